"""What mirroring, scaling, reordering and padding must not change, on boxes that hypothesis draws."""

import functools

import jax
import numpy as np
from deltas import encode_deltas
from hypothesis import given, settings
from hypothesis import strategies as st

from detclipv2_jax.geometry import anchors, atss, boxes
from detclipv2_jax.geometry.nms import nms

CANVAS = (96, 128)
GRID = anchors.grid(CANVAS)
NUM = 12
assign = jax.jit(functools.partial(atss.assign, GRID.boxes, GRID.levels))
suppress = jax.jit(functools.partial(nms, iou_threshold=0.5, max_outputs=NUM))
drawn = st.integers(0, 2**32 - 1).map(np.random.default_rng)
some = functools.partial(settings, max_examples=30, deadline=None)


def draw(rng, num=NUM):
    """Boxes of 4 px or more, which deltas do not bound, float32 [num, 4]; ties of distance do not occur."""
    corners = rng.uniform(0, 1, (num, 2, 2)) * CANVAS[::-1]
    return np.concatenate([corners.min(axis=1), corners.max(axis=1) + 4], axis=1).astype(np.float32)


def mirrored(values):
    return values[:, [2, 1, 0, 3]] * np.float32([-1, 1, -1, 1]) + np.float32([CANVAS[1], 0, CANVAS[1], 0])


@some()
@given(drawn, st.floats(0.01, 100), st.floats(0.01, 100))
def test_overlaps_centerness_and_deltas(rng, factor_y, factor_x):
    a, b = draw(rng), draw(rng)
    factor = np.float32([factor_y, factor_x])
    measures = {
        "iou": boxes.iou, "giou": boxes.generalized_iou, "centerness": boxes.centerness_target,
        "size of deltas": lambda a, b: encode_deltas(a, b)[:, 2:],
    }  # fmt: skip
    for name, measure in measures.items():
        value = np.asarray(measure(a, b))
        np.testing.assert_allclose(measure(mirrored(a), mirrored(b)), value, rtol=1e-3, atol=1e-4, err_msg=name)
        scaled = measure(boxes.scale(a, factor), boxes.scale(b, factor))
        np.testing.assert_allclose(scaled, value, rtol=1e-3, atol=1e-4, err_msg=name)
    assert (np.asarray(boxes.generalized_iou(a, b)) <= np.asarray(boxes.iou(a, b)) + 1e-6).all()
    np.testing.assert_allclose(boxes.iou(a, b), boxes.iou(b, a), atol=1e-6)
    np.testing.assert_allclose(boxes.decode_deltas(a, encode_deltas(a, b)), b, rtol=1e-3, atol=1e-2)
    np.testing.assert_allclose(mirrored(mirrored(a)), a, atol=1e-4)


@some()
@given(drawn)
def test_assignment(rng):
    truth, mask = draw(rng), rng.random(NUM) < 0.7
    given_to = assign(truth, mask)
    owner = np.where(given_to.positive, given_to.box_index, -1)
    # another order of the boxes
    order = rng.permutation(NUM)
    turned = assign(truth[order], mask[order])
    np.testing.assert_array_equal(np.where(turned.positive, order[turned.box_index], -1), owner)
    # whatever is in boxes that are padding
    other = assign(np.where(mask[:, None], truth, draw(rng)), mask)
    np.testing.assert_array_equal(np.where(other.positive, other.box_index, -1), owner)
    # the mirrored image: each anchor's mirror image is an anchor of the same level
    level = np.repeat(np.arange(len(GRID.levels)), GRID.levels)
    cells = list(zip(level, *np.asarray(boxes.centers(GRID.boxes)).T.tolist(), strict=True))
    place = {cell: i for i, cell in enumerate(cells)}
    mirror = [place[level, CANVAS[1] - x, y] for level, x, y in cells]
    flipped = assign(mirrored(truth), mask)
    np.testing.assert_array_equal(np.where(flipped.positive, flipped.box_index, -1)[mirror], owner)


@some()
@given(drawn, st.sampled_from([0.25, 1.0, 4.0]))
def test_suppression(rng, factor):
    found, scores, mask = draw(rng), rng.permutation(NUM).astype(np.float32), rng.random(NUM) < 0.7

    def kept(*arguments, **options):
        indices, used = suppress(*arguments, **options)
        return np.asarray(indices)[np.asarray(used)].tolist()

    expected = kept(found, scores, mask=mask)
    order = rng.permutation(NUM)
    assert order[kept(found[order], scores[order], mask=mask[order])].tolist() == expected
    assert kept(mirrored(found) * np.float32(factor), scores, mask=mask) == expected
    padded = kept(np.where(mask[:, None], found, draw(rng)), np.where(mask, scores, 100), mask=mask)
    assert padded == expected
