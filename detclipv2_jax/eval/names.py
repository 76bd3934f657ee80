"""The share of found boxes that carry the right name: what a person sees, who reads one name a box.

AP ranks the boxes of one word over all photos; here the words of one box compete with each other.

  python -m detclipv2_jax.eval.names --annotations=FILE --detections=FILE

prints `found` and `top1` (and both for the rare, common and frequent categories: r, c, f) as fractions.
"""

from __future__ import annotations

import functools
import itertools
import pathlib
import sys
from collections.abc import Collection
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from detclipv2_jax import commands
from detclipv2_jax.data import truth as truth_lib
from detclipv2_jax.data.truth import FREQUENCIES, Truth
from detclipv2_jax.eval import coco
from detclipv2_jax.eval import detections as detections_lib
from detclipv2_jax.eval.detections import Found

MIN_IOU = 0.5
SCORES = ("found", "top1")  # what names of scores start with
KIND = "names: of annotated boxes that a detection overlaps with IoU > 0.5, the share whose best one names them right"
NOT_FOUND = -1


def evaluate(
    annotations: str | pathlib.Path | dict[str, Any] | Truth,
    detections: Any,
    *,
    image_ids: Collection[Any] | None = None,
) -> dict[str, float]:
    """Returns `found` and `top1` as fractions; where categories carry a frequency also foundr, top1r, … (r, c, f).

    A detection belongs to the annotated box that it overlaps most, if their IoU is above 1/2. `found` is the share of
    annotated boxes that a detection belongs to. `top1` is the share of those found whose best detection, the one with
    the highest score of all words and boxes (of equal ones the first), has the category of the annotated box.
    Crowds and boxes with an "ignore" flag are left out. -1: nothing to measure.

    Arguments are those of `coco.evaluate`.
    """
    truth = truth_lib.read(annotations)
    evaluated = truth.places(None if image_ids is None else list(image_ids))
    found = detections_lib.find(detections, truth, evaluated)
    counted = ~truth.crowd & ~truth.ignored & np.isin(truth.image, evaluated)
    names = np.full(len(truth.boxes), NOT_FOUND)
    order = np.lexsort((-found.scores, found.images))
    num_images = len(truth.images)
    ends = np.searchsorted(found.images[order], np.arange(num_images + 1))
    box_order = np.argsort(truth.image, kind="stable")
    box_ends = np.searchsorted(truth.image[box_order], np.arange(num_images + 1))
    for (start, end), (first, last) in zip(itertools.pairwise(ends), itertools.pairwise(box_ends), strict=True):
        image_boxes = box_order[first:last][counted[box_order[first:last]]]
        names[image_boxes] = _best_names(truth.boxes[image_boxes], found.take(order[start:end]))
    named, category = names[counted], truth.category[counted]
    scores: dict[str, float] = {}
    for lead in ("", *(name for name in FREQUENCIES if name in truth.frequencies)):
        chosen = np.array([lead in ("", truth.frequencies[i]) for i in category], bool)
        is_found = named[chosen] != NOT_FOUND
        right = named[chosen] == category[chosen]
        scores[f"found{lead}"] = float(is_found.mean()) if chosen.any() else -1.0
        scores[f"top1{lead}"] = float(right.sum() / is_found.sum()) if is_found.any() else -1.0
    return scores


def table(scores: dict[str, float]) -> str:
    """Returns scores as lines of text, in percent; a dash where there was nothing to measure."""
    return "".join(f"{name:>7} {'-' if value < 0 else format(100 * value, '.1f'):>5}" for name, value in scores.items())


def _best_names(boxes: Float[np.ndarray, "n 4"], found: Found) -> Int[np.ndarray, " n"]:
    """Returns the category of the best detection of each annotated box (xywh); detections come best first."""
    names = np.full(len(boxes), NOT_FOUND)
    if len(boxes) and len(found.boxes):
        overlap = _iou(found.boxes, boxes)
        belonging = np.flatnonzero(overlap.max(axis=1) > MIN_IOU)
        owners, first = np.unique(overlap.argmax(axis=1)[belonging], return_index=True)
        names[owners] = found.categories[belonging[first]]
    return names


def _iou(a: Float[np.ndarray, "d 4"], b: Float[np.ndarray, "n 4"]) -> Float[np.ndarray, "d n"]:
    """Returns the IoU of each box of `a` with each of `b`, both (x, y, width, height)."""
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum((a[:, :2] + a[:, 2:])[:, None], (b[:, :2] + b[:, 2:])[None])
    shared = np.prod(np.maximum(high - low, 0.0), axis=2)
    areas = np.prod(a[:, 2:], axis=1)[:, None] + np.prod(b[:, 2:], axis=1)[None] - shared
    return shared / np.maximum(areas, 1e-12)


command = functools.partial(coco.score, evaluate=evaluate, ap=KIND, table=table, rename=dict)

if __name__ == "__main__":
    sys.exit(commands.run(command, about=__doc__))
