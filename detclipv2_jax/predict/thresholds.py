"""Thresholds of the words of a search, from photos whose boxes are known."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterator

import numpy as np
import tqdm

from detclipv2_jax import files
from detclipv2_jax.data import transforms, truth
from detclipv2_jax.data.checks import missing_paths
from detclipv2_jax.data.concepts import display_name
from detclipv2_jax.data.selection import file_name, photo_path
from detclipv2_jax.eval import thresholds
from detclipv2_jax.eval.detections import Found
from detclipv2_jax.predict.search import Search


def choose(
    search: Search, annotations: str, *, images: str, min_precision: float | None, path: pathlib.Path
) -> np.ndarray:
    """Returns the threshold of every word of a search, see `eval.thresholds`, and writes them to the json `path`.

    Words are compared with the names of the categories without regard to capitals.

    Raises:
      ValueError: a file is missing or another one, no category is called like a word, or no such category has a box.
    """
    if min_precision is not None and not 0 < min_precision <= 1:
        raise ValueError(f"--min_precision is {min_precision:g}; it must lie above 0 and be at most 1")
    if problems := missing_paths(
        {"--thresholds_from": (annotations, "file"), "--threshold_images": (images, "folder")}
    ):
        raise ValueError("\n".join(problems))
    known = truth.read(annotations)
    if known.federated:
        raise ValueError(
            f"--thresholds_from: {annotations} does not say of every photo whether it shows a category (LVIS)"
        )
    word_of = {name.casefold(): name for name in search.names}
    names = [word_of.get(display_name(str(one.get("name", ""))).casefold(), "") for one in known.categories]
    if not any(names):
        called = ", ".join(str(one.get("name")) for one in known.categories[:5])
        raise ValueError(f"--thresholds_from: no category of {annotations} ({called} …) is called like a word")
    folder = os.path.realpath(images)

    def photos() -> Iterator[tuple[int, transforms.Photo]]:
        for i, image in enumerate(tqdm.tqdm(known.images, desc="thresholds", unit="image", disable=None)):
            try:
                yield i, transforms.read(photo_path(image, folder, where=annotations))
            except (OSError, ValueError) as error:
                raise ValueError(f"--thresholds_from: cannot read {file_name(image)} in {images}: {error}") from error

    category_of = {name: i for i, name in enumerate(names) if name}
    position = np.array([category_of.get(name, -1) for name in search.names])
    parts = [(np.zeros(0, int), np.zeros(0, int), np.zeros((0, 4)), np.zeros(0))]
    for i, _, found in search.find(photos()):
        rows = np.flatnonzero(position[found.labels] >= 0)
        boxes = found.boxes[rows].astype(float)
        boxes = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)
        parts.append((np.full(len(rows), i), position[found.labels[rows]], boxes, found.scores[rows].astype(float)))
    images_of, categories, boxes, scores = (np.concatenate(column) for column in zip(*parts, strict=True))
    all_found = Found(images_of, categories, boxes, scores)
    chosen = thresholds.choose(known, all_found, names, min_precision=min_precision)
    files.write_json(path, chosen, indent=2)
    return thresholds.of_words(chosen, search.names)
