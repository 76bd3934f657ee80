"""Phrases and expressions as their authors publish them: Flickr30k Entities; RefCOCO, RefCOCO+ and RefCOCOg."""

from __future__ import annotations

import collections
import io
import os
import pathlib
import pickle
import re
from typing import Any
from xml.etree import ElementTree

import numpy as np
from jaxtyping import Float

from detclipv2_jax import files
from detclipv2_jax.data.annotations import boxes_of, usable_id
from detclipv2_jax.data.box_json import load_json
from detclipv2_jax.data.checks import documented, unsafe_path
from detclipv2_jax.data.schema import DataError

Row = tuple[str, str, Float[np.ndarray, "n 4"]]  # photo, text, boxes (xywh)
_PHRASE = re.compile(r"\[/EN#(\d+)(?:/[^\s\]/]*)* ([^\]]+)\]")  # [/EN#283585/people Two people]


class _Unpickler(pickle._Unpickler):
    """Reads texts, numbers, lists and dicts, of which RefCOCO consists; all else could run code.

    It is Python's own, which takes twice the time: C's takes 34 GB for a memo that ten bytes say is large.
    """

    def find_class(self, module: str, name: str) -> Any:
        raise DataError(f"it asks for {module}.{name}, which is code")


@documented
def read_refcoco(path: pathlib.Path, *, split: str) -> list[Row]:
    """Returns the expressions of a split of `refs(unc).p` or the like, beside which instances.json has the boxes.

    Raises:
      DataError: there is no such split, the file is of another form, or holds what could run code.
    """
    try:
        refs = _Unpickler(io.BytesIO(files.read_bytes(path)), encoding="latin1").load()  # Python 2 wrote it
    except Exception as error:  # whatever a damaged pickle leads to
        raise DataError(f"{path} cannot be read as a pickle of RefCOCO: {error}") from error
    chosen = [ref for ref in refs if ref["split"] == split]
    if not chosen:
        known = {ref["split"] for ref in refs if isinstance(ref["split"], str)}  # the hash of tuples may take ages
        raise DataError(f"{path} has no split {split!r}; --split is one of {', '.join(sorted(known))}")
    content = load_json(path.parent / "instances.json")
    photos = {image["id"]: image["file_name"] for image in content["images"]}
    given, _ = boxes_of(content["annotations"])
    boxes = {row["id"]: box[None] for row, box in zip(content["annotations"], given, strict=True)}
    rows = [
        (photos[usable_id(ref["image_id"])], text["sent"], boxes[usable_id(ref["ann_id"])])
        for ref in chosen
        for text in ref["sentences"]
    ]
    return _checked(rows, path)


@documented
def read_flickr30k(folder: pathlib.Path, *, split: str, odd: collections.Counter[str]) -> list[Row]:
    """Returns the phrases with boxes of a split of Flickr30k Entities; `odd` counts boxes that are left out.

    The folder has <split>.txt (a photo's number a line), Sentences/<number>.txt and Annotations/<number>.xml; photos
    are <number>.jpg.

    Raises:
      DataError: files are missing, all of them, or of another form.
    """
    listed = folder / f"{split}.txt"
    if not os.path.isfile(listed):  # pathlib's raises for a name that is too long
        there = ", ".join(sorted(path.stem for path in folder.glob("*.txt") if path.stem.islower()))
        raise DataError(f"{listed} does not exist; --split is one of {there or 'no split'}: {folder}/<split>.txt")
    names = [line.strip() for line in files.read_lines(listed) if line.strip()]
    places = [(folder / "Sentences" / f"{name}.txt", folder / "Annotations" / f"{name}.xml") for name in names]
    if missing := [str(path) for pair in places for path in pair if not os.path.isfile(path)]:
        raise DataError(
            f"{len(missing)} of {2 * len(names)} files of {listed} do not exist:\n  " + "\n  ".join(missing)
        )
    rows: list[Row] = []
    for name, (sentences, outlines) in zip(names, places, strict=True):
        boxes = _boxes_of(outlines, odd)
        for chain, phrase in (pair for line in files.read_lines(sentences) for pair in _PHRASE.findall(line)):
            if chain in boxes:  # others are not to be seen
                rows.append((f"{name}.jpg", phrase.strip(), np.array(boxes[chain], np.float64)))
    return _checked(rows, listed)


def _boxes_of(path: pathlib.Path, odd: collections.Counter[str]) -> dict[str, list[list[float]]]:
    """Returns the boxes (xywh) of every chain of phrases; a box may be of several. Pixels count from 1 in the file."""
    try:
        root = ElementTree.parse(path).getroot()
    except ElementTree.ParseError as error:
        raise DataError(f"{path} is no valid XML: {error}") from error
    boxes: dict[str, list[list[float]]] = collections.defaultdict(list)
    for entry in root.iter("object"):
        if (corners := entry.find("bndbox")) is None:
            continue
        texts = {key: corners.findtext(key, "") for key in ("xmin", "ymin", "xmax", "ymax")}
        try:
            left, top, right, bottom = map(float, texts.values())
        except ValueError:
            raise DataError(f"{path} has a box that is no four numbers: {texts}") from None
        if right <= left or bottom <= top:
            odd["box without area left out"] += 1
            continue
        for name in entry.iter("name"):
            boxes[name.text or ""].append([left - 1, top - 1, right - left, bottom - top])
    return boxes


def _checked(rows: list[Row], path: pathlib.Path) -> list[Row]:
    """Returns rows; DataError for the first that names no photo, has no text or no box with an area."""
    for file, text, boxes in rows:
        if unsafe_path(file) or not text.strip() or not np.isfinite(boxes).all() or (boxes[:, 2:] <= 0).any():
            raise DataError(f"{path}: the text {text!r} of photo {file!r} with boxes {boxes.tolist()} cannot be used")
    if not rows:
        raise DataError(f"{path} names no text with a box: there is nothing to be found")
    return rows
