"""Overlaps and coders against float64 NumPy and torchvision; finite gradients on degenerate boxes."""

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from deltas import encode_deltas
from hypothesis import given, settings
from hypothesis import strategies as st

from detclipv2_jax.geometry import anchors, boxes

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
sys.path.insert(0, str(GOLDEN))
import cases  # noqa: E402  (lives beside the fixtures, which are made in another environment)

coordinate = st.integers(0, 80).map(lambda x: x / 2)  # halves meet and touch often
box = st.tuples(coordinate, coordinate, coordinate, coordinate).map(
    lambda c: (min(c[0], c[2]), min(c[1], c[3]), max(c[0], c[2]), max(c[1], c[3]))
)


def oracle(a, b):
    """Returns (IoU, GIoU) of two boxes in float64, with 0 / 0 = 0."""
    a, b = np.float64(a), np.float64(b)
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - width * height
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    iou = width * height / union if union > 0 else 0.0
    return iou, iou - ((hull - union) / hull if hull > 0 else 0.0)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(box, box), min_size=8, max_size=8))
def test_overlaps_equal_the_oracle(pairs):
    a, b = (np.float32([pair[i] for pair in pairs]) for i in (0, 1))
    expected = np.array([oracle(*pair) for pair in pairs])
    np.testing.assert_allclose(boxes.iou(a, b), expected[:, 0], atol=1e-6)
    np.testing.assert_allclose(boxes.generalized_iou(a, b), expected[:, 1], atol=1e-6)
    np.testing.assert_allclose(np.diagonal(boxes.pairwise_iou(a, b)), expected[:, 0], atol=1e-6)


def test_overlaps_equal_torchvision():
    golden = np.load(GOLDEN / "boxes.npz")
    a, b = cases.overlap_boxes()
    np.testing.assert_allclose(boxes.pairwise_iou(a, b)[::8], golden["iou"], atol=1e-6)
    np.testing.assert_allclose(boxes.generalized_iou(a, b), golden["giou"], atol=1e-6)


@pytest.mark.parametrize(
    ("a", "b", "iou", "giou"),
    [
        ((0, 0, 2, 2), (0, 0, 2, 2), 1.0, 1.0),
        ((0, 0, 2, 2), (1, 0, 3, 2), 1 / 3, 1 / 3),  # hull == union
        ((0, 0, 1, 1), (1, 1, 2, 2), 0.0, -0.5),  # touching corners: hull 4, union 2
        ((5, 5, 5, 5), (5, 5, 5, 5), 0.0, 0.0),  # a point with itself
        ((0, 0, 4, 0), (0, 0, 4, 4), 0.0, 0.0),  # a line on the border
    ],
)
def test_overlaps_by_hand(a, b, iou, giou):
    a, b = np.float32(a), np.float32(b)
    np.testing.assert_allclose(boxes.iou(a, b), iou, atol=1e-6)
    np.testing.assert_allclose(boxes.generalized_iou(a, b), giou, atol=1e-6)


DEGENERATE = np.float32(
    [(5, 5, 5, 5), (0, 0, 4, 0), (0, 0, 0, 4), (0, 0, 4, 4), (4, 4, 8, 8), (1e4, 1e4, 1e4, 1e4), (8, 8, 2, 2)]
)


@pytest.mark.parametrize("name", ["iou", "generalized_iou", "centerness_target", "decode_deltas"])
def test_gradients_are_finite_on_degenerate_boxes(name):
    first, second = (x.reshape(-1, 4) for x in np.broadcast_arrays(DEGENERATE[:, None], DEGENERATE[None]))
    if name in ("decode_deltas", "centerness_target"):
        first = np.broadcast_to(np.float32((0, 0, 64, 64)), first.shape)  # anchors have a size
    value, gradients = jax.value_and_grad(lambda *x: jnp.sum(getattr(boxes, name)(*x)), argnums=(0, 1))(first, second)
    assert np.isfinite(value)
    assert all(np.isfinite(g).all() for g in gradients)


def test_deltas_are_inverse_and_follow_the_formula():
    grid = anchors.grid((64, 96)).boxes
    rng = np.random.default_rng(0)
    corner = rng.uniform(0, 60, (len(grid), 2))
    size = rng.uniform(17, 90, (len(grid), 2))  # within the bounds of P7's anchors
    target = np.concatenate([corner, corner + size], axis=1).astype(np.float32)
    deltas = encode_deltas(grid, target)
    np.testing.assert_allclose(boxes.decode_deltas(grid, deltas), target, atol=1e-6 * target.max())
    anchor, box64 = np.float64(grid), np.float64(target)
    width, height = (anchor[:, i + 2] - anchor[:, i] for i in (0, 1))
    expected = np.stack(
        [
            ((box64[:, 0] + box64[:, 2]) / 2 - (anchor[:, 0] + anchor[:, 2]) / 2) / width / 0.1,
            ((box64[:, 1] + box64[:, 3]) / 2 - (anchor[:, 1] + anchor[:, 3]) / 2) / height / 0.1,
            np.log((box64[:, 2] - box64[:, 0]) / width) / 0.2,
            np.log((box64[:, 3] - box64[:, 1]) / height) / 0.2,
        ],
        axis=1,
    )
    np.testing.assert_allclose(deltas, expected, atol=1e-6 * np.abs(expected).max())


def test_deltas_of_oblong_anchors_by_hand():
    # 100 x 40, moved by (1, -2) x 0.1 of its sides, twice as wide and half as high
    double = float(np.log(2) / 0.2)
    decoded = boxes.decode_deltas(np.float32([[0, 0, 100, 40]]), np.float32([[1, -2, double, -double]]))
    np.testing.assert_allclose(decoded, [[60 - 100, 12 - 10, 60 + 100, 12 + 10]], rtol=1e-5)


def test_decoded_sides_are_bounded():
    anchor = np.float32([[0, 0, 100, 100]])
    for wild in (1e6, -1e6):
        decoded = np.asarray(boxes.decode_deltas(anchor, np.float32([[0, 0, wild, wild]])))[0]
        side = 100 * (1000 / 16) ** np.sign(wild)
        np.testing.assert_allclose(decoded, [50 - side / 2] * 2 + [50 + side / 2] * 2, rtol=1e-5)


def test_centerness_by_hand():
    anchor = np.float32([[10, 10, 30, 30]])  # centre (20, 20)
    box = np.float32([[20, 20, 40, 40], [10, 10, 30, 30], [18, 12, 28, 32], [30, 30, 50, 50], [20, 20, 20, 20]])
    expected = [0.0, 1.0, np.sqrt(2 / 8 * 8 / 12), 0.0, 0.0]
    np.testing.assert_allclose(boxes.centerness_target(np.repeat(anchor, 5, axis=0), box), expected, atol=1e-6)


def test_scale_clip_and_contains():
    box = np.float32([[10, 20, 30, 50]])
    np.testing.assert_array_equal(boxes.scale(box, np.float32([2, 3])), [[30, 40, 90, 100]])  # (y, x)
    np.testing.assert_array_equal(boxes.clip(box, np.int32([40, 25])), [[10, 20, 25, 40]])
    points = np.float32([[10, 30], [11, 30], [30, 50], [20, 49.995]])
    inside = boxes.contains(np.repeat(box, 4, axis=0), points, margin=0.01)
    np.testing.assert_array_equal(inside, [False, True, False, False])
    assert not boxes.contains(box, np.float32([[11, 30]]), margin=1.0)  # the margin itself is not inside
    np.testing.assert_array_equal(boxes.clip(np.float32([[-5, -3, 0.5, 50]]), np.int32([40, 25])), [[0, 0, 0.5, 40]])
    beyond = np.float32([[30, 10, 60, 30], [10, 45, 20, 70]])  # at the right, below
    np.testing.assert_array_equal(boxes.clip(beyond, np.int32([40, 25])), [[25, 10, 25, 30], [10, 40, 20, 40]])


@pytest.mark.parametrize("canvas", [(800, 1344), (320, 320), (333, 500), (1, 1)])
def test_anchor_grid(canvas):
    grid = anchors.grid(canvas)
    assert sum(grid.levels) == len(grid.boxes)
    start = 0
    for (height, width), stride, count in zip(anchors.level_sizes(canvas), anchors.STRIDES, grid.levels, strict=True):
        assert count == height * width
        assert (height - 1) * stride < canvas[0] <= height * stride
        level = grid.boxes[start : start + count].reshape(height, width, 4)
        np.testing.assert_array_equal(level[..., 2] - level[..., 0], 8 * stride)
        np.testing.assert_array_equal(level[..., 3] - level[..., 1], 8 * stride)
        np.testing.assert_array_equal((level[-1, 0, 1] + level[-1, 0, 3]) / 2, (height - 0.5) * stride)
        np.testing.assert_array_equal((level[0, -1, 0] + level[0, -1, 2]) / 2, (width - 0.5) * stride)
        start += count


def test_anchors_of_a_mirrored_image_are_mirrored():
    grid = anchors.grid((256, 384))
    mirrored = grid.boxes[:, [2, 1, 0, 3]] * [-1, 1, -1, 1] + [384, 0, 384, 0]
    start = 0
    for (height, width), count in zip(anchors.level_sizes((256, 384)), grid.levels, strict=True):
        level = mirrored[start : start + count].reshape(height, width, 4)[:, ::-1]
        np.testing.assert_array_equal(level.reshape(-1, 4), grid.boxes[start : start + count])
        start += count


def test_number_of_anchors_of_the_paper():
    assert sum(anchors.grid((800, 1344)).levels) == 22_400
    assert sum(anchors.grid((320, 320)).levels) == 2_134


def test_a_centre_on_the_edge_of_a_photo_is_not_on_it():
    boxes = np.array([[0, 0, 24, 40], [0, 0, 23.9, 39.9]], np.float32)  # centres at (12, 20) and before it
    found = anchors.on_photo(boxes, np.array([[20, 13], [21, 12], [21, 13], [20, 12]], np.int32))
    np.testing.assert_array_equal(found, [[False, True], [False, True], [True, True], [False, True]])
