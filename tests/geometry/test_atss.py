"""Assignment against an oracle written from the paper, anchor by anchor."""

import functools

import jax
import numpy as np
import pytest
from oracle import geometry

from detclipv2_jax.geometry import anchors, atss


def random_boxes(rng, count, canvas, largest):
    """Returns boxes inside the canvas, log-uniform in size."""
    size = np.exp(rng.uniform(np.log(2), np.log(largest), (count, 2)))
    size = np.minimum(size, np.array(canvas[::-1]) * 0.98)
    corner = rng.uniform(0, 1, (count, 2)) * (np.array(canvas[::-1]) - size)
    return np.concatenate([corner, corner + size], axis=1).astype(np.float32)


def check(canvas, boxes, box_mask=None):
    """Compares one image with the oracle and returns the number of positive anchors."""
    grid = anchors.grid(canvas)
    box_mask = np.ones(len(boxes), bool) if box_mask is None else box_mask
    result = jax.jit(functools.partial(atss.assign, grid.boxes, grid.levels))(boxes, box_mask)
    index, positive = geometry.assign(grid.boxes, grid.levels, boxes, box_mask)
    np.testing.assert_array_equal(result.positive, positive)
    np.testing.assert_array_equal(result.box_index, index)
    return int(positive.sum())


def test_a_hundred_boxes_on_the_landscape_canvas():
    rng = np.random.default_rng(0)
    assert check((800, 1344), random_boxes(rng, 100, (800, 1344), 1200)) > 400


@pytest.mark.parametrize("canvas", [(96, 1000), (1000, 96), (232, 160), (800, 800)])
def test_the_nearest_anchors_are_found_near_the_box_wherever_it_lies(canvas):
    # inside, on the border and far outside of the grid, and in the middle between anchors
    rng = np.random.default_rng(3)
    corner = rng.uniform(-1.5, 2.5, (60, 2)) * np.array(canvas[::-1])
    anywhere = np.concatenate([corner, corner + np.exp(rng.uniform(0, 7, (60, 2)))], axis=1)
    middle = 4 * rng.integers(-3, np.array(canvas[::-1]) // 4 + 3, (40, 2))
    half = 4 * rng.integers(1, 40, (40, 2))
    boxes = np.concatenate([anywhere, np.concatenate([middle - half, middle + half], axis=1)]).astype(np.float32)
    assert check(canvas, boxes) > 20
    assert_searched_everywhere(anchors.grid(canvas).boxes, anchors.grid(canvas).levels, boxes)


def assert_searched_everywhere(anchor_boxes, levels, boxes):
    """Host constants may be searched near the box only; arrays are searched everywhere."""
    mask = np.ones(len(boxes), bool)
    of_constants = jax.jit(functools.partial(atss.assign, anchor_boxes, levels))(boxes, mask)
    of_arrays = jax.jit(atss.assign, static_argnums=1)(anchor_boxes, levels, boxes, mask)
    np.testing.assert_array_equal(of_constants.positive, of_arrays.positive)
    np.testing.assert_array_equal(of_constants.box_index, of_arrays.box_index)


@pytest.mark.parametrize("moved", [(120, 0), (0, 80)])
def test_a_grid_may_begin_anywhere(moved):
    moved = np.float32([*moved, *moved])
    boxes = random_boxes(np.random.default_rng(0), 20, (128, 192), 90)
    assert_searched_everywhere(anchors.grid((128, 192)).boxes[: 16 * 24] + moved, (16 * 24,), boxes + moved)


def test_anchors_that_are_no_grid_are_all_searched():
    anchor_boxes = anchors.grid((128, 96)).boxes[:192].copy()
    anchor_boxes[-1] = anchor_boxes[0] + 1  # the last one is as near to what the first one is near to
    assert_searched_everywhere(anchor_boxes, (192,), random_boxes(np.random.default_rng(0), 20, (128, 96), 90))


@pytest.mark.parametrize("seed", range(3))
def test_levels_with_fewer_anchors_than_candidates(seed):
    # 128 x 96 px: 4, 1 and 1 anchors on the last levels
    rng = np.random.default_rng(seed)
    assert check((128, 96), random_boxes(rng, 20, (128, 96), 120)) > 20


def positives(sides, *, box=(0, 0, 100, 100)):
    """Returns which square anchors of these sides in the middle of a box of 100 px are positive; all on one level."""
    half = np.float32(sides)[:, None] / 2
    grid = np.float32(50) + np.concatenate([-half, -half, half, half], axis=1)
    result = atss.assign(grid, (len(grid),), np.float32([box]), np.ones(1, bool))
    return result.positive.tolist()


def test_the_threshold_by_hand_where_it_binds():
    # IoUs 0.01 three times, 0.9 and 1: mean 0.386; standard deviation 0.515 unbiased, 0.461 otherwise
    assert positives([10, 10, 10, 10 * np.sqrt(90), 100]) == [False] * 4 + [True]
    # IoU 0.88: mean + deviation is 0.893 unbiased, and would be 0.838
    assert positives([10, 10, 10, 10 * np.sqrt(88), 100]) == [False] * 4 + [True]
    # equal IoUs deviate by nothing: all reach their mean exactly
    assert positives([50] * 4) == [True] * 4
    assert positives([50]) == [True]
    assert positives([50, 100]) == [False, False]  # IoUs 0.25 and 1: 0.625 and 0.530


def test_a_centre_on_the_border_of_a_box_is_not_inside():
    # the box ends 0.005 and 0.02 px beyond the centres of its anchors
    assert positives([50] * 4, box=(0, 0, 50.005, 100)) == [False] * 4
    assert positives([50] * 4, box=(0, 0, 50.02, 100)) == [True] * 4


def test_tiny_full_image_and_equal_boxes():
    boxes = np.float32([[0, 0, 96, 128], [40, 40, 42, 42], [40.5, 41, 47, 49], [0, 0, 96, 128], [90, 120, 96, 128]])
    check((128, 96), boxes)


def test_ties_of_distance_go_to_the_first_anchor():
    # centres on the corners and edges between cells: 4, 2 or more anchors are equally near
    boxes = np.float32(
        [[x - w / 2, y - h / 2, x + w / 2, y + h / 2] for x, y, w, h in
         [(64, 64, 48, 48), (32, 64, 64, 32), (16, 16, 32, 32), (68, 60, 64, 64), (48, 96, 32, 64), (64, 60, 96, 96)]]
    )  # fmt: skip
    assert check((128, 96), boxes) > 6


def test_masked_boxes_take_part_in_nothing():
    rng = np.random.default_rng(5)
    boxes = random_boxes(rng, 20, (128, 96), 90)
    mask = np.arange(20) % 3 != 0  # crowd regions and padding
    boxes[~mask] = [[0, 0, 96, 128]]
    assert check((128, 96), boxes, mask) > 0
    assert check((128, 96), boxes, np.zeros(20, bool)) == 0
    assert check((128, 96), boxes[:0]) == 0


def test_degenerate_boxes_get_no_anchor():
    # a line and a point, also where they pass exactly through anchor centres
    assert check((128, 96), np.float32([[4, 4, 4, 90], [20, 20, 20, 20], [3, 28, 80, 28]])) == 0


def test_over_a_batch_equals_one_by_one():
    rng = np.random.default_rng(7)
    grid = anchors.grid((128, 96))
    boxes = np.stack([random_boxes(rng, 20, (128, 96), 90) for _ in range(3)])
    mask = rng.uniform(size=(3, 20)) < 0.7
    batch = jax.jit(jax.vmap(lambda b, m: atss.assign(grid.boxes, grid.levels, b, m)))(boxes, mask)
    for i in range(3):
        index, positive = geometry.assign(grid.boxes, grid.levels, boxes[i], mask[i])
        np.testing.assert_array_equal(batch.positive[i], positive)
        np.testing.assert_array_equal(batch.box_index[i], index)


def test_no_array_of_anchors_times_boxes_over_a_batch():
    grid = anchors.grid((800, 1344))
    batch, num_boxes = 8, 100
    boxes = jax.ShapeDtypeStruct((batch, num_boxes, 4), np.float32)
    mask = jax.ShapeDtypeStruct((batch, num_boxes), bool)
    run = jax.jit(jax.vmap(lambda b, m: atss.assign(grid.boxes, grid.levels, b, m)))
    temporary = run.lower(boxes, mask).compile().memory_analysis().temp_size_in_bytes
    assert temporary < batch * num_boxes * len(grid.boxes) * 4 / 3


def test_counts_that_do_not_fit_are_an_error():
    grid = anchors.grid((128, 96))
    with pytest.raises(ValueError, match="add up to"):
        atss.assign(grid.boxes, (1, 2), np.zeros((1, 4), np.float32), np.ones(1, bool))
