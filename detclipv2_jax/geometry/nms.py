"""Greedy non-maximum suppression with static shapes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from detclipv2_jax.geometry import boxes as box_ops


def nms(
    boxes: Float[Array, "n 4"],
    scores: Float[Array, "n"],
    *,
    iou_threshold: float,
    max_outputs: int,
    mask: Bool[Array, "n"] | None = None,
    classes: Int[Array, "n"] | None = None,
) -> tuple[Int[Array, "k"], Bool[Array, "k"]]:
    """Returns (indices of the kept boxes best first, mask of the places in use), both `max_outputs` long.

    Exactly the greedy algorithm: the best box left is kept and every box whose IoU with it is above the
    threshold is removed; of equal scores the lower index comes first. Only boxes of the mask take part; with
    `classes` a box removes boxes of its own class only. The loop stops when nothing is left, so its cost follows
    the number of boxes kept, each of which is compared with all boxes at once. Unused places hold index 0.
    """
    num_boxes = boxes.shape[0]
    kept = jnp.zeros(max_outputs, jnp.int32)
    if num_boxes == 0:
        return kept, jnp.zeros(max_outputs, bool)
    order = jnp.argsort(-scores, stable=True)
    boxes = jnp.asarray(boxes, jnp.float32)[order]
    alive = jnp.ones(num_boxes, bool) if mask is None else mask[order]
    classes = None if classes is None else classes[order]
    positions = jnp.arange(num_boxes, dtype=jnp.int32)

    def first(alive: Bool[Array, "n"]) -> Int[Array, ""]:
        return jnp.min(jnp.where(alive, positions, num_boxes))

    def unfinished(state):
        _, _, count, best = state
        return (best < num_boxes) & (count < max_outputs)

    def keep_best(state):
        kept, alive, count, best = state
        removed = box_ops.iou(boxes, boxes[best][None]) > iou_threshold
        if classes is not None:
            removed &= classes == classes[best]
        alive = alive & ~removed & (positions > best)
        return kept.at[count].set(best), alive, count + 1, first(alive)

    kept, _, count, _ = jax.lax.while_loop(unfinished, keep_best, (kept, alive, jnp.int32(0), first(alive)))
    used = jnp.arange(max_outputs) < count
    return jnp.where(used, order[kept], 0).astype(jnp.int32), used
