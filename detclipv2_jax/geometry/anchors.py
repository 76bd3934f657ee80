"""The anchor grid: one square anchor a cell on the five pyramid levels P3-P7."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from detclipv2_jax.geometry import boxes as box_lib

STRIDES = (8, 16, 32, 64, 128)  # px, of P3 ... P7
ANCHOR_SCALE = 8  # side of an anchor in strides


class Anchors(NamedTuple):
    """All anchors of a canvas as host constants, P3 first, row-major within a level."""

    boxes: Float[np.ndarray, "a 4"]
    levels: tuple[int, ...]  # anchors a level


def level_sizes(canvas: tuple[int, int]) -> tuple[tuple[int, int], ...]:
    """Returns (height, width) of P3 ... P7 for a canvas (height, width) px.

    Each halving of the network rounds up (it pads), and nested rounded-up halvings are one rounded-up division.
    """
    return tuple((-(-canvas[0] // stride), -(-canvas[1] // stride)) for stride in STRIDES)


def grid(canvas: tuple[int, int]) -> Anchors:
    """Returns the anchors of a canvas (height, width) px.

    A cell's anchor is a square of 8 x stride around the middle of the cell, ((x + 0.5) * stride,
    (y + 0.5) * stride), as in the ATSS authors' code; mmdetection's later default centres it on the cell's top
    left corner. With the middle, mirrored images have mirrored anchors.
    """
    boxes = []
    for (height, width), stride in zip(level_sizes(canvas), STRIDES, strict=True):
        y, x = np.meshgrid(np.arange(height) + 0.5, np.arange(width) + 0.5, indexing="ij")
        center = np.stack([x, y], axis=-1).reshape(-1, 2) * stride
        half = ANCHOR_SCALE * stride / 2
        boxes.append(np.concatenate([center - half, center + half], axis=-1))
    return Anchors(np.concatenate(boxes).astype(np.float32), tuple(h * w for h, w in level_sizes(canvas)))


def on_photo(anchors: Float[Array | np.ndarray, "a 4"], extent: Int[Array | np.ndarray, "b 2"]) -> Bool[Array, "b a"]:
    """Returns the anchors whose centre lies on the photo, not on the padding around it.

    `extent` is the (height, width) px that each photo of a batch fills at the top left of its canvas.
    """
    centers_yx = box_lib.centers(jnp.asarray(anchors))[:, ::-1]
    return jnp.all(centers_yx[None] < extent[:, None].astype(jnp.float32), axis=-1)
