import dataclasses
import inspect
import json
import pathlib
import pickle
import shlex
import subprocess
import sys
import types

import building
import numpy as np
import pytest
import tensorflow_datasets as tfds

from configs import swin_t
from detclipv2_jax import config as config_lib
from detclipv2_jax.data import built
from detclipv2_jax.data.built import read_built
from detclipv2_jax.data.catalog import DATASETS, command_of, dictionary_command
from detclipv2_jax.data.concepts import Vocabulary
from detclipv2_jax.data.schema import Batch, Kind, Record, UnusableError
from detclipv2_jax.data.sources import open_sources
from detclipv2_jax.data.streams import train_streams
from detclipv2_jax.prepare import __main__ as prepare

PRETRAINING = (pathlib.Path(__file__).parents[2] / "docs" / "pretraining.md").read_text()
BUILDERS = {"detection": "coco_json", "grounding": "grounding_json", "image_text": "image_text"}


def build(world: pathlib.Path, kind: str, **options) -> str:
    source = world / ("pairs.tsv" if kind == "image_text" else f"{kind}.json")
    output = str(world / "built" / kind)
    building.build(BUILDERS[kind], input=str(source), output=output, shard_size=3, **options)
    return output


def use_built(config, world):
    for kind in BUILDERS:
        config[kind].data = (build(world, kind),)
        config[kind]["pairs" if kind == "image_text" else "annotations"] = config[kind].images = ""
    return config


def assert_equal(left: Batch, right: Batch):
    for field, a, b in zip(Batch._fields, left, right, strict=True):
        np.testing.assert_array_equal(a, b, err_msg=field)
        assert np.asarray(a).dtype == np.asarray(b).dtype, field


def test_batches_are_those_of_the_raw_files(config, world):
    dictionary = world / "words.tsv"
    dictionary.write_text("cat\ta small pet\nbridge\ta way over water\nzebra\ta striped horse\n")
    config.detection.dictionary = config.grounding.dictionary = str(dictionary)
    raw = train_streams(config)
    built = train_streams(use_built(config, world))
    assert [stream.name for stream in built] == [stream.name for stream in raw]
    for left, right in zip(raw, built, strict=True):
        assert left.capacities == right.capacities
        for n in range(4):
            assert_equal(left.batch(n), right.batch(n))


def test_sources_with_weights_have_streams_of_their_own(config, world):
    section, one = config.detection, train_streams(config)
    section.data, section.max_examples = (build(world, "detection"),), 4
    section.weight, section.source_weights = 2.0, (1.0, 0.25)
    streams = [stream for stream in train_streams(config) if stream.kind is Kind.DETECTION]
    assert [(stream.name, stream.weight) for stream in streams] == [
        ("detection/64x96/0_detection", 2.0),
        ("detection/96x64/0_detection", 2.0),
        ("detection/64x96/1_detection", 0.5),
        ("detection/96x64/1_detection", 0.5),
    ]
    assert sum(stream.num_examples for stream in streams) == 8
    assert {stream.weight for stream in one} == {1.0}
    # the same images in another order
    left, right = streams[0].batch(0), streams[2].batch(0)
    assert set(left.example_id.tolist()) == set(right.example_id.tolist())
    assert not np.array_equal(left.image, right.image)
    for section.source_weights in ((1.0,), (1.0, -0.1)):
        with pytest.raises(
            ValueError, match=r"config.detection.source_weights is .* each of the 2 sources: detection, "
        ):
            train_streams(config)


def test_raw_files_and_several_folders_are_one_stream(config, world):
    folder = build(world, "grounding")
    with config.grounding.ignore_type():
        config.grounding.data = folder  # one folder may be a text
    streams = [stream for stream in train_streams(config) if stream.kind is Kind.GROUNDING]
    assert sum(stream.num_examples for stream in streams) == 14
    with config.grounding.ignore_type():
        config.grounding.data = (folder, folder)
    streams = [stream for stream in train_streams(config) if stream.kind is Kind.GROUNDING]
    assert sum(stream.num_examples for stream in streams) == 21
    config.grounding.max_examples = 2
    streams = [stream for stream in train_streams(config) if stream.kind is Kind.GROUNDING]
    assert sum(stream.num_examples for stream in streams) == 6  # of each source


def test_a_source_travels_to_other_processes(world):
    source = read_built(build(world, "detection"), Kind.DETECTION)
    before = source[3]
    files = [source.file(i) for i in range(len(source))]
    assert [files.count(name) for name in dict.fromkeys(files)] == [3, 3, 1]  # images of a shard
    assert all(pathlib.Path(name).is_file() for name in files)
    copy = pickle.loads(pickle.dumps(source))
    assert copy.describe(3) == source.describe(3)  # before anything was read there
    copy = pickle.loads(pickle.dumps(source))
    assert copy._examples is None  # opened anew there
    assert (copy[3].image, copy[3].concepts, copy.describe(3)) == (before.image, before.concepts, source.describe(3))
    assert len(pickle.dumps(source)) < 5000


def test_records_are_those_that_tfds_reads(world):
    for kind in BUILDERS:
        folder = build(world, kind)
        source = read_built(folder, Kind(kind))
        split = tfds.builder_from_directory(folder).info.splits["train"]
        examples = tfds.builder_from_directory(folder).as_data_source(
            "train", decoders={"image": tfds.decode.SkipDecoding()}
        )
        assert len(examples) == len(source) == 7
        for i, example in enumerate(examples):
            record = source[i]
            assert record.image == example["image"]
            assert record.size == tuple(example["size"])
            np.testing.assert_array_equal(record.boxes, example["boxes"].reshape(-1, 4))
            np.testing.assert_array_equal(record.box_concepts, example["box_concepts"])
            for name in ("concepts", "negatives", "not_negatives"):
                assert getattr(record, name) == tuple(text.decode() for text in example[name])
        files = dict.fromkeys(source.file(i) for i in range(len(source)))
        assert [*files] == [*map(str, split.filepaths)]


def test_reading_imports_neither_tensorflow_nor_tfds(world):
    folder = build(world, "image_text")
    code = (
        "import sys; from detclipv2_jax.data import built, schema; "
        f"print(built.read_built({folder!r}, schema.Kind.IMAGE_TEXT)[0].caption); "
        "assert not {'tensorflow', 'tensorflow_datasets', 'pyarrow'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "a cat and a dog on grass\n"


def test_all_missing_folders_are_listed_with_their_commands(config, world):
    config.detection.data = ("data/objects365",)
    config.grounding.data = ("data/gqa", "data/flickr30k")
    config.image_text.data = (str(world / "mine"),)
    config.image_text.images = "nowhere"
    (world / "mine" / "building").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"config\.detection\.data: data/objects365: it does not exist") as error:
        train_streams(config)
    message = str(error.value)
    for kind, folder in (("coco_json", "objects365"), ("grounding_json", "gqa"), ("grounding_json", "flickr30k")):
        lines = [line for line in message.splitlines() if line.endswith(f"--output=data/{folder}")]
        assert len(lines) == 1
        assert lines[0].strip().startswith(f"python -m detclipv2_jax.prepare {kind} --input=data/raw/")
    assert f"{world / 'mine'}: its build is not finished" in message
    assert "config.image_text.images: the folder nowhere does not exist" in message


def test_a_folder_of_another_kind_is_refused(config, world):
    config.grounding.data = (build(world, "detection"),)
    with pytest.raises(ValueError, match=r"holds detection data; it belongs in config\.detection\.data"):
        train_streams(config)


def test_sizes_of_the_published_sets():
    assert {name: (dataset.num_examples, dataset.num_names) for name, dataset in DATASETS.items()} == {
        "objects365": (660_000, 365), "gqa": (621_000, 0), "flickr30k": (149_000, 0), "cc3m": (3_000_000, 0),
        "cc12m": (10_000_000, 0),
        "imagenet1k": (1_281_167, 1000), "yfcc1m_boxes": (1_000_000, 0), "lvis": (100_170, 1203), "coco": (118_287, 80),
    }  # fmt: skip
    assert command_of("x/gqa", Kind.DETECTION).split()[3] == "coco_json"  # a name of another kind says nothing
    assert [command_of("mine", kind).split()[3] for kind in Kind] == ["coco_json", "grounding_json", "image_text"]


@pytest.mark.parametrize("folder", DATASETS)
def test_commands_of_the_catalog_are_commands(folder):
    dataset = DATASETS[folder]
    words = command_of(f"data/{folder}", dataset.kind).split()
    assert words[:3] == ["python", "-m", "detclipv2_jax.prepare"]
    assert words[3] in prepare.KINDS
    known = {"input", "images", "names", "num_examples", "output"}
    assert {word.removeprefix("--").split("=")[0] for word in words[4:]} <= known


def test_the_command_of_the_dictionary_takes_what_the_papers_configurations_name():
    command = dictionary_command("data/dictionary.tsv")
    words = shlex.split(command, comments=True)
    assert (words[:4], "…" in command) == (["python", "-m", "detclipv2_jax.prepare", "dictionary"], False)
    given = dict(word.removeprefix("--").split("=") for word in words[4:])
    assert set(given) <= set(inspect.signature(prepare.dictionary).parameters)
    config = swin_t.get_config()
    inputs = {config.eval.annotations, *config.detection.data, *config.image_text.data}
    assert set(given["input"].split(",")) == inputs
    assert given["text"] == config.init_from.text
    assert given["output"] == config.detection.dictionary == config.grounding.dictionary == config.eval.dictionary
    row = next(line for line in PRETRAINING.splitlines() if line.startswith("| `data/dictionary.tsv`"))
    assert f"`{shlex.join(words)}`" in row


def test_a_report_without_its_kind_of_vocabulary_is_json(world):
    folder = pathlib.Path(build(world, "image_text"))
    assert json.loads((folder / "vocabulary.json").read_text()) == {"names": [], "definitions": [], "category_ids": []}
    source = read_built(str(folder), Kind.IMAGE_TEXT)
    assert (len(source), source.most_concepts) == (7, 3)
    assert config_lib.base().image_text.max_phrases >= source.most_concepts - 1


def test_only_whole_records_are_examples():
    whole = Record(
        kind=Kind.DETECTION, source="", example_id=0, image=b"x", size=(4, 5), boxes=np.ones((2, 4), np.float32),
        concepts=("cat", "dog"), box_concepts=np.array([1, 0]), caption="",
    )  # fmt: skip
    assert built._is_whole(whole)
    broken = [
        {"size": (4,)}, {"size": (4, 5, 3)}, {"boxes": whole.boxes[:1]}, {"boxes": np.full((2, 4), np.nan)},
        {"box_concepts": np.array([1, 2])}, {"box_concepts": np.array([-1, 0])}, {"concepts": ("cat",)},
    ]  # fmt: skip
    for change in broken:
        assert not built._is_whole(dataclasses.replace(whole, **change))


def test_part_of_a_folder_with_definitions_and_without_categories(world, caplog):
    content = json.loads((world / "detection.json").read_text())
    last, used = content["images"][-1]["id"], {row["category_id"] for row in content["annotations"]}
    more = [{"image_id": last, "category_id": key, "bbox": [1, 1, 9, 9]} for key in used]
    content["annotations"] += more
    content["categories"][0]["def"] = "in its own words"
    (world / "detection.json").write_text(json.dumps(content))
    folder = build(world, "detection")
    whole = read_built(folder, Kind.DETECTION)
    numbers = [len(whole[i].concepts) for i in range(len(whole))]
    assert whole.most_concepts == max(numbers) > max(numbers[:-1])
    names = whole.vocabulary.names
    dictionary = Vocabulary(names, tuple(f"a {name}" for name in names))
    for num in (1, 2, 5):
        part = read_built(folder, Kind.DETECTION, max_examples=num, dictionary=dictionary, dropped=["no such"])
        assert (len(part), part.most_concepts) == (num, max(numbers[:num]))
        own = zip(whole.vocabulary.definitions, names, strict=True)
        assert part.vocabulary.definitions == tuple(definition or f"a {name}" for definition, name in own)
    less = read_built(folder, Kind.DETECTION, dropped=[names[0].replace(" ", "_"), names[2]])
    assert less.vocabulary.names == tuple(name for name in names if name not in (names[0], names[2]))
    assert less.counters["dropped category"] == 2
    for i in range(len(whole)):
        before, after = (
            [(record.concepts[k], *box) for k, box in zip(record.box_concepts, record.boxes.tolist(), strict=True)]
            for record in (whole[i], less[i])
        )
        assert after == [row for row in before if row[0] in less.vocabulary.names]
    assert max(numbers) > len(less[len(less) - 1].concepts) > 1
    with pytest.raises(ValueError, match="has no category beside those that drop_categories names"):
        read_built(folder, Kind.DETECTION, dropped=names)
    section = config_lib.base().detection
    section.data, section.drop_categories = (str(folder),), ("zebra", names[0])
    with pytest.raises(ValueError, match=f"^config: {folder} has no category 'zebra', which drop_categories names"):
        open_sources(Kind.DETECTION, section, prefix="config")
    section.drop_categories = (names[0],)
    (source,) = open_sources(Kind.DETECTION, section, prefix="config")
    assert source.vocabulary.names == tuple(name for name in names if name != names[0])
    report = pathlib.Path(folder, built.REPORT)
    more = {"dropped": {"missing file": 2}, "federated": True, "class names": True}
    more["categories without a box"] = [names[1]]
    report.write_text(json.dumps(json.loads(report.read_text()) | more))
    caplog.clear()
    source = read_built(folder, Kind.DETECTION)
    assert source.counters == {"missing file (when built)": 2}
    assert source.federated is source[0].federated is source.class_names is True
    assert not whole.federated | whole.class_names
    assert f"1 of {len(names)} categories have no box anywhere: '{names[1]}'" in caplog.text
    info = pathlib.Path(folder, built.INFO)
    info.write_text(info.read_text().replace('"array_record"', '"tfrecord"'))
    with pytest.raises(ValueError, match="names the format 'tfrecord'; `prepare` writes array_record"):
        read_built(folder, Kind.DETECTION)
    phrases = read_built(build(world, "grounding"), Kind.GROUNDING, dictionary=dictionary)
    assert set(phrases.vocabulary.definitions) == {""}  # a definition is no part of a phrase


@pytest.mark.parametrize(("num", "looked_at"), [(1, [0]), (2, [0, 1]), (3, [0, 1, 2]), (10, [0, 4, 9])])
def test_examples_from_the_first_to_the_last_are_asked_for_absent_names(num, looked_at, monkeypatch):
    monkeypatch.setattr(built, "_NUM_LOOKED_AT", 3)
    source = object.__new__(built.BuiltSource)  # without files
    source.sizes, asked = np.zeros((num, 2)), []

    def record(index, **lists):
        asked.append(index)
        if index == 0 and num > 1:
            raise UnusableError("damaged")
        return types.SimpleNamespace(**{"negatives": (), "not_negatives": ()} | lists)

    monkeypatch.setattr(source, "_record", record)
    assert not source._lists_absent()
    assert asked == looked_at
    for name in ("negatives", "not_negatives"):
        lists = {name: ("cat",)}
        monkeypatch.setattr(source, "_record", lambda i, lists=lists: record(i, **lists if i == num - 1 else {}))
        assert source._lists_absent()


def test_folders_that_are_not_built_are_listed_with_the_command(tmp_path):
    (tmp_path / "half").mkdir()
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole" / built.REPORT).write_text("{}")
    folders = tuple(str(tmp_path / name) for name in ("half", "whole", "none"))
    half, none = built.missing_folders(folders, Kind.DETECTION, prefix="config.detection")
    assert half.startswith(f"config.detection.data: {folders[0]}: its build is not finished; build it with")
    assert none.startswith(f"config.detection.data: {folders[2]}: it does not exist; build it with")
    assert "python -m detclipv2_jax.prepare" in none
