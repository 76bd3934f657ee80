"""Detection from any COCO-format json and its image folder: Objects365, COCO, V3Det, ODinW, your own.

The format and what is checked are documented in `detclipv2_jax.data.box_json`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from detclipv2_jax.data.box_json import BoxSource, read_detection
from detclipv2_jax.data.schema import Kind, Record, UnusableError
from detclipv2_jax.files import sha256
from detclipv2_jax.prepare.record_builder import RecordBuilder, Tally


class CocoJson(RecordBuilder):
    """Images with the boxes of their categories, from a COCO-format json."""

    name = "detclipv2_coco_json"


class BoxReader:
    """Some or all images of a json, in its order, `shard_size` images a shard."""

    def __init__(self, source: BoxSource, *, indices: np.ndarray, folder: str, shard_size: int):
        self.kind, self.vocabulary = source.kind, source.vocabulary
        self.num_items, self.num_shards = len(indices), -(-len(indices) // shard_size)
        self.inputs = {str(source.path): describe_file(source.path)}
        self.counters = source.counters
        self.facts: dict[str, Any] = {"federated": source.federated}
        if self.kind is Kind.DETECTION:
            self.facts["categories without a box"] = [
                name for i, name in enumerate(source.vocabulary.names) if i not in source.with_boxes
            ]
        self._source, self._indices, self._size = source, indices, shard_size
        self._folder = os.path.realpath(folder)

    def read(self, shard: int, tally: Tally) -> Iterator[tuple[str, Record]]:
        """Yields name and record of each image of a shard."""
        for index in self._indices[shard * self._size : (shard + 1) * self._size].tolist():
            tally.seen += 1
            try:
                record = self._source[index]
            except UnusableError as error:
                tally.dropped[error.reason] += 1
                continue
            yield os.path.relpath(str(record.image), self._folder), record


def describe_file(path: Path) -> dict[str, Any]:
    """Returns size and sha256 of a file."""
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def balanced_subset(source: BoxSource, num_images: int, *, seed: int) -> np.ndarray:
    """Returns the positions of `num_images` images in which rare categories are as frequent as they can be, ascending.

    1. Every category lists its images in random order.
    2. Round by round, rarest category first, each adds the first image of its list that is not chosen yet.
    3. It ends with the number wanted; images without boxes come last, at random.

    The paper trains on 0.66M images of Objects365 v2 and does not say how they were chosen.

    Raises:
      ValueError: there are fewer images.
    """
    if num_images > len(source):
        raise ValueError(f"--num_examples={num_images}, but {source.path} has {len(source)} usable images")
    rng = np.random.default_rng(seed)
    images_of: dict[str, list[int]] = {}
    for index in rng.permutation(len(source)).tolist():
        for name in source[index].concepts or ("",):
            images_of.setdefault(name, []).append(index)
    without_boxes = images_of.pop("", [])
    queues = [iter(images) for _, images in sorted(images_of.items(), key=lambda item: (len(item[1]), item[0]))]
    chosen: set[int] = set()
    while queues and len(chosen) < num_images:
        for queue in tuple(queues):
            image = next((image for image in queue if image not in chosen), None)
            if image is None:
                queues.remove(queue)
            elif len(chosen) < num_images:
                chosen.add(image)
    return np.array(sorted([*chosen, *without_boxes[: num_images - len(chosen)]]), np.int32)


def open_reader(
    annotations: str, images: str, *, shard_size: int, num_examples: int = 0, seed: int = 0, **limits: Any
) -> BoxReader:
    """Returns the reader of a COCO json; with `num_examples` of a class-balanced part of it.

    Limits are those of `read_detection`.
    """
    source = read_detection(annotations, images, **limits)
    indices = balanced_subset(source, num_examples, seed=seed) if num_examples else np.arange(len(source))
    return BoxReader(source, indices=indices, folder=images, shard_size=shard_size)
