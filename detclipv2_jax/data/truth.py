"""The truth that detections are scored against: a COCO, LVIS or Objects365 json, read and checked once, in arrays.

All that evaluates reads it here, before anything is compiled or predicted. What is repaired or left out is counted in
`odd`; what cannot be used is an error that names file, entry and field, or counted where `max_bad_share` allows it.
"""

from __future__ import annotations

import collections
import dataclasses
import operator
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from jaxtyping import Bool, Float, Int

from detclipv2_jax import files
from detclipv2_jax.data import annotations as annotations_lib
from detclipv2_jax.data.annotations import Ids, shown
from detclipv2_jax.data.checks import check_share, documented
from detclipv2_jax.data.schema import DataError

LISTS = ("images", "annotations", "categories")
FEDERATED = ("neg_category_ids", "not_exhaustive_category_ids")
FREQUENCIES = ("r", "c", "f")  # rare, common, frequent
_NUM_NAMED = 3  # entries in a message
_MOST = 0.5  # of the boxes: more cannot be cut at the border or below a pixel by chance


@dataclasses.dataclass(frozen=True, eq=False)
class Truth:
    """Boxes and what is known of images and categories, which stand in the order of their ids."""

    name: str  # of the file
    images: list[dict[str, Any]]
    categories: list[dict[str, Any]]
    image_ids: Ids
    category_ids: Ids
    image: Int[np.ndarray, " n"]  # position of each box's image
    category: Int[np.ndarray, " n"]
    boxes: Float[np.ndarray, "n 4"]  # xywh
    areas: Float[np.ndarray, " n"]
    crowd: Bool[np.ndarray, " n"]
    ignored: Bool[np.ndarray, " n"]  # need not be found, and are not wrong to find
    absent: Int[np.ndarray, "k 2"]  # (image, category) known not to be there (LVIS)
    incomplete: Int[np.ndarray, "k 2"]  # (image, category) with more objects than boxes (LVIS)
    odd: dict[str, int]  # what was repaired or left out, by kind

    @property
    def federated(self) -> bool:
        """Whether only some categories were looked for on an image."""
        return any(FEDERATED[0] in image for image in self.images)

    @property
    def frequencies(self) -> list[str | None]:
        """r, c or f of every category, None where the file does not say."""
        given = (category.get("frequency") for category in self.categories)
        return [frequency if frequency in FREQUENCIES else None for frequency in given]

    def places(self, image_ids: Sequence[Any] | None) -> Int[np.ndarray, " e"]:
        """Returns the positions of images, ascending, all by default; ValueError for ids that are not listed."""
        if image_ids is None:
            return np.arange(len(self.images))
        found, _ = self.image_ids.find(image_ids)
        if unknown := [shown(image_id) for image_id, i in zip(image_ids, found, strict=True) if i < 0]:
            what = f"{len(unknown)} of {len(found)} evaluated images are unknown: {', '.join(unknown[:5])}"
            raise DataError(f"{self.name}: {what}; they belong to another annotation file")
        return np.unique(found)


def read(source: str | Path | dict[str, Any] | Truth, *, max_bad_share: float = 0.0) -> Truth:
    """Returns the truth of a json, given as its path or content; what is odd in it is logged.

    Raises:
      ValueError: it is no annotation json, lists no images, categories or boxes, lists an id twice, or more than a
        share of its annotations cannot be used.
    """
    if isinstance(source, Truth):
        return source
    if isinstance(source, dict):
        return from_content("the given object", source, max_bad_share=max_bad_share)
    with files.collector_paused():
        truth = from_content(str(source), annotations_lib.load_json(source), max_bad_share=max_bad_share)
    for what, num in truth.odd.items():
        logging.warning("%s: %d × %s", source, num, what)
    return truth


@documented
def from_content(name: str, content: Any, *, max_bad_share: float = 0.0) -> Truth:
    """Returns the truth of the content of the json `name`; errors as `read`."""
    _check_lists(content, name)
    odd: collections.Counter[str] = collections.Counter()
    images, image_ids = in_order(content["images"], f"{name}: images", odd)
    categories, category_ids = in_order(content["categories"], f"{name}: categories", odd)
    _count_names(images, categories, odd)
    entries = content["annotations"]
    rows = entries
    if {*map(type, entries)} != {dict}:
        rows = [entry if isinstance(entry, dict) else {} for entry in entries]
    odd["annotation id missing, 0, repeated or no number, which changes nothing"] = _odd_ids(rows)
    image, odd["image_id of another type than the image's"] = image_ids.find([row.get("image_id") for row in rows])
    category, odd["category_id of another type than the category's"] = category_ids.find(
        [row.get("category_id") for row in rows]
    )
    boxes, odd["box taken from the outline for want of a bbox"] = annotations_lib.boxes_of(rows)
    finite = annotations_lib.all_of(np.isfinite(boxes))
    unusable = {
        "is no object": np.fromiter(map(operator.is_not, entries, rows), bool, len(rows)),
        "image_id is not listed": image < 0,
        "category_id is not listed": category < 0,
        "bbox is not four numbers in px": ~finite,
        "bbox has a negative size": finite & annotations_lib.any_of(boxes[:, 2:] < 0),
    }
    bad = refuse(unusable, entries, name, max_bad_share=max_bad_share, odd=odd)
    flat = ~bad & annotations_lib.any_of(boxes[:, 2:] == 0)
    odd["box without width or height left out, which pycocotools would count as missed"] = int(flat.sum())
    kept = _once(np.flatnonzero(~bad & ~flat), entries, (image, category, *boxes.T), odd)
    if not len(kept):
        raise DataError(f"{name} has no usable box: there is nothing to score against")
    crowd, ignored = (annotations_lib.flags_of(rows, key, odd, where=name)[kept] for key in ("iscrowd", "ignore"))
    if (crowd | ignored).all():
        odd["box that is a crowd's or ignored, as all are: there is nothing to be found"] = len(kept)
    image, category, boxes = image[kept], category[kept], boxes[kept]
    areas = annotations_lib.areas_of([rows[i] for i in kept] if len(kept) < len(rows) else rows, boxes, odd)
    check_form(boxes, images, image, name, max_bad_share=max_bad_share, odd=odd)
    absent, incomplete = (_pairs(images, key, category_ids, odd, name=name) for key in FEDERATED)
    if len(absent):
        keys = np.sort(absent[:, 0] * len(categories) + absent[:, 1])
        of_boxes = image * len(categories) + category
        found = keys[np.searchsorted(keys, of_boxes).clip(max=len(keys) - 1)] == of_boxes
        odd["box of a category that its image lists as absent"] = found.sum()
    return Truth(
        name=name,
        images=images,
        categories=categories,
        image_ids=image_ids,
        category_ids=category_ids,
        image=image,
        category=category,
        boxes=boxes,
        areas=areas,
        crowd=crowd,
        ignored=ignored,
        absent=absent,
        incomplete=incomplete,
        odd={what: int(num) for what, num in odd.items() if num},
    )


def _count_names(images: list[dict[str, Any]], categories: list[dict[str, Any]], odd: collections.Counter[str]) -> None:
    """Counts photos and categories with the name of another one, and categories without a frequency where some have."""
    names = [image["file_name"] for image in images if isinstance(image.get("file_name"), str)]
    num_again = len(names) - len({*names})
    odd["image whose photo has another id, too: it is scored against the boxes of each alone"] = num_again
    names = [str(category["name"]).lower() for category in categories if "name" in category]
    odd["category called like another"] = len(names) - len(set(names))
    if any("frequency" in category for category in categories):
        odd["category without a frequency"] = sum(c.get("frequency") not in FREQUENCIES for c in categories)


def _check_lists(content: Any, name: str) -> None:
    """Raises if content is no COCO json with images, annotations and categories."""
    if not isinstance(content, dict) or any(not isinstance(content.get(key), list) for key in LISTS):
        what = f"an object of {', '.join(sorted(content))}" if isinstance(content, dict) else f"a {json_kind(content)}"
        raise DataError(
            f"{name} is no COCO annotation file: it holds {what}, not the lists {', '.join(LISTS)}"
            + ("; are annotations and detections exchanged?" if isinstance(content, list) else "")
        )
    for key in LISTS:
        if not content[key]:
            raise DataError(f"{name} has no {key}: there is nothing to score against")


def json_kind(content: Any) -> str:
    """Returns what json calls a value, for a message."""
    return "JSON object" if isinstance(content, dict) else "JSON list" if isinstance(content, list) else "JSON value"


def in_order(entries: list[Any], where: str, odd: collections.Counter[str]) -> tuple[list[dict[str, Any]], Ids]:
    """Returns the entries of a list in the order of their ids, numbers first, each once, and their ids.

    Raises:
      ValueError: an entry has no id, or the id of one that is not its copy ("2" and 2 are one id).
    """
    ids, num_rounded = annotations_lib.listed_ids(entries, where=where)
    odd["id with a decimal point"] += num_rounded
    first: dict[str, int] = {}
    for i, key in enumerate(ids):
        j = first.setdefault(str(key), i)
        if i != j and entries[i] != entries[j]:
            raise DataError(f"{where}[{i}] has the id {shown(key)} of [{j}], which is another one: {shown(entries[i])}")
    odd["entry listed twice"] += len(ids) - len(first)
    order = sorted(first.values(), key=lambda i: _rank(ids[i]))
    return [entries[i] for i in order], Ids([ids[i] for i in order])


def _rank(key: int | str) -> tuple[int, int, str]:
    """Returns what ids are sorted by, on which scores depend where detections are equally good: "2" stands beside 2."""
    is_number = isinstance(key, int) or (key.isascii() and key.isdigit() and len(key) < 20)
    return (0, int(key), "") if is_number else (1, 0, str(key))


def _odd_ids(rows: list[dict[str, Any]]) -> int:
    """Returns how many annotations have no id of their own; scoring gives all of them new ones."""
    ids = [row.get("id") for row in rows]
    if {*map(type, ids)} != {int}:
        ids = [key if type(key) in (int, str) else None for key in ids]
    different = {*ids}
    return len(rows) - len(different) + (0 in different) + (None in different)


def _once(
    kept: Int[np.ndarray, " k"], entries: list[Any], columns: Sequence[np.ndarray], odd: collections.Counter[str]
) -> Int[np.ndarray, " k"]:
    """Returns the annotations to keep without copies: of equal image, category and box (`columns`), and of one id.

    Those of another id stay, as all evaluators count them, and are counted in `odd`.
    """
    mixed = np.sort(annotations_lib.mixed(columns)[kept])
    if not (mixed[1:] == mixed[:-1]).any():
        return kept
    rows = np.column_stack(columns)[kept].tolist()
    first: dict[tuple[Any, ...], int] = {}
    distinct, copies = set(), []
    for i, row in zip(kept.tolist(), rows, strict=True):
        j = first.setdefault((*row, str(entries[i].get("id"))), i)
        if i != j and entries[i] == entries[j]:
            copies.append(i)
        distinct.add(tuple(row))
    odd["annotation listed twice"] = len(copies)
    num_equal = len(kept) - len(copies) - len(distinct)
    odd["box equal to another of its image and category, which has to be found twice"] = num_equal
    return np.setdiff1d(kept, copies)


def refuse(
    unusable: dict[str, np.ndarray],
    entries: list[Any],
    name: str,
    *,
    max_bad_share: float,
    odd: collections.Counter[str],
) -> Bool[np.ndarray, " n"]:
    """Returns which annotations cannot be used, by reason counted in `odd`; DataError above a share, naming some."""
    check_share(max_bad_share)
    bad, named = np.zeros(len(entries), bool), []
    for reason, rows in unusable.items():
        new = np.flatnonzero(rows & ~bad)
        bad[new] = True
        if len(new):
            odd[f"annotation left out: {reason}"] = len(new)
            named += [f"annotations[{i}] {reason}: {shown(entries[i])}" for i in new[:_NUM_NAMED]]
    if bad.sum() > max_bad_share * len(entries):
        raise DataError(
            f"{name}: {bad.sum()} of {len(entries)} annotations cannot be used ({'; '.join(named[:_NUM_NAMED])}); "
            f"max_bad_share allows {max_bad_share:.2%}: repair the file or raise it"
        )
    return bad


def check_form(
    boxes: np.ndarray,
    images: list[dict[str, Any]],
    image: np.ndarray,
    name: str,
    *,
    max_bad_share: float,
    odd: collections.Counter[str],
) -> None:
    """Counts boxes that are cut or tiny; DataError where most are, or all look like another form, unless all may be."""
    sizes = np.array([annotations_lib.size_of(entry) for entry in images], np.float64).reshape(-1, 2)[image]
    cut, below, look = annotations_lib.suspicious(boxes, sizes)
    odd["box cut at the border"], odd["box below a pixel"] = cut.sum(), below.sum()
    doubtful = cut | below
    if not look and doubtful.sum() > max(_MOST, max_bad_share) * len(boxes):
        look = "look like another form of boxes, or of photos of another size"
    if look and max_bad_share < 1:
        raise DataError(
            f"{name}: its {len(boxes)} boxes {look} ({cut.sum()} are cut at the border, {below.sum()} below a pixel). "
            "Convert them, or raise max_bad_share to 1 if they are right"
        )
    odd[f"box of a file whose boxes {look}"] = len(boxes) if look else 0


def _pairs(
    images: list[dict[str, Any]], key: str, category_ids: Ids, odd: collections.Counter[str], *, name: str
) -> Int[np.ndarray, "k 2"]:
    """Returns the (image, category) pairs of LVIS's list `key` of every image."""
    lists = [image.get(key) or () for image in images]
    for image, listed in zip(images, lists, strict=True):
        if not isinstance(listed, list | tuple):
            raise DataError(f"{name}: image {shown(image['id'])} has {key} {shown(listed)}, not a list of ids")
    categories, num_others = category_ids.find([category for listed in lists for category in listed])
    odd[f"{key} of another type than the category's id"] = num_others
    odd[f"{key} that are not listed"] = int((categories < 0).sum())
    pairs = np.stack([np.repeat(np.arange(len(images)), [*map(len, lists)]), categories], axis=1).astype(np.int64)
    return pairs[categories >= 0]
