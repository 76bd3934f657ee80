"""GIoU and centerness losses against values worked out by hand, and against loops in float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from deltas import encode_deltas

from detclipv2_jax.geometry import boxes as box_lib
from detclipv2_jax.losses.alignment import AnchorTargets
from detclipv2_jax.losses.localization import localization_losses, objectness_loss
from detclipv2_jax.models.detclip import Regions

ANCHORS = jnp.asarray([[0, 0, 10, 10], [20, 20, 30, 30], [0, 0, 8, 8]], jnp.float32)


def losses(deltas, centerness, positive, target_boxes, target_centerness):
    return localization_losses(
        jnp.asarray(deltas, jnp.float32)[None],
        jnp.asarray(centerness, jnp.float32)[None],
        anchors=ANCHORS,
        target_boxes=jnp.asarray(target_boxes, jnp.float32)[None],
        target_centerness=jnp.asarray(target_centerness, jnp.float32)[None],
        positive=jnp.asarray(positive)[None],
    )


def test_perfect_boxes_cost_nothing_and_centerness_is_cross_entropy():
    targets = np.array([[1, 1, 9, 12], [18, 18, 33, 30], [0, 0, 1, 1]])
    deltas = encode_deltas(ANCHORS, jnp.asarray(targets, jnp.float32))
    box, centerness = losses(deltas, [0.0, 2.0, 5.0], [True, True, False], targets, [0.8, 0.5, 0.0])
    assert float(box) == pytest.approx(0.0, abs=1e-5)
    p = 1 / (1 + np.exp(-2.0))
    assert float(centerness) == pytest.approx(np.log(2) - 0.5 * (np.log(p) + np.log(1 - p)), rel=1e-5)


def test_disjoint_box_costs_one_minus_giou_times_its_weight():
    # anchor (0,0,10,10), target (20,0,30,10): IoU 0, hull 300, gap 100: GIoU = -1/3
    targets = [[20, 0, 30, 10], [0, 0, 1, 1], [0, 0, 1, 1]]
    box, _ = losses(np.zeros((3, 4)), np.zeros(3), [True, False, False], targets, [0.7, 0.0, 0.0])
    assert float(box) == pytest.approx(0.7 * (1 + 1 / 3), rel=1e-5)


def test_masked_anchors_have_exactly_zero_gradients_even_for_degenerate_targets():
    targets = [[0, 0, 0, 0], [5, 5, 5, 5], [-3e38, -3e38, 3e38, 3e38]]

    def total(deltas, centerness):
        return sum(losses(deltas, centerness, [False] * 3, targets, [0.0] * 3))

    gradients = jax.grad(total, argnums=(0, 1))(jnp.ones((3, 4)), jnp.ones(3))
    assert all(np.all(np.asarray(g) == 0.0) for g in gradients)


def in_loops(deltas, logits, positive, targets, centerness):
    """Returns both sums of one image in float64, from the formulas."""
    box_sum = centerness_sum = 0.0
    for a in np.flatnonzero(positive):
        x1, y1, x2, y2 = np.float64(ANCHORS[a])
        (dx, dy, dw, dh), (width, height) = np.float64(deltas[a]) * (0.1, 0.1, 0.2, 0.2), (x2 - x1, y2 - y1)
        center = np.array([(x1 + x2) / 2 + dx * width, (y1 + y2) / 2 + dy * height])
        half = np.array([width * math.exp(dw), height * math.exp(dh)]) / 2
        box, target = np.concatenate([center - half, center + half]), np.float64(targets[a])
        low, high = np.minimum(box, target), np.maximum(box, target)
        shared = np.prod(np.maximum(low[2:] - high[:2], 0))
        union = np.prod(box[2:] - box[:2]) + np.prod(target[2:] - target[:2]) - shared
        hull = np.prod(high[2:] - low[:2])
        box_sum += centerness[a] * (1 - shared / union + (hull - union) / hull)
        p = 1 / (1 + math.exp(-logits[a]))
        centerness_sum -= centerness[a] * math.log(p) + (1 - centerness[a]) * math.log(1 - p)
    return np.array([box_sum, centerness_sum])


def test_sums_and_slopes_equal_loops():
    rng = np.random.default_rng(0)
    for _ in range(2):
        deltas, logits, positive = (
            rng.normal(size=(3, 4)),
            rng.normal(size=3),
            np.array([True, True, rng.random() < 0.5]),
        )
        corner = np.asarray(ANCHORS)[:, :2] + rng.uniform(-6, 6, (3, 2))
        targets = np.concatenate([corner, corner + rng.uniform(2, 12, (3, 2))], axis=1)
        centerness = np.where(positive, rng.random(3), 0.0)
        given = (positive, targets, centerness)
        directions = rng.normal(size=(3, 4)), rng.normal(size=3)
        sums, slopes = jax.jvp(
            lambda d, c, given=given: jnp.stack(losses(d, c, *given)),
            (jnp.float32(deltas), jnp.float32(logits)),
            tuple(map(jnp.float32, directions)),
        )
        np.testing.assert_allclose(sums, in_loops(deltas, logits, *given), rtol=1e-4)
        ends = [
            in_loops(*(x + s * v for x, v in zip((deltas, logits), directions, strict=True)), *given)
            for s in (1e-6, -1e-6)
        ]
        np.testing.assert_allclose(slopes, (ends[0] - ends[1]) / 2e-6, rtol=1e-3, atol=1e-4)


def test_the_extra_head_learns_what_has_a_box_or_how_well_it_fits():
    rng = np.random.default_rng(0)
    anchors = np.array([[0, 0, 10, 10], [5, 5, 25, 25], [0, 0, 40, 40]], np.float32)
    deltas, logits = rng.normal(size=(2, 3, 4)).astype(np.float32), rng.normal(size=(2, 3)).astype(np.float32)
    mask, positive = np.array([[1, 1, 0], [1, 1, 1]], bool), np.array([[1, 0, 0], [0, 1, 1]], bool)
    boxes = np.broadcast_to(anchors[None] + [1, 0, 2, 0], (2, 3, 4)).astype(np.float32)
    targets = AnchorTargets(mask, positive, np.zeros((2, 3, 1), int))

    def loss(logits, deltas, target):
        regions = Regions(None, deltas, None, logits)
        return objectness_loss(regions, targets, anchors=anchors, target_boxes=boxes, target=target)

    p = 1 / (1 + np.exp(-logits.astype(np.float64)))
    focal = np.where(positive, -0.25 * (1 - p) ** 2 * np.log(p), -0.75 * p**2 * np.log(1 - p))
    np.testing.assert_allclose(loss(logits, deltas, "classification"), focal[mask].sum(), rtol=1e-5)
    iou = np.asarray(box_lib.iou(box_lib.decode_deltas(np.broadcast_to(anchors[None], (2, 3, 4)), deltas), boxes))
    entropy = -(iou * np.log(p) + (1 - iou) * np.log(1 - p))
    np.testing.assert_allclose(loss(logits, deltas, "iou"), entropy[positive].sum(), rtol=1e-5)
    assert not np.any(jax.grad(loss, argnums=1)(logits, deltas, "iou"))  # the boxes learn from the box loss alone
