"""GIoU and centerness losses against values worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from deltas import encode_deltas

from detclipv2_jax.losses.localization import localization_losses

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
