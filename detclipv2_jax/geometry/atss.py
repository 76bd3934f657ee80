"""Adaptive training sample selection (ATSS, Zhang et al. 2020): which anchor learns which box."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int

from detclipv2_jax.geometry import boxes as box_ops

INSIDE_MARGIN = 0.01  # px; an anchor centre on the very border of a box is not inside (authors' code)
BOXES_AT_ONCE = 16  # boxes whose distances to all anchors exist at the same time


class Assignment(NamedTuple):
    """The box of every anchor."""

    box_index: Int[Array, " a"]  # 0 where there is none
    positive: Bool[Array, " a"]


def assign(
    anchors: Float[Array, "a 4"],
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

    Per-anchor memory: distances exist for `BOXES_AT_ONCE` boxes at a time; no (anchors x boxes) array is made,
    also not under `vmap` over images.
    """
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
    starts = np.cumsum((0, *level_counts[:-1]))

    def candidates(box: Float[Array, "4"]) -> Int[Array, " c"]:  # 1
        offset = centers - box_ops.centers(box)[None]
        distance = jnp.sum(offset * offset, axis=-1)
        nearest = [
            start + jax.lax.top_k(-distance[start : start + count], min(top_k, count))[1]
            for start, count in zip(starts.tolist(), level_counts, strict=True)
        ]
        return jnp.concatenate(nearest)

    index = jax.lax.map(candidates, boxes, batch_size=min(BOXES_AT_ONCE, num_boxes))
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
