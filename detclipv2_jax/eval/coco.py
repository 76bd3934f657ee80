"""COCO scores of a file of detections, by pycocotools.

Prints a table and, as its last line, one JSON object: the 12 COCO numbers as fractions, APr / APc / APf where the
categories carry a "frequency" (mean AP of the rare, common and frequent ones), and the protocol. -1 means that there
was nothing to measure, for example no small object. LVIS files are scored like any other COCO file: their federated
rules are not applied.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import json
import pathlib
import sys
from collections.abc import Callable, Collection, Iterator
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from detclipv2_jax import commands, files
from detclipv2_jax.data import truth as truth_lib
from detclipv2_jax.data.truth import FREQUENCIES, Truth
from detclipv2_jax.eval import detections as detections_lib
from detclipv2_jax.eval.detections import Found

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
AP_KIND = "COCO: pycocotools, IoU 0.50:0.95, 101 recall points, best 100 detections an image and category"


@dataclasses.dataclass(frozen=True)
class Share:
    """Which of the categories, in the order of their ids, a process scores, and how all come together."""

    index: int
    count: int
    join: Callable[[np.ndarray], np.ndarray]  # → the elementwise maximum over the processes

    def owns(self, categories: np.ndarray) -> np.ndarray:
        """Returns which positions of categories are of this share."""
        return categories % self.count == self.index


WHOLE = Share(0, 1, lambda array: array)


def evaluate(
    annotations: str | pathlib.Path | dict[str, Any] | Truth,
    detections: Any,
    *,
    image_ids: Collection[Any] | None = None,
    share: Share = WHOLE,
) -> dict[str, float]:
    """Returns the 12 COCO numbers (and APr, APc, APf where categories carry a frequency) as fractions.

    Boxes with an "ignore" flag need not be found, and finding them is not wrong.

    Args:
      annotations: COCO json (path or content) or what `truth.read` made of it.
      detections: COCO results, see `detections.read` and `detections.Found`. No rows at all score 0.
      image_ids: images that were evaluated; all listed ones by default. The boxes of others do not count as missed.
      share: the categories of this process.

    Raises:
      ValueError: a file is not what it should be, or detections name unknown images or categories.
    """
    truth = truth_lib.read(annotations)
    evaluated = truth.places(None if image_ids is None else list(image_ids))
    found = detections_lib.find(detections, truth, evaluated)
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        evaluation = _Evaluation(_index(truth, _boxes_of(truth)), _index(truth, _rows_of(found)), "bbox")
        evaluation.params.imgIds = (evaluated + 1).tolist()
        ids = evaluation.params.catIds
        owned = share.owns(np.arange(len(ids)))
        evaluation.params.catIds = [category_id for category_id, is_owned in zip(ids, owned, strict=True) if is_owned]
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.params.catIds = ids
        for name, axis in (("precision", 2), ("recall", 1)):
            values = np.moveaxis(evaluation.eval[name], axis, 0)
            full = np.full((len(ids), *values.shape[1:]), -1.0)
            full[owned] = values
            evaluation.eval[name] = np.moveaxis(share.join(full), 0, axis)
        evaluation.summarize()
    scores = {name: float(value) for name, value in zip(METRICS, evaluation.stats, strict=True)}
    return scores | _by_frequency(evaluation, truth)


class _Evaluation(COCOeval):
    """pycocotools' evaluation, which takes "ignore" flags for those of crowds, with both."""

    def _prepare(self) -> None:
        super()._prepare()
        for boxes in self._gts.values():
            for box in boxes:
                box["ignore"] = box["ignore"] or box["left_out"]


def matched(truth: Truth, found: Found, *, iou: float) -> COCOeval:
    """Returns pycocotools' evaluation whose `evalImgs` say which detections match at one IoU, of all of them."""
    evaluation = _Evaluation(_index(truth, _boxes_of(truth)), _index(truth, _rows_of(found)), "bbox")
    params = evaluation.params
    params.iouThrs, params.areaRng, params.areaRngLbl = np.array([iou]), [params.areaRng[0]], ["all"]
    params.maxDets = [max(len(found.scores), 1)]
    evaluation.evaluate()
    return evaluation


def _boxes_of(truth: Truth) -> Iterator[dict[str, Any]]:
    """Yields the annotations as pycocotools wants them; its ids begin with 1, and 0 would not be found."""
    columns = (truth.image + 1, truth.category + 1, truth.boxes, truth.areas, truth.crowd.astype(int), truth.ignored)
    keys = ("image_id", "category_id", "bbox", "area", "iscrowd", "left_out")
    for i, values in enumerate(zip(*(column.tolist() for column in columns), strict=True), start=1):
        yield dict(zip(keys, values, strict=True), id=i)


def _rows_of(found: Found) -> Iterator[dict[str, Any]]:
    areas = found.boxes[:, 2] * found.boxes[:, 3]
    columns = (found.images + 1, found.categories + 1, found.boxes, areas, found.scores)
    keys = ("image_id", "category_id", "bbox", "area", "score")
    for i, values in enumerate(zip(*(column.tolist() for column in columns), strict=True), start=1):
        yield dict(zip(keys, values, strict=True), id=i, iscrowd=0)


def _index(truth: Truth, annotations: Iterator[dict[str, Any]]) -> COCO:
    coco = COCO()
    coco.dataset = {
        "images": [{"id": i} for i in range(1, len(truth.images) + 1)],
        "categories": [{"id": i} for i in range(1, len(truth.categories) + 1)],
        "annotations": list(annotations),
    }
    coco.createIndex()
    return coco


def _by_frequency(evaluation: COCOeval, truth: Truth) -> dict[str, float]:
    """Returns APr, APc, APf: the mean over the measured entries of the categories of one frequency."""
    if not any("frequency" in category for category in truth.categories):
        return {}
    precision = evaluation.eval["precision"][:, :, :, 0, -1]  # [iou, recall, category], all areas, 100 detections
    scores = {}
    for name in FREQUENCIES:
        values = precision[:, :, [frequency == name for frequency in truth.frequencies]]
        values = values[values > -1]
        scores[f"AP{name}"] = float(values.mean()) if values.size else -1.0
    return scores


def table(scores: dict[str, float]) -> str:
    """Returns scores as lines of text, in percent; a dash where there was nothing to measure."""
    groups = (METRICS[:6], METRICS[6:], tuple(f"AP{name}" for name in FREQUENCIES))
    lines = []
    for names in groups:
        cells = [
            f"{name:>6} {'-' if scores[name] < 0 else format(100 * scores[name], '.1f'):>5}"
            for name in names
            if name in scores
        ]
        lines += ["".join(cells)] if cells else []
    return "\n".join(lines)


def score(
    *,
    annotations: str,
    detections: str,
    output: pathlib.Path | None = None,
    max_bad_share: float = 0.0,
    evaluate: Callable[..., dict[str, float]],
    ap: str,
    table: Callable[[dict[str, float]], str],
    rename: Callable[[dict[str, float]], dict[str, float]],
) -> None:
    """Scores a file of detections; prints counts, a table and one JSON object.

    Args:
      annotations: COCO json with the true boxes
      detections: COCO results json with the found boxes
      output: also write the JSON object to this file
      max_bad_share: share of the annotations that may be left out because they cannot be used, 0 to 1
      evaluate: (annotations, detections) → scores
      ap: what kind of AP it is
      table: scores → text
      rename: scores → those of the JSON object
    """
    truth = truth_lib.read(annotations, max_bad_share=max_bad_share)
    found = detections_lib.find(detections, truth, truth.places(None))
    if not len(found.scores):
        raise ValueError(f"{detections} is an empty list: no detections, nothing to score")
    scores = evaluate(truth, found)
    repaired = truth.odd | found.odd
    protocol = {
        "ap": ap,
        "annotations": annotations,
        "annotations_sha256": files.sha256(annotations),
        "detections": detections,
        "detections_sha256": files.sha256(detections),
        "images_evaluated": len(truth.images),
        "images_listed": len(truth.images),
        "images_with_detections": len(np.unique(found.images)),
        "num_categories": len(truth.categories),
        "num_boxes": len(truth.boxes),
        "num_detections": len(found.scores),
        "repaired": repaired,
        "made_under": _protocol_beside(detections),
    }
    line = json.dumps(rename(scores) | {"protocol": protocol})
    if output:
        files.write_text(output, [line, "\n"])
    for what, num in repaired.items():
        print(f"note: {num} × {what}", file=sys.stderr)
    if ap == AP_KIND and truth.federated:
        print("note: an LVIS file scored by COCO's rules; detclipv2_jax.eval.lvis applies LVIS's", file=sys.stderr)
    print(ap)
    counts = {name: value for name, value in protocol.items() if name.startswith(("num_", "images_"))}
    print(", ".join(f"{value} {name.removeprefix('num_').replace('_', ' ')}" for name, value in counts.items()))
    print(table(scores))
    print(line)


def _protocol_beside(detections: str) -> dict[str, Any] | None:
    """Returns the protocol (step, prompts, EMA, …) that an evaluation of ours wrote beside these detections."""
    scores = pathlib.Path(detections.removesuffix("_detections.json") + "_scores.json")
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        return json.loads(scores.read_bytes())["protocol"]
    return None


command = functools.partial(score, evaluate=evaluate, ap=AP_KIND, table=table, rename=dict)

if __name__ == "__main__":
    sys.exit(commands.run(command, about=__doc__))
