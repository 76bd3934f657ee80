"""Large photos in tiles, as SAHI does (Akyon et al. 2022): small objects are seen larger, and the whole photo as well.

1. A photo that is larger than a tile is cut into tiles of one size, spread evenly, which overlap by at least a share of
   their side. They are predicted in batches like photos, and the whole photo with them, for what is larger than a tile.
2. A box that reaches a border of its tile inside the photo may be a part of an object. It goes where a box of its name,
   which no border cuts, holds more than half of it; the best of these takes its score if that is higher. So SAHI merges
   boxes by the share of the smaller one that lies in the other. A part that no such box holds stays.
3. One NMS by name over all that is left, as on a photo.

A photo that is no larger than a tile is predicted as without tiles.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from detclipv2_jax.data import transforms
from detclipv2_jax.geometry import nms as nms_lib
from detclipv2_jax.inference.detect import Limits
from detclipv2_jax.inference.found import Found

MIN_TILE_PX = 32
BORDER = 0.01  # of the tile's side: a box that ends so near to its border is taken for cut
MIN_SHARE = 0.5  # of a cut box in a whole one
_nms = jax.jit(nms_lib.nms, static_argnames=("max_outputs",))


class Place(NamedTuple):
    """Where a tile lies on its photo, px."""

    x: int
    y: int
    width: int
    height: int


def check(*, tile: int, overlap: float) -> None:
    """Raises a ValueError for a size or an overlap that make no sense."""
    if tile < MIN_TILE_PX:
        raise ValueError(f"tile is {tile}; it must be 0, for none, or at least {MIN_TILE_PX} px")
    if not 0 <= overlap <= 0.9:
        raise ValueError(f"tile_overlap is {overlap}; it must lie between 0 and 0.9 of a tile's side")


def places(size: tuple[int, int], *, tile: int, overlap: float) -> list[Place]:
    """Returns the tiles of a photo of (height, width) px, row by row; one where it is no larger than a tile."""

    def starts(side: int) -> list[int]:
        num = 1 + max(0, math.ceil((side - tile) / (tile - math.floor(tile * overlap))))
        return [round(i * (side - tile) / (num - 1)) if num > 1 else 0 for i in range(num)]

    height, width = size
    return [Place(x, y, min(tile, width), min(tile, height)) for y in starts(height) for x in starts(width)]


def iterate(
    find: Callable[[Iterable[Any]], Iterator[tuple[int, Found]]],
    images: Iterable[Any],
    *,
    tile: int,
    overlap: float,
    limits: Limits,
) -> Iterator[tuple[int, Found]]:
    """Yields (position, what is found) of images as soon as all of their tiles are predicted.

    Args:
      find: the same for images that are not cut.
      images: paths or RGB arrays.
      tile: side of a tile, px of the image.
      overlap: least share of a tile's side that it shares with the next one.
      limits: of NMS and of the number of boxes.
    """
    check(tile=tile, overlap=overlap)
    owners: dict[int, tuple[int, Place | None]] = {}  # of pieces: an image and a place on it, None for the whole
    waiting: dict[int, _Image] = {}

    def pieces() -> Iterator[Any]:
        num = 0
        for i, image in enumerate(images):
            photo = _photo(image)
            cut = places(photo.pixels.shape[:2], tile=tile, overlap=overlap)
            listed = [None, *cut] if len(cut) > 1 else [None]
            waiting[i] = _Image(photo.pixels.shape[:2], photo.scale, len(listed), [])
            for place in listed:
                owners[num] = i, place
                num += 1
                yield image if place is None else _cut(photo.pixels, place)

    for piece, found in find(pieces()):
        i, place = owners.pop(piece)
        image = waiting[i]
        image.parts.append((found, place))
        if len(image.parts) == image.num_parts:
            del waiting[i]
            yield i, found if place is None and image.num_parts == 1 else _merged(image, tile=tile, limits=limits)


class _Image(NamedTuple):
    """What is known of an image whose pieces are being predicted."""

    size: tuple[int, int]  # (height, width) of the pixels that were cut
    scale: Float[np.ndarray, " 4"]  # px of these pixels per px of the image
    num_parts: int
    parts: list[tuple[Found, Place | None]]


def _photo(image: Any) -> transforms.Photo:
    if not isinstance(image, str | os.PathLike):
        return transforms.Photo(image, np.shape(image)[:2])
    try:
        return transforms.read(image)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read the image {os.fspath(image)}: {error}") from error


def _cut(pixels: np.ndarray, place: Place) -> np.ndarray:
    return pixels[place.y : place.y + place.height, place.x : place.x + place.width]


def _merged(image: _Image, *, tile: int, limits: Limits) -> Found:
    """Returns what was found on a photo from what was found on it and on its tiles."""
    boxes, is_cut = [], []
    for found, place in image.parts:
        found_boxes = found.boxes.astype(np.float32)
        if place is not None:
            is_cut.append(cut_boxes(found_boxes, place, image.size, margin=BORDER * tile))
            found_boxes = (found_boxes + np.array([place.x, place.y] * 2, np.float32)) / image.scale[None]
        else:
            is_cut.append(np.zeros(len(found_boxes), bool))
        boxes.append(found_boxes)
    scores, labels = (
        np.concatenate([getattr(found, name) for found, _ in image.parts]) for name in ("scores", "labels")
    )
    kept, scores = merge(np.concatenate(boxes), scores, labels, np.concatenate(is_cut), limits=limits)
    (whole,) = (found for found, place in image.parts if place is None)
    return dataclasses.replace(whole, boxes=np.concatenate(boxes)[kept], scores=scores[kept], labels=labels[kept])


def cut_boxes(
    boxes: Float[np.ndarray, "n 4"], place: Place, size: tuple[int, int], *, margin: float
) -> Bool[np.ndarray, " n"]:
    """Returns which boxes of a tile, in its pixels, reach a border of it inside the photo of (height, width)."""
    inside = [place.x > 0, place.y > 0, place.x + place.width < size[1], place.y + place.height < size[0]]
    borders = np.array([0, 0, place.width, place.height])
    return (np.abs(boxes - borders) <= margin)[:, np.flatnonzero(inside)].any(axis=1)


def merge(
    boxes: Float[np.ndarray, "n 4"],
    scores: Float[np.ndarray, " n"],
    labels: Int[np.ndarray, " n"],
    is_cut: Bool[np.ndarray, " n"],
    *,
    limits: Limits,
) -> tuple[Int[np.ndarray, " k"], Float[np.ndarray, " n"]]:
    """Returns the rows that stay, best first, and all scores, of which some were taken over; steps 2 and 3 above."""
    scores, stays = scores.copy(), np.ones(len(scores), bool)
    classes = np.zeros(len(labels), np.int32) if limits.class_agnostic else labels.astype(np.int32)
    for label in np.unique(classes[is_cut]):
        parts, wholes = (np.flatnonzero((classes == label) & (is_cut == cut)) for cut in (True, False))
        if not len(wholes):
            continue
        low = np.maximum(boxes[parts][:, None, :2], boxes[wholes][None, :, :2])
        high = np.minimum(boxes[parts][:, None, 2:], boxes[wholes][None, :, 2:])
        areas = np.prod(boxes[parts][:, 2:] - boxes[parts][:, :2], axis=1)
        holds = np.prod(np.maximum(high - low, 0), axis=2) > MIN_SHARE * areas[:, None]
        best = wholes[np.argmax(np.where(holds, scores[wholes][None], -1.0), axis=1)]
        held = holds.any(axis=1)
        stays[parts[held]] = False
        np.maximum.at(scores, best[held], scores[parts[held]])
    rows = np.flatnonzero(stays)
    padding = max(256, 1 << (len(rows) - 1).bit_length()) - len(rows)  # few sizes are compiled
    chosen, used = _nms(
        np.pad(boxes[rows].astype(np.float32), ((0, padding), (0, 0))),
        np.pad(scores[rows], (0, padding)),
        iou_threshold=limits.nms_iou,
        max_outputs=limits.max_detections,
        mask=np.arange(len(rows) + padding) < len(rows),
        classes=np.pad(classes[rows], (0, padding)),
    )
    return rows[np.asarray(chosen)[np.asarray(used)]], scores
