"""Suppression against a greedy oracle and torchvision."""

import pathlib
import sys

import jax
import numpy as np
import pytest
from oracle import geometry

from detclipv2_jax.geometry.nms import nms

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
sys.path.insert(0, str(GOLDEN))
import cases  # noqa: E402  (lives beside the fixtures, which are made in another environment)


def kept(result):
    """Returns the indices in use."""
    indices, mask = map(np.asarray, result)
    used = int(mask.sum())
    assert mask[:used].all()
    assert not indices[used:].any()
    return indices[:used].tolist()


@pytest.mark.parametrize("kind", cases.NMS_KINDS)
@pytest.mark.parametrize("threshold", [0.3, 0.6])
def test_equal_to_torchvision(kind, threshold):
    golden = np.load(GOLDEN / "boxes.npz")
    case = cases.nms_case(kind)
    options = {"iou_threshold": threshold, "max_outputs": len(case.scores)}
    np.testing.assert_array_equal(kept(nms(case.boxes, case.scores, **options)), golden[f"{kind}/{threshold}/agnostic"])
    np.testing.assert_array_equal(
        kept(nms(case.boxes, case.scores, classes=case.classes, **options)), golden[f"{kind}/{threshold}/aware"]
    )


@pytest.mark.parametrize("kind", cases.NMS_KINDS)
@pytest.mark.parametrize("max_outputs", [1, 7, 1000])
def test_equal_to_the_greedy_oracle(kind, max_outputs):
    case = cases.nms_case(kind)
    mask = np.arange(len(case.scores)) % 5 != 0
    result = nms(case.boxes, case.scores, iou_threshold=0.5, max_outputs=max_outputs, mask=mask, classes=case.classes)
    assert kept(result) == geometry.nms(case.boxes, case.scores, 0.5, max_outputs, mask, case.classes)


@pytest.mark.parametrize("between", [0, 200])
def test_a_box_at_exactly_the_threshold_stays(between):
    """Half of the first box: IoU 1/2. With others between the two, they are decided in different chunks."""
    far = 10 * np.arange(1, between + 1, dtype=np.float32)[:, None] + np.float32([[0, 0, 1, 1]])
    boxes = np.concatenate([np.float32([[0, 0, 2, 1]]), far, np.float32([[0, 0, 1, 1]])])
    scores = np.linspace(1, 0, len(boxes), dtype=np.float32)
    for threshold, stays in ((0.5, True), (np.nextafter(np.float32(0.5), np.float32(0)), False)):
        result = kept(nms(boxes, scores, iou_threshold=float(threshold), max_outputs=len(boxes)))
        assert result == list(range(len(boxes) if stays else len(boxes) - 1))


def test_points_overlap_nothing_not_even_themselves_and_are_kept_once():
    points = np.random.default_rng(0).integers(0, 9, (300, 2)).astype(np.float32)
    boxes, scores = np.concatenate([points, points], axis=1), np.linspace(1, 0, 300, dtype=np.float32)
    assert kept(nms(boxes, scores, iou_threshold=0.5, max_outputs=400)) == list(range(300))


def test_nothing_to_keep():
    case = cases.nms_case("random")
    nothing = np.zeros(len(case.scores), bool)
    assert kept(nms(case.boxes, case.scores, iou_threshold=0.5, max_outputs=3, mask=nothing)) == []
    assert kept(nms(case.boxes[:0], case.scores[:0], iou_threshold=0.5, max_outputs=3)) == []


def test_a_negative_threshold_is_an_error():
    case = cases.nms_case("single")
    with pytest.raises(ValueError, match=r"iou_threshold is -0\.1; it must be at least 0"):
        nms(case.boxes, case.scores, iou_threshold=-0.1, max_outputs=3)
    assert kept(nms(case.boxes, case.scores, iou_threshold=0.0, max_outputs=3)) == [0]


def test_minus_infinity_is_a_score_like_any_other():
    boxes = np.float32([[0, 0, 1, 1], [5, 5, 6, 6], [8, 8, 9, 9]])
    scores = np.float32([-np.inf, 1, -np.inf])
    assert kept(nms(boxes, scores, iou_threshold=0.5, max_outputs=3)) == [1, 0, 2]


def test_over_a_batch():
    case = cases.nms_case("clustered")
    batch = np.stack([case.scores, np.roll(case.scores, 7), -case.scores])
    run = jax.vmap(lambda scores: nms(case.boxes, scores, iou_threshold=0.4, max_outputs=50))
    for scores, *result in zip(batch, *run(batch), strict=True):
        assert kept(result) == geometry.nms(case.boxes, scores, 0.4, 50)
