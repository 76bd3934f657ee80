"""Example boxes as queries: what is looked for is shown on other photos, not named.

A query is a name and 1 to 5 examples of it, each a photo and a box in pixels of the photo as displayed. Examples come
from Python, from a json (`read`) or from the annotations of a data set (`from_coco`).
"""

from __future__ import annotations

import collections
import hashlib
import json
import os
import pathlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging
from jaxtyping import Float, UInt8

from detclipv2_jax import files
from detclipv2_jax.data import annotations as annotations_lib
from detclipv2_jax.data import concepts, transforms, truth
from detclipv2_jax.data.checks import missing_paths
from detclipv2_jax.data.selection import photo_path
from detclipv2_jax.inference import vocabulary

MAX_EXAMPLES = 5
_ROUNDING_PX = 1.0  # so far a box may reach beyond the border of its photo
_SMALLEST_PX = 1.0  # side of a box

OneImage = str | os.PathLike[str] | UInt8[np.ndarray, "h w 3"]
Example = tuple[OneImage, Sequence[float]]  # photo, xyxy
Exemplars = Mapping[str, Sequence[Example]]


def read(path: str | os.PathLike[str]) -> dict[str, list[Example]]:
    """Returns the examples of a json {"name": [{"image": "photo.jpg", "box": [x1, y1, x2, y2]}, …], …}.

    Photos are relative to the folder of the file.

    Raises:
      ValueError: it is another file, or a photo is missing.
    """
    path = pathlib.Path(path)
    try:
        content = files.read_json(path, object_pairs_hook=_without_repeated)
    except OSError as error:
        raise ValueError(f"--exemplars: cannot read {path}: {error.strerror or error}") from error
    form = 'it must be {"name": [{"image": "photo.jpg", "box": [x1, y1, x2, y2]}, …], …}'
    if not isinstance(content, dict):
        raise ValueError(f"--exemplars: {path} is no object: {form}")
    found: dict[str, list[Example]] = {}
    for name, examples in content.items():
        if not isinstance(examples, list):
            raise ValueError(f"--exemplars: {path}: {name!r} has {annotations_lib.shown(examples)}, no list: {form}")
        for i, example in enumerate(examples):
            where = f"{path}: example {i + 1} of {name!r}"
            if not isinstance(example, dict) or not isinstance(example.get("image"), str) or "box" not in example:
                raise ValueError(f"--exemplars: {where} is {annotations_lib.shown(example)}: {form}")
            if not (path.parent / example["image"]).is_file():
                raise ValueError(f"--exemplars: {where}: there is no photo {path.parent / example['image']}")
            _four_numbers(example["box"], where=f"--exemplars: {where}")
        found[name] = [(path.parent / example["image"], example["box"]) for example in examples]
    return found


def _without_repeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if repeated := [name for name, num in collections.Counter(names).items() if num > 1]:
        raise ValueError(f"{repeated[0]!r} stands there twice")
    return dict(pairs)


def from_coco(path: str | pathlib.Path, *, images: str, per_class: int, seed: int = 0) -> dict[str, list[Example]]:
    """Returns examples of every category of a COCO json that has boxes; the others are named in the log.

    They are drawn from the larger half of its boxes, of different photos where there are as many. Crowds and boxes
    with an "ignore" flag are none.

    Args:
      path: the json.
      images: folder its file names are relative to.
      per_class: examples a category, 1 to 5; fewer where it has not as many boxes.
      seed: of the choice.

    Raises:
      ValueError: `per_class` is out of range, or the file or the folder is missing or another one.
    """
    if not 1 <= per_class <= MAX_EXAMPLES:
        raise ValueError(f"--per_class is {per_class}; it must lie between 1 and {MAX_EXAMPLES}")
    needed = {"--exemplars_from": (str(path), "file"), "--exemplar_images": (images, "folder")}
    if problems := missing_paths(needed):
        raise ValueError("\n".join(problems))
    known, folder, rng = truth.read(path), os.path.realpath(images), np.random.default_rng(seed)
    corners = np.concatenate([known.boxes[:, :2], known.boxes[:, :2] + known.boxes[:, 2:]], axis=1)
    sizes = np.array([annotations_lib.size_of(image) for image in known.images], np.float64).reshape(-1, 2)
    boxes, usable, _ = transforms.check_boxes(corners, sizes[known.image])
    usable &= ~known.crowd & ~known.ignored & (boxes[:, 2:] - boxes[:, :2] >= _SMALLEST_PX).all(axis=1)
    found: dict[str, list[Example]] = {}
    for category in range(len(known.categories)):
        name = concepts.display_name(str(known.categories[category].get("name", "")))
        rows = rng.permutation(np.flatnonzero(usable & (known.category == category)))
        if name and len(rows):
            rows = rows[known.areas[rows] >= np.median(known.areas[rows])]
            first = np.sort(np.unique(known.image[rows], return_index=True)[1])  # one of every photo, in drawn order
            rows = rows[[*first, *np.setdiff1d(np.arange(len(rows)), first)]][:per_class]
            found.setdefault(name, []).extend(
                (photo_path(known.images[known.image[row]], folder, where=path), boxes[row].tolist()) for row in rows
            )
    missing = [
        str(c.get("name")) for c in known.categories if concepts.display_name(str(c.get("name", ""))) not in found
    ]
    if missing:
        logging.warning("%s: no example of %d categories: %s", path, len(missing), ", ".join(missing[:20]))
    return {name: examples[:per_class] for name, examples in found.items()}


def check(exemplars: Exemplars, *, words: Collection[str]) -> dict[str, list[Example]]:
    """Returns the examples of every name in lists; ValueError if a name or a list is not as it must be.

    That boxes lie on their photos is checked by `checked_box`.
    """
    form = f'{{"name": [(photo, (x1, y1, x2, y2)), …]}} with 1 to {MAX_EXAMPLES} examples a name'
    if not isinstance(exemplars, Mapping):
        raise ValueError(f"exemplars must be {form}, not {type(exemplars).__name__}")
    taken, found = {word.strip().casefold() for word in words}, {}
    for name, examples in exemplars.items():
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"exemplars: the name {name!r} must be a text that is not empty")
        if name.strip().casefold() in taken:
            raise ValueError(f"exemplars: the name {name!r} is taken, by a word or another example; choose another")
        taken.add(name.strip().casefold())
        listed = list(examples) if isinstance(examples, Sequence) and not isinstance(examples, str) else None
        if listed is None or not all(isinstance(example, tuple | list) and len(example) == 2 for example in listed):
            raise ValueError(f"exemplars: the examples of {name!r} are no list of pairs; they must be {form}")
        if not 1 <= len(listed) <= MAX_EXAMPLES:
            raise ValueError(f"exemplars: {name!r} has {len(listed)} examples; there must be 1 to {MAX_EXAMPLES}")
        for i, (_, box) in enumerate(listed):
            _four_numbers(box, where=f"exemplars: example {i + 1} of {name!r}")
        found[name] = [(image, box) for image, box in listed]
    return found


def checked_box(box: Any, size: tuple[int, int], *, where: str) -> Float[np.ndarray, " 4"]:
    """Returns a box (xyxy) of a photo of `size` (height, width) px, cut at its border.

    Raises:
      ValueError: it is no box, has a side below 1 px, or does not lie on the photo; `where` says whose it is.
    """
    corners = _four_numbers(box, where=where)
    shown = [round(float(side), 2) for side in corners]
    if not (corners[2:] - corners[:2] >= _SMALLEST_PX).all():  # shares of the photo's sides are such boxes, too
        raise ValueError(
            f"{where}: the box {shown} has no area; it must be x1, y1, x2, y2 in px of the photo, and "
            f"{_SMALLEST_PX:g} px wide and high or more"
        )
    height, width = size
    cut = np.clip(corners, 0, np.array([width, height, width, height], np.float32))
    if np.abs(cut - corners).max() > _ROUNDING_PX or not (cut[2:] > cut[:2]).all():
        raise ValueError(f"{where}: the box {shown} does not lie on the photo, which is {width} px wide, {height} high")
    return cut


def _four_numbers(box: Any, *, where: str) -> Float[np.ndarray, " 4"]:
    """Returns the corners of a box; ValueError if it is no list of four finite numbers."""
    try:
        corners = np.asarray(box)
        numbers = corners.shape == (4,) and corners.dtype.kind in "iuf" and bool(np.isfinite(corners).all())
    except ValueError:  # lists of several lengths
        numbers = False
    if not numbers or any(isinstance(side, bool) for side in box):
        raise ValueError(f"{where}: the box is {annotations_lib.shown(box)}, not four numbers x1, y1, x2, y2 in px")
    return corners.astype(np.float32)


def title(image: OneImage) -> str:
    """Returns how a message names a photo."""
    return files.printable(os.fspath(image)) if isinstance(image, str | os.PathLike) else "array"


class Cache(vocabulary.Cache):
    """Embeds examples, or finds their embeddings in a folder, under a hash of photos, boxes, model and weights."""

    def key(self, texts: Sequence[Any]) -> str:
        """Returns a hash of all that the embeddings of lists of examples depend on."""
        hasher = hashlib.sha256(json.dumps([self._config, self._weights]).encode())
        for examples in texts:
            hasher.update(b"query")
            for image, box in examples:
                is_path = isinstance(image, str | os.PathLike)
                content = files.read_bytes(image) if is_path else np.ascontiguousarray(image).tobytes()
                hasher.update(f"{'file' if is_path else image.shape} {list(map(float, box))}".encode())
                hasher.update(hashlib.sha256(content).digest())
        return hasher.hexdigest()
