"""Small files in the published formats of Flickr30k Entities and RefCOCO."""

import collections
import json
import os
import pickle
import resource

import numpy as np
import pytest

from detclipv2_jax.data.schema import DataError
from detclipv2_jax.eval import grounding, published

XML = """<annotation><filename>{name}.jpg</filename><size><width>60</width><height>40</height><depth>3</depth></size>
{objects}</annotation>"""
BOX = "<bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox>"
SENTENCES = """[/EN#1/people Two people] wait for [/EN#2/vehicles/scene the subway] in [/EN#3/scene a station] .
[/EN#1/people/clothing They] have [/EN#4/clothing a hat ] and [/EN#0/notvisual time] .
"""


def write_flickr(folder):
    objects = [
        "<object><name>1</name>" + BOX.format(1, 1, 11, 21) + "</object>",
        "<object><name>1</name><name>4</name>" + BOX.format(21, 6, 31, 36) + "</object>",
        "<object><name>2</name>" + BOX.format(5, 5, 5, 9) + "</object>",
        "<object><name>2</name>" + BOX.format(5, 5, 9, 5) + "</object>",
        "<object><name>3</name><scene>1</scene><nobndbox>1</nobndbox></object>",
    ]
    for name in ("Sentences", "Annotations"):
        (folder / name).mkdir(parents=True)
    for name in ("36979", "100"):
        (folder / "Sentences" / f"{name}.txt").write_text(SENTENCES)
        (folder / "Annotations" / f"{name}.xml").write_text(XML.format(name=name, objects="".join(objects)))
    (folder / "val.txt").write_text("36979\n")
    (folder / "test.txt").write_text("36979\n \n100\n\n")
    (folder / "README.txt").write_text("")
    return folder


def read(path, *, task, split, odd=None):
    odd = collections.Counter() if odd is None else odd
    queries = grounding.read_any(str(path), task=task, split=split, max_bad_share=0.0, odd=odd)
    return [(query.file, query.text, query.boxes.tolist()) for query in queries]


def test_phrases_of_flickr30k_have_the_boxes_of_their_chain(tmp_path):
    odd = collections.Counter()
    both = [[0, 0, 10, 20], [20, 5, 10, 30]]  # pixels count from 1 in the files
    expected = [("36979.jpg", "Two people", both), ("36979.jpg", "They", both), ("36979.jpg", "a hat", both[1:])]
    folder = write_flickr(tmp_path)
    assert read(folder, task="phrases", split="val", odd=odd) == expected
    assert odd == {"box without area left out": 2}
    assert [row[0] for row in read(folder, task="phrases", split="test")] == ["36979.jpg"] * 3 + ["100.jpg"] * 3


def test_what_flickr30k_lacks_is_said(tmp_path):
    folder = write_flickr(tmp_path)
    with pytest.raises(DataError, match=r"train\.txt does not exist; --split is one of test, val:"):
        read(folder, task="phrases", split="train")
    (folder / "Sentences" / "100.txt").unlink()
    (folder / "Annotations" / "36979.xml").unlink()
    with pytest.raises(DataError, match=r"2 of 4 files of .*test\.txt do not exist:\n.*36979\.xml\n.*100\.txt"):
        read(folder, task="phrases", split="test")
    (folder / "Annotations" / "36979.xml").write_text("<annotation>")
    with pytest.raises(DataError, match=r"36979\.xml is no valid XML"):
        read(folder, task="phrases", split="val")
    (folder / "Annotations" / "36979.xml").write_text(
        XML.format(name="36979", objects=f"<object>{BOX.format(1, 1, '', 2)}</object>")
    )
    with pytest.raises(DataError, match=r"36979\.xml has a box that is no four numbers: \{'xmin': '1'.* 'xmax': ''"):
        read(folder, task="phrases", split="val")
    (folder / "Annotations" / "36979.xml").write_text("<annotation></annotation>")
    with pytest.raises(DataError, match="names no text with a box"):
        published.read_flickr30k(folder, split="val", odd=collections.Counter())


def write_refcoco(folder, **changes):
    refs = [
        {"ref_id": i, "ann_id": 70 + i, "image_id": 5, "category_id": 1, "file_name": f"COCO_train2014_5_{i}.jpg",
         "split": split, "sent_ids": [2 * i, 2 * i + 1],
         "sentences": [{"sent_id": 2 * i + j, "sent": f"{word} {i}", "raw": f"{word.upper()} {i}", "tokens": [word]}
                       for j, word in enumerate(("left man", "caf\xe9"))]}
        for i, split in enumerate(("train", "testA", "testA"))
    ]  # fmt: skip
    content = {
        "images": [{"id": 5, "file_name": "COCO_train2014_000000000005.jpg", "width": 60, "height": 40}],
        "annotations": [{"id": 70 + i, "image_id": 5, "bbox": [i, 2, 10, 20.5]} for i in range(3)],
    }
    (folder / "refs(unc).p").write_bytes(pickle.dumps(refs, protocol=2))
    (folder / "instances.json").write_text(json.dumps(content | changes))
    return folder / "refs(unc).p"


def test_every_sentence_of_refcoco_is_an_expression(tmp_path):
    path = write_refcoco(tmp_path)
    photo, content = "COCO_train2014_000000000005.jpg", json.loads((tmp_path / "instances.json").read_text())
    assert read(path, task="referring", split="testA") == [
        (photo, f"{word} {i}", [[i, 2, 10, 20.5]]) for i in (1, 2) for word in ("left man", "caf\xe9")
    ]
    with pytest.raises(DataError, match=r"has no split 'testB'; --split is one of testA, train"):
        read(path, task="referring", split="testB")
    write_refcoco(tmp_path, annotations=[])
    with pytest.raises(DataError, match=r"refs\(unc\)\.p does not have the documented form \(KeyError: 71\)"):
        published.read_refcoco(path, split="testA")
    for box in (None, "1 2 3 4", [1, 2, 3], [1, 2, "x", 4], [True, 2, 3, 4], [1, 2, 0, 4], [1, 2, 3, 0]):
        write_refcoco(tmp_path, annotations=[{"id": 70 + i, "image_id": 5, "bbox": box} for i in range(3)])
        with pytest.raises(DataError, match=r"refs\(unc\)\.p: the text 'left man 1' .* cannot be used"):
            read(path, task="referring", split="testA")
    refs = pickle.loads(path.read_bytes())
    refs[1]["sentences"][1]["sent"] = " "
    path.write_bytes(pickle.dumps(refs, protocol=2))
    (tmp_path / "instances.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"refs\(unc\)\.p: the text ' ' .* cannot be used"):
        read(path, task="referring", split="testA")
    write_refcoco(tmp_path, images=[{"id": 5, "file_name": "../../etc/passwd"}])
    with pytest.raises(DataError, match=r"'left man 1' of photo '../../etc/passwd' .* cannot be used"):
        read(path, task="referring", split="testA")


def test_a_phrase_of_many_types_takes_no_time():
    assert published._PHRASE.findall("[/EN#1" + "/a" * 10_000) == []
    assert published._PHRASE.findall("[/EN#1" + "/a" * 10_000 + " a hat]") == [("1", "a hat")]


def test_a_pipe_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "refs(unc).p")
    with pytest.raises(DataError, match="is not a regular file"):
        published.read_refcoco(tmp_path / "refs(unc).p", split="testA")


def test_texts_of_python_2_are_read(tmp_path):
    """As Python 2 wrote them: bytes that are texts, by the opcode U, with whatever letters."""
    path = write_refcoco(tmp_path)
    written = path.read_bytes()
    assert b"X\x0a\0\0\0left man 1" in written
    path.write_bytes(written.replace(b"X\x0a\0\0\0left man 1", b"U\x0acaf\xe9 man 1"))
    assert read(path, task="referring", split="testA")[0][1] == "caf\xe9 man 1"


def test_a_pickle_takes_no_memory_and_no_time(tmp_path):
    path = tmp_path / "refs(unc).p"
    memo = b"\x80\x02Nr\xff\xff\xff\x7f."  # "remember this as number 2,147,483,647", for which C's reader makes room
    split = b"\x80\x02]}X\x05\0\0\0split)" + b"2\x86" * 60 + b"sa."  # pairs of pairs, which are hashed one by one
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for data in (memo, split):
        path.write_bytes(data)
        with pytest.raises(
            DataError, match=r"does not have the documented form|has no split 'val'; --split is one of $"
        ):
            read(path, task="referring", split="val")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10


class Harm:
    def __reduce__(self):
        return print, ("run",)


def test_a_pickle_runs_no_code(tmp_path, capsys):
    path = tmp_path / "refs(google).p"
    for content, message in (
        (pickle.dumps([Harm()]), "asks for builtins.print, which is code"),
        (pickle.dumps([np.float64(1.0)]), "which is code"),
        (pickle.dumps([{"split": "val"}])[:-3], "cannot be read as a pickle of RefCOCO"),
        (b"\x80\x7f", "cannot be read as a pickle of RefCOCO"),
        (pickle.dumps(3), "does not have the documented form"),
    ):
        path.write_bytes(content)
        with pytest.raises(DataError, match=message):
            read(path, task="referring", split="val")
    assert "run" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "task", "split", "message"),
    [
        ("flickr", "referring", "val", "needs --split and --task=phrases; given are --split=val and --task=referring"),
        ("flickr", "phrases", "", "needs --split and --task=phrases"),
        ("refs(umd).p", "phrases", "val", "needs --split and --task=referring"),
        ("g.json", "phrases", "val", "has no --split"),
    ],
)
def test_formats_have_their_task_and_split(tmp_path, name, task, split, message):
    (tmp_path / "flickr").mkdir()
    with pytest.raises(ValueError, match=message):
        read(tmp_path / name, task=task, split=split)
