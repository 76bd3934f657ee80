"""The photos, categories and truth that a model is evaluated on, checked before anything is compiled or predicted."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from jaxtyping import Int

from detclipv2_jax.data import tokenizer
from detclipv2_jax.data import truth as truth_lib
from detclipv2_jax.data.annotations import shown
from detclipv2_jax.data.box_json import BoxSource, open_detection, probe_sizes, vocabulary_of
from detclipv2_jax.data.checks import documented, photo_facts
from detclipv2_jax.data.concepts import Vocabulary, read_dictionary
from detclipv2_jax.data.schema import DataError, Kind
from detclipv2_jax.data.selection import NOTHING, Dropped, say_unused, select_images
from detclipv2_jax.data.truth import Truth

_NUM_NAMED = 10  # categories in a message


@dataclasses.dataclass(frozen=True, eq=False)
class GroundTruth:
    """What evaluation needs beside images."""

    truth: Truth
    images: Int[np.ndarray, " n"]  # position in the truth, by example id
    categories: Int[np.ndarray, " c"]  # position in the truth, by position in the vocabulary
    vocabulary: Vocabulary  # the categories in the order of the json
    photos: str  # a digest of them
    definitions: bool  # whether a category is encoded with its definition

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
    definitions: bool = False,
) -> tuple[BoxSource, GroundTruth]:
    """Returns the photos of a COCO json, without boxes, and what is scored; arguments as `box_json.read_detection`.

    With `definitions` the text of a category has its definition. Of categories with one text those without a box are
    not asked for: what is found would be found twice.

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
    vocabulary = _asked_once(vocabulary, used, path, definitions=definitions)
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
        definitions=definitions,
        photos=photo_facts(map(source.file, range(len(source))), where=path, folder="" if follow_links else folder),
    )
    refuse_equal_texts(ground_truth)
    return source, ground_truth


def _asked_once(vocabulary: Vocabulary, used: Collection[Any], path: Path, *, definitions: bool) -> Vocabulary:
    """Returns a vocabulary without the categories that have no box (their ids are not `used`) and another's text."""
    texts = [text.lower() for text in vocabulary.texts(definitions=definitions)]
    boxed = [category_id in used for category_id in vocabulary.category_ids]
    seen = {text for text, has_boxes in zip(texts, boxed, strict=True) if has_boxes}
    kept, again = list[int](), list[int]()
    for i, (text, has_boxes) in enumerate(zip(texts, boxed, strict=True)):
        (kept if has_boxes or text not in seen else again).append(i)
        seen.add(text)
    if not again:
        return vocabulary
    named = ", ".join(shown(vocabulary.category_ids[i]) for i in again[:_NUM_NAMED])
    logging.warning(
        "%s: %d categories without a box have the text of another one and are not asked for: %s",
        path,
        len(again),
        named,
    )
    names, given, ids = vocabulary.names, vocabulary.definitions, vocabulary.category_ids
    return Vocabulary(tuple(names[i] for i in kept), tuple(given[i] for i in kept), tuple(ids[i] for i in kept))


def refuse_equal_texts(ground_truth: GroundTruth, *, context_length: int = 0) -> None:
    """Raises if two categories with boxes have one text: what is found would count for both, and be wrong for one.

    With a `context_length` also if a model, which reads no further, gets the same of two texts.
    """
    texts = encoded = [text.lower() for text in ground_truth.texts]
    if context_length:
        encoded = [row.tobytes() for row in tokenizer.tokenize(texts, max_length=context_length)]
    first: dict[Any, int] = {}
    with_boxes = set(ground_truth.truth.category.tolist())
    ids, where = ground_truth.vocabulary.category_ids, ground_truth.annotations
    for i, code in enumerate(encoded):
        if int(ground_truth.categories[i]) in with_boxes and (j := first.setdefault(code, i)) != i:
            more = f", as far as {context_length} tokens go," if texts[i] != texts[j] else ""
            raise DataError(
                f"{where}: the categories {shown(ids[j])} and {shown(ids[i])} are both called {ground_truth.texts[i]!r}"
                f"{more} and have boxes; no text tells them apart: rename one, or give both one id"
            )
