"""COCO scores of a file of detections, by pycocotools.

Prints a table and, as its last line, one JSON object: the 12 COCO numbers as fractions, APr / APc / APf where the
categories carry a "frequency" (mean AP of the rare, common and frequent ones), and the protocol. -1 means that there
was nothing to measure, for example no small object. LVIS files are scored like any other COCO file: their federated
rules are not applied.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import io
import json
import pathlib
import sys
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

PART_CHARS = 1 << 23  # of a file of detections read at once: some 80,000 rows, 60 MB
METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
FREQUENCIES = ("r", "c", "f")  # rare, common, frequent
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
    annotations: str | pathlib.Path | dict[str, Any],
    detections: Any,
    *,
    image_ids: Collection[int] | None = None,
    share: Share = WHOLE,
) -> dict[str, float]:
    """Returns the 12 COCO numbers (and APr, APc, APf where categories carry a frequency) as fractions.

    Args:
      annotations: COCO json (path or content); "area" and "iscrowd" may be missing.
      detections: COCO results (see `read_detections`): rows of image_id, category_id, bbox (xywh), score.
        No rows at all score 0.
      image_ids: images that were evaluated; all listed ones by default. The boxes of others do not count as missed.
      share: the categories of this process.

    Raises:
      ValueError: a file is not what it should be, or detections name unknown images or categories.
    """
    truth = load_annotations(annotations)
    rows = load_detections(detections)
    known = {image["id"] for image in truth["images"]}
    evaluated = sorted(known if image_ids is None else image_ids)
    refuse_unknown("evaluated images", set(evaluated), known)
    refuse_unknown("images of the detections", {row["image_id"] for row in rows}, set(evaluated))
    categories = {category["id"] for category in truth["categories"]}
    refuse_unknown("categories of the detections", {row["category_id"] for row in rows}, categories)

    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        reference = _index(truth)
        results = reference.loadRes(rows) if rows else _index({**truth, "annotations": []})
        evaluation = COCOeval(reference, results, "bbox")
        evaluation.params.imgIds = evaluated
        ids = evaluation.params.catIds
        own = share.owns(np.arange(len(ids)))
        evaluation.params.catIds = [category_id for category_id, mine in zip(ids, own, strict=True) if mine]
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.params.catIds = ids
        for name, axis in (("precision", 2), ("recall", 1)):
            values = np.moveaxis(evaluation.eval[name], axis, 0)
            full = np.full((len(ids), *values.shape[1:]), -1.0)
            full[own] = values
            evaluation.eval[name] = np.moveaxis(share.join(full), 0, axis)
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


def load_detections(detections: Any) -> list[dict[str, Any]]:
    """Returns COCO results reduced to their four keys; ValueError naming the first row that is wrong."""
    return [
        {"image_id": image_id, "category_id": category_id, "bbox": box, "score": score}
        for chunk in read_detections(detections)
        for image_id, category_id, box, score in zip(
            *chunk[:2], chunk.boxes.tolist(), chunk.scores.tolist(), strict=True
        )
    ]


class Columns(NamedTuple):
    """Detections, one a row."""

    image_ids: list[Any]
    category_ids: list[Any]
    boxes: Float[np.ndarray, "d 4"]  # xywh
    scores: Float[np.ndarray, " d"]


def read_detections(detections: Any) -> Iterator[Columns]:
    """Yields COCO results in order, part by part, so that a file need not fit into memory as Python objects.

    Args:
      detections: a path, rows, or an iterator of lists of rows or of what this yields.

    Raises:
      ValueError: naming the first row that is wrong.
    """
    if isinstance(detections, (str, pathlib.Path)):
        parts = _read_list(detections)
    else:
        parts = detections if isinstance(detections, Iterator) else iter([detections])
    start = 0
    for rows in parts:
        if isinstance(rows, Columns):
            yield rows
            continue
        if not isinstance(rows, list):
            raise ValueError(
                f"{_name(detections)} is no COCO results file: it holds a {_kind(rows)}, not a list of objects with"
                " image_id, category_id, bbox and score"
                + ("; are annotations and detections exchanged?" if isinstance(rows, dict) else "")
            )
        try:
            yield _columns(rows)
        except (KeyError, TypeError, ValueError):
            for i, row in enumerate(rows):
                try:
                    _columns([row])
                except (KeyError, TypeError, ValueError) as error:
                    raise ValueError(
                        f"{_name(detections)}: row {start + i} is {str(row)[:120]}, not an object with image_id,"
                        " category_id, bbox (x, y, width, height) and score; all must be finite numbers"
                    ) from error
        start += len(rows)


def _columns(rows: list[Any]) -> Columns:
    boxes = np.array([row["bbox"] for row in rows], np.float64).reshape(len(rows), -1)
    scores = np.array([row["score"] for row in rows], np.float64)
    if scores.ndim != 1 or boxes.shape[1] != 4 or not (np.isfinite(boxes).all() and np.isfinite(scores).all()):
        raise ValueError
    return Columns([row["image_id"] for row in rows], [row["category_id"] for row in rows], boxes, scores)


def _read_list(path: str | pathlib.Path) -> Iterator[Any]:
    """Yields the objects of a file with one JSON list in several lists, or else the whole content."""
    with _reading(path), open(path, encoding="utf-8") as file:
        text = file.read(PART_CHARS)
        if text.lstrip().startswith("["):
            text = text.lstrip()[1:]
            while more := file.read(PART_CHARS):
                text += more
                cut = len(text)
                for _ in range(
                    4
                ):  # a brace of a nested object or within a text is no place to cut: the part is no JSON
                    cut = text.rfind("{", 0, cut)
                    before = text[: max(cut, 0)].rstrip()
                    with contextlib.suppress(ValueError):
                        if before.endswith(","):
                            yield json.loads(f"[{before[:-1]}]")
                            text = text[cut:]
                            break
            text = f"[{text}"
        yield json.loads(text + file.read())


def _read(source: Any) -> Any:
    if not isinstance(source, (str, pathlib.Path)):
        return source
    with _reading(source):
        return json.loads(pathlib.Path(source).read_bytes(), object_hook=_without_outlines)


def _without_outlines(content: dict[str, Any]) -> dict[str, Any]:
    content.pop("segmentation", None)  # most of the memory of a file, and boxes alone are scored
    return content


@contextlib.contextmanager
def _reading(path: str | pathlib.Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error


def _name(source: Any) -> str:
    return str(source) if isinstance(source, (str, pathlib.Path)) else "the given object"


def _kind(content: Any) -> str:
    return "JSON object" if isinstance(content, dict) else "JSON list" if isinstance(content, list) else "JSON value"


def refuse_unknown(what: str, found: set[Any], known: set[Any]) -> None:
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
    parser = command_line("detclipv2_jax.eval.coco", __doc__)
    options = parser.parse_args(arguments)
    return run_command(options, evaluate, ap=AP_KIND, table=table)


def command_line(module: str, description: str | None) -> argparse.ArgumentParser:
    """Returns the parser of the arguments that every evaluation of files has."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {module}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--annotations", required=True, metavar="FILE", help="COCO json with the true boxes")
    parser.add_argument("--detections", required=True, metavar="FILE", help="COCO results json with the found boxes")
    parser.add_argument("--output", metavar="FILE", help="also write the JSON object to this file")
    return parser


def run_command(
    options: argparse.Namespace,
    evaluate: Callable[..., dict[str, float]],
    *,
    ap: str,
    table: Callable[[dict[str, float]], str],
    rename: Callable[[dict[str, float]], dict[str, float]] = dict,
) -> int:
    """Scores `options.detections`, prints counts, table and JSON object; returns the exit status.

    Args:
      options: of `command_line`.
      evaluate: (annotations, detections) → scores.
      ap: what kind of AP it is.
      table: scores → text.
      rename: scores → those of the JSON object.
    """
    images: set[Any] = set()
    num_detections = 0

    def counted() -> Iterator[Columns]:
        nonlocal num_detections
        for chunk in read_detections(options.detections):
            images.update(chunk.image_ids)
            num_detections += len(chunk.scores)
            yield chunk
        if not num_detections:
            raise ValueError(f"{options.detections} is an empty list: no detections, nothing to score")

    try:
        truth = load_annotations(options.annotations)
        scores = evaluate(truth, counted())
        protocol = {
            "ap": ap,
            "annotations": options.annotations,
            "annotations_sha256": sha256(options.annotations),
            "detections": options.detections,
            "detections_sha256": sha256(options.detections),
            "images_evaluated": len(truth["images"]),
            "images_listed": len(truth["images"]),
            "images_with_detections": len(images),
            "num_categories": len(truth["categories"]),
            "num_boxes": len(truth["annotations"]),
            "num_detections": num_detections,
            "made_under": _protocol_beside(options.detections),
        }
        line = json.dumps(rename(scores) | {"protocol": protocol})
        if options.output:
            pathlib.Path(options.output).write_text(line + "\n")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if ap == AP_KIND and any("neg_category_ids" in image for image in truth["images"]):
        print("note: an LVIS file scored by COCO's rules; detclipv2_jax.eval.lvis applies LVIS's", file=sys.stderr)
    print(ap)
    counts = {name: value for name, value in protocol.items() if name.startswith(("num_", "images_"))}
    print(", ".join(f"{value} {name.removeprefix('num_').replace('_', ' ')}" for name, value in counts.items()))
    print(table(scores))
    print(line)
    return 0


def _protocol_beside(detections: str) -> dict[str, Any] | None:
    """Returns the protocol (step, prompts, EMA, …) that an evaluation of ours wrote beside these detections."""
    scores = pathlib.Path(detections.removesuffix("_detections.json") + "_scores.json")
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        return json.loads(scores.read_bytes())["protocol"]
    return None


if __name__ == "__main__":
    sys.exit(main())
