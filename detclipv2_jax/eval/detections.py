"""Detections in COCO's results format, read part by part and put into arrays beside the truth they belong to."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from detclipv2_jax import files
from detclipv2_jax.data.annotations import MAX_NUMBER, num_equal, shown, size_of, suspicious
from detclipv2_jax.data.truth import Truth, json_kind

PART_CHARS = 1 << 23  # of a file of detections read at once: some 80,000 rows, 60 MB
_NUM_LOOKED_AT = 100_000  # boxes, for the form of all
_NEEDED = "an object with image_id, category_id, bbox (x, y, width, height) and score; all must be finite numbers"


@dataclasses.dataclass(frozen=True, eq=False)
class Found:
    """Detections, one a row; of equal scores the first is better."""

    images: Int[np.ndarray, " d"]  # positions in the truth
    categories: Int[np.ndarray, " d"]
    boxes: Float[np.ndarray, "d 4"]  # xywh
    scores: Float[np.ndarray, " d"]
    odd: dict[str, int] = dataclasses.field(default_factory=dict)  # what was repaired, by kind

    def take(self, rows: np.ndarray) -> Found:
        """Returns some of the rows."""
        return Found(self.images[rows], self.categories[rows], self.boxes[rows], self.scores[rows], self.odd)


def find(detections: Any, truth: Truth, evaluated: Int[np.ndarray, " e"]) -> Found:
    """Returns detections as arrays.

    Args:
      detections: what `read` takes; of the arrays, those of a truth in the same order.
      truth: what they are scored against.
      evaluated: positions of the images that were looked at.

    Raises:
      ValueError: naming the first row that is wrong, or is of another image or category.
    """
    if isinstance(detections, Found):
        return detections
    name, odd, start = _name(detections), collections.Counter[str](), 0
    is_evaluated = np.zeros(len(truth.images) + 1, bool)  # the last one stands for those that are not listed
    is_evaluated[evaluated] = True
    parts = [(np.zeros(0, np.int32), np.zeros(0, np.int32), np.zeros((0, 4)), np.zeros(0))]
    for chunk in read(detections):
        images, num_images = truth.image_ids.find(chunk.image_ids)
        categories, num_categories = truth.category_ids.find(chunk.category_ids)
        for what, ids, known in (
            ("images", chunk.image_ids, is_evaluated[images]),
            ("categories", chunk.category_ids, categories >= 0),
        ):
            if not known.all():
                _refuse_unknown(what, ids, known, f"{name}: row {start + int(np.argmin(known))}", truth.name)
        odd["image_id of a detection of another type than the image's"] += num_images
        odd["category_id of a detection of another type than the category's"] += num_categories
        parts.append((images.astype(np.int32), categories.astype(np.int32), chunk.boxes, chunk.scores))
        start += len(images)
    images, categories, boxes, scores = (np.concatenate(column) for column in zip(*parts, strict=True))
    odd["detection equal to another one, also in its score"] = num_equal((images, categories, scores, *boxes.T))
    sample = slice(None, None, 1 + len(boxes) // _NUM_LOOKED_AT)
    sizes = np.array([size_of(image) for image in truth.images], np.float64)[images[sample]]
    if look := suspicious(boxes[sample], sizes)[2]:
        odd[f"detection of a file whose boxes {look}"] = len(boxes)
    return Found(images, categories, boxes, scores, {what: num for what, num in odd.items() if num})


def _refuse_unknown(what: str, ids: list[Any], known: np.ndarray, where: str, truth: str) -> None:
    all_ids = [shown(key) for key in ids]
    unknown = sorted({key for key, is_known in zip(all_ids, known, strict=True) if not is_known})
    examples = ", ".join(unknown[:5])
    raise ValueError(
        f"{where}: {len(unknown)} of {len(set(all_ids))} {what} of the detections are unknown: {examples}"
        f"{' …' if len(unknown) > 5 else ''}; they belong to another annotation file than {truth}"
    )


class Columns(NamedTuple):
    """Detections, one a row, with the ids of the file."""

    image_ids: list[Any]
    category_ids: list[Any]
    boxes: Float[np.ndarray, "d 4"]  # xywh
    scores: Float[np.ndarray, " d"]


def load(detections: Any) -> list[dict[str, Any]]:
    """Returns COCO results reduced to their four keys; ValueError naming the first row that is wrong."""
    return [
        {"image_id": image_id, "category_id": category_id, "bbox": box, "score": score}
        for chunk in read(detections)
        for image_id, category_id, box, score in zip(
            *chunk[:2], chunk.boxes.tolist(), chunk.scores.tolist(), strict=True
        )
    ]


def read(detections: Any) -> Iterator[Columns]:
    """Yields COCO results in order, part by part, so that a file need not fit into memory as Python objects.

    Args:
      detections: a path, rows, or an iterator of lists of rows.

    Raises:
      ValueError: naming the first row that is wrong.
    """
    if isinstance(detections, (str, pathlib.Path)):
        parts = _read_list(detections)
    else:
        parts = detections if isinstance(detections, Iterator) else iter([detections])
    start = 0
    for rows in parts:
        if not isinstance(rows, list):
            raise ValueError(
                f"{_name(detections)} is no COCO results file: it holds a {json_kind(rows)}, not a list of objects with"
                " image_id, category_id, bbox and score"
                + ("; are annotations and detections exchanged?" if isinstance(rows, dict) else "")
            )
        try:
            yield _columns(rows)
        except (KeyError, TypeError, ValueError, OverflowError):
            for i, row in enumerate(rows):
                try:
                    _columns([row])
                except (KeyError, TypeError, ValueError, OverflowError) as error:
                    why = f" ({error})" if type(error) is ValueError and str(error).startswith("its ") else ""
                    raise ValueError(
                        f"{_name(detections)}: row {start + i} is {str(row)[:120]}, not {_NEEDED}{why}"
                    ) from error
            raise
        start += len(rows)


def _columns(rows: list[Any]) -> Columns:
    boxes = np.array([row["bbox"] for row in rows] or np.zeros((0, 4)))
    scores = np.array([row["score"] for row in rows] or np.zeros(0))
    for what, array, shape in (("bbox has", boxes, (len(rows), 4)), ("score is", scores, (len(rows),))):
        if array.dtype.kind not in "if" or array.shape != shape or not (np.abs(array) <= MAX_NUMBER).all():
            raise ValueError(f"its {what} something else")
    numbers = np.column_stack([boxes, scores])
    may_be_true = np.flatnonzero(((numbers == 0) | (numbers == 1)).any(axis=1)).tolist()  # NumPy takes true for 1
    if any(isinstance(value, bool) for i in may_be_true for value in (*rows[i]["bbox"], rows[i]["score"])):
        raise ValueError("its bbox or score has true or false")
    if (boxes[:, 2:] < 0).any():
        raise ValueError("its bbox has a negative size")
    return Columns(
        [row["image_id"] for row in rows],
        [row["category_id"] for row in rows],
        boxes.astype(np.float64, copy=False),
        scores.astype(np.float64, copy=False),
    )


def _read_list(path: str | pathlib.Path) -> Iterator[Any]:
    """Yields the objects of a file with one JSON list in several lists, or else the whole content."""
    with _reading(path), contextlib.ExitStack() as stack:
        files.beginning(path)  # of a pipe there is none, and UTF-16 has its own message
        file = stack.enter_context(open(path, encoding="utf-8-sig"))
        text = file.read(PART_CHARS)
        if text.lstrip().startswith("["):
            text = text.lstrip()[1:]
            while more := file.read(PART_CHARS):
                text += more
                cut = len(text)
                for _ in range(4):  # a brace of a nested object or of a text is no place to cut: the part is no JSON
                    cut = text.rfind("{", 0, cut)
                    before = text[: max(cut, 0)].rstrip()
                    with contextlib.suppress(ValueError):
                        if before.endswith(","):
                            yield json.loads(f"[{before[:-1]}]")
                            text = text[cut:]
                            break
            text = f"[{text}"
        yield json.loads(text + file.read())


@contextlib.contextmanager
def _reading(path: str | pathlib.Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error


def _name(source: Any) -> str:
    return str(source) if isinstance(source, (str, pathlib.Path)) else "the given object"
