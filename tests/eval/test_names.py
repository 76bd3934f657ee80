"""The share of found boxes with the right name, against counts by hand."""

import json

import numpy as np
import pytest

from detclipv2_jax import commands
from detclipv2_jax.eval import names

TRUTH = {
    "images": [{"id": 7}, {"id": 8}],
    "categories": [
        {"id": 1, "name": "star", "frequency": "f"},
        {"id": 2, "name": "key", "frequency": "r"},
        {"id": 3, "name": "moon", "frequency": "r"},
    ],
    "annotations": [
        {"id": 1, "image_id": 7, "category_id": 1, "bbox": [0, 0, 10, 10]},
        {"id": 2, "image_id": 7, "category_id": 2, "bbox": [20, 0, 10, 10]},
        {"id": 3, "image_id": 8, "category_id": 1, "bbox": [0, 0, 10, 10]},
        {"id": 4, "image_id": 8, "category_id": 3, "bbox": [0, 0, 50, 50], "iscrowd": 1},
    ],
}


def row(image, category, box, score):
    return {"image_id": image, "category_id": category, "bbox": box, "score": score}


FOUND = [
    row(7, 1, [0, 0, 10, 9], 0.2),  # right, but another word of another box of that object has a higher score
    row(7, 3, [0, 0, 10, 8], 0.6),
    row(7, 2, [20, 0, 10, 10], 0.3),  # right; what overlaps it less than half does not name it
    row(7, 1, [26, 0, 10, 10], 0.9),
    row(8, 1, [0, 0, 10, 5], 0.9),  # IoU of exactly 1/2: not found
]


def test_counts_by_hand():
    scores = names.evaluate(TRUTH, FOUND)
    assert scores == {"found": 2 / 3, "top1": 1 / 2, "foundr": 1.0, "top1r": 1.0, "foundf": 1 / 2, "top1f": 0.0}
    only = names.evaluate(TRUTH, [row for row in FOUND if row["image_id"] == 8], image_ids=[8])
    assert only == {"found": 0.0, "top1": -1.0, "foundr": -1.0, "top1r": -1.0, "foundf": 0.0, "top1f": -1.0}


def test_boxes_that_share_nothing_do_not_overlap_however_thin_they_are():
    boxes = np.array([[0, 0, 9, 0.4], [20, 8, 0.25, 9], [50, 50, 0.5, 0.5]])
    np.testing.assert_array_equal(names._iou(boxes, boxes), np.eye(3))


def test_a_table_has_percents_and_dashes():
    assert names.table({"found": 0.0, "top1": -1.0, "foundr": 0.125}) == "  found   0.0   top1     - foundr  12.5"


def test_order_and_parts_of_the_detections_do_not_matter():
    rng = np.random.default_rng(0)
    boxes = [[*rng.uniform(0, 80, 2), *rng.uniform(10, 20, 2)] for _ in range(30)]
    truth = {
        "images": [{"id": i} for i in "abc"],  # ids may be texts
        "categories": [{"id": i} for i in range(5)],
        "annotations": [
            {"id": i, "image_id": "abc"[i % 3], "category_id": int(rng.integers(5)), "bbox": box}
            for i, box in enumerate(boxes)
        ],
    }
    found = [
        row("abc"[i % 3], int(rng.integers(5)), [x + 1, y, width, height], float(rng.random()))
        for i, (x, y, width, height) in enumerate(boxes * 4)
    ]
    expected = [
        max(
            (of for of in found if of["image_id"] == own["image_id"] and best_match(of, truth) is own),
            key=lambda of: of["score"],
        )["category_id"]
        == own["category_id"]
        for own in truth["annotations"]
    ]
    assert names.evaluate(truth, found) == {"found": 1.0, "top1": np.mean(expected)}
    rng.shuffle(found)
    assert names.evaluate(truth, iter([found[:50], found[50:]])) == {"found": 1.0, "top1": np.mean(expected)}


def best_match(found, truth):
    own = [row for row in truth["annotations"] if row["image_id"] == found["image_id"]]
    return max(own, key=lambda row: iou(row["bbox"], found["bbox"]))


def iou(a, b):
    across, down = (max(0.0, min(a[i] + a[i + 2], b[i] + b[i + 2]) - max(a[i], b[i])) for i in (0, 1))
    return across * down / (a[2] * a[3] + b[2] * b[3] - across * down)


def test_the_command_prints_them_last(tmp_path, capsys):
    for name, content in (("truth", TRUTH), ("found", FOUND)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    files = [f"--annotations={tmp_path}/truth.json", f"--detections={tmp_path}/found.json"]
    assert commands.run(names.command, arguments=files) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["top1"] == pytest.approx(1 / 2)
    assert commands.run(names.command, arguments=[*files, f"--annotations={tmp_path}/found.json"]) == 1
    assert "no COCO annotation file" in capsys.readouterr().err


def test_boxes_that_are_to_be_ignored_are_left_out():
    box = [0, 0, 10, 10]
    truth = {
        "images": [{"id": 1}],
        "categories": [{"id": 1}],
        "annotations": [
            {"id": i, "image_id": 1, "category_id": 1, "bbox": [20 * i, 0, 10, 10], **flag}
            for i, flag in enumerate(({}, {"ignore": 1}, {"iscrowd": 1}))
        ],
    }
    assert names.evaluate(truth, [row(1, 1, box, 0.5)]) == {"found": 1.0, "top1": 1.0}
    # also where the boxes of the images are mixed
    truth["images"].append({"id": 2})
    others = [of | {"image_id": 2, "id": 9 + i} for i, of in enumerate(truth["annotations"][::-1])]
    truth["annotations"] = [of for pair in zip(others, truth["annotations"], strict=True) for of in pair]
    assert names.evaluate(truth, [row(1, 1, box, 0.5)]) == {"found": 0.5, "top1": 1.0}
