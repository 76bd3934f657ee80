"""Files of detections: read in parts as at once, in arrays beside their truth, with the first wrong row named."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from detclipv2_jax.data import truth as truth_lib
from detclipv2_jax.eval import detections

IDS = [3, "a", 8, 11]
TRUTH = truth_lib.from_content(
    "truth.json",
    {
        "images": [{"id": key} for key in IDS],
        "categories": [{"id": 5}, {"id": 2}],
        "annotations": [{"id": 1, "image_id": 3, "category_id": 5, "bbox": [0, 0, 5, 5]}],
    },
)
RELATIVE = "look relative to the image's size (0 to 1); they must be in pixels"
EVALUATED = np.flatnonzero([key != 11 for key in TRUTH.image_ids.ids])


def row(image=3, category=5, box=(1, 2, 3, 4), score=0.5, **more):
    return {"image_id": image, "category_id": category, "bbox": list(box), "score": score} | more


def as_rows(parts):
    found = []
    for part in parts:
        numbers = np.c_[part.boxes, part.scores].tolist()
        found += [list(entry) for entry in zip(part.image_ids, part.category_ids, numbers, strict=True)]
    return found


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 12), st.integers(20, 400), st.sampled_from([None, 1]), st.integers(0, 99))
def test_a_file_is_read_in_parts_as_at_once(tmp_path_factory, num, part_chars, indent, seed):
    rng = np.random.default_rng(seed)
    extra = [{}, {"deep": {"a": {"b": {"c": 1}}}}, {"text": '}, {"image_id": 9, {'}, {"list": [{}, {}]}]
    rows = [
        row(IDS[rng.integers(4)], int(rng.integers(9)), rng.random(4).tolist(), i / 16, **extra[rng.integers(4)])
        for i in range(num)
    ]
    path = tmp_path_factory.mktemp("found") / "found.json"
    path.write_text(" \n" + json.dumps(rows, indent=indent), encoding="utf-8-sig")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(detections, "PART_CHARS", part_chars)
        parts = list(detections.read(path))
    assert as_rows(parts) == as_rows(detections.read(rows))
    if part_chars < 100 and num > 8:
        assert len(parts) > 1  # however deep the objects in it are
    assert detections.load(path) == [
        {key: entry[key] for key in ("image_id", "category_id", "bbox", "score")} for entry in rows
    ]


def test_nested_objects_do_not_keep_a_file_from_being_cut(tmp_path, monkeypatch):
    rows = [{"deep": {"a": {"b": {"c": i}}}} | row(score=i / 64) for i in range(60)]
    (tmp_path / "found.json").write_text(json.dumps(rows))
    monkeypatch.setattr(detections, "PART_CHARS", 250)  # two rows or three
    parts = list(detections.read(tmp_path / "found.json"))
    assert len(parts) > 20
    assert as_rows(parts) == as_rows(detections.read(rows))


@pytest.mark.parametrize(
    "change",
    [
        {"score": True}, {"score": "1"}, {"score": -2e9}, {"score": [1]}, {"bbox": [True] * 4},
        {"bbox": [1, 2, 3, 1.5e9]},
        {"bbox": [1, 2, float("inf"), 4]}, {"bbox": [-2e9, 2, 3, 4]}, {"bbox": [1, 2, 3, -4]}, {"bbox": [1, 2, -3, 4]},
        {"bbox": [1, 2, 3]},
    ],
)  # fmt: skip
def test_the_number_of_a_wrong_row_counts_all_parts(change):
    # alone: in a column with other numbers NumPy takes true for 1
    parts = [[row()] * 3, [row(), row()], [row() | change]]
    with pytest.raises(ValueError, match=r"the given object: row 5 is .*, not an object with image_id"):
        list(detections.read(iter(parts)))


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("place", range(5))
def test_true_and_false_among_numbers_are_refused(number, place):
    numbers = [number] * 5  # NumPy takes true for 1 where others are numbers: nothing else tells this row
    list(detections.read([row(), row(box=numbers[:4], score=number)]))
    numbers[place] = bool(number)
    with pytest.raises(ValueError, match="row 1 is "):
        list(detections.read([row(), row(box=numbers[:4], score=numbers[4])]))


def test_positions_in_the_truth_and_what_was_repaired():
    parts = [[row("3", 2, score=0.1), row("a", "5")], [row(8.0, 5, (9, 8, 7, 6)), row("3")]]
    found = detections.find(iter(parts), TRUTH, EVALUATED)
    order = [TRUTH.image_ids.ids[i] for i in found.images], [TRUTH.category_ids.ids[i] for i in found.categories]
    assert order == ([3, "a", 8, 3], [2, 5, 5, 5])
    assert found.boxes[2].tolist() == [9, 8, 7, 6]
    assert found.scores.tolist() == [0.1, 0.5, 0.5, 0.5]
    assert found.odd == {
        "image_id of a detection of another type than the image's": 3,
        "category_id of a detection of another type than the category's": 1,
    }
    assert found.take(np.array([2])).odd == found.odd
    assert detections.find(found, TRUTH, np.array([0])) is found
    assert len(detections.find([], TRUTH, np.arange(4)).scores) == 0
    (point,) = detections.read([row(box=(1, 2, 0, 0))])  # a box without area is one
    assert point.boxes.tolist() == [[1, 2, 0, 0]]
    (far,) = detections.read([row(box=(-1e9, 2, 1e9, 4), score=-1e9)])  # the largest numbers that there may be
    assert (far.boxes.tolist(), far.scores.tolist()) == ([[-1e9, 2, 1e9, 4]], [-1e9])


@pytest.mark.parametrize(("num_looked_at", "num_relative", "told"), [(100_000, 3, 5), (100_000, 2, 0), (2, 3, 5)])
def test_boxes_of_another_form_are_told_by_most_of_those_looked_at(monkeypatch, num_looked_at, num_relative, told):
    monkeypatch.setattr(detections, "_NUM_LOOKED_AT", num_looked_at)
    boxes = [(1, 2, 3, 4), (0.1, 0.2, 0.3, 0.4), (0.5, 0.5, 0.2, 0.2), (0.1, 0.1, 0.9, 0.9), (5, 6, 7, 8)]
    if num_relative == 2:
        boxes[1] = (9, 9, 9, 9)
    if num_looked_at == 2:  # each third of them
        boxes[0] = (0.1, 0.1, 0.1, 0.1)
    odd = detections.find([row(box=box) for box in boxes], TRUTH, EVALUATED).odd
    assert odd == ({f"detection of a file whose boxes {RELATIVE}": told} if told else {})


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([row(11)], "row 3: 1 of 1 images of the detections are unknown: 11; they"),  # listed, but not evaluated
        ([row(), row(99)], "row 4: 1 of 2 images of the detections are unknown: 99; they"),
        ([row(), row(None)], "row 4: 1 of 2 images of the detections are unknown: null; they"),
        ([row(category=0)], "row 3: 1 of 1 categories of the detections are unknown: 0; they belong to another"),
        ([row(i) for i in (3, *range(50, 55))], "5 of 6 images of .* are unknown: 50, 51, 52, 53, 54; they"),
        ([row(i) for i in range(50, 56)], "6 of 6 images of the .* unknown: 50, 51, 52, 53, 54 …; .* than truth.json"),
    ],
)  # fmt: skip
def test_ids_that_the_truth_does_not_list_are_named(rows, message):
    with pytest.raises(ValueError, match=message):
        detections.find(iter([[row()] * 3, rows]), TRUTH, EVALUATED)
