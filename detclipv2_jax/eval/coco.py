"""COCO scores of a file of detections, by pycocotools.

Prints a table and, as its last line, one JSON object: the 12 COCO numbers as fractions, APr / APc / APf where the
categories carry a "frequency" (mean AP of the rare, common and frequent ones), and the protocol. -1 means that there
was nothing to measure, for example no small object. LVIS files are scored like any other COCO file: their federated
rules are not applied.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import math
import pathlib
import sys
from collections.abc import Collection
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
FREQUENCIES = ("r", "c", "f")  # rare, common, frequent
AP_KIND = "COCO: pycocotools, IoU 0.50:0.95, 101 recall points, best 100 detections an image and category"


def evaluate(
    annotations: str | pathlib.Path | dict[str, Any],
    detections: str | pathlib.Path | list[dict[str, Any]],
    *,
    image_ids: Collection[int] | None = None,
) -> dict[str, float]:
    """Returns the 12 COCO numbers (and APr, APc, APf where categories carry a frequency) as fractions.

    Args:
      annotations: COCO json (path or content); "area" and "iscrowd" may be missing.
      detections: COCO results (path or content): rows of image_id, category_id, bbox (x, y, width, height), score. No
        rows at all score 0.
      image_ids: images that were evaluated; all listed ones by default. The boxes of others do not count as missed.

    Raises:
      ValueError: a file is not what it should be, or detections name unknown images or categories.
    """
    truth = load_annotations(annotations)
    rows = load_detections(detections)
    known = {image["id"] for image in truth["images"]}
    evaluated = sorted(known if image_ids is None else image_ids)
    _refuse_unknown("evaluated images", set(evaluated), known)
    _refuse_unknown("images of the detections", {row["image_id"] for row in rows}, set(evaluated))
    categories = {category["id"] for category in truth["categories"]}
    _refuse_unknown("categories of the detections", {row["category_id"] for row in rows}, categories)

    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        reference = _index(truth)
        results = reference.loadRes(rows) if rows else _index({**truth, "annotations": []})
        evaluation = COCOeval(reference, results, "bbox")
        evaluation.params.imgIds = evaluated
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    scores = {name: float(value) for name, value in zip(METRICS, evaluation.stats, strict=True)}
    return scores | _by_frequency(evaluation, truth["categories"])


def _by_frequency(evaluation: COCOeval, categories: list[dict[str, Any]]) -> dict[str, float]:
    """Returns APr, APc, APf: the mean over the measured entries of the categories of one frequency."""
    if not any("frequency" in category for category in categories):
        return {}
    frequency = {category["id"]: category.get("frequency") for category in categories}
    precision = evaluation.eval["precision"][:, :, :, 0, -1]  # [iou, recall, category], all areas, 100 detections
    scores = {}
    for name in FREQUENCIES:
        chosen = [i for i, category in enumerate(evaluation.params.catIds) if frequency[category] == name]
        values = precision[:, :, chosen]
        values = values[values > -1]
        scores[f"AP{name}"] = float(values.mean()) if values.size else -1.0
    return scores


def load_annotations(annotations: str | pathlib.Path | dict[str, Any]) -> dict[str, Any]:
    """Returns the content of a COCO json with "area" and "iscrowd" in every annotation; ValueError if it is not one."""
    content = _read(annotations)
    keys = ("images", "annotations", "categories")
    if not isinstance(content, dict) or any(not isinstance(content.get(key), list) for key in keys):
        what = f"an object of {', '.join(sorted(content))}" if isinstance(content, dict) else f"a {_kind(content)}"
        raise ValueError(
            f"{_name(annotations)} is no COCO annotation file: it holds {what}, not the lists {', '.join(keys)}"
            + ("; are annotations and detections exchanged?" if isinstance(content, list) else "")
        )
    for key in keys:
        if not content[key]:
            raise ValueError(f"{_name(annotations)} has no {key}: there is nothing to score against")
    full = []
    for annotation in content["annotations"]:
        if "bbox" not in annotation:
            raise ValueError(f"{_name(annotations)}: annotation {annotation.get('id')} has no bbox")
        area = annotation["bbox"][2] * annotation["bbox"][3]
        full.append({"area": area, "iscrowd": 0} | annotation)
    return content | {"annotations": full}


def load_detections(detections: str | pathlib.Path | list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns COCO results reduced to their four keys; ValueError naming the first row that is wrong."""
    content = _read(detections)
    if not isinstance(content, list):
        raise ValueError(
            f"{_name(detections)} is no COCO results file: it holds a {_kind(content)}, not a list of objects with"
            " image_id, category_id, bbox and score"
            + ("; are annotations and detections exchanged?" if isinstance(content, dict) else "")
        )
    rows = []
    for i, row in enumerate(content):
        try:
            box, score = [float(value) for value in row["bbox"]], float(row["score"])
            ids = {"image_id": row["image_id"], "category_id": row["category_id"]}
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{_name(detections)}: row {i} is {str(row)[:120]}, not an object with image_id, category_id,"
                " bbox (x, y, width, height) and score"
            ) from error
        if len(box) != 4 or not all(map(math.isfinite, [*box, score])):
            raise ValueError(
                f"{_name(detections)}: row {i} has bbox {box} and score {score}; all must be finite numbers"
            )
        rows.append({**ids, "bbox": box, "score": score})
    return rows


def _read(source: Any) -> Any:
    if not isinstance(source, (str, pathlib.Path)):
        return source
    try:
        return json.loads(pathlib.Path(source).read_bytes())
    except OSError as error:
        raise ValueError(f"cannot read {source}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{source} is not JSON: {error}") from error


def _name(source: Any) -> str:
    return str(source) if isinstance(source, (str, pathlib.Path)) else "the given object"


def _kind(content: Any) -> str:
    return "JSON object" if isinstance(content, dict) else "JSON list" if isinstance(content, list) else "JSON value"


def _refuse_unknown(what: str, found: set[Any], known: set[Any]) -> None:
    unknown = sorted(found - known, key=str)
    if unknown:
        examples = ", ".join(map(str, unknown[:5]))
        raise ValueError(
            f"{len(unknown)} of {len(found)} {what} are unknown: {examples}{' …' if len(unknown) > 5 else ''};"
            " they belong to another annotation file"
        )


def _index(content: dict[str, Any]) -> COCO:
    coco = COCO()
    coco.dataset = content
    coco.createIndex()
    return coco


def sha256(path: str | pathlib.Path) -> str:
    """Returns the hex SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m detclipv2_jax.eval.coco",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--annotations", required=True, metavar="FILE", help="COCO json with the true boxes")
    parser.add_argument("--detections", required=True, metavar="FILE", help="COCO results json with the found boxes")
    parser.add_argument("--output", metavar="FILE", help="also write the JSON object to this file")
    options = parser.parse_args(arguments)
    try:
        truth, rows = load_annotations(options.annotations), load_detections(options.detections)
        if not rows:
            raise ValueError(f"{options.detections} is an empty list: no detections, nothing to score")
        scores = evaluate(truth, rows)
        protocol = {
            "ap": AP_KIND,
            "annotations": options.annotations,
            "annotations_sha256": sha256(options.annotations),
            "detections": options.detections,
            "detections_sha256": sha256(options.detections),
            "num_images": len(truth["images"]),
            "num_images_with_detections": int(np.unique([row["image_id"] for row in rows]).size),
            "num_categories": len(truth["categories"]),
            "num_boxes": len(truth["annotations"]),
            "num_detections": len(rows),
        }
        line = json.dumps(scores | {"protocol": protocol})
        if options.output:
            pathlib.Path(options.output).write_text(line + "\n")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if any("neg_category_ids" in image for image in truth["images"]):
        print("note: an LVIS file scored by COCO's rules; its federated rules are not applied", file=sys.stderr)
    counted = {name: protocol[name] for name in protocol if name.startswith("num_")}
    print(AP_KIND)
    print(", ".join(f"{count} {name.removeprefix('num_').replace('_', ' ')}" for name, count in counted.items()))
    print(table(scores))
    print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
