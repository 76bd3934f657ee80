"""Truths and detections as the field's tools write them: both evaluators repair and count alike, or name the entry."""

import copy
import json
import math
import os

import numpy as np
import pytest
from pycocotools import mask as mask_lib

from detclipv2_jax import commands
from detclipv2_jax.data import annotations, box_json, checks, truth
from detclipv2_jax.eval import coco, detections, lvis

IDS = "annotation id missing, 0, repeated or no number, which changes nothing"


def make_truth(num_images=3, num_categories=2):
    """Boxes of 20 to 50 px, two of them an image."""
    images = [{"id": i + 1, "file_name": f"{i}.jpg", "width": 200, "height": 150} for i in range(num_images)]
    categories = [{"id": c + 1, "name": f"thing {c}"} for c in range(num_categories)]
    rows = [
        {"id": 2 * i + k + 1, "image_id": i + 1, "category_id": (i + k) % num_categories + 1}
        | {"bbox": [100.0 * k + 5 * i, 60, 20 + 10 * k, 40]}
        for i in range(num_images)
        for k in range(2)
    ]
    return {"images": images, "annotations": rows, "categories": categories}


def perfect(content):
    keys = ("image_id", "category_id", "bbox")
    return [{key: row[key] for key in keys} | {"score": 0.9 - i / 100} for i, row in enumerate(content["annotations"])]


def scored(content, rows, **options):
    """Returns the AP and the counts of both evaluators, which must be equal."""
    read = truth.read(content, **options)
    pairs = [module.evaluate(read, copy.deepcopy(rows))["AP"] for module in (coco, lvis)]
    assert pairs[0] == pytest.approx(pairs[1], abs=1e-9)
    return pairs[0], read.odd


def set_all(key, values, *, of="annotations"):
    """Returns the change that gives the entries of a list their values of a key, those of `None` none at all."""

    def change(content):
        for entry, value in zip(content[of], values, strict=False):
            entry[key] = value

    return change


def remove(key, *, of="annotations"):
    def change(content):
        for entry in content[of]:
            entry.pop(key, None)

    return change


def rename_ids(new):
    """Returns the change that gives images other ids, in the annotations too."""

    def change(content):
        for image in content["images"]:
            image["id"] = new(image["id"])
        for row in content["annotations"]:
            row["image_id"] = new(row["image_id"])

    return change


NOT_FINITE = "area that is NaN or infinite"
STRANGE = "area more than twice or below a thousandth of its box's: sizes are judged by it"
REPAIRED = {
    "annotation ids from 0": (set_all("id", range(6)), {IDS: 1}),
    "annotation ids all 0": (set_all("id", [0] * 6), {IDS: 6}),
    "annotation ids twice": (set_all("id", [1, 1, 2, 2, 3, 3]), {IDS: 3}),
    "annotation ids missing": (remove("id"), {IDS: 6}),
    "annotation ids null": (set_all("id", [None] * 6), {IDS: 6}),
    "annotation ids lists": (set_all("id", [[1]] * 6), {IDS: 6}),
    "annotation ids as text": (set_all("id", ["a0", "a1", "a2", "a3", "a4", "a5"]), {}),
    "area null": (set_all("area", [None, 2.0]), {"area that is no number": 1}),
    "area text": (set_all("area", ["800", "x", "1e3"]), {"area that is no number": 3}),
    "area NaN": (set_all("area", [math.nan, math.inf, None]), {"area that is no number": 1, NOT_FINITE: 2}),
    "area without end": (set_all("area", [10**400, -(10**400)]), {NOT_FINITE: 2}),
    "area empty": (set_all("area", [""]), {"area that is no number": 1}),
    "area true": (set_all("area", [True, [1]]), {"area that is no number": 2}),
    "area 0": (set_all("area", [0, -3]), {"area of 0 or less of a box that has one": 2}),
    "area of another scale": (set_all("area", [0.01, 2404, 1605, 1.2]), {STRANGE: 2}),
    "iscrowd null": (set_all("iscrowd", [None] * 4), {"iscrowd that is no whole number": 4}),
    "iscrowd text": (set_all("iscrowd", ["0", "false", "", "No"]), {"iscrowd that is no whole number": 4}),
    "iscrowd false": (set_all("iscrowd", [False] * 6), {}),
    "image_id as text": (set_all("image_id", ["1", " 1", 2, 2]), {"image_id of another type than the image's": 2}),
    "image_id with a point": (set_all("image_id", [1.0, 1]), {"image_id of another type than the image's": 1}),
    "category_id as text": (
        set_all("category_id", ["1", "2"]), {"category_id of another type than the category's": 2}
    ),
    "image ids as text": (rename_ids(lambda i: f"photo {i}"), {}),
    "image ids of both types": (rename_ids(lambda i: i if i % 2 else f"b{i}"), {}),
    "huge image ids": (rename_ids(lambda i: i + (1 << 63)), {}),
    "image ids with a point": (set_all("id", [1.0, 2.0], of="images"), {"id with a decimal point": 2}),
    "frequency of some": (set_all("frequency", ["f"], of="categories"), {"category without a frequency": 1}),
    "frequency of another kind": (set_all("frequency", ["f", 3], of="categories"), {"category without a frequency": 1}),
    "category names twice": (set_all("name", ["A", "a"], of="categories"), {"category called like another": 1}),
}  # fmt: skip


@pytest.mark.parametrize("name", REPAIRED)
def test_what_is_repaired_changes_no_score_and_is_counted(name):
    change, counts = REPAIRED[name]
    content = make_truth()
    change(content)
    ap, odd = scored(content, perfect(content))
    assert ap == pytest.approx(1.0, abs=1e-9)
    assert {what: num for what, num in odd.items() if "image_id" not in what or what in counts} == counts
    plain, read = truth.read(make_truth()), truth.read(content)
    np.testing.assert_array_equal(read.boxes, plain.boxes)
    assert not (read.crowd | read.ignored).any()
    given = {"area null": {1: 2.0}, "area text": {0: 800.0, 2: 1000.0}}
    given = given.get(name) or dict(enumerate([0.01, 2404, 1605, 1.2] if name == "area of another scale" else []))
    assert read.areas.tolist() == [given.get(i, area) for i, area in enumerate(plain.areas.tolist())]
    assert [read.category_ids.ids[i] for i in read.category] == [1, 2, 2, 1, 1, 2]
    ids = {image["file_name"]: key for image, key in zip(read.images, read.image_ids.ids, strict=True)}
    assert [read.image_ids.ids[i] for i in read.image] == [ids[f"{i // 2}.jpg"] for i in range(6)]


def test_what_is_left_out_takes_its_own_area_and_flags():
    content = make_truth()
    for i, row in enumerate(content["annotations"]):
        row |= {"area": 100.0 + i, "iscrowd": int(i == 3), "ignore": int(i == 4)}
    content["annotations"][1]["bbox"] = None
    content["annotations"][2]["bbox"] = [1, 2, 0, 9]
    read = truth.read(content, max_bad_share=0.2)
    assert read.areas.tolist() == [100.0, 103.0, 104.0, 105.0]
    assert read.crowd.tolist() == [False, True, False, False]
    assert read.ignored.tolist() == [False, False, True, False]
    for row in content["annotations"]:
        row["bbox"] = None
    with pytest.raises(ValueError, match="has no usable box: there is nothing to score against"):
        truth.read(content, max_bad_share=1)


@pytest.mark.parametrize("share", [math.nan, -0.1, 1.1, math.inf])
def test_a_share_that_is_none_allows_nothing(share):
    content = make_truth()
    content["annotations"][1]["bbox"] = None
    with pytest.raises(ValueError, match=r"max_bad_share is .*; allowed: 0 to 1"):
        truth.read(content, max_bad_share=share)
    with pytest.raises(ValueError, match=r"max_bad_share is .*; allowed: 0 to 1"):
        checks.refuse_above_share({}, 1, share, what="boxes", where="f")
    with pytest.raises(ValueError, match=r"max_bad_share is .*; allowed: 0 to 1"):
        checks.check_share(share)


def test_images_stand_in_the_order_of_their_ids_numbers_first():
    content = make_truth(num_images=7)
    for image, row, key in zip(
        content["images"], content["annotations"], ["10", 9, "b", 100, "-1", "a", 11], strict=False
    ):
        image["id"], row["image_id"] = key, key
    read = truth.read(content, max_bad_share=1)
    assert read.image_ids.ids == [9, "10", 11, 100, "-1", "a", "b"]
    assert read.places(["a", 9, 100, "100", 9]).tolist() == [0, 3, 5]
    with pytest.raises(ValueError, match=r"2 of 3 evaluated images are unknown: 12, \"c\""):
        read.places([12, 9, "c"])


@pytest.mark.parametrize("value", [math.nan, math.inf, -3, 0, 0.5, None, True, "200", [200], 1 << 70, 70_000])
@pytest.mark.parametrize("key", ["width", "height"])
def test_sizes_of_images_that_say_nothing_are_unknown(key, value):
    content = make_truth()
    content["images"][1][key] = value
    assert annotations.size_of(content["images"][1]) == (0, 0)
    assert scored(content, perfect(content)) == (pytest.approx(1.0), {})


def test_lists_of_lvis_belong_to_their_image():
    content = make_truth()
    content["images"][2] |= {"neg_category_ids": [2, "1"], "not_exhaustive_category_ids": [1, 99]}
    content["images"][0] |= {"neg_category_ids": None, "not_exhaustive_category_ids": [2]}
    read = truth.read(content)
    assert read.absent.tolist() == [[2, 1], [2, 0]]
    assert read.incomplete.tolist() == [[0, 1], [2, 0]]
    assert read.odd["not_exhaustive_category_ids that are not listed"] == 1
    assert read.odd["neg_category_ids of another type than the category's id"] == 1
    assert read.odd["box of a category that its image lists as absent"] == 2


def test_an_id_that_may_have_been_rounded_names_no_image():
    content = make_truth()
    for image in content["images"]:
        image["id"] += 1 << 60
    for row in content["annotations"]:
        row["image_id"] = float(row["image_id"] + (1 << 60))  # pandas, of a column with a gap: all are one number
    with pytest.raises(ValueError, match=r"6 of 6 annotations cannot be used .*image_id is not listed"):
        truth.read(content)
    assert annotations.usable_id(2.0**53) == 1 << 53


@pytest.mark.parametrize("where", ["first", "last"])
def test_a_list_that_stands_twice_in_a_file_is_refused(where, tmp_path):
    """Of two lists of one name, as joined by hand, json takes the last one."""
    content, path = make_truth(), tmp_path / "t.json"
    half = content | {"annotations": content["annotations"][:2]}
    more = f'"annotations": {json.dumps(content["annotations"][2:])}'
    text = json.dumps(half)
    path.write_text(f"{{{more}, {text[1:]}" if where == "first" else f"{text[:-1]}, {more}}}")
    for read in (truth.read, box_json.load_json):
        with pytest.raises(ValueError, match=r"t\.json .*: an object has 'annotations' twice"):
            read(path)
    content["info"] = {"description": "annotations", "annotations": 3}  # another object may have it
    path.write_text(json.dumps(content))
    assert len(truth.read(path).boxes) == 6


def test_an_image_listed_twice_is_one():
    content = make_truth()
    content["images"].append(dict(content["images"][1]))
    content["categories"].append(dict(content["categories"][0]))
    assert scored(content, perfect(content)) == (pytest.approx(1.0), {"entry listed twice": 2})


def test_a_photo_with_two_ids_is_counted():
    content = make_truth()
    rows = perfect(content)
    content["images"].append(content["images"][1] | {"id": 77})
    said = "image whose photo has another id, too: it is scored against the boxes of each alone"
    assert scored(content, rows) == (pytest.approx(1.0), {said: 1})


@pytest.mark.parametrize("with_ids", [True, False])
def test_an_annotation_listed_twice_is_one_and_an_equal_box_is_counted(with_ids):
    content = make_truth()
    if not with_ids:
        remove("id")(content)
    rows = perfect(content)
    content["annotations"] += copy.deepcopy(content["annotations"][:4])  # of a file that was joined with itself
    num_odd = 4 if with_ids else 10
    assert scored(content, rows) == (pytest.approx(1.0), {IDS: num_odd, "annotation listed twice": 4})
    assert len(truth.read(content).boxes) == 6
    assert len(truth.read(content | {"annotations": [content["annotations"][0]] * 2}).boxes) == 1
    content["annotations"].append(content["annotations"][5] | {"id": 99})
    said = "box equal to another of its image and category, which has to be found twice"
    counts = {IDS: num_odd, "annotation listed twice": 4, said: 1}
    ap, odd = scored(content, rows)
    assert odd == counts
    assert ap < 0.9  # as pycocotools and LVIS count it
    assert scored(content, [*rows, rows[5] | {"score": 0.1}]) == (pytest.approx(1.0), counts)
    content["annotations"][-1]["category_id"] = 1  # another thing at the same place
    assert truth.read(content).odd == {IDS: num_odd, "annotation listed twice": 4}


BAD = {
    "null": (None, "is no object"),
    "a number": (7, "is no object"),
    "an unlisted image": ({"image_id": 99}, "image_id is not listed"),
    "no image": ({"image_id": None}, "image_id is not listed"),
    "an image that is a list": ({"image_id": [1]}, "image_id is not listed"),
    "an image that is true": ({"image_id": True}, "image_id is not listed"),
    "an unlisted category": ({"category_id": 9}, "category_id is not listed"),
    "another text": ({"category_id": "thing"}, "category_id is not listed"),
    "bbox null": ({"bbox": None}, "bbox is not four numbers"),
    "bbox empty": ({"bbox": []}, "bbox is not four numbers"),
    "bbox of three": ({"bbox": [1, 2, 3]}, "bbox is not four numbers"),
    "bbox of five": ({"bbox": [1, 2, 3, 4, 5]}, "bbox is not four numbers"),
    "bbox of texts": ({"bbox": ["1", "2", "3", "4"]}, "bbox is not four numbers"),
    "bbox a text": ({"bbox": "1 2 3 4"}, "bbox is not four numbers"),
    "bbox NaN": ({"bbox": [1, 2, math.nan, 4]}, "bbox is not four numbers"),
    "bbox infinite": ({"bbox": [1, 2, math.inf, 4]}, "bbox is not four numbers"),
    "bbox enormous": ({"bbox": [1, 2, 1e308, 1e308]}, "bbox is not four numbers"),
    "bbox of a thousand kilometres": ({"bbox": [1, 2, 1e10, 9]}, "bbox is not four numbers"),
    "bbox with true": ({"bbox": [True, 2, 30, 40]}, "bbox is not four numbers"),
    "bbox with false": ({"bbox": [0.5, False, 30, 40]}, "bbox is not four numbers"),
    "negative width": ({"bbox": [50, 50, -20, 10]}, "bbox has a negative size"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_used_is_named_or_counted(name, tmp_path):
    change, reason = BAD[name]
    content = make_truth()
    row = content["annotations"][3] | change if isinstance(change, dict) else change
    rows = perfect(content)
    content["annotations"].append(row)
    (tmp_path / "t.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"t\.json: 1 of 7 annotations .*annotations\[6\] {reason}.*repair the file"):
        truth.read(tmp_path / "t.json")
    ap, odd = scored(content, rows, max_bad_share=0.2)
    assert ap == pytest.approx(1.0, abs=1e-9)
    assert [num for what, num in odd.items() if what.startswith(f"annotation left out: {reason}")] == [1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (remove("id", of="images"), r"images\[0\] .* has no id"),
        (set_all("id", [None], of="images"), r"images\[0\] .* has the id null, neither a whole number nor a text"),
        (set_all("id", [[1]], of="images"), r"images\[0\] .* has the id \[1\]"),
        (set_all("id", [1.5], of="images"), r"images\[0\] .* has the id 1\.5"),
        (set_all("id", [2, 2], of="images"), r"images\[1\] has the id 2 of \[0\], which is another one"),
        (set_all("id", [2, "2"], of="images"), r'images\[1\] has the id "2" of \[0\], which is another one'),
        (remove("id", of="categories"), r"categories\[0\] .* has no id"),
        (set_all("id", [1, 1], of="categories"), r"categories\[1\] has the id 1 of \[0\]"),
        (lambda content: content["images"].append(None), r"images\[3\] is null, not an object"),
        (lambda content: content["categories"].append("cat"), r'categories\[2\] is "cat", not an object'),
        (lambda content: content["annotations"].clear(), "has no annotations: there is nothing to score"),
        (lambda content: content["images"].clear(), "has no images"),
        (lambda content: content.update(categories={"1": "cat"}), "is no COCO annotation file"),
        (set_all("iscrowd", ["perhaps"]), r'annotations\[0\] has iscrowd "perhaps"; 0 and 1 have a meaning'),
        (set_all("iscrowd", [-1]), r"annotations\[0\] has iscrowd -1; 0 and 1"),  # Open Images: not known
        (set_all("ignore", [0, 2]), r"annotations\[1\] has ignore 2; 0 and 1"),
        (set_all("ignore", [[1]]), r"annotations\[0\] has ignore \[1\]"),
        (set_all("neg_category_ids", [5], of="images"), r"image 1 has neg_category_ids 5, not a list of ids"),
    ],
)
def test_lists_that_cannot_be_used_are_an_error_with_entry_and_field(change, message):
    content = make_truth()
    change(content)
    for module in (coco, lvis):
        with pytest.raises(ValueError, match=message):
            module.evaluate(content, [])


def test_boxes_without_width_are_left_out():
    content = make_truth()
    rows = perfect(content)
    content["annotations"] += [{"id": 70 + i, "image_id": 1, "category_id": 1, "bbox": [9, 9, i, 0]} for i in range(3)]
    assert scored(content, rows) == (
        pytest.approx(1.0),
        {"box without width or height left out, which pycocotools would count as missed": 3},
    )


@pytest.mark.parametrize("flag", ["ignore", "iscrowd"])
def test_ignored_boxes_need_not_be_found_and_are_not_wrong_to_find(flag):
    content = make_truth()
    rows = perfect(content)
    hidden = {"id": 9, "image_id": 1, "category_id": 1, "bbox": [10, 10, 30, 30], flag: 1}
    content["annotations"].append(hidden)
    assert scored(content, rows)[0] == pytest.approx(1.0)
    found = [{"image_id": 1, "category_id": 1, "bbox": hidden["bbox"], "score": 0.95}]
    assert scored(content, rows + found)[0] == pytest.approx(1.0)
    expected = 1.0 if flag == "iscrowd" else scored(content, [*rows, found[0] | {"bbox": [150, 5, 9, 9]}])[0]
    assert scored(content, rows + found * 2)[0] == pytest.approx(expected)  # a crowd holds many


@pytest.mark.parametrize("part", [0, 1, 2])
def test_rows_of_detections_are_counted_through_all_parts(part):
    content = make_truth()
    parts = [perfect(content)[:3] for _ in range(3)]
    parts[part][1] = parts[part][1] | {"score": None}
    with pytest.raises(ValueError, match=rf"row {3 * part + 1} is "):
        list(detections.read(iter(parts)))
    parts[part][1] |= {"score": 0.5, "image_id": 77}
    read = truth.read(content)
    with pytest.raises(ValueError, match=rf"row {3 * part + 1}: 1 of "):
        detections.find(iter(parts), read, read.places(None))


# --- outlines


def outline_cases():
    rng = np.random.default_rng(0)
    for _ in range(12):
        mask = np.zeros((30, 40), np.uint8)
        y, x = rng.integers(0, 25), rng.integers(0, 35)
        mask[y : y + rng.integers(1, 30), x : x + rng.integers(1, 40)] = 1
        mask[rng.random(mask.shape) < 0.2] = 0
        mask[y, x] = 1
        if rng.random() < 0.3:  # a run that begins low in one column, fills others and ends high in the last one
            mask.T[:] = (np.arange(1200) >= rng.integers(20, 29)).reshape(40, 30)
            mask[:, rng.integers(1, 6) :] = 0
        packed = mask_lib.encode(np.asfortranarray(mask))
        flat = mask.T.ravel().tolist()
        runs, value = [0], 0
        for pixel in flat:
            if pixel != value:
                runs.append(0)
                value = pixel
            runs[-1] += 1
        for counts in (packed["counts"].decode(), runs):
            yield {"size": [30, 40], "counts": counts}, mask_lib.toBbox(packed).tolist()
    yield [[5, 5, 25, 5, 25, 20], [30, 8, 33, 9, 31, 22.5]], [5, 5, 28, 17.5]
    yield [5, 5, 25, 5, 25, 20], [5, 5, 20, 15]


def test_boxes_of_outlines_are_those_of_pycocotools():
    for outline, expected in outline_cases():
        assert annotations.box_of_outline(outline) == expected


@pytest.mark.parametrize(
    "outline",
    [
        [], [[]], [[1, 2]], [[1, 2, 3, 4, 5]], [["a"] * 6], None, 3, "x", {}, {"size": [3, 3]},
        [[1, 2, math.nan, 4, 5, 6]],
        {"size": [3, 3], "counts": "~~~"}, {"size": [3, 3], "counts": [0, 10]}, {"size": [0, 3], "counts": [0, 1]},
        {"size": [3, 3], "counts": [9]}, {"size": [3, 3], "counts": [-1, 2]}, {"size": [3, 3], "counts": "P" * 40},
        {"size": [1 << 70, 3], "counts": [0, 1]}, {"size": [3, 3], "counts": [0, True]},
    ],
)  # fmt: skip
def test_broken_outlines_have_no_box(outline):
    assert annotations.box_of_outline(outline) is None


def test_outlines_stand_in_for_boxes(tmp_path):
    content = make_truth()
    rows = perfect(content)
    for row, (x, y, w, h) in zip(content["annotations"], [row["bbox"] for row in rows], strict=True):
        row["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    content["annotations"][0]["bbox"] = None
    content["annotations"][1]["bbox"] = []
    del content["annotations"][2]["bbox"]
    (tmp_path / "t.json").write_text(json.dumps(content))
    read = truth.read(tmp_path / "t.json")
    assert read.odd == {"box taken from the outline for want of a bbox": 3}
    assert coco.evaluate(read, rows)["AP"] == lvis.evaluate(read, rows)["AP"] == pytest.approx(1.0)


# --- boxes of another form


def many_boxes(seed, num=60, *, size=(640, 480)):
    """Returns boxes as corners, within photos of a size."""
    rng = np.random.default_rng(seed)
    corners = np.sort(rng.uniform(1, 1, (num, 2, 2)) * rng.uniform(2, np.array(size) - 2, (num, 2, 2)), axis=1)
    corners[:, 1] = np.minimum(corners[:, 1] + 3, np.array(size) - 1)
    return corners.reshape(num, 4)


def with_boxes(boxes, *, size=(640, 480)):
    images = [{"id": i, "width": size[0], "height": size[1]} for i in range(1, 1 + len(boxes))]
    rows = [{"id": i, "image_id": i, "category_id": 1, "bbox": box} for i, box in enumerate(boxes.tolist(), start=1)]
    return {"images": images, "annotations": rows, "categories": [{"id": 1, "name": "a"}]}


@pytest.mark.parametrize("seed", range(5))
def test_boxes_of_another_form_are_refused_and_right_ones_are_not(seed):
    corners = many_boxes(seed)
    right = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1)
    assert truth.read(with_boxes(right)).odd == {}
    with pytest.raises(ValueError, match=r"its 60 boxes look like x1, y1, x2, y2; .*raise max_bad_share to 1"):
        truth.read(with_boxes(corners))
    for relative in (right, corners):
        with pytest.raises(ValueError, match="its 60 boxes look relative to the image's size"):
            truth.read(with_boxes(relative / [640, 480, 640, 480]))
    assert truth.read(with_boxes(corners), max_bad_share=1).odd["box cut at the border"] > 10
    photo = np.array([640, 480, 640, 480])
    small = np.concatenate([right[:, :2], right[:, 2:] / 20 + 2], axis=1)  # all leave room: nothing is cut as corners
    begin = np.concatenate([small[:, :2] / 2.4, small[:, :2] / 2.4 + small[:, 2:]], axis=1)
    middle = np.concatenate([right[:, :2] + right[:, 2:] / 2, right[:, 2:]], axis=1)
    assert truth.read(with_boxes(right[:, [1, 0, 3, 2]], size=(480, 640))).odd == {}
    for boxes, look in (
        (right[:, [1, 0, 3, 2]], "y, x, height, width"),
        (begin, "x1, y1, x2, y2"),
        (middle, "centre x, centre y, width, height"),
        (np.clip(right / photo * 100, 0, 100), "percent of the image's size"),
    ):
        with pytest.raises(ValueError, match=f"its 60 boxes look like {look}; they must"):
            truth.read(with_boxes(boxes))
        assert truth.read(with_boxes(boxes), max_bad_share=1)
    for boxes in (
        small,
        np.concatenate([begin[:, :2], small[:, 2:]], axis=1),
        np.tile(right[0] / 9, (60, 1)),
    ):
        assert truth.read(with_boxes(boxes), max_bad_share=0.5)


def test_whole_photos_and_single_boxes_look_like_what_they_are():
    whole = np.tile([0.0, 0, 640, 480], (9, 1))
    close = np.tile([20.0, 15, 600, 450], (9, 1))  # as corners they would be boxes, too
    for boxes in (whole, close, close[:1], np.array([[300.0, 200, 340, 280]])):
        assert truth.read(with_boxes(boxes)).odd == {}


@pytest.mark.parametrize("box", [[150, 100, 100, 100], [-60, 20, 100, 40], [50, 50, 0.5, 20]])
def test_most_boxes_cut_or_below_a_pixel_are_refused(box):
    content = make_truth(num_images=5)  # two boxes an image
    for num in range(1, 11):
        content["annotations"][num - 1]["bbox"] = box
        if num <= 5:
            assert sum(truth.read(content).odd.values()) == num
        else:
            with pytest.raises(
                ValueError, match=rf"10 boxes look like another form .*\({num if box[2] > 1 else 0} are"
            ):
                truth.read(content)
            truth.read(content, max_bad_share=num / 10)


@pytest.mark.parametrize("flag", ["ignore", "iscrowd"])
def test_a_truth_in_which_nothing_is_to_be_found_says_so(flag):
    content = make_truth()
    set_all(flag, [1] * 5)(content)
    assert scored(content, perfect(content)) == (pytest.approx(1.0), {})
    content["annotations"][5][flag] = True
    said = "box that is a crowd's or ignored, as all are: there is nothing to be found"
    assert scored(content, perfect(content)) == (-1, {said: 6})


def test_detections_that_are_equal_are_counted():
    content = make_truth()
    rows, read = perfect(content), truth.read(content)
    near = [rows[0] | {"score": 0.1}, rows[0] | {"category_id": 2}, rows[0] | {"image_id": 3}]
    for more, num in ([], 0), (near, 0), (rows, 6), (rows[:2] * 3, 6):  # joined with themselves, or some of them
        found = detections.find(rows + more, read, read.places(None))
        assert found.odd == ({"detection equal to another one, also in its score": num} if num else {})
        assert len(found.scores) == len(rows) + len(more)


def test_detections_of_another_form_are_said():
    corners = many_boxes(7)
    right = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1)
    read = truth.read(with_boxes(right))
    rows = perfect(with_boxes(right))
    for boxes, look in ((right, None), (corners, "look like x1, y1, x2, y2"), (right / 640, "look relative to")):
        found = detections.find(
            [row | {"bbox": box} for row, box in zip(rows, boxes.tolist(), strict=True)], read, read.places(None)
        )
        assert [(look in what, num) for what, num in found.odd.items()] == ([(True, 60)] if look else [])


# --- agreement


def random_case(seed):
    """Returns a truth without LVIS's lists and detections with ties, crowds and ignored boxes."""
    rng = np.random.default_rng(seed)
    content = {"images": [{"id": int(i)} for i in rng.permutation(9)], "annotations": []}
    content["categories"] = [{"id": 3 * c, "name": str(c), "frequency": "rcf"[c % 3]} for c in range(4)]
    rows = []
    for image in content["images"]:
        for _ in range(rng.integers(0, 9)):
            box = [*rng.integers(1, 60, 2).tolist(), *rng.choice([20, 40, 110], 2).tolist()]
            row = {"image_id": image["id"], "category_id": 3 * int(rng.integers(4)), "bbox": box}
            row |= {"iscrowd": int(rng.random() < 0.15), "ignore": int(rng.random() < 0.15)}
            content["annotations"].append(row)
            for _ in range(rng.integers(0, 4)):
                moved = np.maximum(np.add(box, rng.integers(-3, 4, 4)), 1).tolist()
                category = row["category_id"] if rng.random() < 0.8 else 3 * int(rng.integers(4))
                rows.append({"image_id": image["id"], "category_id": category, "bbox": moved})
    rng.shuffle(rows)
    return content, [row | {"score": float(rng.integers(1, 40)) / 40} for row in rows]


@pytest.mark.parametrize("seed", range(12))
def test_both_evaluators_agree_on_files_that_both_can_read(seed):
    content, rows = random_case(seed)
    read = truth.read(content, max_bad_share=1)
    scores = [module.evaluate(read, rows) for module in (coco, lvis)]
    for name in ("AP", "AP50", "AP75", "APs", "APm", "APl", "APr", "APc", "APf"):
        assert scores[0][name] == pytest.approx(scores[1][name], abs=1e-9), name
    assert scores[0]["AR100"] == pytest.approx(scores[1]["AR@300"], abs=1e-9)


# --- detections


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"score": "0.9"}, "row 2 is .*its score is something else"),
        ({"score": None}, "row 2 is .*its score is something else"),
        ({"score": math.nan}, "row 2 is .*its score is something else"),
        ({"bbox": ["1", "2", "3", "4"]}, "row 2 is .*its bbox has something else"),
        ({"score": True}, "row 2 is .*its score is something else"),
        ({"bbox": [9, 9, True, 30]}, "row 2 is .*its bbox or score has true or false"),
        ({"bbox": [False, 9, 30, 30]}, "row 2 is .*its bbox or score has true or false"),
        ({"bbox": [1, 2, 3]}, "row 2 is .*its bbox has something else"),
        ({"bbox": [1, 2, 1e300, 4]}, "row 2 is .*its bbox has something else"),
        ({"bbox": [9, 9, -3, 4]}, "row 2 is .*its bbox has a negative size"),
        ({"image_id": 77}, "row 2: 1 of 3 images of the detections are unknown: 77"),
        ({"image_id": None}, "row 2: 1 of 3 images of the detections are unknown: null"),
        ({"image_id": [1]}, "row 2: 1 of 3 images of the detections are unknown"),
        ({"category_id": 77}, "row 2: 1 of 3 categories of the detections are unknown: 77"),
    ],
)
def test_detections_that_are_wrong_are_named(change, message, tmp_path):
    content = make_truth()
    rows = perfect(content)[:4]
    rows[2] |= change
    (tmp_path / "found.json").write_text(json.dumps(rows))
    for module in (coco, lvis):
        with pytest.raises(ValueError, match=rf"found\.json: {message}"):
            module.evaluate(content, tmp_path / "found.json")


@pytest.mark.parametrize("change", [{"image_id": "1"}, {"image_id": 1.0}, {"category_id": "1"}, {"category_id": 1.0}])
def test_ids_of_another_type_are_counted(change, tmp_path, capsys):
    content = make_truth()
    rows = perfect(content)
    rows[0] |= change
    for name, value in (("t.json", content), ("found.json", rows)):
        (tmp_path / name).write_text(json.dumps(value))
    for command in (coco.command, lvis.score):
        arguments = [f"--annotations={tmp_path}/t.json", f"--detections={tmp_path}/found.json"]
        assert commands.run(command, arguments=arguments) == 0
        captured = capsys.readouterr()
        printed = json.loads(captured.out.splitlines()[-1])
        assert printed["AP"] == pytest.approx(1.0)
        assert list(printed["protocol"]["repaired"].values()) == [1]
        assert "note: 1 × " in captured.err


def test_a_file_of_detections_may_have_a_mark_and_is_refused_by_name_if_it_is_no_text(tmp_path):
    content = make_truth()
    text, path = json.dumps(perfect(content)), tmp_path / "found.json"
    path.write_bytes(text.encode("utf-8-sig"))
    assert coco.evaluate(content, path)["AP"] == pytest.approx(1.0)
    for encoding in ("utf-16", "utf-16-le", "utf-32-be"):
        path.write_bytes(text.encode(encoding))
        with pytest.raises(ValueError, match=r"found\.json is UTF-.*save it as UTF-8"):
            coco.evaluate(content, path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ValueError, match="is not a regular file"):
        lvis.evaluate(content, path)
