"""Mutated archives, photos, built folders and workdirs; as in test_fuzzing.py, input i is a pure function of i."""

import bz2
import collections
import contextlib
import gzip
import io
import json
import lzma
import pathlib
import pickle
import re
import shutil

import building
import numpy as np
import pytest
import test_fuzzing
from micro import micro_config
from PIL import Image
from test_fuzzing import NUM_INPUTS, fuzz, mutated_bytes, mutated_json

from detclipv2_jax import config as config_lib
from detclipv2_jax import config_json, files
from detclipv2_jax.data import checks, scenes, transforms
from detclipv2_jax.data.built import check_metadata, read_built
from detclipv2_jax.data.schema import Kind, UnusableError
from detclipv2_jax.eval import grounding
from detclipv2_jax.prepare import image_text
from detclipv2_jax.prepare.record_builder import Tally


@pytest.mark.parametrize(("suffix", "pack"), [("gz", gzip.compress), ("bz2", bz2.compress), ("xz", lzma.compress)])
def test_compressed_tar(tmp_path, suffix, pack):
    whole = test_fuzzing.tar_bytes()

    def one(rng):
        data = mutated_bytes(whole, rng) if rng.random() < 0.5 else whole
        at = rng.randrange(len(data))
        packed = b"".join(map(pack, (data[:at], data[at:])))
        changed = mutated_bytes(packed, rng) if rng.random() < 0.7 else packed
        (tmp_path / f"0.tar.{suffix}").write_bytes(changed)
        reader = image_text.open_reader(str(tmp_path), "", shard_size=10, pipeline="", max_phrases=8)
        tally = Tally()
        pairs = list(reader.pairs(0, tally))
        assert all(pair.caption.strip() for pair in pairs)
        assert tally.seen >= len(pairs) + sum(tally.dropped.values())
        if data == whole and changed != packed:  # checksums tell of every change that could lose or change a pair
            same = [(pair.image, pair.caption) for pair in pairs] == [(b"image", "a cat"), (b"image", "a")]
            assert same or tally.dropped["tar cut or damaged"]

    assert fuzz(one, errors=()) == NUM_INPUTS  # whatever is in a tar is counted


def encoded(file_format, **options):
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (9, 13, 3), np.uint8)
    Image.fromarray(pixels).save(buffer, file_format, **options)
    return buffer.getvalue()


PHOTOS = [encoded(name) for name in ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "AVIF")]
PHOTOS += [encoded("TIFF", big_tiff=True, tiffinfo={274: 6}), encoded("JPEG", progressive=True)]


def test_photos():
    def one(rng):
        out = np.zeros((32, 32, 3), np.uint8)
        data = mutated_bytes(rng.choice(PHOTOS), rng)
        extent, _ = transforms.place(data, out, annotated_size=(0, 0), short_side=32, long_side=32)
        assert not out[extent[0] :].any()

    assert fuzz(one, errors=(UnusableError,)) > NUM_INPUTS // 20


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    scenes.write(folder, num_detection=4, num_grounding=0, num_image_text=0, num_eval=0, size_px=64)
    building.build("coco_json", input=str(folder / "detection.json"), images=str(folder), output=str(folder / "built"))
    return folder / "built"


@pytest.mark.parametrize("name", ["features.json", "dataset_info.json"])
def test_metadata_of_built_folders(built, tmp_path, name):
    shutil.copytree(built, tmp_path / "built")
    content = json.loads((built / name).read_text())

    def one(rng):
        (tmp_path / "built" / name).write_bytes(mutated_json(content, rng))
        check_metadata(tmp_path / "built")
        if name == "features.json":  # what TFDS would import
            text = (tmp_path / "built" / name).read_text(encoding="utf-8-sig")
            named = re.findall(r'"(?:pythonClassName|python_class_name|type)"\s*:\s*"([^"]*)"', text)
            assert all(part.startswith("tensorflow_datasets.core.features.") for part in named)

    fuzz(one, errors=(ValueError,))


@pytest.mark.parametrize("name", ["build_report.json", "vocabulary.json", "index.npz"])
def test_files_of_built_folders(built, tmp_path, name):
    shutil.copytree(built, tmp_path / "built")
    data = (built / name).read_bytes()

    def one(rng):
        changed = mutated_bytes(data, rng) if name.endswith("npz") else mutated_json(json.loads(data), rng)
        (tmp_path / "built" / name).write_bytes(changed)
        source = read_built(str(tmp_path / "built"), Kind.DETECTION)
        assert source.sizes.ndim == 2

    fuzz(one, errors=(ValueError,))


@pytest.mark.parametrize("whole_file", [True, False])
def test_records_of_built_folders(built, tmp_path, whole_file):
    """Shards with changed bytes, and records that a shard holds as whole ones."""
    shutil.copytree(built, tmp_path / "built")
    source = read_built(str(tmp_path / "built"), Kind.DETECTION)
    (path,) = map(pathlib.Path, {source.file(i) for i in range(len(source)) if source[i]})
    data, num = path.read_bytes(), len(source)
    records = [bytes(source._examples[i]) for i in range(num)]

    def one(rng):
        if whole_file:
            path.write_bytes(mutated_bytes(data, rng))
            opened = read_built(str(tmp_path / "built"), Kind.DETECTION)
        else:
            opened = source
            opened._examples = [mutated_bytes(record, rng) if rng.random() < 0.8 else record for record in records]
        num_read = 0
        for i in range(num):
            with contextlib.suppress(UnusableError):
                record = opened[i]
                assert np.isfinite(record.boxes).all()
                assert {*record.box_concepts.tolist()} <= {*range(len(record.concepts))}
                num_read += 1
        if not num_read:
            raise UnusableError("nothing of it")

    assert fuzz(one, errors=(UnusableError,)) > NUM_INPUTS // 50


def test_config_json():
    content = json.loads(config_json.to_json(micro_config()))

    def one(rng):
        text = files.decode(mutated_json(content, rng), where="config.json")
        config = config_json.from_json(text, where="config.json")
        again = config_json.from_json(config_json.to_json(config))
        assert config_json.to_json(again) == config_json.to_json(config)
        assert {*config_lib.flat(config_lib.base())} <= {*config_lib.flat(config)}

    assert fuzz(one, errors=(ValueError,)) > NUM_INPUTS // 50


def test_json_lines(tmp_path):
    text = b"".join(b'{"step": %d, "loss": 1.5}\n' % step for step in range(20))

    def one(rng):
        (tmp_path / "metrics.jsonl").write_bytes(mutated_bytes(text, rng))
        rows, num_other = files.read_json_lines(tmp_path / "metrics.jsonl")
        assert len(rows) + num_other <= 40
        assert all(isinstance(row, dict) for row in rows)

    assert fuzz(one, errors=()) == NUM_INPUTS


def test_file_names():
    alphabet = 'ab/\\.: \0\n\u202eé\ud800*?"<>|-CON'

    def one(rng):
        name = "".join(rng.choices(alphabet, k=rng.choice([0, 1, 3, 10, 300])))
        safe = files.safe_name(name)
        assert safe not in ("", ".", "..")
        assert not set(safe) & set('/\\\0\n:*?"<>|')
        assert len(safe.encode()) <= 120
        with contextlib.suppress(UnicodeEncodeError):
            assert safe == name or not name.encode().endswith(safe.encode())

    assert fuzz(one, errors=()) == NUM_INPUTS


ENTITIES = {
    "val.txt": b"1\n2\n",
    "Sentences/1.txt": b"[/EN#1/people Two people] wait in [/EN#3/scene/other a station] .\n",
    "Annotations/1.xml": b"<annotation><object><name>1</name><name>3</name><bndbox><xmin>1</xmin><ymin>2</ymin>"
    b"<xmax>30</xmax><ymax>40</ymax></bndbox></object></annotation>",
}


def usable(folder, *, task, split):
    for query in grounding.read_any(folder, task=task, split=split, max_bad_share=0.0, odd=collections.Counter()):
        assert query.text.strip()
        assert np.isfinite(query.boxes).all()
        assert (query.boxes[:, 2:] > 0).all()
        assert not checks.unsafe_path(query.file)


@pytest.mark.parametrize("name", ENTITIES)
def test_flickr30k_entities(tmp_path, name):
    for other, content in ENTITIES.items():
        for place in (tmp_path / other, tmp_path / other.replace("1", "2")):
            place.parent.mkdir(exist_ok=True)
            place.write_bytes(content)

    def one(rng):
        content = ENTITIES[name] if rng.random() < 0.1 else mutated_bytes(ENTITIES[name], rng)
        (tmp_path / name).write_bytes(content)
        usable(str(tmp_path), task="phrases", split="val")

    assert fuzz(one, errors=(ValueError,)) > NUM_INPUTS // 50


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_refcoco(tmp_path, protocol):
    refs = [
        {"ref_id": i, "ann_id": 7 + i, "image_id": 5, "split": "val", "sentences": [{"sent": f"caf\xe9 {i}"}]}
        for i in range(3)
    ]
    annotations = [{"id": 7 + i, "image_id": 5, "bbox": [i, 2, 10, 20.5]} for i in range(3)]
    content = {"images": [{"id": 5, "file_name": "a/5.jpg"}], "annotations": annotations}

    def one(rng):
        data, text = pickle.dumps(refs, protocol), json.dumps(content).encode()
        if rng.random() < 0.7:
            data = mutated_bytes(data, rng)
        else:
            text = mutated_json(content, rng)
        (tmp_path / "refs.p").write_bytes(data)
        (tmp_path / "instances.json").write_bytes(text)
        usable(str(tmp_path / "refs.p"), task="referring", split="val")

    assert fuzz(one, errors=(ValueError,)) > NUM_INPUTS // 50
