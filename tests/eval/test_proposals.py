"""Class-agnostic recall on hand-made boxes, and of an evaluation by centerness alone."""

import json

import planted
import pytest

from detclipv2_jax.eval import proposals

TRUTH = {
    "images": [{"id": 1}, {"id": 2}],
    "categories": [{"id": 1, "name": "cat", "frequency": "f"}, {"id": 2, "name": "dog", "frequency": "r"}],
    "annotations": [
        {"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 10, 10]},
        {"id": 2, "image_id": 1, "category_id": 2, "bbox": [50, 0, 100, 100]},
        {"id": 3, "image_id": 2, "category_id": 2, "bbox": [0, 0, 10, 10]},
        {"id": 4, "image_id": 2, "category_id": 1, "bbox": [40, 40, 10, 10], "ignore": 1},
    ],
}


def row(image_id, category_id, box, score):
    return {"image_id": image_id, "category_id": category_id, "bbox": box, "score": score}


def test_objects_are_found_under_whatever_name():
    rows = [
        row(1, 2, [0, 0, 10, 10], 0.9),  # the cat as a dog
        row(1, 1, [50, 0, 100, 75], 0.5),  # the dog, IoU 0.75: 6 of 10 thresholds
    ]
    scores = proposals.evaluate(TRUTH, rows)
    expected = {"AR": (1 + 0.6 + 0) / 3, "ARf": 1.0, "ARr": 0.6 / 2, "ARs": 0.5, "ARm": -1.0, "ARl": 0.6}
    limits = (10, 100, 300)
    assert scores == pytest.approx({f"agnostic_{name}@{n}": value for name, value in expected.items() for n in limits})
    only = proposals.evaluate(TRUTH, rows, image_ids=[1])  # the object of the other image is none
    assert (only["agnostic_AR@10"], only["agnostic_ARr@10"]) == pytest.approx((0.8, 0.6))
    with pytest.raises(ValueError, match="images of the detections are unknown: 1"):
        proposals.evaluate(TRUTH, rows, image_ids=[2])
    shown = proposals.table({"agnostic_AR@10": 0.5, "agnostic_AR@100": 0.75, "agnostic_ARr@10": -1.0})
    assert shown == "agnostic_AR@10 50.0   agnostic_ARr@10 -\nagnostic_AR@100 75.0"


def test_a_report_without_frequencies_says_what_they_would_add():
    assert "frequency" not in proposals.report(proposals.evaluate(TRUTH, [row(1, 2, [0, 0, 10, 10], 0.9)]))
    plain = TRUTH | {"categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]}
    scores = proposals.evaluate(plain, [row(1, 2, [0, 0, 10, 10], 0.9)])
    assert not {name for name in scores if name[:-3].endswith(("ARr", "ARf"))}
    *lines, note = proposals.report(scores).splitlines()
    assert len(lines) == 3
    assert note.startswith('no AR of novel and base objects: no category of the annotations has a "frequency"')


def test_a_place_counts_once_and_300_of_an_image():
    wrong = [row(1, 1, [300 + i, 300, 20, 20], 0.5) for i in range(299)]
    named_twice = [row(1, category, [300, 300, 20, 20], 0.4 + category / 10) for category in (1, 2)]
    last = row(1, 2, [0, 0, 10, 10], 0.1)
    assert proposals.evaluate(TRUTH, [*wrong, *named_twice, last])["agnostic_AR@300"] == pytest.approx(1 / 3)
    one_more = row(1, 1, [700, 300, 20, 20], 0.5)
    assert proposals.evaluate(TRUTH, [*wrong, one_more, last])["agnostic_AR@300"] == 0.0
    for num, limit in ((9, 10), (99, 100)):
        rows = [*wrong[:num], row(2, 1, [0, 0, 10, 10], 0.05), last]
        assert proposals.evaluate(TRUTH, rows)[f"agnostic_AR@{limit}"] == pytest.approx(2 / 3)
        rows.append(wrong[num])
        assert proposals.evaluate(TRUTH, rows)[f"agnostic_AR@{limit}"] == pytest.approx(1 / 3)
    federated = json.loads(json.dumps(TRUTH))
    for image in federated["images"]:
        image["neg_category_ids"] = []
    assert proposals.evaluate(federated, [last])["agnostic_ARf@10"] == 1.0


def test_an_evaluation_by_centerness_has_the_recall_of_proposals(tmp_path):
    from test_loop import _evaluator  # the planted model's

    dataset = planted.write_dataset(tmp_path / "set", num_images=4)
    evaluate, params = _evaluator(dataset, tmp_path, score="centerness", num_pictures=0, num_devices=1)
    scores = evaluate(params, step=1)
    assert scores["agnostic_AR@100"] > 0.7
    assert scores["agnostic_ARr@10"] > 0.7
    assert scores["top1"] > 0.9  # the best word of a box is its name
    protocol = json.loads((tmp_path / "eval" / "step_00000001_scores.json").read_text())["protocol"]
    assert (protocol["score"], protocol["nms"]) == ("centerness", "over all categories")
    rows = tmp_path / "eval" / protocol["detections"]
    assert proposals.evaluate(dataset, rows).items() <= scores.items()
