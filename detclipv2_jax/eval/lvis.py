"""LVIS v1 scores of a file of detections, standard and fixed AP at once.

* standard: the best 300 detections an image, as lvis-api;
* fixed (Dave et al. 2021): the best 10,000 detections a category over the whole set, no limit an image.

Of equal scores the earlier detection of the file counts. Federated rules: a detection counts only where its category is
annotated on the image or listed as absent (neg_category_ids); an unmatched one of a category that is not annotated
exhaustively (not_exhaustive_category_ids) is ignored.

Prints both side by side and, as its last line, one JSON object of fractions: AP, AP50, AP75, APs, APm, APl, APr, APc,
APf, AR@300, ARs@300, ARm@300, ARl@300 of the standard protocol, the same of the fixed one led by "fixed_" (its AR has
no limit to name), and the protocol. With --fixed_ap the names without prefix are the fixed ones and the others are led
by "standard_". -1 means that there was nothing to measure.
"""

from __future__ import annotations

import dataclasses
import itertools
import pathlib
import sys
from collections.abc import Collection, Iterator
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, Int8

from detclipv2_jax import commands
from detclipv2_jax.data import truth as truth_lib
from detclipv2_jax.data.truth import FREQUENCIES, Truth
from detclipv2_jax.eval import coco
from detclipv2_jax.eval import detections as detections_lib
from detclipv2_jax.eval.detections import Found

MAX_AN_IMAGE = 300  # standard
MAX_A_CATEGORY = 10_000  # fixed
AP_KIND = (
    f"LVIS v1, IoU 0.50:0.95, 101 recall points, federated rules; standard: best {MAX_AN_IMAGE} detections an image;"
    f" fixed: best {MAX_A_CATEGORY} a category over the whole set"
)
IOUS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0.0, 1.0, 101)
AREAS = {"": (0.0, 1e10), "s": (0.0, 32.0**2), "m": (32.0**2, 96.0**2), "l": (96.0**2, 1e10)}  # px², ends included
PAIRS_AT_ONCE = 1 << 21  # (detection, box) pairs whose IoU is computed at once: about 200 MB
UNMATCHED, MATCHED, MATCHED_IGNORED = 0, 1, 2
_AREA_OF = np.repeat(np.arange(len(AREAS)), len(IOUS))  # a column is an area and an IoU threshold
_LOWEST, _HIGHEST = np.array(list(AREAS.values())).T


def evaluate(
    annotations: str | pathlib.Path | dict[str, Any] | Truth,
    detections: Any,
    *,
    image_ids: Collection[Any] | None = None,
    share: coco.Share = coco.WHOLE,
) -> dict[str, float]:
    """Returns the 13 standard scores and, led by "fixed_", the 13 of fixed AP, as fractions; see the module.

    Arguments are those of `coco.evaluate`. A json without LVIS's lists counts as annotated exhaustively; of a detection
    48 bytes or so are held.

    Raises:
      ValueError: a file is not what it should be, or detections name unknown images or categories.
    """
    whole = truth_lib.read(annotations)
    evaluated = whole.places(None if image_ids is None else list(image_ids))
    found = detections_lib.find(detections, whole, evaluated)
    truth = _Keyed.of(whole, evaluated)
    found = dataclasses.replace(found, images=np.searchsorted(evaluated, found.images).astype(np.int32))
    chosen = _best(found.images, found.scores, MAX_AN_IMAGE), _best(found.categories, found.scores, MAX_A_CATEGORY)
    measured = np.stack([_measure(truth, found, rows, share=share) for rows in chosen])
    standard, fixed = (_summary(truth, *both) for both in share.join(measured))
    named = {f"{name}@{MAX_AN_IMAGE}" if name.startswith("AR") else name: value for name, value in standard.items()}
    return named | {f"fixed_{name}": value for name, value in fixed.items()}


@dataclasses.dataclass(frozen=True)
class _Keyed:
    """Annotated boxes by key, which is category * number of images + image."""

    num_images: int
    frequencies: list[str | None]
    keys: Int[np.ndarray, " g"]  # of the boxes, ascending; within a key in the order of the file
    boxes: Float[np.ndarray, "g 4"]  # xywh
    crowd: Bool[np.ndarray, " g"]
    ignored: Bool[np.ndarray, "g 4"]  # for each area
    known: Int[np.ndarray, " k"] | None  # keys of which it is known whether the category is on the image; None: all
    incomplete: Int[np.ndarray, " i"]  # keys with more objects than annotated boxes

    @classmethod
    def of(cls, truth: Truth, evaluated: Int[np.ndarray, " e"]) -> _Keyed:
        place = np.full(len(truth.images), -1)
        place[evaluated] = np.arange(len(evaluated))

        def key(images: np.ndarray, categories: np.ndarray) -> np.ndarray:
            return (categories * len(evaluated) + place[images])[place[images] >= 0]

        kept = place[truth.image] >= 0
        keys = key(truth.image, truth.category)
        order = np.argsort(keys, kind="stable")
        area, ignored = truth.areas[kept][order, None], (truth.crowd | truth.ignored)[kept][order, None]
        absent, incomplete = (key(pairs[:, 0], pairs[:, 1]) for pairs in (truth.absent, truth.incomplete))
        return cls(
            num_images=len(evaluated),
            frequencies=truth.frequencies,
            keys=keys[order],
            boxes=truth.boxes[kept][order],
            crowd=truth.crowd[kept][order],
            ignored=ignored | (area < _LOWEST) | (area > _HIGHEST),
            known=np.unique(np.concatenate([keys, absent])) if truth.federated else None,
            incomplete=np.unique(incomplete),
        )


def _best(groups: Int[np.ndarray, " d"], scores: Float[np.ndarray, " d"], limit: int) -> Bool[np.ndarray, " d"]:
    """Returns which rows are among the best `limit` of their group; of equal scores the earlier is better."""
    counts = np.bincount(groups)
    if counts.max(initial=0) <= limit:
        return np.ones(len(groups), bool)
    order = np.lexsort((-scores, groups))
    chosen = np.empty(len(groups), bool)
    chosen[order] = np.arange(len(groups)) - np.repeat(np.cumsum(counts) - counts, counts) < limit
    return chosen


def _measure(
    truth: _Keyed, found: Found, chosen: Bool[np.ndarray, " d"], *, share: coco.Share
) -> Float[np.ndarray, "2 c x"]:
    """Returns average precision and recall of every category and column; -1 without boxes and of others' categories.

    1. Keep detections of which it is known whether they are right, by (category, image, falling score).
    2. Match them with the boxes.
    3. A category at a time, order them by score and count.
    """
    # 1
    keys = found.categories * np.int64(truth.num_images) + found.images
    counted = chosen & share.owns(found.categories)
    rows = np.flatnonzero(counted if truth.known is None else counted & _member(keys, truth.known))
    rows = rows[np.lexsort((-found.scores[rows], keys[rows]))]
    found, keys = found.take(rows), keys[rows]
    # 2
    state = _match(truth, found, keys)
    area = (found.boxes[:, 2] * found.boxes[:, 3])[:, None]
    ignored = (area < _LOWEST) | (area > _HIGHEST) | _member(keys, truth.incomplete)[:, None]  # where unmatched
    # 3
    num_columns, num_categories = len(_AREA_OF), len(truth.frequencies)
    both = np.full((2, num_categories, num_columns), -1.0)
    precision, recall = both
    starts = np.searchsorted(found.categories, np.arange(num_categories + 1))
    category_of_box = truth.keys // truth.num_images
    num_boxes = np.stack([np.bincount(category_of_box[~x], minlength=num_categories) for x in truth.ignored.T], axis=1)
    for category in np.flatnonzero((num_boxes[:, 0] > 0) & share.owns(np.arange(num_categories))):
        those = slice(starts[category], starts[category + 1])
        order = np.argsort(-found.scores[those], kind="stable")
        states, unmatched_ignored = state[those][order], ignored[those][order][:, _AREA_OF]
        matched = states == MATCHED
        places = np.cumsum(matched | ((states == UNMATCHED) & ~unmatched_ignored), axis=0, dtype=np.int32)
        hits, totals = matched.sum(axis=0), num_boxes[category, _AREA_OF]
        measured = totals > 0
        precision[category, measured], recall[category, measured] = 0.0, hits[measured] / totals[measured]
        for column in np.flatnonzero(measured & (hits > 0)):
            place = places[matched[:, column], column]  # of each right one among those that count
            rank = np.arange(1, len(place) + 1)
            # precision rises at right ones only, so that the best one from a recall on stands at one of them
            best = np.maximum.accumulate((rank / (place + np.spacing(1)))[::-1])[::-1]
            reached = np.searchsorted(rank / totals[column], RECALLS)
            precision[category, column] = np.append(best, 0.0)[reached].mean()
    return both


def _member(keys: Int[np.ndarray, " d"], known: Int[np.ndarray, " k"]) -> Bool[np.ndarray, " d"]:
    """Returns which keys are among the known ones, which ascend."""
    if not len(known):
        return np.zeros(len(keys), bool)
    return known[np.minimum(np.searchsorted(known, keys), len(known) - 1)] == keys


def _match(truth: _Keyed, found: Found, keys: Int[np.ndarray, " d"]) -> Int8[np.ndarray, "d x"]:
    """Returns UNMATCHED, MATCHED or MATCHED_IGNORED for every detection and column.

    Within an image and category, better detections choose first: among the free boxes that overlap enough the one with
    the largest IoU (of equals the last), ignored boxes only where there is no other. Those of crowds stay free. The
    n-th detections of all images and categories choose at once.
    """
    state = np.zeros((len(keys), len(_AREA_OF)), np.int8)
    parts = [(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0)), *_overlapping_pairs(truth, found, keys)]
    detection, box, iou = (np.concatenate(column) for column in zip(*parts, strict=True))
    place = detection - np.searchsorted(keys, keys[detection])  # of the detection within its image and category
    order = np.lexsort((box, iou, detection, place))
    detection, box, iou, place = detection[order], box[order], iou[order], place[order]
    thresholds = np.tile(IOUS, len(AREAS))
    taken = np.zeros((len(truth.keys), len(_AREA_OF)), bool)
    steps = np.flatnonzero(np.diff(place, prepend=-1, append=-1))
    for start, end in itertools.pairwise(steps):
        boxes, num = box[start:end], end - start
        free = (iou[start:end, None] >= thresholds) & ~(taken[boxes] & ~truth.crowd[boxes, None])
        regular = ~truth.ignored[boxes][:, _AREA_OF]
        preference = np.where(free, np.arange(num, dtype=np.int32)[:, None] + np.int32(num) * regular, -1)
        firsts = np.flatnonzero(np.diff(detection[start:end], prepend=-1))
        best = np.maximum.reduceat(preference, firsts, axis=0)
        state[detection[start:end][firsts]] = np.where(
            best < 0, UNMATCHED, np.where(best < num, MATCHED_IGNORED, MATCHED)
        )
        who, column = np.nonzero(best >= 0)
        taken[boxes[best[who, column] % num], column] = True
    return state


def _overlapping_pairs(
    truth: _Keyed, found: Found, keys: Int[np.ndarray, " d"]
) -> Iterator[tuple[Int[np.ndarray, " p"], Int[np.ndarray, " p"], Float[np.ndarray, " p"]]]:
    """Yields (detection, box, IoU) of all pairs of one image and category with an IoU that may match."""
    first = np.searchsorted(truth.keys, keys)
    count = np.searchsorted(truth.keys, keys, side="right") - first
    ends = np.cumsum(count)
    start = 0
    while start < len(keys):
        before = ends[start] - count[start]
        end = max(start + 1, int(np.searchsorted(ends, before + PAIRS_AT_ONCE, side="right")))
        detection = np.repeat(np.arange(start, end), count[start:end])
        box = np.arange(len(detection)) + np.repeat(
            first[start:end] - (ends - count)[start:end] + before, count[start:end]
        )
        a, b = found.boxes[detection], truth.boxes[box]
        sides = np.minimum(a[:, :2] + a[:, 2:], b[:, :2] + b[:, 2:]) - np.maximum(a[:, :2], b[:, :2])
        near = np.flatnonzero((sides > 0).all(axis=1))
        common = sides[near, 0] * sides[near, 1]
        area = a[near, 2] * a[near, 3]  # of a crowd's box the part outside of the detection does not count
        iou = common / np.where(truth.crowd[box[near]], area, area + b[near, 2] * b[near, 3] - common)
        enough = iou >= IOUS[0]
        yield detection[near[enough]], box[near[enough]], iou[enough]
        start = end


def _summary(truth: _Keyed, precision: Float[np.ndarray, "c x"], recall: Float[np.ndarray, "c x"]) -> dict[str, float]:
    def mean(values: np.ndarray) -> float:
        measured = values[values > -1]
        return float(measured.mean()) if measured.size else -1.0

    columns = [i == _AREA_OF for i in range(len(AREAS))]
    all_areas = precision[:, columns[0]]
    scores = {"AP": mean(all_areas), "AP50": mean(all_areas[:, 0]), "AP75": mean(all_areas[:, 5])}
    scores |= {f"AP{name}": mean(precision[:, chosen]) for name, chosen in zip(AREAS, columns, strict=True) if name}
    for name in FREQUENCIES:
        scores[f"AP{name}"] = mean(all_areas[[frequency == name for frequency in truth.frequencies]])
    return scores | {f"AR{name}": mean(recall[:, chosen]) for name, chosen in zip(AREAS, columns, strict=True)}


def table(scores: dict[str, float]) -> str:
    """Returns both protocols side by side in percent; a dash where there was nothing to measure."""
    names = [name for name in scores if not name.startswith("fixed_")]
    lines = [f"{'':10}{'standard':>10}{'fixed':>10}"]
    for name in names:
        values = (scores[name], scores[f"fixed_{name.split('@')[0]}"])
        lines.append(f"{name:10}" + "".join(f"{'-' if x < 0 else format(100 * x, '.1f'):>10}" for x in values))
    return "\n".join(lines)


def score(
    *,
    annotations: str,
    detections: str,
    output: pathlib.Path | None = None,
    max_bad_share: float = 0.0,
    fixed_ap: bool = False,
) -> None:
    """Scores a file of detections; prints counts, a table and one JSON object.

    Args:
      annotations: LVIS json with the true boxes
      detections: COCO results json with the found boxes
      output: also write the JSON object to this file
      max_bad_share: share of the annotations that may be left out because they cannot be used, 0 to 1
      fixed_ap: the names without prefix are those of fixed AP
    """
    ap = f"{AP_KIND}; names without prefix: {'fixed' if fixed_ap else 'standard'}"
    coco.score(
        annotations=annotations,
        detections=detections,
        output=output,
        max_bad_share=max_bad_share,
        evaluate=evaluate,
        ap=ap,
        table=table,
        rename=_fixed_first if fixed_ap else dict,
    )


def _fixed_first(scores: dict[str, float]) -> dict[str, float]:
    fixed = {name.removeprefix("fixed_"): value for name, value in scores.items() if name.startswith("fixed_")}
    return fixed | {f"standard_{name}": value for name, value in scores.items() if not name.startswith("fixed_")}


if __name__ == "__main__":
    sys.exit(commands.run(score, about=__doc__))
