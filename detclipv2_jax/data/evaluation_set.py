"""The photos, categories and truth that a model is evaluated on, checked before anything is compiled or predicted."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
from absl import logging
from jaxtyping import Int

from detclipv2_jax.data import truth as truth_lib
from detclipv2_jax.data.annotations import shown
from detclipv2_jax.data.box_json import BoxSource, open_detection, probe_sizes, vocabulary_of
from detclipv2_jax.data.checks import documented, photo_facts
from detclipv2_jax.data.concepts import Vocabulary, read_dictionary
from detclipv2_jax.data.schema import DataError, Kind
from detclipv2_jax.data.selection import NOTHING, Dropped, say_unused, select_images
from detclipv2_jax.data.truth import Truth


@dataclasses.dataclass(frozen=True, eq=False)
class GroundTruth:
    """What evaluation needs beside images."""

    truth: Truth
    images: Int[np.ndarray, " n"]  # position in the truth, by example id
    categories: Int[np.ndarray, " c"]  # position in the truth, by position in the vocabulary
    vocabulary: Vocabulary  # the categories in the order of the json
    photos: str  # a digest of them
    definitions: bool = False  # whether a category is encoded with its definition

    @property
    def annotations(self) -> Path:
        """The COCO json."""
        return Path(self.truth.name)

    @property
    def texts(self) -> list[str]:
        """The text of every category as it is encoded."""
        return self.vocabulary.texts(definitions=self.definitions)


@documented
def read_evaluation(
    annotations: str,
    images: str,
    *,
    dictionary: str = "",
    max_examples: int = 0,
    max_bad_share: float = 0.0,
    follow_links: bool = False,
    dropped: Dropped = NOTHING,
) -> tuple[BoxSource, GroundTruth]:
    """Returns the photos of a COCO json, without boxes, and what is scored; arguments as `box_json.read_detection`.

    Raises:
      ValueError: as there and of `truth.read`; photos that are missing, all of them; categories with boxes that no
        text tells apart.
    """
    # the truth makes ids fit, and counts them
    path, folder, content, num_dropped = open_detection(annotations, images, dropped=dropped, fitting_ids=False)
    probe_sizes(content["images"], folder, follow_links=follow_links)
    truth = truth_lib.from_content(str(path), content, max_bad_share=max_bad_share)
    for what, num in (truth.odd | num_dropped).items():
        logging.warning("%s: %d × %s", path, num, what)
    used = {truth.category_ids.ids[i] for i in np.unique(truth.category)}
    say_unused(truth.categories, used, path, option=dropped.option)
    once = {str(category["id"]): category for category in content["categories"]}
    known = read_dictionary(dictionary) if dictionary else None
    vocabulary = vocabulary_of(content | {"categories": list(once.values())}, path, known)
    # all photos are looked for below
    kept, counters = select_images(content, "", path, max_examples=max_examples, max_bad_share=max_bad_share)
    none = np.zeros(0, np.int32)
    source = BoxSource(
        kind=Kind.DETECTION,
        path=path,
        folder=folder,
        images=kept,
        boxes=np.zeros((0, 4), np.float32),
        labels=none,
        image_of_box=none,
        vocabulary=vocabulary,
        counters=counters | truth.odd | num_dropped,
        follow_links=follow_links,
    )
    ground_truth = GroundTruth(
        truth=truth,
        images=truth.image_ids.find(source.image_ids)[0],
        categories=truth.category_ids.find(vocabulary.category_ids)[0],
        vocabulary=vocabulary,
        photos=photo_facts(map(source.file, range(len(source))), where=path, folder="" if follow_links else folder),
    )
    _refuse_equal_texts(ground_truth, path)
    return source, ground_truth


def _refuse_equal_texts(ground_truth: GroundTruth, path: Path) -> None:
    """Raises if two categories with boxes have one text: what is found would count for both, and be wrong for one."""
    first: dict[str, int] = {}
    with_boxes = set(ground_truth.truth.category.tolist())
    ids = ground_truth.vocabulary.category_ids
    for i, text in enumerate(ground_truth.vocabulary.texts(definitions=True)):
        if int(ground_truth.categories[i]) in with_boxes and (j := first.setdefault(text.lower(), i)) != i:
            raise DataError(
                f"{path}: the categories {shown(ids[j])} and {shown(ids[i])} are both called {text!r} and have boxes; "
                "no text tells them apart: rename one, or give both one id"
            )
