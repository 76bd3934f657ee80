"""Adaptive training sample selection (ATSS, Zhang et al. 2020): which anchor learns which box."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int

from detclipv2_jax.geometry import boxes as box_ops

INSIDE_MARGIN = 0.01  # px; an anchor centre on the very border of a box is not inside (authors' code)
WINDOW = 11  # cells a side; on a grid the nearest anchors of any point lie within 4 cells of the nearest one


class Assignment(NamedTuple):
    """The box of every anchor."""

    box_index: Int[Array, " a"]  # 0 where there is none
    positive: Bool[Array, " a"]


def assign(
    anchors: Float[Array | np.ndarray, "a 4"],
    level_counts: tuple[int, ...],
    boxes: Float[Array, "n 4"],
    box_mask: Bool[Array, " n"],
    *,
    top_k: int = 9,
) -> Assignment:
    """Returns the assignment of one image's boxes to its anchors; boxes outside the mask take part in nothing.

    1. Candidates of a box: on each level the `top_k` anchors (all, on a smaller level) whose centres are nearest
       to the box's; equal distances in anchor order.
    2. Threshold of a box: mean + standard deviation (unbiased) of the IoUs of all its candidates.
    3. Positive: a candidate with IoU >= threshold whose centre lies inside the box.
    4. An anchor that is positive for several boxes takes the one with the largest IoU, the first of equal ones.

    `anchors` that are host constants on a regular grid, as those of `anchors.grid`, are searched near the box only: no
    (anchors x boxes) array is made, also not under `vmap` over images.
    """
    starts = np.cumsum((0, *level_counts[:-1])).tolist()
    sides = [_grid_sides(anchors[start : start + count]) for start, count in zip(starts, level_counts, strict=True)]
    anchors, boxes = jnp.asarray(anchors, jnp.float32), jnp.asarray(boxes, jnp.float32)
    num_anchors, num_boxes = anchors.shape[0], boxes.shape[0]
    if sum(level_counts) != num_anchors:
        raise ValueError(
            f"level_counts {level_counts} add up to {sum(level_counts)}, but there are {num_anchors} anchors; "
            "pass `.boxes` and `.levels` of the same `anchors.grid`"
        )
    if num_boxes == 0:
        return Assignment(jnp.zeros(num_anchors, jnp.int32), jnp.zeros(num_anchors, bool))
    centers = box_ops.centers(anchors)

    def candidates(center: Float[Array, "2"]) -> Int[Array, " c"]:  # 1
        nearest = []
        for start, count, level_sides in zip(starts, level_counts, sides, strict=True):
            level = centers[start : start + count]
            index = jnp.arange(count) if level_sides is None else _window(level, level_sides, center)
            offset = level[index] - center[None]
            distance = jnp.sum(offset * offset, axis=-1)
            nearest.append(start + index[jax.lax.top_k(-distance, min(top_k, count))[1]])
        return jnp.concatenate(nearest)

    index = jax.vmap(candidates)(box_ops.centers(boxes))
    overlap = box_ops.iou(anchors[index], boxes[:, None])  # [n, c]
    threshold = jnp.mean(overlap, axis=-1, keepdims=True)  # 2
    if index.shape[1] > 1:
        threshold += jnp.std(overlap, axis=-1, ddof=1, keepdims=True)
    inside = box_ops.contains(boxes[:, None], centers[index], margin=INSIDE_MARGIN)
    positive = (overlap >= threshold) & inside & box_mask[:, None]  # 3
    score = jnp.where(positive, overlap, -1.0)  # 4
    best = jnp.full(num_anchors, -1.0).at[index].max(score)
    wins = positive & (score == best[index])
    order = jnp.where(wins, jnp.arange(num_boxes, dtype=jnp.int32)[:, None], num_boxes)
    winner = jnp.full(num_anchors, num_boxes, jnp.int32).at[index].min(order)
    assigned = winner < num_boxes
    return Assignment(jnp.where(assigned, winner, 0), assigned)


def _grid_sides(anchors: Any) -> tuple[int, int] | None:
    """Returns (height, width) of a regular grid, row by row, that is larger than a window; None for other anchors."""
    if not isinstance(anchors, np.ndarray) or len(anchors) <= WINDOW**2:
        return None
    centers = (anchors[:, :2] + anchors[:, 2:]) / 2
    width = int(np.sum(centers[:, 1] == centers[0, 1]))
    height, step = len(anchors) // width, centers[1, 0] - centers[0, 0]
    y, x = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    expected = centers[0] + step * np.stack([x, y], axis=-1).reshape(-1, 2)
    regular = step > 0 and expected.shape == centers.shape and np.array_equal(expected, centers)
    return (height, width) if regular else None


def _window(level: Float[Array, "a 2"], sides: tuple[int, int], center: Float[Array, "2"]) -> Int[Array, " w"]:
    """Returns the anchors of a grid around the one nearest to a point, in their order.

    Seen from the nearest one, moved inwards at a border, a window of 9 cells has the 9 nearest; two more are for what
    rounding does to a point in the middle between two.
    """
    step = level[1, 0] - level[0, 0]
    nearest = jnp.round((center - level[0]) / step)[::-1]
    size = np.minimum(WINDOW, sides)
    first = jnp.clip(nearest - WINDOW // 2, 0, np.asarray(sides) - size).astype(jnp.int32)
    rows, columns = (start + jnp.arange(count) for start, count in zip(first, size.tolist(), strict=True))
    return (rows[:, None] * sides[1] + columns[None]).reshape(-1)
