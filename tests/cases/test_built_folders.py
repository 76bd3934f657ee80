"""Built folders from strangers: they run no code and reach no other file, and damage is one error."""

import io
import json
import os
import pathlib
import shutil
import sys

import building
import numpy as np
import pytest

from detclipv2_jax.data import scenes
from detclipv2_jax.data.built import read_built
from detclipv2_jax.data.schema import Kind, UnusableError
from detclipv2_jax.prepare import inspect, shards


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    scenes.write(folder, num_detection=6, num_grounding=0, num_image_text=6, num_eval=0, size_px=64)
    building.build("coco_json", input=str(folder / "detection.json"), images=str(folder), output=str(folder / "boxes"))
    building.build("image_text", input=str(folder / "pairs.tsv"), images=str(folder), output=str(folder / "pairs"))
    return folder


@pytest.fixture
def folder(built, tmp_path):
    """A copy of a built folder of detection, and a module that makes a file when it is imported."""
    shutil.copytree(built / "boxes", tmp_path / "boxes")
    (tmp_path / "trap").mkdir()
    sprung = f"open({str(tmp_path / 'sprung')!r}, 'w').close()\n"
    (tmp_path / "trap" / "trap_module.py").write_text(sprung + "class Feature: pass\n")
    return tmp_path / "boxes"


def change(path, edit):
    content = json.loads(path.read_text())
    path.write_text(json.dumps(edit(content) or content))


def set_class(name, key="pythonClassName"):
    def edit(content):
        content["featuresDict"]["features"]["name"].pop("pythonClassName")
        content["featuresDict"]["features"]["name"][key] = name

    return edit


TRAPS = {
    "class": set_class("trap_module.Feature"),
    "class by the other name of the field": set_class("trap_module.Feature", "python_class_name"),
    "class of the whole": lambda content: content.update(pythonClassName="trap_module.Feature"),
    "class of an unknown feature": lambda content: content["featuresDict"]["features"].update(
        more={"pythonClassName": "trap_module.Feature", "text": {}}
    ),
    "class of a part": lambda content: content["featuresDict"]["features"]["concepts"]["sequence"].update(
        feature={"pythonClassName": "trap_module.Feature", "text": {}}
    ),
    "the old form": lambda content: {"type": "trap_module.Feature", "content": {}},
    "the old form within": lambda content: content["featuresDict"]["features"].update(
        name={"type": "trap_module.Feature", "content": {}}
    ),
    "a class of TFDS that is not ours": set_class("tensorflow_datasets.core.features.dataset_feature.Dataset"),
    "a list of classes": set_class(["trap_module.Feature"]),
    "no class": set_class(None),
}


@pytest.mark.parametrize("trap", TRAPS)
def test_a_built_folder_imports_nothing(folder, monkeypatch, trap):
    monkeypatch.syspath_prepend(folder.parent / "trap")
    change(folder / "features.json", TRAPS[trap])
    with pytest.raises(ValueError, match=r"features\.json (names the class|has the key)"):
        read_built(str(folder), Kind.DETECTION)
    assert not (folder.parent / "sprung").exists()
    assert "trap_module" not in sys.modules


@pytest.mark.parametrize("name", ["features.json", "dataset_info.json"])
def test_a_key_that_stands_twice_is_an_error(folder, name):
    text = (folder / name).read_text()
    (folder / name).write_text(
        "{" + '"pythonClassName": "trap_module.Feature", "fileFormat": "tfrecord",' + text.lstrip()[1:]
    )
    with pytest.raises(ValueError, match=rf"{name} is no valid json: an object has a key twice"):
        read_built(str(folder), Kind.DETECTION)


def test_the_trap_works(folder, monkeypatch):
    import tensorflow_datasets as tfds

    monkeypatch.syspath_prepend(folder.parent / "trap")
    change(folder / "features.json", set_class("trap_module.Feature"))
    with pytest.raises(ValueError, match="trap_module"):
        tfds.builder_from_directory(folder)
    assert (folder.parent / "sprung").exists()
    del sys.modules["trap_module"]


def test_a_folder_that_changes_after_it_was_opened_imports_nothing(folder, monkeypatch):
    source = read_built(str(folder), Kind.DETECTION)
    monkeypatch.syspath_prepend(folder.parent / "trap")
    change(folder / "features.json", set_class("trap_module.Feature"))
    with pytest.raises(ValueError, match="names the class"):
        source[0]
    assert not (folder.parent / "sprung").exists()


def flipped(place, value):
    """Returns a change of a byte in the last entry of a zip's directory."""

    def change(data, _):
        at = data.rindex(b"PK\x01\x02") + place
        return data[:at] + bytes([value]) + data[at + 1 :]

    return change


def stored(save=np.savez, **changes):
    def change(_, arrays):
        buffer = io.BytesIO()
        save(buffer, **(arrays | changes))
        return buffer.getvalue()

    return change


INDICES = {
    "unknown compression": flipped(10, 197),
    "bzip2 that is none": flipped(10, 12),
    "LZMA that is none": flipped(10, 14),
    "encrypted": flipped(8, 1),
    "another version": flipped(6, 250),
    "compressed, of any size": stored(np.savez_compressed),
    "objects": stored(num_concepts=np.array([1, None, 2, 3, 4, 5], object)),
    "texts": stored(num_concepts=np.array(list("123456"))),
    "sizes of three": stored(sizes=np.ones((6, 3), np.int32)),
    "sizes of fewer": stored(sizes=np.ones((3, 2), np.int32)),
    "sizes that are no whole numbers": stored(sizes=np.full((6, 2), np.nan)),
    "a number": stored(num_concepts=np.int32(4)),
    "nothing": stored(sizes=np.zeros((0, 2), np.int32), num_concepts=np.zeros(0, np.int32)),
    "one array": lambda data, arrays: data[: data.index(b"PK", 4)],
    "a petabyte": lambda data, _: data.replace(b"'shape': (6, 2), }", b"'shape': (1<<49,)}"),
    "a terabyte": lambda data, _: data.replace(b"'shape': (6, 2), }    ", b"'shape': (99999999999,)}"),
}  # fmt: skip


@pytest.mark.parametrize("name", INDICES)
def test_a_damaged_index_is_one_error(folder, name):
    path = folder / "index.npz"
    with np.load(path) as arrays:
        changed = INDICES[name](path.read_bytes(), dict(arrays))
    assert changed != path.read_bytes()
    path.write_bytes(changed)
    with pytest.raises(ValueError, match=r"index\.npz .*build the folder again"):
        read_built(str(folder), Kind.DETECTION)


@pytest.mark.parametrize(
    "name", ["/etc/{DATASET}-{SPLIT}", "../x/{SPLIT}.{SHARD_X_OF_Y}", "gs://bucket/{SPLIT}", "{DATASET}-{SPLIT}"]
)
@pytest.mark.parametrize("key", ["filepathTemplate", "filepath_template"])
def test_a_built_folder_reaches_no_other_file(folder, name, key):
    change(folder / "dataset_info.json", lambda content: content["splits"][0].update({key: name}))
    with pytest.raises(ValueError, match="files outside of the folder"):
        read_built(str(folder), Kind.DETECTION)


def test_a_name_reaches_no_other_file_and_lengths_are_numbers(folder):
    change(folder / "dataset_info.json", lambda content: content.update(name="../boxes/detclipv2_coco_json"))
    with pytest.raises(ValueError, match="files outside of the folder"):
        read_built(str(folder), Kind.DETECTION)
    for lengths in ([], ["-1"], ["6", None], "6", ["9" * 5000], [6.0], None):
        change(folder / "dataset_info.json", lambda content: content["splits"][0].update(shardLengths=lengths))  # noqa: B023
        with pytest.raises(ValueError, match="has no split train with the lengths of its shards"):
            read_built(str(folder), Kind.DETECTION)


@pytest.mark.parametrize(
    "name", ["features.json", "dataset_info.json", "build_report.json", "vocabulary.json", "index.npz"]
)
@pytest.mark.parametrize("data", [b"", b"[]", b"null", b"{}", b"\xff\xfe{", b"[" * 50_000, b'"text"', None])
def test_a_damaged_file_is_one_error(folder, name, data):
    if data is None:
        data = (folder / name).read_bytes()[:-40]
    (folder / name).write_bytes(data)
    with pytest.raises(ValueError, match=r"boxes"):
        read_built(str(folder), Kind.DETECTION)


def write_records(folder, edit):
    """Writes the records of a built folder anew, changed."""
    from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
    from tensorflow_datasets.proto import tf_example_pb2

    (path,) = folder.glob("*array_record*")
    reader = ArrayRecordReader(str(path))
    records = [tf_example_pb2.Example.FromString(record) for record in reader.read_all()]
    reader.close()
    path.unlink()
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        edit(record.features.feature)
        writer.write(record.SerializeToString())
    writer.close()


RECORDS = {
    "half a box": lambda record: record["boxes"].float_list.value.append(1.0),
    "box that is not finite": lambda record: record["boxes"].float_list.value.__setitem__(0, float("nan")),
    "concept that is not there": lambda record: record["box_concepts"].int64_list.value.__setitem__(0, 99),
    "negative concept": lambda record: record["box_concepts"].int64_list.value.__setitem__(0, -1),
    "concept beyond 32 bits": lambda record: record["box_concepts"].int64_list.value.__setitem__(0, 1 << 40),
    "no size": lambda record: record["size"].int64_list.ClearField("value"),
    "no UTF-8": lambda record: record["concepts"].bytes_list.value.__setitem__(0, b"\xff"),
    "no caption": lambda record: record["caption"].bytes_list.ClearField("value"),
}


@pytest.mark.parametrize("edit", RECORDS)
def test_a_record_that_is_no_example_is_counted(folder, edit):
    write_records(folder, RECORDS[edit])
    with pytest.raises(UnusableError, match="record that is no example in"):
        read_built(str(folder), Kind.DETECTION)[0]


def test_pairs_without_a_concept_are_counted(built, tmp_path):
    shutil.copytree(built / "pairs", tmp_path / "pairs")
    write_records(tmp_path / "pairs", lambda record: record["concepts"].bytes_list.ClearField("value"))
    with pytest.raises(UnusableError, match="record that is no example in"):
        read_built(str(tmp_path / "pairs"), Kind.IMAGE_TEXT)[0]


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path)])
def test_what_is_no_file_is_not_opened(folder, make):
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        path.unlink()
        make(path)
        with pytest.raises((OSError, ValueError), match=rf"{path.name} is not a regular file"):
            read_built(str(folder), Kind.DETECTION)[0]
        (path.rmdir if path.is_dir() else path.unlink)()
        path.write_bytes(data)
    assert len(read_built(str(folder), Kind.DETECTION)[0].boxes)


@pytest.mark.parametrize("data", [b"{}", b"[]", b'{"kind": ["detection"]}', b'{"kind": "boxes"}'])
def test_inspect_refuses_a_damaged_report(folder, tmp_path, data):
    (folder / "build_report.json").write_bytes(data)
    with pytest.raises(ValueError, match="does not say which kind of data the folder holds"):
        inspect.inspect(str(tmp_path / "out"), folders=[str(folder)])


def test_what_is_not_changed_is_read(built):
    source = read_built(str(built / "boxes"), Kind.DETECTION)
    assert [len(source[i].boxes) > 0 for i in range(len(source))] == [True] * 6
    assert np.array_equal(source.sizes, np.full((6, 2), 64))
    assert pathlib.Path(source.file(0)).is_file()


@pytest.mark.parametrize("name", ["plan.json", "000000.json", "000001.index.json"])
def test_what_an_unfinished_build_left_is_used_or_one_error_that_names_it(built, tmp_path, monkeypatch, name):
    options = {"input": str(built / "detection.json"), "images": str(built), "output": str(tmp_path / "out")}

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shards, "_write_metadata", stop)
        with pytest.raises(KeyboardInterrupt):
            building.build("coco_json", **options, shard_size=3)
    path = tmp_path / "out" / "building" / name
    whole = path.read_bytes()
    for data in (
        b"",
        b"[]",
        b"{",
        b'{"x": 1}',
        b'"x"',
        b"[[1]]",
        b"\xff\xfe",
        b"null",
        whole[:-3],
        b"[[1e99, 1, 1, 1]]",
    ):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=rf"{tmp_path}/out\S* (is|holds)"):
            building.build("coco_json", **options, shard_size=3)
    path.write_bytes(whole)
    assert building.build("coco_json", **options, shard_size=3)["examples"] == 6
