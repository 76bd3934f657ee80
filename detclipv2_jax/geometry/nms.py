"""Greedy non-maximum suppression with static shapes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from detclipv2_jax.geometry import boxes as box_ops

CHUNK = 128  # boxes decided at once


def nms(
    boxes: Float[Array, "n 4"],
    scores: Float[Array, " n"],
    *,
    iou_threshold: float,
    max_outputs: int,
    mask: Bool[Array, " n"] | None = None,
    classes: Int[Array, " n"] | None = None,
) -> tuple[Int[Array, " k"], Bool[Array, " k"]]:
    """Returns (indices of the kept boxes best first, mask of the places in use), both `max_outputs` long.

    Exactly the greedy result: the best box left is kept and every box whose IoU with it is above the threshold is
    removed; of equal scores the lower index comes first. Only boxes of the mask take part; with `classes` a box
    removes boxes of its own class only. Unused places hold index 0.

    1. Sort by score and take `CHUNK` boxes at a time, until enough are kept or none is left.
    2. Remove those of the chunk that an earlier kept box suppresses.
    3. Within the chunk: a box stays unless a better one that stays suppresses it. Repeating this for all at once,
       starting with all, settles the first box, then all that depend on it, and so on; it stops when nothing
       changes, after as many rounds as the longest chain of suppressions.
    """
    if isinstance(iou_threshold, int | float) and iou_threshold < 0:  # a traced one has no value yet
        raise ValueError(f"iou_threshold is {iou_threshold}; it must be at least 0")
    boxes, scores = jnp.asarray(boxes, jnp.float32), jnp.asarray(scores)
    num_boxes = boxes.shape[0]
    kept = jnp.zeros(max_outputs, jnp.int32)
    if num_boxes == 0:
        return kept, jnp.zeros(max_outputs, bool)
    mask = jnp.ones(num_boxes, bool) if mask is None else jnp.asarray(mask)
    classes = jnp.zeros(num_boxes, jnp.int32) if classes is None else jnp.asarray(classes)

    order = jnp.argsort(jnp.where(mask, -scores, jnp.inf), stable=True)  # 1
    order = jnp.pad(order, (0, -num_boxes % CHUNK))
    alive = mask[order] & (jnp.arange(len(order)) < num_boxes)
    end = jnp.max(jnp.where(alive, jnp.arange(len(order)) + 1, 0))
    earlier = jnp.arange(CHUNK)[:, None] < jnp.arange(CHUNK)[None]

    def suppresses(a: Int[Array, " p"], b: Int[Array, " q"]) -> Bool[Array, "p q"]:
        overlap = box_ops.pairwise_iou(boxes[a], boxes[b]) > iou_threshold
        return overlap & (classes[a][:, None] == classes[b][None])

    def unfinished(state: tuple[Array, Array, Array]) -> Array:
        start, count, _ = state
        return (start < end) & (count < max_outputs)

    def one_chunk(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        start, count, kept = state
        chunk = jax.lax.dynamic_slice(order, (start,), (CHUNK,))
        by_earlier = suppresses(kept, chunk) & (jnp.arange(max_outputs) < count)[:, None]  # 2
        free = jax.lax.dynamic_slice(alive, (start,), (CHUNK,)) & ~jnp.any(by_earlier, axis=0)
        within = suppresses(chunk, chunk) & earlier  # 3

        def settle(state: tuple[Array, Array]) -> tuple[Array, Array]:
            stays, _ = state
            revised = free & ~jnp.any(within & stays[:, None], axis=0)
            return revised, jnp.any(revised != stays)

        stays, _ = jax.lax.while_loop(lambda state: state[1], settle, (free, jnp.any(free)))
        place = jnp.where(stays, count + jnp.cumsum(stays) - 1, max_outputs)
        kept = kept.at[place].set(chunk, mode="drop")
        return start + CHUNK, jnp.minimum(count + jnp.sum(stays), max_outputs), kept

    _, count, kept = jax.lax.while_loop(unfinished, one_chunk, (jnp.int32(0), jnp.int32(0), kept))
    return kept, jnp.arange(max_outputs) < count
