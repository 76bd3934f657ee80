"""Mutated files and command lines end in success or in a documented error, in bounded time and memory.

Input i of a format is a pure function of i, so that what fails is found again by its number. 300 of each; all 10,000
with EXHAUSTIVE=1.
"""

import collections
import contextlib
import copy
import io
import json
import os
import pathlib
import random
import resource
import signal
import sys
import tarfile

import numpy as np
import pytest
from absl import flags
from ml_collections import config_flags

from configs import demo
from detclipv2_jax import config as config_lib
from detclipv2_jax import config_json, validation
from detclipv2_jax.data import box_json, canvases, sources, tokenizer, truth
from detclipv2_jax.data.concepts import read_dictionary
from detclipv2_jax.data.schema import UnusableError
from detclipv2_jax.eval import coco, grounding, lvis
from detclipv2_jax.eval.result import Parts, Rows
from detclipv2_jax.prepare import image_text
from detclipv2_jax.prepare.record_builder import Tally

NUM_INPUTS = 10_000 if os.environ.get("EXHAUSTIVE") else 300
MAX_SECONDS = 10  # an input
MAX_BYTES = 300 << 20  # that the process may grow by while it reads them all
JUNK = (
    None, True, -1, 0, 1e308, -1e308, 2**70, 1.5, float("nan"), float("inf"), "", "x", "../../etc/passwd", "a/../b",
    "\0", "/etc/passwd", "\ud800", "é" * 50, [], {}, [[]], [None], [1, 2, 3, 4], [0, 0, 0, 0], {"id": 1}, "1", [[0, 3]],
    [[3, 0]], [[-5, 1e9]], [["a", None]],
)  # fmt: skip


def image(number):
    return {"id": number, "file_name": f"{number}.jpg", "height": 40, "width": 60, "caption": "a cat and a red dog"}


IMAGES = [image(number) for number in range(4)]
BOXES = [{"id": i, "image_id": i % 4, "category_id": 1 + i % 2, "bbox": [1, 2, 20, 10], "iscrowd": 0} for i in range(6)]
CATEGORIES = [{"id": 1, "name": "cat", "def": "an animal"}, {"id": 2, "name": "dog"}]
DETECTION = {"images": [{**i, "neg_category_ids": [2]} for i in IMAGES], "annotations": BOXES, "categories": CATEGORIES}
GROUNDING = {"images": IMAGES, "annotations": [{**box, "tokens_positive": [[0, 5], [10, 13]]} for box in BOXES]}
PAIRS = "".join(f'{i}.jpg\ta cat and a red dog é {i}\t["a cat", "a red dog"]\n' for i in range(4))


def tar_bytes():
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in (
            ("0.jpg", b"image"),
            ("0.txt", b"a cat"),
            ("1.png", b"image"),
            ("1.json", b'{"caption": "a"}'),
        ):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def nodes(tree, path=()):
    """Yields the path of everything in a JSON value."""
    yield path
    for key in tree if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ():
        yield from nodes(tree[key], (*path, key))


def mutated_json(content, rng):
    """Returns JSON text with one to three values replaced, or bytes changed."""
    content = json.loads(json.dumps(content))
    for _ in range(rng.randint(1, 3)):
        places = [path for path in nodes(content) if path]
        if not places:  # nothing is left to change
            break
        *path, last = rng.choice(places)
        parent = content
        for key in path:
            parent = parent[key]
        if rng.random() < 0.2:
            del parent[last]
        else:
            parent[last] = copy.deepcopy(rng.choice(JUNK))  # a later change may fall into it
    text = json.dumps(content).encode()
    return mutated_bytes(text, rng) if rng.random() < 0.2 else text


def mutated_bytes(data, rng):
    """Returns bytes with some flipped, cut, repeated or put in."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 8)):
        at = rng.randrange(len(data) + 1)
        match rng.randrange(4):
            case 0 if at < len(data):
                data[at] = rng.randrange(256)
            case 1:
                data[at:at] = rng.choice(
                    [b"\t", b"\n", b"\r", b"\0", b"\xff", b'"', b"[" * 3000, b"{}", b"9" * 400, b"/", b"\\u"]
                )
            case 2:
                del data[at : at + rng.randrange(1, 40)]
            case _:
                data[at:at] = data[at : at + rng.randrange(1, 100)]
    return bytes(data)


@contextlib.contextmanager
def bounded(number):
    """Fails where an input takes too long, naming it."""

    def late(*_):
        raise TimeoutError(f"input {number} took more than {MAX_SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(MAX_SECONDS)
    try:
        yield
    except Exception as error:
        error.add_note(f"input {number}")
        raise
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def fuzz(read, *, errors):
    """Calls `read(rng)` for every input; returns how many ended in success."""
    num_read, before = 0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(NUM_INPUTS):
        with bounded(number), contextlib.suppress(*errors):
            read(random.Random(number))
            num_read += 1
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10 < MAX_BYTES
    return num_read


@pytest.fixture
def folder(tmp_path):
    for number in range(4):
        (tmp_path / f"{number}.jpg").write_bytes(b"not decoded here")
    return tmp_path


@pytest.mark.parametrize(
    ("content", "read"), [(DETECTION, box_json.read_detection), (GROUNDING, box_json.read_grounding)]
)
def test_annotation_json(folder, content, read):
    def one(rng):
        (folder / "annotations.json").write_bytes(mutated_json(content, rng))
        source = read(str(folder / "annotations.json"), str(folder), max_bad_share=rng.choice([0.0, 1.0]))
        canvases.fill_sizes(source)
        for i in range(len(source)):
            with contextlib.suppress(UnusableError):
                record = source[i]
                assert np.isfinite(record.boxes).all()
                assert len(record.boxes) == len(record.box_concepts)
                assert pathlib.Path(os.path.normpath(record.image)).is_relative_to(folder)

    assert fuzz(one, errors=(ValueError,)) > NUM_INPUTS // 10


@pytest.mark.parametrize("federated", [False, True])
def test_truth_and_detections(tmp_path, federated):
    content = DETECTION if federated else DETECTION | {"images": IMAGES}
    outline = {"segmentation": [[1, 2, 21, 2, 21, 12]]}
    content = content | {"annotations": [box | outline | {"area": 90.5, "ignore": 0} for box in BOXES]}
    rows = [{key: box[key] for key in ("image_id", "category_id", "bbox")} | {"score": 0.5} for box in BOXES]
    paths = tmp_path / "truth.json", tmp_path / "found.json"

    def one(rng):
        which = rng.randrange(2)
        for i, (path, value) in enumerate(zip(paths, (content, rows), strict=True)):
            path.write_bytes(mutated_json(value, rng) if i == which else json.dumps(value).encode())
        known = truth.read(paths[0], max_bad_share=rng.choice([0.0, 0.5, 1.0]))
        scores = [module.evaluate(known, paths[1])["AP"] for module in (coco, lvis)]
        assert all(score == -1 or 0 <= score < 1.001 for score in scores)
        assert federated or scores[0] == pytest.approx(scores[1], abs=1e-9)

    assert fuzz(one, errors=(ValueError,)) > NUM_INPUTS // 10


@pytest.mark.parametrize("task", ["phrases", "referring"])
def test_grounding_queries(tmp_path, task):
    path = tmp_path / "grounding.json"

    def one(rng):
        path.write_bytes(mutated_json(GROUNDING, rng))
        odd = collections.Counter()
        queries = grounding.read_queries(str(path), task=task, max_bad_share=rng.choice([0.0, 1.0]), odd=odd)
        for query in queries:
            assert query.text.strip()
            assert np.isfinite(query.boxes).all()
            assert (query.boxes[:, 2:] > 0).all()

    assert fuzz(one, errors=(ValueError,)) > NUM_INPUTS // 10


def test_partial_files(tmp_path):
    """What an evaluation left is as it was written or is not used, wherever and however it was changed."""
    parts = Parts(tmp_path, fingerprint={})
    ids = np.arange(5)
    parts.add(Rows(ids, ids, np.ones((5, 4), np.float32), np.linspace(1, 0, 5, dtype=np.float32)))
    parts.write()
    (path,) = tmp_path.rglob("*.rows")
    whole = path.read_bytes()

    def one(rng):
        changed = bytearray(whole)
        if rng.random() < 0.5:
            changed[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        else:
            changed = mutated_bytes(whole, rng)
        path.write_bytes(changed)
        assert Parts(tmp_path, fingerprint={}).done == int(changed == whole)

    assert fuzz(one, errors=()) == NUM_INPUTS


def test_tsv(folder):
    def one(rng):
        (folder / "pairs.tsv").write_bytes(mutated_bytes(PAIRS.encode(), rng))
        source = sources.read_pairs(str(folder / "pairs.tsv"), str(folder), max_bad_share=rng.choice([0.0, 1.0]))
        for i in range(len(source)):
            with contextlib.suppress(UnusableError):
                record = source[i]
                assert record.concepts[0] == record.caption != ""
                assert pathlib.Path(os.path.normpath(record.image)).is_relative_to(folder)
        read_dictionary(str(folder / "pairs.tsv"))

    assert fuzz(one, errors=(ValueError,)) > NUM_INPUTS // 10


def test_tar(folder):
    def one(rng):
        (folder / "0.tar").write_bytes(mutated_bytes(tar_bytes(), rng))
        reader = image_text.open_reader(str(folder), "", shard_size=10, pipeline="", max_phrases=8)
        tally = Tally()
        for pair in reader.pairs(0, tally):
            assert pair.caption.strip()
        assert tally.seen >= sum(tally.dropped.values())

    assert fuzz(one, errors=(ValueError,)) == NUM_INPUTS  # whatever is in a tar is counted


def test_tokenizer():
    alphabet = [
        "a",
        " ",
        "\0",
        "é",
        "e\u0301",
        "\u200d",
        "😀",
        "ß",
        "İ",
        "\ud800",
        "中",
        "'s",
        "<|endoftext|>",
        "&amp;",
        "\n",
    ]

    def one(rng):
        texts = ["".join(rng.choices(alphabet, k=rng.choice([0, 1, 10, 200]))) for _ in range(3)]
        tokens = tokenizer.tokenize(texts, max_length=16)
        assert tokens.shape == (3, 16)
        assert tokens.dtype == np.int32
        assert ((tokens >= 0) & (tokens < 49_408)).all()
        assert (tokens[:, 0] == 49_406).all()
        assert (tokens == 49_407).any(axis=1).all()

    assert fuzz(one, errors=()) == NUM_INPUTS


def parsed(overrides):
    """Returns the configuration of the demo after overrides."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["main", *overrides])  # where ml_collections looks for them
        values = flags.FlagValues()
        config_flags.DEFINE_config_dict("config", demo.get_config(), flag_values=values)
        values(sys.argv)
        return values.config


def test_config_overrides():
    defaults = config_lib.flat(config_lib.base())
    keys = list(defaults)
    values = [
        "", "0", "-1", "1e400", "nan", "None", "()", "(1,)", "((1, 2), 3)", "'x'", "x", "True", "[", "((64, 64),)",
        "{}", "(64, 64)", "('a', 'b')", "__import__('os').system('false')", "9" * 50, "1.5", "((('a',),),)", "\0",
        "(0.5, 0.25)",
    ]  # fmt: skip

    def one(rng):
        overrides = []
        for _ in range(rng.randint(1, 3)):
            key = rng.choice(keys)
            if rng.random() < 0.1:
                key = key[: rng.randrange(len(key))] + rng.choice(["", ".", "x"])
            value = defaults.get(key, "") if rng.random() < 0.3 else rng.choice(values)
            overrides.append(f"--config.{key}={value}")
        try:
            config = parsed(overrides)
        except (
            AttributeError,
            KeyError,
            TypeError,
            flags.Error,
        ) as error:  # put into one line by `commands`
            raise ValueError(str(error)) from error
        validation.validate(config, num_devices=8)
        assert config_json.to_json(config_json.from_json(config_json.to_json(config))) == config_json.to_json(config)

    assert fuzz(one, errors=(ValueError,)) > NUM_INPUTS // 10
