"""What is read from the entries of annotation jsons, each function on values made by hand."""

import collections
import contextlib
import gc
import json
from typing import Any

import numpy as np
import pytest

from detclipv2_jax import files
from detclipv2_jax.data import annotations, truth
from detclipv2_jax.data.schema import DataError


def test_a_json_is_read_without_the_outlines_of_boxes(tmp_path):
    path = tmp_path / "a.json"
    outline = [[0, 0, 4, 0, 4, 4]]
    rows = [{"bbox": [1, 2, 3, 4.5], "segmentation": outline}, {"bbox": None, "segmentation": outline}]
    path.write_text(json.dumps({"annotations": rows}))
    assert annotations.load_json(path) == {"annotations": [{"bbox": [1, 2, 3, 4.5]}, rows[1]]}
    assert gc.isenabled()
    with pytest.raises(ValueError, match=r"cannot read .*absent\.json: No such file"):
        annotations.load_json(tmp_path / "absent.json")
    path.write_text("{")
    with pytest.raises(ValueError, match=r"a\.json"):
        annotations.load_json(path)
    assert gc.isenabled()


@pytest.mark.parametrize("enabled", [True, False])
def test_the_garbage_collector_is_as_it_was_after_a_reading(enabled):
    (gc.enable if enabled else gc.disable)()
    try:
        with contextlib.suppress(KeyError), files.collector_paused(), files.collector_paused():
            assert not gc.isenabled()
            raise KeyError
        assert gc.isenabled() is enabled
    finally:
        gc.enable()


@pytest.mark.parametrize("shape", [(0, 2), (5, 1), (50, 2), (50, 4)])
def test_rows_of_flags(shape):
    flags = np.random.default_rng(0).random(shape) < 0.6
    np.testing.assert_array_equal(annotations.all_of(flags), flags.all(axis=1))
    np.testing.assert_array_equal(annotations.any_of(flags), flags.any(axis=1))


def test_equal_rows_are_counted_and_mixed_into_equal_numbers():
    rows = np.random.default_rng(0).integers(0, 4, (300, 7)).astype(float)
    assert annotations.num_equal([*rows.T]) == 300 - len(np.unique(rows, axis=0)) > 0
    for num_columns in (3, 7):
        columns = [*rows.T[:num_columns]]
        _, same = np.unique(rows[:, :num_columns], axis=0, return_inverse=True)
        _, numbers = np.unique(annotations.mixed(columns), return_inverse=True)
        assert len({*zip(same.ravel().tolist(), numbers.ravel().tolist(), strict=True)}) == same.max() + 1
    assert annotations.num_equal([np.zeros(0)] * 7) == 0


def test_ids_are_whole_numbers_and_texts():
    given = [2, 2.0, "2", 2.5, True, None, [2], float("nan")]
    assert [annotations.usable_id(value) for value in given] == [2, 2, "2", None, None, None, None, None]
    assert annotations.listed_ids([{"id": 3}, {"id": 1.0}, {"id": "x"}], where="w") == ([3, 1, "x"], 1)
    for entries, message in (
        ([{"id": 1}, 5], r"w\[1\] is 5, not an object"),
        ([{"id": None}], r"w\[0\] \(.*\) has the id null, neither a whole number nor a text"),
        ([{}], r"w\[0\] \(.*\) has no id"),
    ):
        with pytest.raises(ValueError, match=message):
            annotations.listed_ids(entries, where="w")


def test_boxes_are_numbers_outlines_or_nothing():
    nan = float("nan")
    assert annotations.boxes_of([])[0].shape == (0, 4)
    plain, num = annotations.boxes_of([{"bbox": [1, 2, 3, 4]}, {"bbox": [5, 6.5, 7, 8]}])
    assert (plain.tolist(), plain.dtype, num) == ([[1, 2, 3, 4], [5, 6.5, 7, 8]], np.float64, 0)
    rows = [
        {"bbox": [1, 2, 3, 4]},
        {"segmentation": [[2, 3, 6, 3, 6, 9]]},
        {"bbox": ["1", 2, 3, 4]},
        {"bbox": [1, 2, 3]},
        {},
    ]
    boxes, num = annotations.boxes_of(rows)
    np.testing.assert_array_equal(boxes, [[1, 2, 3, 4], [2, 3, 4, 6], *[[nan] * 4] * 3])
    assert num == 1
    assert annotations.boxes_of([{"bbox": [1e9, 1.1e9, -2e9, 1]}])[0].tolist() == [[1e9, np.inf, np.inf, 1]]


def runs_of(mask):
    """Returns the runs of a mask [height, width], down its columns, the first of zeros."""
    values = mask.T.reshape(-1)
    ends = np.flatnonzero(np.diff(values.astype(int), prepend=1 - int(values[0]), append=2))
    runs = np.diff(ends).tolist()
    return [0, *runs] if values[0] else runs


def text_of(runs):
    """Returns runs in COCO's compressed form."""
    text = ""
    for i, run in enumerate(runs):
        value, more = run - (runs[i - 2] if i > 2 else 0), True
        while more:
            bits, value = value & 31, value >> 5
            more = value != (-1 if bits & 16 else 0)
            text += chr(48 + bits + 32 * more)
    return text


def test_boxes_around_masks_and_polygons():
    rng = np.random.default_rng(0)
    large = np.zeros((1100, 600), bool)  # runs of five characters
    large[7:1000, 500:] = large[3:, 550] = True
    for mask in (*(rng.random(rng.integers(1, 8, 2)) < rng.random() for _ in range(100)), large):
        rows, columns = mask.nonzero()
        box = None
        if len(rows):
            x, y = int(columns.min()), int(rows.min())
            box = [x, y, int(columns.max()) - x + 1, int(rows.max()) - y + 1]
        runs = runs_of(mask)
        assert sum(runs) == mask.size
        for counts in (runs, text_of(runs)):
            assert annotations.box_of_outline({"size": list(mask.shape), "counts": counts}) == box
    largest = annotations.MAX_SIDE
    for counts in ([0, largest**2], text_of([0, largest**2])):
        assert annotations.box_of_outline({"size": [largest] * 2, "counts": counts}) == [0, 0, largest, largest]
    points = rng.integers(-9, 9, (2, 5, 2))
    low, high = points.min(axis=(0, 1)), points.max(axis=(0, 1))
    expected = [*low.tolist(), *(high - low).tolist()]
    assert annotations.box_of_outline(points.reshape(2, -1).tolist()) == expected
    assert annotations.box_of_outline(points.reshape(-1).tolist()) == expected  # one polygon that stands for itself
    wrong: list[Any] = [[0, 5], [0, 2, 1, 2], [0, 1.0], [-1, 2], "\x20", "~~~~", {}]
    broken: list[Any] = [{"size": [2, 2], "counts": counts} for counts in wrong]
    broken += [{"size": size, "counts": [0, 1]} for size in ([2], [2, True], [2.0, 2], [0, 2], [2, 65_536], "22")]
    broken += [[1, 2, 3, 4], [[1, 2, 3, 4]], [[1, 2, 3, 4, 5, 6, 7]], [[1, 2, 3, 4, 5, "x"]], [], [[]], 5, None]
    for outline in broken:
        assert annotations.box_of_outline(outline) is None


def test_true_is_no_number_of_a_box():
    for at in range(4):
        for value in (True, False):
            box = [5, 6, 7, 8]
            box[at] = value
            assert np.isnan(annotations.boxes_of([{"bbox": [5, 6, 7, 8]}, {"bbox": box}])[0][1]).all()
    assert annotations.boxes_of([{"bbox": [0, 1, 1, 0]}])[0].tolist() == [[0, 1, 1, 0]]


def test_positions_of_ids_of_any_type():
    for listed, asked, found, others in (
        ([5, 7, 5], [5, 7, 6], [0, 1, -1], 0),  # the first of equal ones
        ([1, "a", "9"], [1.0, " a ", "1", True, None, 9, 2.5], [0, 1, 0, -1, -1, 2, -1], 3),
        ([1, 2], [1, "2"], [0, 1], 1),
        (["1", "2"], [2, "1"], [1, 0], 1),
    ):
        positions, num = annotations.Ids(listed).find(asked)
        assert (positions.tolist(), num) == (found, others)
    assert annotations.shown("x" * 78) == '"' + "x" * 78 + '"'
    assert annotations.shown("x" * 79) == '"' + "x" * 76 + "..."


def test_flags():
    odd = collections.Counter()
    rows = [{"iscrowd": value} for value in (0, 1, "1", "False", None, 0.0, 1.0)] + [{}]
    flags = annotations.flags_of(rows, "iscrowd", odd, where="f")
    assert flags.tolist() == [False, True, True, False, False, False, True, False]
    assert odd == {"iscrowd that is no whole number": 5}
    for value in ("maybe", 0.5, [1]):
        with pytest.raises(DataError, match=r"f: annotations\[1\] has ignore .*; 0 and 1 have a meaning"):
            annotations.flags_of([{}, {"ignore": value}], "ignore", collections.Counter(), where="f")


def test_areas_are_those_of_the_boxes_where_none_are_given():
    boxes, odd = np.array([[0, 0, 2.0, 3.0]] * 6), collections.Counter()
    rows = [{"area": 5}, {}, {"area": None}, {"area": 0}, {"area": -1.0}, {"area": "4"}]
    assert annotations.areas_of(rows, boxes, odd).tolist() == [5, 6, 6, 6, 6, 4]
    assert +odd == {"area that is no number": 2, "area of 0 or less of a box that has one": 2}


def test_boxes_of_another_form_are_told():
    sizes = np.full((8, 2), (100, 200))
    boxes = np.array(
        [
            [0, 0, 50, 50],
            [191, 10, 12, 20],
            [190, 10, 12, 20],
            [5, 5, 0.5, 9],
            [150, 9, 53, 9],
            [-3, 9, 20, 20],
            [30, -3, 20, 20],
            [5, 5, 9, 1],
        ]
    )
    cut, below, look = annotations.suspicious(boxes, sizes)
    # the second leaves by 3 px of 12, the third by 2, the fifth by 3 of 53, the two after it by 3 of 20
    assert cut.tolist() == [False, True, False, False, False, True, True, False]
    assert below.tolist() == [False, False, False, True, False, False, False, False]
    assert look == ""
    assert not annotations.suspicious(boxes, np.zeros((8, 2)))[0].any()
    assert "0 to 1" in annotations.suspicious(np.full((5, 4), 0.5), sizes[:5])[2]
    corners = np.array([[10, 10, 150, 90], [100, 50, 160, 80], [120, 60, 190, 95], [5, 5, 100, 50]])
    assert "x1, y1, x2, y2" in annotations.suspicious(corners, sizes[:4])[2]
    assert annotations.suspicious(np.zeros((0, 4)), np.zeros((0, 2)))[2] == ""


def form(*boxes, size=(480, 640)):
    """Returns the first words of what boxes look like on photos of a (height, width); "" for x, y, width, height."""
    return annotations.suspicious(np.array(boxes, float), np.full((len(boxes), 2), size))[2].partition(";")[0]


def test_half_of_the_boxes_may_be_tiny():
    tiny, plain = (-1, 0.5, 1, 1), (30, 20, 20, 10)
    assert form(tiny, tiny, plain, plain) == ""
    assert form(tiny, tiny, tiny, plain, plain) == "look relative to the image's size (0 to 1)"


def test_percents_are_told_from_pixels():
    percent = "look like percent of the image's size"

    def look(*, end=95.0, step=3.0, num=20, size=(480, 640), first=(0.0, 0.0)):
        low = [first, *((step * i, step * i) for i in range(1, num))]
        return form(*((x, y, *[end - step * (num - 1)] * 2) for x, y in low), size=size)

    assert look() == look(end=89.1) == look(end=100.9) == look(size=(200, 200)) == look(step=1.75) == percent
    assert look(end=88.9) == look(end=101.1) == look(size=(199, 640)) == look(size=(480, 199)) == look(num=19) == ""
    assert look(step=1.7) == look(first=(-0.1, 0)) == look(size=(0, 0)) == ""  # all about one place, outside, unknown


def test_corners_are_told_by_the_border():
    corners, small = "look like x1, y1, x2, y2", (10, 10, 100, 100)
    leaves, not_quite = (310, 10, 331, 100), (310, 10, 330.5, 100)  # a right end of 641 px
    assert form(*[leaves] * 4, *[small] * 6) == corners
    assert form(*[leaves] * 3, *[small] * 7) == form(*[not_quite] * 4, *[small] * 6) == ""
    reaches = (20, 15, 620, 100)
    assert form(reaches, reaches) == corners
    assert form(reaches) == form(reaches, reaches, small) == ""
    assert form(*[leaves] * 99, (50, 50, 20, 90)) == corners
    assert form(*[leaves] * 98, *[(50, 50, 20, 90)] * 2) == ""


@pytest.mark.parametrize("across", [0, 1])
@pytest.mark.parametrize(("correlation", "look"), [(0.49, ""), (0.51, "look like x1, y1, x2, y2")])
def test_corners_are_told_by_how_they_grow(correlation, look, across):
    one, other = np.tile([1, -1], 10), np.tile([1, 1, -1, -1], 5)
    boxes = np.stack([20 + 5.0 * one] * 2 + [100 + 20.0 * one] * 2, axis=1)
    boxes[:, 2 + across] = 100 + 20 * (correlation * one + np.sqrt(1 - correlation**2) * other)
    assert form(*boxes) == look
    assert form(*boxes[:19]) == ""  # too few
    boxes[:, :2] = 20 + 0.4 * one[:, None]  # all begin at one place: less than a thousandth of the photo apart
    assert form(*boxes) == ""


def test_exchanged_sides_and_centres_are_told_by_what_leaves_the_photo():
    exchanged, plain, tall = "look like y, x, height, width", (30, 20, 20, 10), (10, 500, 5, 60)
    assert form(*[plain] * 48, *[tall] * 2) == form(*[plain] * 19, tall) == exchanged
    assert form(*[plain] * 49, tall) == form(*[plain] * 18, tall) == ""
    assert form(*[plain] * 47, (-1, 20, 20, 10), *[tall] * 2) == exchanged
    assert form(*[plain] * 47, (-1.1, 20, 20, 10), *[tall] * 2) == ""
    centre, at_the_end = "look like centre x, centre y, width, height", (622, 462, 38, 38)
    assert form(*[plain] * 48, *[at_the_end] * 2) == centre
    assert form(*[plain] * 47, (18, 20, 38, 10), *[at_the_end] * 2) == centre
    assert form(*[plain] * 47, (17.9, 20, 38, 10), *[at_the_end] * 2) == ""
    assert form(*[plain] * 47, (622.1, 462, 38, 38), *[at_the_end] * 2) == ""


def test_sizes_of_images():
    largest = annotations.MAX_SIDE
    known = [((4, 5), (4, 5)), ((4.0, largest), (4, largest)), ((0, 5), (0, 0)), ((4, largest + 1), (0, 0))]
    for (height, width), size in known:
        assert annotations.size_of({"height": height, "width": width}) == size
    assert annotations.size_of({"height": 4}) == annotations.size_of({"height": "4", "width": 5}) == (0, 0)


def content(**changes):
    """Returns a COCO json of two images, two categories and two boxes."""
    return {
        "images": [{"id": 7, "height": 50, "width": 60}, {"id": 3, "height": 50, "width": 60}],
        "categories": [{"id": 2, "name": "b"}, {"id": 1, "name": "a"}],
        "annotations": [
            {"image_id": 7, "category_id": 1, "bbox": [1, 2, 30, 40], "iscrowd": 1},
            {"image_id": 3, "category_id": 2, "bbox": [5, 6, 7, 8]},
        ],
    } | changes


def test_the_truth_is_in_the_order_of_ids():
    found = truth.from_content("name", content())
    assert [image["id"] for image in found.images] == [3, 7]
    assert [category["name"] for category in found.categories] == ["a", "b"]
    assert (found.image.tolist(), found.category.tolist()) == ([1, 0], [0, 1])
    assert (found.areas.tolist(), found.crowd.tolist()) == ([1200, 56], [True, False])
    images = [{"id": 7, "neg_category_ids": [2, 99]}, {"id": 3, "not_exhaustive_category_ids": ["1"]}]
    found = truth.from_content("name", content(images=images))
    assert (found.absent.tolist(), found.incomplete.tolist()) == ([[1, 1]], [[0, 0]])  # 99 is not listed
    assert found.odd["neg_category_ids that are not listed"] == 1
    with pytest.raises(DataError, match="name has no images"):
        truth.from_content("name", content(images=[]))
    with pytest.raises(DataError, match="a JSON list, not the lists"):
        truth.from_content("name", [])


def test_what_cannot_be_used_changes_nothing_of_the_rest():
    rng = np.random.default_rng(0)
    good = [
        {
            "image_id": int(rng.choice([3, 7])),
            "category_id": int(rng.choice([1, 2])),
            "bbox": rng.uniform(1, 20, 4).tolist(),
        }
        | {"area": float(rng.uniform(1, 9)), "iscrowd": int(rng.random() < 0.5), "ignore": int(rng.random() < 0.5)}
        for _ in range(12)
    ]
    bad = [
        5,
        {},
        {"image_id": 9},
        {"category_id": None},
        {"bbox": [1, 2]},
        {"bbox": [1, 1, -1, 1]},
        {"bbox": [1, 1, 0, 1]},
    ]
    mixed: list[Any] = list(good)
    for change in bad:
        mixed.insert(int(rng.integers(len(mixed))), good[0] | change if isinstance(change, dict) and change else change)
    expected = truth.from_content("name", content(annotations=good))
    found = truth.from_content("name", content(annotations=mixed), max_bad_share=1)
    for name in ("image", "category", "boxes", "areas", "crowd", "ignored"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), err_msg=name)
    assert sum(num for what, num in found.odd.items() if "left out" in what) == len(bad)


def test_frequencies_are_those_of_lvis():
    categories = [{"id": i, "name": str(i), "frequency": f} for i, f in enumerate(("r", "f", "x", None, "c"), start=1)]
    found = truth.from_content("name", content(categories=categories))
    assert found.frequencies == ["r", "f", None, None, "c"]
    assert found.odd["category without a frequency"] == 2
    assert not found.federated
    images = [{"id": 7, "neg_category_ids": []}, {"id": 3}]
    found = truth.from_content("name", content(images=images, categories=categories))
    assert found.federated
    assert found.places([7, 3, 7]).tolist() == [0, 1]
    assert found.places([]).tolist() == []
    assert found.places(None).tolist() == [0, 1]


def test_entries_in_the_order_of_their_ids():
    odd = collections.Counter()
    entries = [{"id": "b"}, {"id": 10}, {"id": "9"}, {"id": 2.0}, {"id": 10}]
    ordered, ids = truth.in_order(entries, "w", odd)
    assert [entry["id"] for entry in ordered] == [2.0, "9", 10, "b"]
    assert ids.ids == [2, "9", 10, "b"]
    assert odd == {"id with a decimal point": 1, "entry listed twice": 1}
    with pytest.raises(DataError, match=r"w\[1\] has the id \"2\" of \[0\], which is another one"):
        truth.in_order([{"id": 2}, {"id": "2", "name": "x"}], "w", odd)


def test_what_json_calls_a_value():
    assert [truth.json_kind(x) for x in ({}, [], 3, None)] == ["JSON object", "JSON list", "JSON value", "JSON value"]


def test_unusable_annotations_are_counted_once_and_refused_above_a_share():
    odd, entries = collections.Counter(), [{"n": i} for i in range(4)]
    unusable = {"is red": np.array([1, 0, 0, 1], bool), "is big": np.array([1, 1, 0, 0], bool)}
    bad = truth.refuse(unusable, entries, "f", max_bad_share=0.75, odd=odd)
    assert bad.tolist() == [True, True, False, True]
    assert odd == {"annotation left out: is red": 2, "annotation left out: is big": 1}
    with pytest.raises(DataError, match=r"f: 3 of 4 .*annotations\[0\] is red: {\"n\": 0}.*allows 74\.00%"):
        truth.refuse(unusable, entries, "f", max_bad_share=0.74, odd=odd)


def test_boxes_of_another_form_are_refused_unless_all_may_be_bad():
    odd, images, boxes = collections.Counter(), [{"height": 90, "width": 90}], np.full((3, 4), 0.5)
    options = {"images": images, "image": np.zeros(3, int), "name": "f", "odd": odd}
    with pytest.raises(DataError, match="f: its 3 boxes look relative"):
        truth.check_form(boxes, **options, max_bad_share=0.99)
    truth.check_form(boxes, **options, max_bad_share=1)
    assert odd["box below a pixel"] == 3
    assert [num for what, num in odd.items() if "look relative" in what] == [3]
