"""Annotation jsons as they come: ids, boxes, outlines, flags and areas of their entries, with what is odd in them.

Tools write ids from 0, twice or not at all, "2" for 2, null for what is not known, and corners where sizes belong.
An entry with one possible meaning is repaired and counted; one without is left to the caller, who counts or refuses it.
"""

from __future__ import annotations

import collections
import functools
import itertools
import json
import math
import operator
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from detclipv2_jax import files
from detclipv2_jax.data.schema import DataError

MAX_SIDE = 65_535  # px; of a JPEG
MAX_NUMBER = 1e9  # px
_MAX_EXACT = 2**53  # beyond, several whole numbers are one float
_NUMBERS = {int, float}
_ENOUGH = 20  # boxes, to tell from how they lie
_FLAGS = {"": False, "0": False, "false": False, "no": False, "1": True, "true": True, "yes": True}


def load_json(path: str | Path) -> Any:
    """Returns the content of a json, without the outlines of boxes, which are most of it; ValueError if it is none."""
    with files.collector_paused():
        try:
            text = files.decode(files.read_bytes(path), where=path)
            if text.count('"annotations"') > 1:  # of two lists json would give the last one
                return files.parse_json(text, where=path, object_pairs_hook=_without_repeated_keys)
            return files.parse_json(text, where=path, object_hook=_without_outline)
        except OSError as error:
            raise ValueError(f"cannot read {path}: {error.strerror or error}") from error


def _without_outline(entry: dict[str, Any]) -> dict[str, Any]:
    if "segmentation" in entry and _four_numbers(entry.get("bbox")):
        del entry["segmentation"]
    return entry


def _without_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entry = dict(pairs)
    if len(entry) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"an object has {max(keys, key=keys.count)!r} twice: join the two by hand")
    return _without_outline(entry)


def _four_numbers(box: Any) -> bool:
    return isinstance(box, list) and len(box) == 4 and _NUMBERS.issuperset(map(type, box))


def shown(value: Any) -> str:
    """Returns the beginning of a value as json writes it, for a message."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else f"{text[:77]}..."


def usable_id(value: Any) -> int | str | None:
    """Returns an id: a whole number (2.0 is 2) or a text; None if it is neither, or a float that may be rounded."""
    if isinstance(value, float) and value.is_integer() and abs(value) <= _MAX_EXACT:
        return int(value)
    return value if isinstance(value, int | str) and not isinstance(value, bool) else None


class Ids:
    """Positions of the entries of a list by their ids; "2" and 2.0 find the entry 2, and 2 finds "2"."""

    def __init__(self, ids: Sequence[int | str]):
        self.ids = list(ids)
        self._positions = {key: i for i, key in reversed(list(enumerate(self.ids)))}
        self._by_text = {str(key): i for key, i in self._positions.items()}
        self._type = type(self.ids[0]) if len({*map(type, self.ids)}) == 1 else None

    def __len__(self) -> int:
        return len(self.ids)

    def find(self, ids: Sequence[Any]) -> tuple[Int[np.ndarray, " n"], int]:
        """Returns the position of each id, -1 where it is not listed, and how many are of another type."""
        if {*map(type, ids)} <= {self._type}:
            found = np.fromiter(map(self._positions.get, ids, itertools.repeat(-1)), np.int64, len(ids))
            return found, 0
        found, num_others = np.full(len(ids), -1), 0
        for i, value in enumerate(ids):
            key = usable_id(value)
            if key is not None:
                found[i] = self._positions.get(key, self._by_text.get(str(key).strip(), -1))
                num_others += found[i] >= 0 and type(self.ids[found[i]]) is not type(value)
        return found, int(num_others)


def listed_ids(entries: Sequence[Any], *, where: str) -> tuple[list[int | str], int]:
    """Returns the id of every entry of a list, and how many had to be rounded.

    Raises:
      ValueError: an entry is no object or has no id that is a whole number or a text; `where` names the list.
    """
    ids = []
    for i, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise ValueError(f"{where}[{i}] is {shown(entry)}, not an object")
        key = usable_id(entry.get("id"))
        if key is None:
            what = f"the id {shown(entry['id'])}, neither a whole number nor a text" if "id" in entry else "no id"
            raise ValueError(f"{where}[{i}] ({shown(entry)}) has {what}")
        ids.append(key)
    return ids, sum(isinstance(entry["id"], float) for entry in entries)


def all_of(flags: Bool[np.ndarray, "n k"]) -> Bool[np.ndarray, " n"]:
    """Returns flags.all(axis=1); NumPy takes several times as long for a few columns."""
    return functools.reduce(operator.and_, flags.T)


def any_of(flags: Bool[np.ndarray, "n k"]) -> Bool[np.ndarray, " n"]:
    """Returns flags.any(axis=1), see `all_of`."""
    return functools.reduce(operator.or_, flags.T)


def mixed(columns: Sequence[np.ndarray]) -> Float[np.ndarray, " n"]:
    """Returns a number for each row of up to seven columns: equal for equal rows, and hardly ever for others."""
    weights = np.sqrt([2, 3, 5, 7, 11, 13, 17])
    return functools.reduce(operator.add, (w * column for w, column in zip(weights, columns, strict=False)))


def num_equal(columns: Sequence[np.ndarray]) -> int:
    """Returns how many rows of up to seven columns are equal to one before."""
    numbers = mixed(columns)
    in_order = np.sort(numbers)
    again = in_order[1:][in_order[1:] == in_order[:-1]]
    rows = np.column_stack(columns)[np.isin(numbers, again)].tolist() if len(again) else []
    return len(rows) - len({*map(tuple, rows)})


def boxes_of(rows: Sequence[dict[str, Any]]) -> tuple[Float[np.ndarray, "n 4"], int]:
    """Returns each annotation's bbox (xywh, as it stands there), and how many had none and were taken from outlines.

    A row without four numbers and without an outline has NaN.
    """
    try:
        boxes = np.array([row["bbox"] for row in rows])
        if boxes.shape == (len(rows), 4) and boxes.dtype.kind in "if":
            # NumPy takes true for 1
            may_be_true = np.flatnonzero(any_of((boxes == 0) | (boxes == 1))).tolist()
            if all(_four_numbers(rows[i]["bbox"]) for i in may_be_true):
                return _bounded(boxes.astype(np.float64, copy=False)), 0
    except (KeyError, TypeError, ValueError):
        pass
    boxes, num_outlined = np.full((len(rows), 4), np.nan), 0
    for i, row in enumerate(rows):
        if _four_numbers(row.get("bbox")):
            boxes[i] = [_number(value) for value in row["bbox"]]
        elif outline := box_of_outline(row.get("segmentation")):
            boxes[i] = outline
            num_outlined += 1
    return _bounded(boxes), num_outlined


def _bounded(boxes: Float[np.ndarray, "n 4"]) -> Float[np.ndarray, "n 4"]:
    """Returns boxes with infinity for numbers whose products would overflow."""
    return np.where(np.abs(boxes) > MAX_NUMBER, np.inf, boxes)


def _number(value: Any) -> float:
    """Returns a number, also one given as a text; NaN for anything else."""
    try:
        return math.nan if isinstance(value, bool) else float(value)
    except (OverflowError, TypeError, ValueError):
        return math.nan


def box_of_outline(outline: Any) -> list[float] | None:
    """Returns the box (xywh) around polygons or the runs of a mask (COCO's `segmentation`); None if it is neither."""
    if isinstance(outline, dict):
        return _box_of_runs(outline.get("size"), outline.get("counts"))
    if not isinstance(outline, list) or not outline:
        return None
    polygons = outline if isinstance(outline[0], list) else [outline]
    if not all(isinstance(p, list) and len(p) >= 6 and len(p) % 2 == 0 for p in polygons):
        return None
    points = np.array([_number(value) for polygon in polygons for value in polygon]).reshape(-1, 2)
    (x, y), (right, bottom) = points.min(axis=0).tolist(), points.max(axis=0).tolist()
    return [x, y, right - x, bottom - y] if np.isfinite(points).all() else None


def _box_of_runs(size: Any, counts: Any) -> list[float] | None:
    """Returns the box of a run-length mask; its runs, a list or COCO's text, go down the columns, first those of 0."""
    if not (isinstance(size, list) and len(size) == 2 and all(type(s) is int and 0 < s <= MAX_SIDE for s in size)):
        return None
    height, width = size
    runs = _runs_of_text(counts) if isinstance(counts, str) else counts
    if not isinstance(runs, list) or not all(type(run) is int and 0 <= run <= height * width for run in runs):
        return None
    ends = list(itertools.accumulate(runs))
    inside = [(end - run, end - 1) for run, end in zip(runs[1::2], ends[1::2], strict=True) if run]
    if not inside or ends[-1] > height * width:
        return None
    first, last = np.array(inside).T
    whole_columns = first // height != last // height  # a run that goes on in the next column
    x, right = first[0] // height, last[-1] // height
    y = np.where(whole_columns, 0, first % height).min()
    bottom = np.where(whole_columns, height - 1, last % height).max()
    return [float(value) for value in (x, y, right - x + 1, bottom - y + 1)]


def _runs_of_text(text: str) -> list[int] | None:
    """Returns the runs of COCO's compressed form: six bits a character, from the third on differences; None if not."""
    runs: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > 40:
            return None
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            value -= (bits & 16) << (shift - 4)  # negative numbers: the bits above are ones
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    return runs if not shift else None


def flags_of(
    rows: Sequence[dict[str, Any]], key: str, odd: collections.Counter[str], *, where: str | Path
) -> Bool[np.ndarray, " n"]:
    """Returns whether a flag is set in each annotation; null and texts like "0" are counted in `odd`.

    Raises:
      DataError: a flag has no meaning; the message names the file, `where`, and the entry.
    """
    values = [row.get(key, 0) for row in rows]
    if {*map(type, values)} <= {int, bool} and {*values} <= {0, 1}:
        return np.array(values, bool)
    for i, value in enumerate(values):
        if value is None or isinstance(value, str | float):
            odd[f"{key} that is no whole number"] += 1
            values[i] = _FLAGS.get(value.strip().lower()) if isinstance(value, str) else value or 0
        if not isinstance(values[i], int | float) or values[i] not in (0, 1):
            raise DataError(f"{where}: annotations[{i}] has {key} {shown(value)}; 0 and 1 have a meaning")
    return np.array(values, bool)


def areas_of(
    rows: Sequence[dict[str, Any]], boxes: Float[np.ndarray, "n 4"], odd: collections.Counter[str]
) -> Float[np.ndarray, " n"]:
    """Returns the area of each annotation, that of its box where none is given; what else is repaired is in `odd`."""
    whole = boxes[:, 2] * boxes[:, 3]
    values = [row.get("area") for row in rows]
    try:
        areas = np.array(values, np.float64) if _NUMBERS.issuperset(map(type, values)) else None
    except OverflowError:  # whole numbers without end
        areas = None
    if areas is None:
        areas = np.array([_number(value) for value in values])
        odd["area that is no number"] += sum("area" in row and type(row["area"]) not in _NUMBERS for row in rows)
    given = np.isfinite(areas)
    odd["area that is NaN or infinite"] += sum(type(values[i]) in _NUMBERS for i in np.flatnonzero(~given))
    odd["area of 0 or less of a box that has one"] += int((given & (areas <= 0) & (whole > 0)).sum())
    strange = given & (areas > 0) & ((areas > 2 * whole + 4) | (areas < whole / 1000)) & (whole > 0)
    odd["area more than twice or below a thousandth of its box's: sizes are judged by it"] += int(strange.sum())
    return np.where(given & ((areas > 0) | ~(whole > 0)), areas, whole)


def suspicious(
    boxes: Float[np.ndarray, "n 4"], sizes: Float[np.ndarray, "n 2"]
) -> tuple[Bool[np.ndarray, " n"], Bool[np.ndarray, " n"], str]:
    """Returns which boxes (xywh, with an area) are cut at the border, which are below a pixel, and the form of all.

    The form is "" for x, y, width, height. A box is cut if more than 2 px and a tenth of its area lie outside.
    `sizes` are the (height, width) of each box's image, 0 where unknown.
    """
    known = all_of(sizes > 0)
    low, size, end = boxes[:, :2], boxes[:, 2:], boxes[:, :2] + boxes[:, 2:]
    limit = np.where(sizes > 0, sizes, np.inf)[:, ::-1]
    inside = (np.minimum(end, limit) - np.maximum(low, 0)).clip(min=0)
    beyond = any_of(np.maximum(-low, end - limit) > 2)
    cut = known & beyond & (inside[:, 0] * inside[:, 1] < 0.9 * size[:, 0] * size[:, 1])
    return cut, any_of(size < 1), _form_of(boxes, limit, known=known, cut=cut) if len(boxes) else ""


def _form_of(
    boxes: Float[np.ndarray, "n 4"], limit: Float[np.ndarray, "n 2"], *, known: np.ndarray, cut: np.ndarray
) -> str:
    """Returns what boxes look like that are not x, y, width, height in pixels; `limit` is the (width, height)."""
    low, size, end = boxes[:, :2], boxes[:, 2:], boxes[:, :2] + boxes[:, 2:]
    if np.mean(all_of(np.abs(boxes) <= 1)) > 0.5:
        return "look relative to the image's size (0 to 1); they must be in pixels"
    if (
        len(boxes) >= _ENOUGH
        and (np.abs(end.max(axis=0) - 95) < 6).all()
        and (known & all_of(limit >= 200) & all_of(low >= 0)).all()
        and ((low + size / 2).std(axis=0) > 10).all()
    ):
        return "look like percent of the image's size; they must be in pixels"
    # all are boxes of the photo, and as sizes many of them would leave it, or all reach its border, or they grow to
    # the right and downwards, as ends do
    told = known & all_of(low > 0)
    corners = all_of((size > low) & (size <= limit))[told]
    reach, leave = (any_of(end >= limit + margin)[told] for margin in (0, 1))
    if len(corners) and corners.mean() >= 0.99:
        by_border = leave.mean() > 0.3 or (reach.all() and len(reach) > 1)
        if by_border or _grow(low[told] / limit[told], (size / limit)[told]):
            return "look like x1, y1, x2, y2; they must be x, y, width, height"
    # some leave the photo, and none would with x and y exchanged, or around their first point
    if known.sum() >= _ENOUGH and cut[known].mean() > 0.02:
        exchanged = all_of((low >= -1) & (end <= limit[:, ::-1] + 1))[known]
        if exchanged.mean() >= 0.99:
            return "look like y, x, height, width; they must be x, y, width, height"
        around = all_of((low >= size / 2 - 1) & (low + size / 2 <= limit + 1))[known]
        if around.mean() >= 0.99:
            return "look like centre x, centre y, width, height; they must begin at the left top corner"
    return ""


def _grow(low: Float[np.ndarray, "n 2"], size: Float[np.ndarray, "n 2"]) -> bool:
    """Returns whether boxes are the larger the further from the left top corner they begin, in both directions."""
    together = ((low - low.mean(axis=0)) * (size - size.mean(axis=0))).mean(axis=0)
    apart = low.std(axis=0), size.std(axis=0)
    return len(low) >= _ENOUGH and bool(
        np.all(np.minimum(*apart) > 1e-3) and np.all(together > 0.5 * np.prod(apart, axis=0))
    )


def size_of(image: dict[str, Any]) -> tuple[int, int]:
    """Returns the annotated (height, width) of an image, (0, 0) where there is none."""
    height, width = image.get("height"), image.get("width")
    if not (isinstance(height, int | float) and isinstance(width, int | float)) or height is True or width is True:
        return 0, 0
    return (int(height), int(width)) if 1 <= height <= MAX_SIDE and 1 <= width <= MAX_SIDE else (0, 0)
