"""Boxes from json files, read in place: COCO json + folder and MDETR-style grounding json + folder.

* detection: COCO json (`images`, `annotations` with `bbox` xywh, `categories`). LVIS's `neg_category_ids` and
  `not_exhaustive_category_ids` of an image, and a definition of a category under `def` or `definition`, are used.
* grounding: json as made for MDETR: `images` with `caption`, `annotations` with `bbox` and `tokens_positive`, a list
  of [start, end) character spans of the caption which together are the phrase of that box.

The annotation is kept in flat arrays, so that worker processes start quickly. What cannot be used is counted by reason
in `counters`; above a share of the whole it is an error.
"""

from __future__ import annotations

import collections
import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from detclipv2_jax import files
from detclipv2_jax.data import transforms
from detclipv2_jax.data.checks import documented, probe_images, refuse_above_share, resolve, unsafe_path
from detclipv2_jax.data.concepts import Vocabulary, display_name, read_dictionary
from detclipv2_jax.data.schema import Kind, Record, UnusableError


class BoxSource:
    """Images with boxes from a COCO json or an MDETR-style json; see `read_detection` and `read_grounding`."""

    def __init__(
        self,
        *,
        kind: Kind,
        path: Path,
        folder: str,
        images: Sequence[dict[str, Any]],
        boxes: np.ndarray,
        labels: np.ndarray,
        image_of_box: np.ndarray,
        vocabulary: Vocabulary,
        counters: dict[str, int],
        follow_links: bool = False,
    ):
        self.name, self.path, self.kind = path.stem, path, kind
        self.vocabulary = vocabulary
        self.counters = counters
        self.image_ids = [image["id"] for image in images]
        self.federated = any("neg_category_ids" in image for image in images)  # not every box is annotated (LVIS)
        self.sizes = np.array([_size(image) for image in images], np.int32).reshape(-1, 2)
        self._folder, self._follow_links = folder, follow_links
        self._files = [file_name(image) for image in images]
        self._captions = [image.get("caption", "") for image in images] if kind is Kind.GROUNDING else None
        index_of = {category_id: i for i, category_id in enumerate(vocabulary.category_ids)}
        self._federated = {i: lists for i, image in enumerate(images) if any(lists := _federated(image, index_of))}
        order = np.argsort(image_of_box, kind="stable")
        self._boxes, self._labels = boxes[order], labels[order]
        self._starts = np.searchsorted(image_of_box[order], np.arange(len(images) + 1))
        distinct = np.unique(image_of_box.astype(np.int64) * max(len(vocabulary), 1) + labels)
        self.most_concepts = int(np.bincount(distinct // max(len(vocabulary), 1)).max()) if len(distinct) else 0

    def __len__(self) -> int:
        return len(self._files)

    def file(self, index: int) -> str:
        return f"{self._folder}/{self._files[index]}"

    def describe(self, index: int) -> str:
        return f"{self._files[index]} of {self.path}"

    def __getitem__(self, index: int) -> Record:
        rows = slice(self._starts[index], self._starts[index + 1])
        present, box_concepts = np.unique(self._labels[rows], return_inverse=True)
        negatives, not_negatives = self._federated.get(index, ((), ()))
        names = self.vocabulary.names
        return Record(
            kind=self.kind,
            source=self.name,
            example_id=index,
            image=resolve(self._folder, self._files[index], follow_links=self._follow_links),
            size=tuple(self.sizes[index].tolist()),
            boxes=self._boxes[rows],
            concepts=tuple(names[i] for i in present),
            box_concepts=box_concepts.astype(np.int32),
            caption=self._captions[index] if self._captions else "",
            negatives=tuple(names[i] for i in negatives),
            not_negatives=tuple(names[i] for i in not_negatives),
        )

    def fill_sizes(self) -> None:
        """Reads the sizes the annotation does not give from the headers of the images ; canvases need them."""
        for index in np.flatnonzero((self.sizes == 0).any(axis=1)):
            try:
                path = resolve(self._folder, self._files[index], follow_links=self._follow_links)
                header = transforms.read_header(files.read_bytes(path))
                self.sizes[index] = header.displayed_size
            except (UnusableError, OSError):
                continue  # it is reported when it is read


def _size(image: dict[str, Any]) -> tuple[int, int]:
    sides = image.get("height"), image.get("width")
    if all(isinstance(side, int | float) and 1 <= side <= transforms.MAX_SIDE for side in sides):
        return int(sides[0]), int(sides[1])
    return 0, 0


def file_name(image: dict[str, Any]) -> str:
    # LVIS gives no file name but an address that ends with split/file
    return str(image.get("file_name") or "/".join(str(image.get("coco_url", "")).split("/")[-2:]))


def _federated(image: dict[str, Any], index_of: dict[Any, int]) -> tuple[list[int], list[int]]:
    """Returns the vocabulary indices verified to be absent and those not annotated exhaustively (LVIS)."""
    keys = ("neg_category_ids", "not_exhaustive_category_ids")
    absent, incomplete = ([index_of[i] for i in image.get(key) or () if i in index_of] for key in keys)
    return absent, incomplete


@documented
def load_json(path: Path) -> dict[str, Any]:
    content = files.read_json(path)
    if not isinstance(content, dict) or not {"images", "annotations"} <= content.keys():
        found = f"the keys {sorted(content)[:8]}" if isinstance(content, dict) else f"a {type(content).__name__}"
        raise ValueError(f"{path} has {found}; an annotation json has `images` and `annotations`")
    if not content["images"]:
        raise ValueError(f"{path} lists no images")
    return content


def _select_images(
    content: dict[str, Any], folder: str, path: Path, *, max_examples: int, max_bad_share: float
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Returns the usable images, in order, each id once, and the counts of what was repaired."""
    images = content["images"][:max_examples] if max_examples else content["images"]
    bad: collections.Counter[str] = collections.Counter()
    repaired: collections.Counter[str] = collections.Counter()
    files = collections.defaultdict(set)
    for image in images:
        files[image.get("id")].add(file_name(image))
    seen, kept = set(), []
    for image in images:
        if "id" not in image or unsafe_path(file_name(image)):
            bad["without id" if "id" not in image else "with a file name outside the folder"] += 1
        elif len(files[image["id"]]) > 1:
            bad["sharing their id with another image"] += 1
        elif image["id"] in seen:
            repaired["image listed twice"] += 1
        else:
            seen.add(image["id"])
            kept.append(image)
    refuse_above_share(bad, len(images), max_bad_share, what="images", where=path)
    probe_images(folder, map(file_name, kept), path)
    return kept, dict(bad + repaired)


def _collect_boxes(
    content: dict[str, Any],
    images: Sequence[dict[str, Any]],
    path: Path,
    *,
    label: Callable[[dict[str, Any], dict[str, Any]], int | str],
    max_bad_share: float,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[str, int]]:
    """Returns boxes [n,4] xyxy, labels [n], image of each box [n] and the counts of what is bad.

    `label(annotation, image)` gives an index into the vocabulary, or the reason why there is none.
    """
    index = {image["id"]: i for i, image in enumerate(images)}
    listed = {image.get("id") for image in content["images"]}
    bad: collections.Counter[str] = collections.Counter()
    repaired: collections.Counter[str] = collections.Counter()
    rows, total = [], 0
    for annotation in content["annotations"]:
        i = index.get(annotation.get("image_id"))
        if i is None:
            if annotation.get("image_id") not in listed:
                total += 1
                bad["box of an image that is not listed"] += 1
            continue
        if annotation.get("iscrowd"):
            repaired["crowd box left out"] += 1
            continue
        total += 1
        box = annotation.get("bbox")
        if not (isinstance(box, list) and len(box) == 4 and all(isinstance(x, int | float) for x in box)):
            bad["box without four numbers"] += 1
            continue
        value = label(annotation, images[i])
        if isinstance(value, str):
            bad[value] += 1
            continue
        rows.append((i, value, *box))
    table = np.array(rows, np.float64).reshape(-1, 6)
    image_of_box, labels = table[:, 0].astype(np.int32), table[:, 1].astype(np.int32)
    xyxy = np.concatenate([table[:, 2:4], table[:, 2:4] + table[:, 4:6]], axis=1)
    sizes = np.array([_size(image) for image in images], np.float64).reshape(-1, 2)[image_of_box]
    boxes, usable, reasons = transforms.check_boxes(xyxy, sizes)
    bad.update(reasons)
    refuse_above_share(bad, total, max_bad_share, what="boxes", where=path)
    if not usable.any():
        raise ValueError(f"{path} has no usable box for its {len(images)} images")
    return boxes[usable], labels[usable], image_of_box[usable], dict(bad + repaired)


@documented
def read_vocabulary(path: str | Path, *, dictionary: str = "") -> Vocabulary:
    """Returns the categories of a COCO json in their order; definitions from the json, else from the dictionary."""
    return _vocabulary(load_json(Path(path)), Path(path), read_dictionary(dictionary) if dictionary else None)


def _vocabulary(content: dict[str, Any], path: Path, dictionary: Vocabulary | None) -> Vocabulary:
    categories = content.get("categories")
    if not categories:
        raise ValueError(f"{path} lists no categories")
    names, definitions = [], []
    for category in categories:
        name = display_name(category["name"]) if isinstance(category.get("name"), str) else ""
        if not name or "id" not in category:
            raise ValueError(f"{path}: the category {category} needs an id and a name, a text that is more than spaces")
        names.append(name)
        own = category.get("def") or category.get("definition") or ""
        definitions.append(own or (dictionary.definition(name) if dictionary else ""))
    ids = tuple(category["id"] for category in categories)
    if len(set(ids)) < len(ids):
        raise ValueError(f"{path} lists two categories with the id {max(ids, key=ids.count)}")
    return Vocabulary(tuple(names), tuple(definitions), ids)


def check_kind(content: dict[str, Any], path: Path, kind: Kind) -> None:
    """Raises if the json is of another kind than its key says."""
    sample = content["annotations"][:100]
    has_spans = any("tokens_positive" in annotation for annotation in sample)
    has_captions = any("caption" in annotation and "bbox" not in annotation for annotation in sample)
    if has_captions:
        raise ValueError(f"{path} holds captions without boxes; give them as a TSV in config.image_text.pairs")
    if kind is Kind.DETECTION and has_spans:
        raise ValueError(
            f"{path} is a grounding json (its annotations have tokens_positive); "
            "it belongs in config.grounding.annotations"
        )
    if kind is Kind.GROUNDING and sample and not has_spans:
        raise ValueError(
            f"{path} has no tokens_positive in its annotations; a COCO json belongs in config.detection.annotations"
        )


@documented
def read_detection(
    annotations: str,
    images: str,
    *,
    dictionary: str = "",
    max_examples: int = 0,
    max_bad_share: float = 0.0,
    follow_links: bool = False,
    need_boxes: bool = True,
    num_shots: int = 0,
    few_shot_seed: int = 0,
) -> BoxSource:
    """Returns the source of a COCO json and its image folder.

    Args:
      annotations: path of the json.
      images: folder its file names are relative to.
      dictionary: TSV with definitions for the categories that have none; "" for none.
      max_examples: the first n images; 0: all.
      max_bad_share: an error above this share of unusable images or boxes.
      follow_links: images may be links to files outside of the folder.
      need_boxes: False for evaluation, where boxes are read by the evaluator alone and every image is kept.
      num_shots: only the images of `few_shot` with this many; 0: all.
      few_shot_seed: its seed.

    Raises:
      ValueError: see the module; the message says which file, how many and why.
    """
    path, folder = Path(annotations), os.path.realpath(images)
    content = load_json(path)
    check_kind(content, path, Kind.DETECTION)
    if num_shots:
        content = few_shot(content, num_shots=num_shots, seed=few_shot_seed)
        logging.info("%s: %d images for %d shots, seed %d", path, len(content["images"]), num_shots, few_shot_seed)
    vocabulary = _vocabulary(content, path, read_dictionary(dictionary) if dictionary else None)
    kept, counters = _select_images(content, folder, path, max_examples=max_examples, max_bad_share=max_bad_share)
    label_of: dict[Any, int | str] = {category_id: i for i, category_id in enumerate(vocabulary.category_ids)}
    boxes, labels, image_of_box = np.zeros((0, 4), np.float32), np.zeros(0, np.int32), np.zeros(0, np.int32)
    more: dict[str, int] = {}
    if need_boxes:
        boxes, labels, image_of_box, more = _collect_boxes(
            content,
            kept,
            path,
            label=lambda annotation, _: label_of.get(annotation.get("category_id"), "box of an unlisted category"),
            max_bad_share=max_bad_share,
        )
    return BoxSource(
        kind=Kind.DETECTION,
        path=path,
        folder=folder,
        images=kept,
        boxes=boxes,
        labels=labels,
        image_of_box=image_of_box,
        vocabulary=vocabulary,
        counters=counters | more,
        follow_links=follow_links,
    )


def few_shot(content: dict[str, Any], *, num_shots: int, seed: int) -> dict[str, Any]:
    """Returns a COCO json with the images of GLIP's few-shot split, in which each category is on `num_shots` or more.

    Images with a box wider and higher than 1 px are sorted by id and shuffled by Python's generator. One after the
    other is taken if a category on it has not had `num_shots` images yet; it counts for every category on it. A
    category that is on fewer images has them all.
    """
    present = collections.defaultdict(set)  # categories of every image
    usable = set()
    for annotation in content["annotations"]:
        present[annotation.get("image_id")].add(annotation.get("category_id"))
        if min((annotation.get("bbox") or ())[2:], default=0) > 1:
            usable.add(annotation.get("image_id"))
    ids = sorted(usable & {image.get("id") for image in content["images"]})
    random.Random(seed).shuffle(ids)
    num_images: collections.Counter[Any] = collections.Counter()
    taken = set()
    for image_id in ids:
        if any(num_images[category] < num_shots for category in present[image_id]):
            taken.add(image_id)
            num_images.update(present[image_id])
    images = [image for image in content["images"] if image.get("id") in taken]
    annotations = [annotation for annotation in content["annotations"] if annotation.get("image_id") in taken]
    return content | {"images": images, "annotations": annotations}


def phrase_of(caption: str, spans: Any) -> str:
    """Returns the text of [start, end) character spans, joined by spaces; "" where they cover nothing."""
    try:
        parts = [caption[max(int(start), 0) : max(int(end), 0)].strip(" \t\n.,;:") for start, end in spans]
    except (OverflowError, TypeError, ValueError):
        return ""
    return " ".join(part for part in parts if part)


@documented
def read_grounding(
    annotations: str,
    images: str,
    *,
    max_examples: int = 0,
    max_bad_share: float = 0.0,
    follow_links: bool = False,
) -> BoxSource:
    """Returns the source of an MDETR-style json and its image folder; arguments as for `read_detection`.

    Its vocabulary are the distinct phrases, without definitions.
    """
    path, folder = Path(annotations), os.path.realpath(images)
    content = load_json(path)
    check_kind(content, path, Kind.GROUNDING)
    kept, counters = _select_images(content, folder, path, max_examples=max_examples, max_bad_share=max_bad_share)
    empty = sum(not str(image.get("caption") or "").strip() for image in kept)
    refuse_above_share({"with an empty caption": empty}, len(kept), max_bad_share, what="images", where=path)
    kept = [image for image in kept if str(image.get("caption") or "").strip()]
    phrases: dict[str, int] = {}

    def label(annotation: dict[str, Any], image: dict[str, Any]) -> int | str:
        phrase = phrase_of(image["caption"], annotation.get("tokens_positive"))
        return phrases.setdefault(phrase, len(phrases)) if phrase else "box whose spans are not in the caption"

    boxes, labels, image_of_box, more = _collect_boxes(content, kept, path, label=label, max_bad_share=max_bad_share)
    return BoxSource(
        kind=Kind.GROUNDING,
        path=path,
        folder=folder,
        images=kept,
        boxes=boxes,
        labels=labels,
        image_of_box=image_of_box,
        vocabulary=Vocabulary(tuple(phrases), ("",) * len(phrases)),
        counters=counters | more | ({"image with an empty caption": empty} if empty else {}),
        follow_links=follow_links,
    )
