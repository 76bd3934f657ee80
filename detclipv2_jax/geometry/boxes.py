"""Box arithmetic. A box is absolute (x1, y1, x2, y2) in pixels of the padded network image, float32.

Degenerate boxes (zero width or height) are legal everywhere: overlaps are 0 and all gradients finite.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

DELTA_STD = (0.1, 0.1, 0.2, 0.2)  # of the regression targets (dx, dy, dw, dh); ATSS's
WH_RATIO_CLIP = 16 / 1000  # a decoded side is at most 1000/16 times the anchor's, at least 16/1000 of it
EPSILON = 1e-6  # px or px^2: only keeps divisions finite


def area(boxes: Float[Array, "... 4"]) -> Float[Array, "..."]:
    """Returns the area in px², 0 for a box whose corners are swapped."""
    size = jnp.maximum(boxes[..., 2:] - boxes[..., :2], 0.0)
    return size[..., 0] * size[..., 1]


def iou(a: Float[Array, "... 4"], b: Float[Array, "... 4"]) -> Float[Array, "..."]:
    """Returns intersection over union of boxes at equal positions; 0 where the union is empty."""
    return _overlap(a, b)[0]


def pairwise_iou(a: Float[Array, "... n 4"], b: Float[Array, "... m 4"]) -> Float[Array, "... n m"]:
    """Returns intersection over union of every box of `a` with every box of `b`."""
    return _overlap(a[..., :, None, :], b[..., None, :, :])[0]


def generalized_iou(a: Float[Array, "... 4"], b: Float[Array, "... 4"]) -> Float[Array, "..."]:
    """Returns the GIoU (Rezatofighi et al. 2019), in [-1, 1], of boxes at equal positions.

    IoU minus the share of the smallest enclosing box that belongs to neither.
    """
    overlap, union = _overlap(a, b)
    hull = area(jnp.concatenate([jnp.minimum(a[..., :2], b[..., :2]), jnp.maximum(a[..., 2:], b[..., 2:])], axis=-1))
    return overlap - (hull - union) / jnp.maximum(hull, EPSILON)


def _overlap(a: Float[Array, "... 4"], b: Float[Array, "... 4"]) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Returns (IoU, area of the union)."""
    left, top = jnp.maximum(a[..., 0], b[..., 0]), jnp.maximum(a[..., 1], b[..., 1])
    right, bottom = jnp.minimum(a[..., 2], b[..., 2]), jnp.minimum(a[..., 3], b[..., 3])
    intersection = jnp.maximum(right - left, 0.0) * jnp.maximum(bottom - top, 0.0)
    union = area(a) + area(b) - intersection
    return intersection / jnp.maximum(union, EPSILON), union


def centers(boxes: Float[Array, "... 4"]) -> Float[Array, "... 2"]:
    """Returns the centres as (x, y)."""
    return (boxes[..., :2] + boxes[..., 2:]) * 0.5


def decode_deltas(anchors: Float[Array, "... 4"], deltas: Float[Array, "... 4"]) -> Float[Array, "... 4"]:
    """Returns the boxes that deltas (dx, dy, dw, dh) make of anchors, not clipped to the image.

    dx = (x_box - x_anchor) / w_anchor, dw = log(w_box / w_anchor), each divided by `DELTA_STD`: Faster R-CNN's
    parametrisation, as mmdetection's DeltaXYWHBBoxCoder. |dw| and |dh| are bounded by |log(WH_RATIO_CLIP)|, so that a
    wild prediction stays finite.
    """
    deltas = deltas * jnp.broadcast_to(jnp.asarray(DELTA_STD, deltas.dtype), deltas.shape)
    anchor_size = anchors[..., 2:] - anchors[..., :2]
    center = centers(anchors) + deltas[..., :2] * anchor_size
    bound = abs(math.log(WH_RATIO_CLIP))
    half = anchor_size * jnp.exp(jnp.clip(deltas[..., 2:], -bound, bound)) * 0.5
    return jnp.concatenate([center - half, center + half], axis=-1)


def centerness_target(anchors: Float[Array, "... 4"], boxes: Float[Array, "... 4"]) -> Float[Array, "..."]:
    """Returns how central the anchor's centre lies in its box: 1 in the middle, 0 on the border and outside.

    sqrt(min(l, r) / max(l, r) * min(t, b) / max(t, b)) with the distances to the four sides (FCOS, ATSS).
    """
    center = centers(anchors)
    before = jnp.maximum(center - boxes[..., :2], 0.0)
    after = jnp.maximum(boxes[..., 2:] - center, 0.0)
    ratio = jnp.minimum(before, after) / jnp.maximum(jnp.maximum(before, after), EPSILON)
    product = ratio[..., 0] * ratio[..., 1]
    positive = product > 0.0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, product, 1.0)), 0.0)  # sqrt has no gradient at 0


def contains(boxes: Float[Array, "... 4"], points: Float[Array, "... 2"], *, margin: float) -> Bool[Array, "..."]:
    """Returns whether a point (x, y) lies more than `margin` px inside the box at the same position."""
    inside = jnp.concatenate([points - boxes[..., :2], boxes[..., 2:] - points], axis=-1)
    return jnp.min(inside, axis=-1) > margin


def scale(boxes: Float[Array, "... 4"], factor: Float[Array, "... 2"]) -> Float[Array, "... 4"]:
    """Returns the boxes multiplied by `factor`, given as (y, x) like `Batch.scale`."""
    factor = jnp.asarray(factor, boxes.dtype)
    xyxy = jnp.concatenate([factor[..., ::-1], factor[..., ::-1]], axis=-1)
    return boxes * jnp.broadcast_to(xyxy, boxes.shape)


def clip(boxes: Float[Array, "... 4"], extent: Float[Array, "... 2"]) -> Float[Array, "... 4"]:
    """Returns the boxes cut at the border of an image of `extent` (height, width) px."""
    extent = jnp.asarray(extent, boxes.dtype)
    xyxy = jnp.concatenate([extent[..., ::-1], extent[..., ::-1]], axis=-1)
    return jnp.clip(boxes, 0.0, jnp.broadcast_to(xyxy, boxes.shape))
