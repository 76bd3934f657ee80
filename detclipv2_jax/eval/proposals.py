"""The share of objects that are found under whatever name (class-agnostic AR): how well boxes generalise.

  python -m detclipv2_jax.eval.proposals --annotations=FILE --detections=FILE

prints AR of the best 10, 100 and 300 boxes an image, over IoU 0.50:0.95, as fractions: of all objects, of small, medium
and large ones, and of those of rare, common and frequent categories (r, c, f): where the rare ones had no box in
training, ARr is that of novel objects. Files like COCO's, whose categories have no frequency, give none of these. A box
that was found under several names counts once, with its best score.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import sys
from collections.abc import Collection
from typing import Any

import numpy as np

from detclipv2_jax import commands
from detclipv2_jax.data import truth as truth_lib
from detclipv2_jax.data.annotations import Ids
from detclipv2_jax.data.truth import FREQUENCIES, Truth
from detclipv2_jax.eval import coco, lvis
from detclipv2_jax.eval import detections as detections_lib
from detclipv2_jax.eval.detections import Found

LEAD = "agnostic_"
LIMITS = (10, 100, lvis.MAX_AN_IMAGE)  # boxes an image
KIND = f"class-agnostic AR, IoU 0.50:0.95, best {', '.join(map(str, LIMITS))} boxes an image"
_NO_FREQUENCY = (
    'no AR of novel and base objects: no category of the annotations has a "frequency"; give novel ones "r", base ones '
    '"f" (docs/evaluation.md)'
)


def evaluate(
    annotations: str | pathlib.Path | dict[str, Any] | Truth,
    detections: Any,
    *,
    image_ids: Collection[Any] | None = None,
) -> dict[str, float]:
    """Returns agnostic_AR@10, @100 and @300, and alike ARs, ARm, ARl and, where the file says so, ARr, ARc, ARf.

    They are fractions.

    Crowds and boxes with an "ignore" flag need not be found. -1: nothing to measure.

    Arguments are those of `coco.evaluate`.
    """
    truth = truth_lib.read(annotations)
    evaluated = truth.places(None if image_ids is None else list(image_ids))
    found = _places(detections_lib.find(detections, truth, evaluated))
    frequency = np.array(truth.frequencies, object)[truth.category]
    pairs = np.zeros((0, 2), np.int64)
    agnostic = dataclasses.replace(
        truth,
        categories=[{"id": 1, "name": "object"}],
        category_ids=Ids([1]),
        category=np.zeros_like(truth.category),
        absent=pairs,
        incomplete=pairs,
    )
    scores: dict[str, float] = {}
    for letter in ("", *(letter for letter in FREQUENCIES if letter in truth.frequencies)):
        others = np.zeros(len(frequency), bool) if not letter else frequency != letter
        part = dataclasses.replace(agnostic, ignored=truth.ignored | others)
        for limit in LIMITS:
            measured = lvis.evaluate(part, _best(found, limit), image_ids=image_ids)
            for size in lvis.AREAS if not letter else [""]:
                scores[f"{LEAD}AR{size or letter}@{limit}"] = measured[f"AR{size}@{lvis.MAX_AN_IMAGE}"]
    return scores


def table(scores: dict[str, float]) -> str:
    """Returns scores as a line of text for each limit, in percent; a dash where there was nothing to measure."""
    lines: dict[str, list[str]] = {}
    for name, value in scores.items():
        text = f"{name} {'-' if value < 0 else format(100 * value, '.1f')}"
        lines.setdefault(name.partition("@")[2], []).append(text)
    return "\n".join("   ".join(line) for line in lines.values())


def report(scores: dict[str, float]) -> str:
    """Returns the table, and what is missing if no score is by frequency; too long for the log of a run."""
    by_frequency = any(name.startswith(f"{LEAD}AR{letter}@") for name in scores for letter in FREQUENCIES)
    return table(scores) if by_frequency else f"{table(scores)}\n{_NO_FREQUENCY}"


def _best(found: Found, limit: int) -> Found:
    """Returns the first rows of each image."""
    order = np.argsort(found.images, kind="stable")
    images = found.images[order]
    place = np.arange(len(images)) - np.searchsorted(images, images)
    return found.take(np.sort(order[place < limit]))


def _places(found: Found) -> Found:
    """Returns each box of an image once, with its best score, best first within all."""
    found = found.take(np.argsort(-found.scores, kind="stable"))
    _, first = np.unique(np.column_stack([found.images, found.boxes]), axis=0, return_index=True)
    found = found.take(np.sort(first))
    return dataclasses.replace(found, categories=np.zeros_like(found.categories))


command = functools.partial(coco.score, evaluate=evaluate, ap=KIND, table=report, rename=dict)

if __name__ == "__main__":
    sys.exit(commands.run(command, about=__doc__))
