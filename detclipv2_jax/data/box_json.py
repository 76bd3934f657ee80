"""Boxes from json files, read in place: COCO json + folder and MDETR-style grounding json + folder.

* detection: COCO json (`images`, `annotations` with `bbox` xywh, `categories`). LVIS's `neg_category_ids` and
  `not_exhaustive_category_ids` of an image, and a definition of a category under `def` or `definition`, are used; with
  either field a json is federated: of other names nothing is known.
* grounding: json as made for MDETR: `images` with `caption`, `annotations` with `bbox` and `tokens_positive`, a list
  of [start, end) character spans of the caption which are the phrases of that box (data/spans.py). Each phrase gives
  a box of its own; identical boxes are one box with several concepts (`max_box_concepts`).

The annotation is kept in flat arrays, so that worker processes start quickly. What cannot be used is counted by reason
in `counters`; above a share of the whole it is an error.
"""

from __future__ import annotations

import collections
import itertools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from detclipv2_jax import files
from detclipv2_jax.data import annotations as annotations_lib
from detclipv2_jax.data import transforms
from detclipv2_jax.data.annotations import shown, size_of, usable_id
from detclipv2_jax.data.checks import documented, refuse_above_share, resolve, unsafe_path
from detclipv2_jax.data.concepts import Vocabulary, display_name, read_dictionary
from detclipv2_jax.data.schema import DataError, Kind, Record, UnusableError
from detclipv2_jax.data.selection import (
    NOTHING,
    Dropped,
    drop_categories,
    few_shot,
    file_name,
    say_unused,
    select_images,
    with_fitting_ids,
)
from detclipv2_jax.data.spans import oddities_of, phrases_of, problem_of
from detclipv2_jax.data.truth import FEDERATED

_NUM_PROBED_SIZES = 64
_FEW = 0.01


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
        self.vocabulary, self.counters, self.class_names = vocabulary, counters, False
        self.image_ids = [usable_id(image["id"]) for image in images]
        self.federated = any(key in image for image in images for key in FEDERATED)
        self.sizes = np.array([size_of(image) for image in images], np.int32).reshape(-1, 2)
        self._folder, self._follow_links = folder, follow_links
        self._files = [file_name(image) for image in images]
        self._captions = [image.get("caption", "") for image in images] if kind is Kind.GROUNDING else None
        index_of: dict[Any, int] = {category_id: i for i, category_id in enumerate(vocabulary.category_ids)}
        index_of = {str(category_id): i for category_id, i in index_of.items()} | index_of  # "2" is 2
        lists_of = (_federated(image, index_of, where=path) for image in images)
        self._federated = {i: lists for i, lists in enumerate(lists_of) if any(lists)}
        order = np.argsort(image_of_box, kind="stable")
        self._boxes, self._labels = boxes[order], labels[order]
        self._starts = np.searchsorted(image_of_box[order], np.arange(len(images) + 1))
        distinct = np.unique(image_of_box.astype(np.int64) * max(len(vocabulary), 1) + labels)
        self.with_boxes = frozenset(np.unique(labels).tolist())  # positions of categories in the vocabulary
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
            federated=self.federated,
        )


def _federated(image: dict[str, Any], index_of: dict[Any, int], *, where: Path) -> tuple[list[int], list[int]]:
    """Returns the vocabulary indices verified to be absent and those not annotated exhaustively (LVIS)."""
    found = []
    for key in FEDERATED:
        listed = image.get(key) or ()
        if not isinstance(listed, list | tuple):
            raise DataError(f"{where}: image {shown(image['id'])} has {key} {shown(listed)}, not a list of ids")
        found.append([index_of[i] for i in listed if isinstance(i, int | float | str) and i in index_of])
    return found[0], found[1]


@documented
def load_json(path: Path) -> dict[str, Any]:
    """Returns the content of an annotation json without outlines; its entries are not looked at."""
    content = annotations_lib.load_json(path)
    if not isinstance(content, dict) or not {"images", "annotations"} <= content.keys():
        found = f"the keys {sorted(content)[:8]}" if isinstance(content, dict) else f"a {type(content).__name__}"
        raise ValueError(f"{path} has {found}; an annotation json has `images` and `annotations`")
    if not content["images"]:
        raise ValueError(f"{path} lists no images")
    return content


def _collect_boxes(
    content: dict[str, Any],
    images: Sequence[dict[str, Any]],
    path: Path,
    *,
    label: Callable[[dict[str, Any], dict[str, Any]], Sequence[int] | str],
    max_bad_share: float,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, collections.Counter[str]]:
    """Returns boxes [n,4] xyxy, labels [n], image of each box [n] and the counts of what is bad.

    `label(annotation, image)` gives indices into the vocabulary, a box for each, or the reason why there is none.
    """
    index = {usable_id(image["id"]): i for i, image in enumerate(images)}
    listed = {usable_id(image.get("id")) for image in content["images"]}
    bad: collections.Counter[str] = collections.Counter()
    repaired: collections.Counter[str] = collections.Counter()
    entries = content["annotations"]
    xywh, repaired["box taken from the outline for want of a bbox"] = annotations_lib.boxes_of(entries)
    crowd = annotations_lib.flags_of(entries, "iscrowd", repaired, where=path)
    no_numbers = np.isnan(xywh).all(axis=1)
    kept, image_of_box, labels, total = [], [], [], 0
    for row, annotation in enumerate(entries):
        i = index.get(annotation.get("image_id"))
        if i is None:
            if annotation.get("image_id") not in listed:
                total += 1
                bad["box of an image that is not listed"] += 1
            continue
        if crowd[row]:
            repaired["crowd box left out"] += 1
            continue
        total += 1
        value = "box without four numbers" if no_numbers[row] else label(annotation, images[i])
        if isinstance(value, str):
            bad[value] += 1
            continue
        kept.append(row)
        image_of_box.append(i)
        labels.append(value)
    xywh, places = xywh[kept].reshape(-1, 4), np.array(image_of_box, np.int32)
    sizes = np.array([size_of(image) for image in images], np.float64).reshape(-1, 2)[places]
    boxes, usable, reasons = transforms.check_boxes(
        np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1), sizes
    )
    bad.update(reasons)
    refuse_above_share(bad, total, max_bad_share, what="boxes", where=path)
    doubtful = _doubtful(xywh[usable], sizes[usable], total, path, max_bad_share=max_bad_share)
    if not usable.any():
        raise ValueError(f"{path} has no usable box for its {len(images)} images")
    repaired.update(doubtful)
    times = [len(own) if used else 0 for own, used in zip(labels, usable, strict=True)]
    flat = [index for own, used in zip(labels, usable, strict=True) if used for index in own]
    return boxes.repeat(times, axis=0), np.array(flat, np.int32), places.repeat(times), bad + repaired


def _doubtful(xywh: np.ndarray, sizes: np.ndarray, total: int, path: Path, *, max_bad_share: float) -> dict[str, int]:
    """Returns how many usable boxes are cut at the border or below a pixel; DataError if too many are, or all look so.

    A few of them are in every set: COCO has one in a thousand.
    """
    cut, below, look = annotations_lib.suspicious(xywh, sizes)
    counts = {"box cut at the border": int(cut.sum()), "box below a pixel": int((below & ~cut).sum())}
    if look:
        counts = {f"boxes that {look}": len(xywh)}
    refuse_above_share(counts, total, max(max_bad_share, _FEW), what="boxes", where=path)
    return {reason: num for reason, num in counts.items() if num}


def probe_sizes(images: Sequence[dict[str, Any]], folder: str, *, follow_links: bool) -> None:
    """Gives some images whose json has no size that of their files, for boxes to be compared with."""
    wanting = (image for image in images if isinstance(image, dict) and not all(size_of(image)))
    for image in itertools.islice(wanting, _NUM_PROBED_SIZES):
        if unsafe_path(file_name(image)):
            continue
        try:
            data = files.read_bytes(resolve(folder, file_name(image), follow_links=follow_links))
            image["height"], image["width"] = transforms.read_header(data).displayed_size
        except (UnusableError, OSError, ValueError):
            continue


@documented
def read_vocabulary(path: str | Path, *, dictionary: str = "") -> Vocabulary:
    """Returns the categories of a COCO json in their order; definitions from the json, else from the dictionary."""
    return vocabulary_of(load_json(Path(path)), Path(path), read_dictionary(dictionary) if dictionary else None)


def vocabulary_of(content: dict[str, Any], path: Path, dictionary: Vocabulary | None) -> Vocabulary:
    """Returns the categories of the content of a COCO json in their order; ValueError for one without id or name."""
    categories = content.get("categories")
    if not categories:
        raise ValueError(f"{path} lists no categories")
    ids, _ = annotations_lib.listed_ids(categories, where=f"{path}: categories")
    names, definitions = [], []
    for i, category in enumerate(categories):
        given = category.get("name")
        name = display_name(str(given)) if isinstance(given, str | int) and not isinstance(given, bool) else ""
        if not name:
            raise ValueError(f"{path}: categories[{i}] ({shown(category)}) needs an id and a name")
        names.append(name)
        texts = (category.get("def"), category.get("definition"), dictionary and dictionary.definition(name))
        definitions.append(next((text for text in texts if isinstance(text, str) and text.strip()), ""))
    keys = [str(value) for value in ids]
    if len(set(keys)) < len(keys):
        raise ValueError(f"{path} lists two categories with the id {max(keys, key=keys.count)}")
    return Vocabulary(tuple(names), tuple(definitions), tuple(ids))


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


def open_detection(
    annotations: str, images: str, *, dropped: Dropped, fitting_ids: bool
) -> tuple[Path, str, dict[str, Any], dict[str, int]]:
    """Returns path, real image folder and content of a COCO json, and the counts of what was repaired or left out.

    Args:
      annotations: path of the json.
      images: its image folder.
      dropped: categories that are left out.
      fitting_ids: whether annotations get the ids that images and categories have; they do where some are dropped.
    """
    path, counters = Path(annotations), dict[str, int]()
    content = load_json(path)
    check_kind(content, path, Kind.DETECTION)
    if fitting_ids or dropped.names:
        content, counters = with_fitting_ids(content)
    content, num_dropped = drop_categories(content, dropped, path)
    return path, os.path.realpath(images), content, counters | num_dropped


@documented
def read_detection(
    annotations: str,
    images: str,
    *,
    dictionary: str = "",
    max_examples: int = 0,
    max_bad_share: float = 0.0,
    follow_links: bool = False,
    num_shots: int = 0,
    few_shot_seed: int = 0,
    dropped: Dropped = NOTHING,
) -> BoxSource:
    """Returns the source of a COCO json and its image folder.

    Args:
      annotations: path of the json.
      images: folder its file names are relative to.
      dictionary: TSV with definitions for the categories that have none; "" for none.
      max_examples: the first n images; 0: all.
      max_bad_share: an error above this share of unusable images or boxes.
      follow_links: images may be links to files outside of the folder.
      num_shots: only the images of `few_shot` with this many; 0: all.
      few_shot_seed: its seed.
      dropped: categories that are left out with their boxes.

    Raises:
      ValueError: see the module; the message says which file, how many and why.
    """
    path, folder, content, counters = open_detection(annotations, images, dropped=dropped, fitting_ids=True)
    vocabulary = vocabulary_of(content, path, read_dictionary(dictionary) if dictionary else None)
    used = {row.get("category_id") for row in content["annotations"]}
    say_unused(content["categories"], used, path, option=dropped.option)
    if num_shots:
        content = few_shot(content, num_shots=num_shots, seed=few_shot_seed)
        logging.info("%s: %d images for %d shots, seed %d", path, len(content["images"]), num_shots, few_shot_seed)
    kept, more = select_images(content, folder, path, max_examples=max_examples, max_bad_share=max_bad_share)
    probe_sizes(kept, folder, follow_links=follow_links)
    label_of: dict[Any, Sequence[int]] = {category_id: (i,) for i, category_id in enumerate(vocabulary.category_ids)}

    def label(annotation: dict[str, Any], _: dict[str, Any]) -> Sequence[int] | str:
        return label_of.get(annotation.get("category_id"), "box of an unlisted category")

    boxes, labels, image_of_box, odd = _collect_boxes(content, kept, path, label=label, max_bad_share=max_bad_share)
    return BoxSource(
        kind=Kind.DETECTION,
        path=path,
        folder=folder,
        images=kept,
        boxes=boxes,
        labels=labels,
        image_of_box=image_of_box,
        vocabulary=vocabulary,
        counters=counters | more | odd,
        follow_links=follow_links,
    )


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
    content, counters = with_fitting_ids(content)
    kept, more = select_images(content, folder, path, max_examples=max_examples, max_bad_share=max_bad_share)
    captioned = [image for image in kept if isinstance(image.get("caption"), str) and image["caption"].strip()]
    no_caption = len(kept) - len(captioned)
    refuse_above_share({"without a caption": no_caption}, len(kept), max_bad_share, what="images", where=path)
    probe_sizes(captioned, folder, follow_links=follow_links)
    phrases: dict[str, int] = {}
    odd_spans: collections.Counter[str] = collections.Counter()

    def label(annotation: dict[str, Any], image: dict[str, Any]) -> Sequence[int] | str:
        caption, spans = image["caption"], annotation.get("tokens_positive")
        if problem := problem_of(caption, spans):
            return problem
        odd_spans.update(oddities_of(caption, spans))
        return [phrases.setdefault(phrase, len(phrases)) for phrase in phrases_of(caption, spans)]

    boxes, labels, image_of_box, odd = _collect_boxes(
        content, captioned, path, label=label, max_bad_share=max_bad_share
    )
    return BoxSource(
        kind=Kind.GROUNDING,
        path=path,
        folder=folder,
        images=captioned,
        boxes=boxes,
        labels=labels,
        image_of_box=image_of_box,
        vocabulary=Vocabulary(tuple(phrases), ("",) * len(phrases)),
        counters=counters | more | odd | odd_spans | ({"image without a caption": no_caption} if no_caption else {}),
        follow_links=follow_links,
    )
