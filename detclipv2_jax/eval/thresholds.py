"""A score threshold for every word, from detections on a few annotated photos.

A detection is right if it is matched with an annotated box of its word at IoU 0.5, as pycocotools matches them: the
best score first, each box once; those matched with a crowd or an "ignore" box count neither way. A word's threshold
lies midway between two scores, so that

  best F1         2 · right / (detections above it + annotated boxes) is largest; of equal ones the highest threshold;
  min_precision   the most boxes are found while the share of right ones among those above it is at least this.

A word with fewer annotated boxes than `MIN_EXAMPLES` takes the threshold of all words together. A word that cannot have
the precision at any threshold gets 1: none of its boxes is kept. Both are said.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import logging
from jaxtyping import Bool, Float

from detclipv2_jax import files
from detclipv2_jax.data.truth import Truth
from detclipv2_jax.eval import coco
from detclipv2_jax.eval.detections import Found

MIN_EXAMPLES = 5
MIN_IOU = 0.5


class Matches(NamedTuple):
    """Detections of a word that count, best first, and the number of its annotated boxes."""

    scores: Float[np.ndarray, " d"]
    right: Bool[np.ndarray, " d"]
    num_boxes: int


def match(truth: Truth, found: Found) -> list[Matches]:
    """Returns the matches of every category of a truth, over all of its images."""
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        evaluation = coco.matched(truth, found, iou=MIN_IOU)
    per_category: list[list[dict[str, Any]]] = [[] for _ in truth.categories]
    for image in filter(None, evaluation.evalImgs):
        per_category[image["category_id"] - 1].append(image)
    return [_of(images) for images in per_category]


def _of(images: Sequence[dict[str, Any]]) -> Matches:
    scores = np.concatenate([np.asarray(image["dtScores"], float) for image in images] or [np.zeros(0)])
    right = np.concatenate([image["dtMatches"][0] > 0 for image in images] or [np.zeros(0, bool)])
    counted = np.concatenate([~image["dtIgnore"][0].astype(bool) for image in images] or [np.zeros(0, bool)])
    order = np.argsort(-scores, kind="stable")
    order = order[counted[order]]
    num_boxes = sum(int((~np.asarray(image["gtIgnore"], bool)).sum()) for image in images)
    return Matches(scores[order], right[order], num_boxes)


def best(matches: Matches, *, min_precision: float | None = None) -> dict[str, float]:
    """Returns threshold, precision, recall and F1 of a word (see the module); threshold 1 where none is good enough."""
    scores, right, num_boxes = matches
    ends = np.flatnonzero(np.diff(scores, append=-np.inf))  # all detections of one score are above, or none is
    num_right, num = np.cumsum(right)[ends], ends + 1
    precision, f1 = num_right / num, 2 * num_right / (num + max(num_boxes, 1))
    good = num_right > 0 if min_precision is None else (precision >= min_precision) & (num_right > 0)
    if not good.any():
        return {"threshold": 1.0, "precision": 0.0, "recall": 0.0, "f1": 0.0}
    chosen = int(np.argmax(np.where(good, f1, -1.0)) if min_precision is None else np.flatnonzero(good)[-1])
    lowest = scores[ends[chosen]]
    below = scores[ends[chosen] + 1] if ends[chosen] + 1 < len(scores) else 0.0
    threshold = (lowest + below) / 2
    recall = num_right[chosen] / max(num_boxes, 1)
    return {
        "threshold": float(threshold if threshold < lowest else np.nextafter(lowest, 0.0)),
        "precision": float(precision[chosen]),
        "recall": float(recall),
        "f1": float(f1[chosen]),
    }


def choose(truth: Truth, found: Found, names: Sequence[str], *, min_precision: float | None = None) -> dict[str, Any]:
    """Returns thresholds for words, to be kept as json: {"rule", "common", "words": {name: {"threshold", …}}}.

    `names[i]` is the word of the truth's category i, "" for one that is not looked for. Without `min_precision` they
    are those of the best F1.

    Raises:
      ValueError: none of the words has an annotated box.
    """
    matches = match(truth, found)
    asked = [(name, one) for name, one in zip(names, matches, strict=True) if name]
    scores, right = (np.concatenate([one[i] for _, one in asked] or [np.zeros(0)]) for i in (0, 1))
    order = np.argsort(-scores, kind="stable")
    num_boxes = sum(one.num_boxes for _, one in asked)
    if not num_boxes:
        raise ValueError(
            f"{truth.name}: none of the words has an annotated box; its categories must be called like them"
        )
    common = best(Matches(scores[order], right[order].astype(bool), num_boxes), min_precision=min_precision)
    words: dict[str, dict[str, Any]] = {}
    for name, one in asked:
        few = one.num_boxes < MIN_EXAMPLES
        chosen = {"threshold": common["threshold"]} if few else best(one, min_precision=min_precision)
        words[name] = chosen | {"examples": one.num_boxes, "common": few}
    _say(words, where=truth.name, min_precision=min_precision)
    rule = "best F1" if min_precision is None else f"precision of at least {min_precision:g}"
    return {"rule": rule, "annotations": truth.name, "iou": MIN_IOU, "common": common, "words": words}


def _say(words: Mapping[str, Mapping[str, Any]], *, where: str, min_precision: float | None) -> None:
    few = [f"{name} ({one['examples']})" for name, one in words.items() if one["common"]]
    none = [name for name, one in words.items() if not one["common"] and one["threshold"] >= 1]
    if few:
        message = "%s: fewer than %d annotated boxes; these words take the threshold of all together: %s"
        logging.warning(message, where, MIN_EXAMPLES, ", ".join(few[:20]) + " …" * (len(few) > 20))
    if none:
        wanted = "a right box" if min_precision is None else f"a precision of {min_precision:g}"
        message = "%s: no threshold gives %s; no box of these words is kept: %s"
        logging.warning(message, where, wanted, ", ".join(none[:20]) + " …" * (len(none) > 20))


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns thresholds that `choose` made, from a json; ValueError if it is something else."""
    try:
        content = files.read_json(path)
        values = [content["common"]["threshold"], *(one["threshold"] for one in content["words"].values())]
        if all(type(value) in (int, float) and 0 <= value <= 1 for value in values):  # true is no number
            return content
    except OSError as error:
        raise ValueError(f"--thresholds: cannot read {os.fspath(path)}: {error.strerror or error}") from error
    except (AttributeError, KeyError, TypeError):
        pass
    form = '{"common": {"threshold": 0.3}, "words": {"cat": {"threshold": 0.4}, …}}, each from 0 to 1'
    raise ValueError(f"--thresholds: {os.fspath(path)} has other content; it must be {form}")


def of_words(content: Mapping[str, Any], names: Sequence[str]) -> Float[np.ndarray, " w"]:
    """Returns the threshold of every word; the log names those that have none of their own and take the common one."""
    words, common = content["words"], content["common"]["threshold"]
    if missing := [name for name in names if name not in words]:
        message = "no threshold of their own, so that the common one of %.3g counts: %s"
        logging.warning(message, common, ", ".join(missing[:20]) + " …" * (len(missing) > 20))
    return np.array([words.get(name, {"threshold": common})["threshold"] for name in names])
