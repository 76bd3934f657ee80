import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import types
from collections import Counter

import building
import numpy as np
import pytest
import tensorflow_datasets as tfds
from raw_files import jpeg, write_coco

from detclipv2_jax.data.built import read_built
from detclipv2_jax.data.schema import Kind, Record, UnusableError
from detclipv2_jax.prepare import __main__ as prepare
from detclipv2_jax.prepare import box_json, record_builder, shards
from detclipv2_jax.prepare.record_builder import Tally

ROOT = pathlib.Path(__file__).parents[2]


def build(source, output, **options):
    return building.build("coco_json", input=str(source), output=str(output), **{"shard_size": 2} | options)


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "build_report.json"}


def test_a_build_is_read_by_tfds_alone(tmp_path):
    build(write_coco(tmp_path / "raw"), tmp_path / "out")
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == [
        "build_report.json",
        "dataset_info.json",
        *(f"detclipv2_coco_json-train.array_record-{i:05d}-of-00003" for i in range(3)),
        "features.json",
        "index.npz",
        "vocabulary.json",
    ]
    examples = tfds.builder_from_directory(tmp_path / "out").as_data_source("train")
    assert len(examples) == 6
    example = examples[1]
    assert example["image"].shape == (24, 32, 3)
    assert example["concepts"] == [b"thing 1", b"thing 2"]
    np.testing.assert_array_equal(example["boxes"], [[1, 2, 7, 8], [2, 2, 9, 8]])
    np.testing.assert_array_equal(example["box_concepts"], [0, 1])
    np.testing.assert_array_equal(example["size"], [24, 32])
    assert example["name"] == b"000000000001.jpg"


def test_writing_shards_needs_neither_tensorflow_nor_jax(tmp_path):
    source, output = write_coco(tmp_path / "raw"), tmp_path / "out"
    code = (
        "import sys, building; building.build('coco_json', input=sys.argv[1], output=sys.argv[2], shard_size=2); "
        "print(sorted({'tensorflow', 'jax', 'flax', 'torch', 'spacy'} & set(sys.modules)))"
    )
    paths = os.pathsep.join(str(path) for path in (ROOT / "tests", ROOT))
    done = subprocess.run(
        [sys.executable, "-c", code, str(source), str(output)],
        env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert (output / "dataset_info.json").exists()
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_builder_is_an_ordinary_tfds_builder(tmp_path):
    source = write_coco(tmp_path / "raw")
    reader = box_json.open_detection(str(source), str(source.parent / "images"), shard_size=4, max_bad_share=0.0)
    builder = box_json.CocoJson.of(reader, data_dir=tmp_path / "out")
    builder.download_and_prepare()
    names = [example["name"] for example in builder.as_data_source("train")]
    assert names == [f"{i:012d}.jpg".encode() for i in range(6)]


def test_concepts_above_the_context_are_counted(tmp_path):
    source = write_coco(tmp_path / "raw")
    content = json.loads(source.read_text())
    for category, num_words in zip(content["categories"], (14, 15, 1), strict=True):  # [SOS] and [EOS] come on top
        category["name"] = " ".join(["dog"] * num_words)
    source.write_text(json.dumps(content))
    report = build(source, tmp_path / "out", shard_size=100)
    assert (report["concepts above 16 tokens"], report["longest"]["tokens of a concept"]) == (1, 17)


def test_counts_of_shards_are_added_and_maxima_kept(monkeypatch):
    monkeypatch.setattr(record_builder, "MAX_PHRASES", 2)
    total = Tally(dropped=Counter(a=1), longest=Counter(x=5, y=1), inputs={"f": {"bytes": 1}})
    part = {"seen": 2, "examples": 3, "boxes": 4, "concepts": 5, "long_concepts": 6}
    part |= {"dropped": {"a": 2, "b": 1}, "noted": {"c": 1}, "leaked": {"p": 1}, "longest": {"x": 4, "y": 2}}
    part |= {"phrases": {letter: i for i, letter in enumerate("abcdefgh", 1)}, "inputs": {"g": {"bytes": 2}}}
    total.add(Tally(**part))
    assert total.phrases == part["phrases"]  # 8 are not too many
    total.add(Tally(**part | {"phrases": {"i": 1}}))
    assert vars(total) == {
        "seen": 4, "examples": 6, "boxes": 8, "concepts": 10, "long_concepts": 12, "dropped": {"a": 5, "b": 2},
        "noted": {"c": 2}, "leaked": {"p": 2}, "longest": {"x": 5, "y": 2}, "phrases": dict(h=8, g=7, f=6, e=5),
        "inputs": {"f": {"bytes": 1}, "g": {"bytes": 2}},
    }  # fmt: skip


def test_records_are_checked_before_they_are_stored(tmp_path):
    data = jpeg(size=(24, 32))
    (tmp_path / "a.jpg").write_bytes(data)
    record = Record(
        kind=Kind.IMAGE_TEXT, source="", example_id=0, image=str(tmp_path / "a.jpg"), size=(0, 0),
        boxes=np.zeros((0, 4), np.float32), concepts=("A Cat", "a Cat", "B"), box_concepts=np.zeros(0, np.int32),
    )  # fmt: skip
    found = record_builder.checked(record)
    assert (found.image, found.size) == (data, (24, 32))
    for image, size, reason in (
        (tmp_path / "absent", (0, 0), "missing file"),
        (tmp_path, (0, 0), r"unreadable file \(NotRegularError\)"),
        (data, (24, 33), "size differs from the annotation's"),
        (data[:-9], (24, 32), "truncated image"),
    ):
        image = image if isinstance(image, bytes) else str(image)
        with pytest.raises(UnusableError, match=reason):
            record_builder.checked(dataclasses.replace(record, image=image, size=size))
    long = " ".join(["dog"] * 15)
    pairs = [("a.jpg", record), ("b.jpg", dataclasses.replace(record, concepts=(long, long)))]
    pairs.append(("d/COCO_val2014_000000000042.jpg", dataclasses.replace(record, concepts=("x",), caption="four")))
    for class_names in (False, True):
        reader = types.SimpleNamespace(read=lambda shard, tally: iter(pairs), facts={"class names": class_names})
        tally = Tally()
        options = {"held_out": frozenset({"000000000042"})}
        names = [name for name, _ in record_builder.generate(reader, 0, tally, **options)]
        assert names == [name for name, _ in pairs]
        assert (tally.examples, tally.boxes, tally.concepts, tally.long_concepts) == (3, 0, 6, 1)
        assert tally.phrases == {"a cat": 1, "b": 1, long: 1}
        assert tally.noted == ({} if class_names else {"caption without a noun phrase": 1})
        assert tally.leaked == {"000000000042": 1}
        assert tally.longest == {
            "concepts of an image": 3, "tokens of a concept": 17, "characters of a caption": 4,
            "bytes of an image": len(data),
        }  # fmt: skip
        tally = Tally()
        assert len([*record_builder.generate(reader, 0, tally, **options, drop_held_out=True)]) == 2
        assert (tally.examples, tally.noted["photo of a validation set left out"]) == (2, 1)


def test_what_a_report_says_of_all_shards():
    facts = {"inputs": {"a": {"bytes": 1}, "b": {"bytes": 2}}, "counters": {"turned": 1, "old": 5}, "facts": {"x": 1}}
    reader = types.SimpleNamespace(kind=Kind.IMAGE_TEXT, vocabulary=(), **facts)
    job = shards.Job(reader, pathlib.Path("f"), frozenset("abc"), drop_held_out=True)
    total = Tally(seen=9, examples=1, boxes=2, concepts=3, long_concepts=4, longest=Counter(y=8))
    total.dropped, total.noted = Counter(torn=2, burnt=4), Counter(turned=3, cut=1)
    total.leaked = Counter({f"{i:03d}": 1 for i in range(149, -1, -1)})
    total.inputs = {"b": {"sha256": "s"}, "c": {"sha256": "t"}}
    report = shards._report(job, total)
    assert report == {
        "kind": "image_text", "examples": 1, "boxes": 2, "concepts": 3, "distinct concepts": None,
        "concepts above 16 tokens": 4, "seen": 9, "dropped": {"burnt": 4, "torn": 2},
        "left out or repaired": {"old": 5, "turned": 4, "cut": 1}, "longest": {"y": 8}, "x": 1,
        "validation photos": {
            "compared with": 3, "found": 150, "left out": True, "names": [f"{i:03d}" for i in range(100)]
        },
        "inputs": {"a": {"bytes": 1}, "b": {"bytes": 2, "sha256": "s"}, "c": {"sha256": "t"}},
    }  # fmt: skip
    assert [*report["dropped"]] == ["burnt", "torn"]
    assert [*report["left out or repaired"]] == ["old", "turned", "cut"]
    assert shards._by_reason({"torn": 2, "burnt": 4}) == "4 burnt, 2 torn"


def test_no_more_processes_are_started_than_shards_are_missing(tmp_path, monkeypatch):
    asked, mapper = [], shards._mapper
    monkeypatch.setattr(shards, "_mapper", lambda job, num: asked.append(num) or mapper(job, 1))
    source = write_coco(tmp_path / "raw")
    for shard_size, workers in ((2, 9), (2, 2), (100, 4)):
        build(source, tmp_path / f"out{len(asked)}", shard_size=shard_size, workers=workers)
    assert asked == [3, 2, 1]


def test_phrases_stand_on_one_line_each(tmp_path):
    (tmp_path / "0.jpg").write_bytes(jpeg())
    phrases = json.dumps(["a  cat", "b", "A\tdog\nc"])
    (tmp_path / "pairs.tsv").write_text(f"0.jpg\tx\t{phrases}\n")
    building.build("image_text", input=str(tmp_path / "pairs.tsv"), output=str(tmp_path / "out"))
    assert (tmp_path / "out" / "phrases.tsv").read_text() == "a dog c\t1\na cat\t1\nb\t1\n"


def test_what_is_known_to_be_too_bad_is_not_read_to_its_end(tmp_path):
    source = write_coco(tmp_path / "raw", broken=(0, 1))
    with pytest.raises(ValueError, match=r"1 of 6 items cannot be used"):
        build(source, tmp_path / "out", shard_size=1)
    assert [path.name for path in (tmp_path / "out" / "building").glob("0*[0-9].json")] == ["000000.json"]
    with pytest.raises(ValueError, match=r"2 of 6 items cannot be used"):
        build(source, tmp_path / "out", shard_size=1, max_bad_share=1 / 6)
    assert build(source, tmp_path / "out", shard_size=1, max_bad_share=2 / 6)["examples"] == 4


def test_report(tmp_path):
    labels = ((1,), (1, 1, 2), (2,), (1,), (3,), (1,))
    source = write_coco(tmp_path / "raw", labels=labels, broken=(4,))
    report = build(source, tmp_path / "out", max_bad_share=0.2, command="typed")
    assert report == json.loads((tmp_path / "out" / "build_report.json").read_text())
    assert (report["kind"], report["seen"], report["examples"], report["boxes"]) == ("detection", 6, 5, 7)
    assert report["distinct concepts"] == 3
    assert report["dropped"] == {"not an image": 1}
    assert (report["longest"]["boxes of an image"], report["longest"]["concepts of an image"]) == (3, 2)
    assert report["longest"]["tokens of a concept"] == 4  # [SOS] thing 1 [EOS]
    assert len(report["inputs"][str(source)]["sha256"]) == 64
    written = [path.stat().st_size for path in (tmp_path / "out").glob("*.array_record-*")]
    assert report["bytes"] == sum(written) > 5000
    assert not (tmp_path / "out" / "building").exists()
    index = np.load(tmp_path / "out" / "index.npz")
    assert index["sizes"].tolist() == [[24, 32]] * 5
    assert (index["num_boxes"].tolist(), index["num_concepts"].tolist()) == ([1, 3, 1, 1, 1], [1, 2, 1, 1, 1])
    assert report["command"] == "typed"
    assert prepare.summary(report, "data/mine").splitlines()[-1] == (
        'put in the config: config.detection.data = ("data/mine",)'
    )


def test_too_much_that_is_bad_is_an_error_that_a_larger_share_continues(tmp_path, monkeypatch):
    source = write_coco(tmp_path / "raw", broken=(5,))
    with pytest.raises(ValueError, match=r"1 of 6 items cannot be used \(1 not an image\)"):
        build(source, tmp_path / "out")
    monkeypatch.setattr(shards.Job, "write", lambda job, shard: pytest.fail("a finished shard was written again"))
    assert build(source, tmp_path / "out", max_bad_share=0.2)["examples"] == 5


def test_restart_does_not_redo_finished_shards(tmp_path, monkeypatch):
    source = write_coco(tmp_path / "raw")
    build(source, tmp_path / "whole")
    write, written = shards.Job.write, []

    def dying(job, shard):
        if len(written) == 2:
            part = job.file(shard, f"part{os.getpid()}")
            part.write_bytes(b"half a shard")
            raise KeyboardInterrupt
        written.append(shard)
        return write(job, shard)

    monkeypatch.setattr(shards.Job, "write", dying)
    with pytest.raises(KeyboardInterrupt):
        build(source, tmp_path / "out")
    assert not (tmp_path / "out" / "build_report.json").exists()
    monkeypatch.setattr(shards.Job, "write", lambda job, shard: (written.append(shard), write(job, shard))[1])
    build(source, tmp_path / "out")
    assert written == [0, 1, 2]
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    build(source, tmp_path / "out")  # finished: nothing is done
    assert written == [0, 1, 2]


def test_a_kill_while_files_get_their_names_is_survived(tmp_path, monkeypatch):
    source = write_coco(tmp_path / "raw")
    build(source, tmp_path / "whole")
    rename, renamed = pathlib.Path.rename, []

    def dying(path, target):
        if "-of-" in str(target):
            renamed.append(path)
            if len(renamed) == 2:
                raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(pathlib.Path, "rename", dying)
    with pytest.raises(KeyboardInterrupt):
        build(source, tmp_path / "out")
    build(source, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_other_inputs_or_options_in_the_same_folder_are_an_error(tmp_path):
    source = write_coco(tmp_path / "raw")
    build(source, tmp_path / "out")
    with pytest.raises(ValueError, match="shard_size: 2 -> 3"):
        build(source, tmp_path / "out", shard_size=3)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("keep me")
    with pytest.raises(ValueError, match="is not empty and no build"):
        build(source, tmp_path / "notes")


def test_a_shard_without_usable_examples_is_left_out(tmp_path):
    source = write_coco(tmp_path / "raw", broken=(2, 3))
    report = build(source, tmp_path / "out", max_bad_share=0.5)
    assert report["examples"] == 4
    assert len(list((tmp_path / "out").glob("*-of-00002"))) == 2
    source = read_built(str(tmp_path / "out"), Kind.DETECTION)
    assert [source[i].concepts for i in (0, 2)] == [("thing 1",), ("thing 3",)]
    nothing = write_coco(tmp_path / "none", labels=((1,),), broken=(0,))
    with pytest.raises(ValueError, match="no usable example; 1 not an image"):
        build(nothing, tmp_path / "empty", max_bad_share=1.0)


@pytest.mark.slow
def test_processes_write_the_same_files(tmp_path):
    source = write_coco(tmp_path / "raw")
    build(source, tmp_path / "one")
    build(source, tmp_path / "two", workers=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
