"""COCO scores: the published numbers of the official fake results, properties, and what wrong files lead to."""

import copy
import json
import math

import numpy as np
import pytest

from detclipv2_jax import commands, files
from detclipv2_jax.data import truth as truth_lib
from detclipv2_jax.eval import coco
from detclipv2_jax.eval.detections import Found

FIXTURES = ("coco_gt_instances_val2014_100.json", "coco_dt_fakebbox100.json")


def _truth(*, frequencies=(None, None)):
    categories = [{"id": 7, "name": "cat"}, {"id": 2, "name": "dog"}]
    for category, frequency in zip(categories, frequencies, strict=True):
        category |= {"frequency": frequency} if frequency else {}
    boxes = {1: [(7, [10, 10, 50, 50]), (2, [100, 20, 40, 40])], 2: [(7, [0, 0, 200, 150])], 3: [(2, [5, 5, 20, 20])]}
    annotations = [
        {"id": i, "image_id": image, "category_id": category, "bbox": box}  # no area, no iscrowd
        for i, (image, category, box) in enumerate(
            [(image, *row) for image, rows in boxes.items() for row in rows], start=1
        )
    ]
    return {"images": [{"id": image} for image in boxes], "annotations": annotations, "categories": categories}


def _perfect(truth):
    return [
        {"image_id": a["image_id"], "category_id": a["category_id"], "bbox": a["bbox"], "score": 0.9}
        for a in truth["annotations"]
    ]


def test_published_numbers(shared_data, tmp_path, capsys):
    folder = shared_data / "eval_fixtures"
    expected = json.loads((folder / "expected.json").read_text())["coco_bbox"]
    annotations, detections = (str(folder / name) for name in FIXTURES)
    output = tmp_path / "scores.json"
    assert (
        commands.run(
            coco.command, arguments=[f"--annotations={annotations}", f"--detections={detections}", f"--output={output}"]
        )
        == 0
    )
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert printed == json.loads(output.read_text())
    for name in coco.METRICS:
        assert round(printed[name], 3) == pytest.approx(expected[name], abs=1e-9)  # published with three digits
    assert printed["protocol"]["images_evaluated"] == 100
    assert printed["protocol"]["annotations_sha256"] == files.sha256(annotations)
    # the function gives the same, whatever the order of the images (pycocotools keeps that of equal scores in an image)
    rows = json.loads((folder / FIXTURES[1]).read_text())
    untouched = copy.deepcopy(rows)
    place = {
        image_id: i for i, image_id in enumerate(np.random.default_rng(0).permutation([r["image_id"] for r in rows]))
    }
    scores = coco.evaluate(annotations, sorted(rows, key=lambda row: place[row["image_id"]]))
    assert rows == untouched
    assert scores == {name: printed[name] for name in coco.METRICS}
    assert f"{100 * scores['AP']:.1f}" in coco.table(scores)


def test_perfect_missing_and_wrong_boxes():
    truth = _truth()
    scores = coco.evaluate(truth, _perfect(truth))
    assert list(scores) == list(coco.METRICS)
    assert [scores[name] for name in ("AP", "AP50", "AR100", "APs", "APm", "APl")] == pytest.approx([1.0] * 6, abs=1e-9)
    half = coco.evaluate(truth, [row for row in _perfect(truth) if row["category_id"] == 7])
    assert half["AP"] == 0.5
    moved = [row | {"bbox": [row["bbox"][0] + 300, *row["bbox"][1:]]} for row in _perfect(truth)]
    assert coco.evaluate(truth, moved)["AP50"] == 0.0


def test_no_detections_score_zero():
    scores = coco.evaluate(_truth(), [])
    assert scores["AP"] == scores["AR100"] == 0.0


def test_images_that_were_not_evaluated_do_not_count():
    truth = _truth()
    rows = [row for row in _perfect(truth) if row["image_id"] == 1]
    assert coco.evaluate(truth, rows)["AR100"] < 1.0
    assert coco.evaluate(truth, rows, image_ids=[1])["AR100"] == 1.0
    with pytest.raises(ValueError, match="1 of 2 images of the detections are unknown: 3"):
        coco.evaluate(truth, [*rows, *_perfect(truth)[-1:]], image_ids=[1, 2])


def test_frequencies_average_their_categories():
    truth = _truth(frequencies=("r", "f"))
    scores = coco.evaluate(truth, [row for row in _perfect(truth) if row["category_id"] == 2])
    assert (scores["APr"], scores["APc"], scores["APf"]) == (0.0, -1.0, 1.0)
    assert scores["AP"] == 0.5
    unseen = _truth(frequencies=("r", "f"))
    unseen["categories"].append({"id": 9, "name": "owl", "frequency": "f"})  # without a box: it measures nothing
    assert coco.evaluate(unseen, _perfect(unseen))["APf"] == pytest.approx(1.0)
    assert "APc     -" in coco.table(scores)


def _grid(count, *, side=100.0):
    """Returns annotations of a rare category in a row on one image."""
    boxes = [[2 * side * i, 0.0, side, side] for i in range(count)]
    annotations = [{"id": i, "image_id": 1, "category_id": 7, "bbox": box} for i, box in enumerate(boxes, start=1)]
    return {
        "images": [{"id": 1}],
        "annotations": annotations,
        "categories": [{"id": 7, "name": "cat", "frequency": "r"}],
    }


def test_rare_ap_counts_a_hundred_detections_all_sizes_and_all_thresholds():
    truth = _grid(40)
    rows = [row | {"score": 0.9 - 0.01 * i} for i, row in enumerate(_perfect(truth))]
    scores = coco.evaluate(truth, rows)
    assert scores["APr"] == scores["AP"] == pytest.approx(1.0)  # with 10 detections it would be 0.25
    assert scores["AR10"] == pytest.approx(0.25)
    for row in rows:
        row["bbox"] = [*row["bbox"][:3], 80.0]
    scores = coco.evaluate(truth, rows)
    assert scores["APr"] == scores["AP"] == pytest.approx(0.7)  # 0.5, 0.55, ... 0.8


@pytest.mark.parametrize(("height", "found"), [(50.0, ("AP50",)), (49.0, ()), (75.0, ("AP50", "AP75"))])
def test_an_overlap_of_exactly_the_threshold_is_enough(height, found):
    truth = _grid(1)
    scores = coco.evaluate(truth, [row | {"bbox": [0.0, 0.0, 100.0, height]} for row in _perfect(truth)])
    assert {name for name in ("AP50", "AP75") if scores[name] > 0} == set(found)


def test_area_is_that_of_the_box_unless_given():
    for changes, small in (({}, 1.0), ({"area": 2000}, -1.0)):
        truth = _grid(1)
        truth["annotations"][0] |= {"bbox": [0, 0, 20, 50]} | changes
        scores = coco.evaluate(truth, _perfect(truth))
        assert (scores["APs"], scores["APm"]) == pytest.approx((small, -small))
    truth["annotations"][0] = {"id": 1, "image_id": 1, "category_id": 7, "bbox": [0, 0, 20, 60]}
    assert coco.evaluate(truth, _perfect(truth))["APs"] == -1.0


@pytest.mark.parametrize("sides", [(10, 200), (200, 10)])
def test_a_wrong_detection_is_of_the_size_of_its_own_area(sides):
    truth = _grid(1)
    truth["annotations"][0]["bbox"] = [0, 0, 20, 50]
    wrong = {"image_id": 1, "category_id": 7, "bbox": [300, 300, *sides], "score": 1.0}
    scores = coco.evaluate(truth, [*_perfect(truth), wrong])
    assert (scores["AP"], scores["APs"]) == pytest.approx((0.5, 1.0))


def test_all_detections_of_all_sizes_are_matched_at_the_overlap_asked_for():
    truth = truth_lib.read(_grid(1))
    boxes = np.array([[500.0, 0, 10, 10]] * 150 + [[0, 0, 100, 79], [0, 0, 100, 80]])
    zeros = np.zeros(len(boxes), int)
    (image,) = filter(
        None, coco.matched(truth, Found(zeros, zeros, boxes, np.linspace(0.9, 0.1, 152)), iou=0.8).evalImgs
    )
    assert np.flatnonzero(image["dtMatches"][0]).tolist() == [151]
    assert not image["gtIgnore"].any()
    assert not image["dtIgnore"].any()


@pytest.mark.parametrize("flag", ["iscrowd", "ignore"])
def test_crowds_and_boxes_to_be_ignored_neither_count_nor_punish(flag):
    truth = _grid(2)
    truth["annotations"][1][flag] = 1
    rows = _perfect(truth)
    rows[1]["score"] = 1.0  # on the crowd
    assert coco.evaluate(truth, rows)["AP"] == pytest.approx(1.0)
    assert coco.evaluate(truth, rows[:1])["AR100"] == pytest.approx(1.0)
    del truth["annotations"][1][flag]
    assert coco.evaluate(truth, rows[:1])["AR100"] == pytest.approx(0.5)


def test_nothing_small_is_minus_one():
    truth = _truth()
    truth["annotations"] = [a for a in truth["annotations"] if a["bbox"][2] * a["bbox"][3] > 96**2]
    assert coco.evaluate(truth, _perfect(truth))["APs"] == -1.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_id": 99}, "1 of 3 images of the detections are unknown: 99; they belong to another annotation file"),
        ({"category_id": "cat"}, 'row 3: 1 of 3 categories of the detections are unknown: "cat"'),
        ({"bbox": [1, 2, 3]}, r"row 3 is .*\[1, 2, 3\].*all must be finite numbers"),
        ({"bbox": [1, 2, 3, [4]]}, "row 3 is .*, not an object with image_id"),
        ({"score": math.nan}, "row 3 is .*nan.*, not an object with image_id"),
        ({"bbox": None}, "row 3 is .*, not an object with image_id, category_id, bbox"),
        ({"score": "high"}, "row 3 is .*, not an object with image_id"),
    ],
)
def test_wrong_rows_are_named(change, message):
    truth = _truth()
    rows = _perfect(truth)
    rows[3] |= change
    with pytest.raises(ValueError, match=message):
        coco.evaluate(truth, rows)


def _command(folder, truth, rows, *more):
    for name, content in (("truth.json", truth), ("found.json", rows)):
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name).write_text(text)
    files_of = [f"--annotations={folder / 'truth.json'}", f"--detections={folder / 'found.json'}"]
    return commands.run(coco.command, arguments=[*files_of, *more])


def test_command_says_what_is_wrong(tmp_path, capsys):
    truth = _truth()
    rows = _perfect(truth)
    cases = [
        (rows, truth, "truth.json is no COCO annotation file: it holds a JSON list, not the lists images, annotations"),
        (truth, truth, "found.json is no COCO results file: it holds a JSON object, not a list of objects"),
        ({"images": []}, rows, "it holds an object of images, not the lists"),
        (truth | {"annotations": []}, rows, "truth.json has no annotations: there is nothing to score against"),
        ("{", rows, "truth.json is no valid json"),
        (truth, [], "found.json is an empty list: no detections, nothing to score"),
        (
            truth | {"annotations": [{"id": 4}]},
            rows,
            '1 of 1 annotations cannot be used (annotations[0] image_id is not listed: {"id": 4})',
        ),
    ]
    for annotations, detections, message in cases:
        assert _command(tmp_path, annotations, detections) == 1
        captured = capsys.readouterr()
        assert f"error: {tmp_path}" in captured.err
        assert message in captured.err
        assert not captured.out
    assert commands.run(coco.command, arguments=["--annotations=absent.json", "--detections=absent.json"]) == 1
    assert "cannot read absent.json: No such file" in capsys.readouterr().err


def test_the_report_tells_what_was_scored(tmp_path, capsys):
    truth = _truth(frequencies=("c", None))
    truth["annotations"].append(truth["annotations"][0] | {"id": 9, "bbox": [1, 1, 0.5, 9]})
    rows = [row | {"image_id": str(row["image_id"])} for row in _perfect(truth)[:2]]
    assert _command(tmp_path, truth, rows, f"--output={tmp_path}/scores.json") == 0
    captured = capsys.readouterr()
    *_, counts, first, _, frequencies, line = captured.out.splitlines()
    printed = json.loads(line)
    assert json.loads((tmp_path / "scores.json").read_text()) == printed
    assert counts.startswith("3 images evaluated, 3 images listed, 1 images with detections, 2 categories, 5 boxes, 2")
    expected = {
        "category without a frequency": 1,
        "box below a pixel": 1,
        "image_id of a detection of another type than the image's": 2,
    }
    assert printed["protocol"]["repaired"] == expected
    assert captured.err.splitlines() == [f"note: {num} × {what}" for what, num in expected.items()]
    for name in ("truth", "found"):
        key = {"truth": "annotations", "found": "detections"}[name]
        assert printed["protocol"][key] == str(tmp_path / f"{name}.json")
        assert printed["protocol"][f"{key}_sha256"] == files.sha256(tmp_path / f"{name}.json")
    assert f"AP {100 * printed['AP']:5.1f}" in first
    assert frequencies == f"   APr     -   APc {100 * printed['APc']:5.1f}   APf     -"
    assert coco.table({"AP": 0.0, "AR1": -1.0}) == "    AP   0.0\n   AR1     -"


def test_some_annotations_may_be_left_out(tmp_path, capsys):
    truth = _truth()
    truth["annotations"].append({"id": 9})
    assert _command(tmp_path, truth, _perfect(_truth()), "--max_bad_share=0.1") == 1  # it is one of five
    assert _command(tmp_path, truth, _perfect(_truth()), "--max_bad_share=0.2") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["AP"] == pytest.approx(1.0)


def test_command_notes_lvis_files(tmp_path, capsys):
    truth = _truth()
    truth["images"][0]["neg_category_ids"] = []
    assert _command(tmp_path, truth, _perfect(truth)) == 0
    assert "scored by COCO's rules" in capsys.readouterr().err


def test_shares_of_categories_are_apart_and_whole():
    shares = [coco.Share(i, 3, np.asarray) for i in range(3)]
    owned = np.array([share.owns(np.arange(10)) for share in shares])
    assert (owned.sum(axis=0) == 1).all()
    assert coco.WHOLE.owns(np.arange(10)).all()
