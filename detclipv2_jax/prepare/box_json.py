"""Boxes from jsons and their image folders; `detclipv2_jax.data.box_json` documents the formats and what is checked.

* COCO-format: Objects365, COCO, V3Det, ODinW, your own.
* LVIS v1, whose images say which categories were looked for: `neg_category_ids` (verified absent) become negatives,
  `not_exhaustive_category_ids` (may be present without boxes) never do, and nothing is known of other categories
  (`config.detection.federated`). Images are named by `coco_url`: the image folder holds train2017/ and val2017/.
* Grounding as made for MDETR: `final_mixed_train_no_coco.json`, `final_flickr_separateGT_train.json`. The
  `tokens_positive` spans of a box are the parts of a phrase, or several phrases; each is a box of its own.
"""

from __future__ import annotations

import collections
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from detclipv2_jax.data.box_json import BoxSource, load_json, read_detection, read_grounding
from detclipv2_jax.data.schema import Kind, Record, UnusableError
from detclipv2_jax.data.truth import FEDERATED
from detclipv2_jax.files import sha256
from detclipv2_jax.prepare.record_builder import RecordBuilder, Tally

_FREQUENCIES = {"r": "rare", "c": "common", "f": "frequent"}


class CocoJson(RecordBuilder):
    """Images with the boxes of their categories, from a COCO-format json."""

    name = "detclipv2_coco_json"


class Lvis(RecordBuilder):
    """Images with the boxes of their categories and the federated lists of LVIS."""

    name = "detclipv2_lvis"


class GroundingJson(RecordBuilder):
    """Captioned images with the boxes of their phrases, from a json with tokens_positive."""

    name = "detclipv2_grounding_json"


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


def open_detection(
    annotations: str, images: str, *, shard_size: int, num_examples: int = 0, seed: int = 0, **limits: Any
) -> BoxReader:
    """Returns the reader of a COCO json; with `num_examples` of a class-balanced part of it.

    Limits are those of `read_detection`.
    """
    source = read_detection(annotations, images, **limits)
    indices = balanced_subset(source, num_examples, seed=seed) if num_examples else np.arange(len(source))
    return BoxReader(source, indices=indices, folder=images, shard_size=shard_size)


def open_lvis(annotations: str, images: str, **options: Any) -> BoxReader:
    """Returns the reader of an LVIS json; options as for `open_detection`.

    Its facts say how many categories are rare, common and frequent.

    Raises:
      ValueError: the fields that make a json LVIS are missing.
    """
    reader = open_detection(annotations, images, **options)
    content = load_json(Path(annotations))
    missing = [field for field in FEDERATED if not any(field in image for image in content["images"])]
    if not all(category.get("frequency") in _FREQUENCIES for category in content["categories"]):
        missing.append("the frequency of every category (r, c or f)")
    if missing:
        raise ValueError(f"{annotations} is no LVIS json, it lacks {', '.join(missing)}; build it with KIND coco_json")
    frequencies = collections.Counter(_FREQUENCIES[category["frequency"]] for category in content["categories"])
    reader.facts["categories by frequency"] = dict(frequencies)
    return reader


def open_grounding(annotations: str, images: str, *, shard_size: int, **limits: Any) -> BoxReader:
    """Returns the reader of a grounding json; limits as for `read_grounding`."""
    source = read_grounding(annotations, images, **limits)
    return BoxReader(source, indices=np.arange(len(source)), folder=images, shard_size=shard_size)
