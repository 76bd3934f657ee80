"""One host's rows of the n-th global batch of a stream, as a pure function of n.

1. The order of an epoch is a permutation seeded by (seed, stream, epoch); position p of the stream is its example.
2. Scales and flips of the n-th batch are drawn by a generator seeded by (seed, stream, n), the negatives of an example
   by one seeded by (seed, stream) that counts with p. Of as many batches in a row as the canvas has sizes, each has
   another.
3. An image that cannot be used is noted and the next readable example of the stream takes its place.
4. The concepts of all images are merged into one table; boxes and captions point into it.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import math
import re
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from detclipv2_jax import buckets, files
from detclipv2_jax.data import transforms
from detclipv2_jax.data.concepts import Encoded, Encoder, Pool, Table, Vocabulary, build_table, concept_text, num_draws
from detclipv2_jax.data.mirroring import speaks_of_sides
from detclipv2_jax.data.schema import Batch, DataError, Federated, Kind, Record, UnusableError
from detclipv2_jax.data.sources import Source

_MAX_TRIES = 100  # unusable images in a row; so many mean that the disk is gone
# what is cut because a static size is too small
OVERFLOWS = (NEGATIVES_CUT, TEXTS_TRUNCATED, PHRASES_CUT, BOXES_CUT, BOX_CONCEPTS_CUT) = (
    "negatives cut: concept table full",
    "texts truncated",
    "phrases cut: more than max_phrases",
    "boxes cut: more than max_boxes",
    "box concepts cut: more than max_box_concepts",
)
BARE_PHRASES = "phrases without a definition"


class Skipped(NamedTuple):
    """An example that could not be used."""

    example: str
    reason: str
    source: str


class Notes(NamedTuple):
    """What happened while one batch was made; travels with it from a worker process."""

    counts: collections.Counter[str]
    skipped: dict[int, Skipped]  # by position among the stream's members
    examples: list[tuple[int, int]]  # source and position in it of every row of the batch


class _Example(NamedTuple):
    """One image that was put on its canvas."""

    record: Record
    source: int
    extent: tuple[int, int]
    size: tuple[int, int]
    flip: bool
    position: int  # in the stream


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchMaker:
    """Makes batches; its only state are caches, and it travels to worker processes."""

    name: str
    kind: Kind
    canvases: tuple[tuple[int, int], ...]  # sizes of one canvas, the largest first
    sources: tuple[Source, ...]
    members: np.ndarray  # int32 [examples of the stream]: positions in the concatenated sources
    seed: int
    batch_size: int  # of all hosts
    process_index: int
    process_count: int
    short_side: tuple[int, int]  # range it is drawn from, px
    long_side: int
    encoder: Encoder
    endless: bool = True  # False: every member once, in order, without concepts and boxes
    flip_prob: float = 0.0
    unflippable: re.Pattern[str] | None = None  # finds what a mirrored photo would make wrong
    max_boxes: int = 0
    max_box_concepts: int = 1
    class_names: bool = False  # captions are the names of classes
    num_captions: int = 0  # m: concepts of a caption, itself included
    num_concepts: int = 0  # M: positives and sampled negatives of an image
    num_verified: int = 0  # v: concepts that a federated image is annotated for; 0: no image is federated
    capacity: int = 0  # rows of the concept table
    definitions: bool = False  # encode "name, definition"
    vocabularies: tuple[Vocabulary, ...] = ()  # of each source: definitions
    pools: tuple[Pool, ...] = ()  # of each source: negatives
    _orders: dict[int, np.ndarray] = dataclasses.field(default_factory=dict, init=False)  # permutation by epoch

    @property
    def _tag(self) -> int:
        return zlib.crc32(f"{self.seed} {self.name}".encode())

    def _member(self, position: int) -> int:
        """Returns which member stands at a position of the endless stream."""
        epoch, place = divmod(position, len(self.members))
        order = self._orders.get(epoch)
        if order is None:
            order = np.arange(len(self.members), dtype=np.int32)
            np.random.default_rng((self._tag, epoch, 0)).shuffle(order)
            for old in sorted(tuple(self._orders))[:-1]:  # two epochs stay: a batch may cross from one to the next
                self._orders.pop(old, None)
            self._orders[epoch] = order
        return int(order[place])

    @functools.cached_property
    def _offsets(self) -> np.ndarray:
        return np.cumsum([0, *map(len, self.sources)])

    @functools.cached_property
    def _in_bucket(self) -> list[bool]:
        return [buckets.place_of(source.file(0)) is not None for source in self.sources]

    def canvas_of(self, n: int) -> tuple[int, int]:
        """Returns the canvas of global batch n, the same on every host."""
        block, place = divmod(n, len(self.canvases))
        order = np.random.default_rng((self._tag, block, 1)).permutation(len(self.canvases))
        return self.canvases[int(order[place])]

    def make(self, n: int, *, step: int = 0) -> tuple[Batch, Notes]:
        """Returns this host's rows of global batch n and notes on them; with a `step`, batch n + step is next."""
        for soon in range(n, n + step + 1, step or 1):
            places = map(self.place, self.positions(soon))
            buckets.begin(self.sources[source].file(index) for _, source, index in places if self._in_bucket[source])
        notes = Notes(collections.Counter(), {}, [])
        rows = self.batch_size // self.process_count
        positions = self.positions(n)
        image = np.zeros((rows, *self.canvas_of(n), 3), np.uint8)
        rng, of_this_host = np.random.default_rng((self._tag, n)), slice(self.process_index * rows, None)
        short_sides = rng.integers(*self.short_side, self.batch_size, endpoint=True)[of_this_host].tolist()
        flips = (rng.random(self.batch_size) < self.flip_prob)[of_this_host].tolist()
        examples = [
            self._read(position, out, notes, short_side=short_side, flip=flip)
            for position, out, short_side, flip in zip(positions, image, short_sides, flips, strict=False)
        ]
        extent, original_size = np.ones((rows, 2), np.int32), np.ones((rows, 2), np.int32)
        example_id = np.zeros(rows, np.int32)
        for row, example in enumerate(examples):
            extent[row], original_size[row] = example.extent, example.size
            example_id[row] = example.record.example_id
            notes.examples.append((example.source, example.record.example_id))
        scale = (extent / original_size).astype(np.float32)

        table, concepts, negatives = self._concepts(examples, notes)
        boxes, box_mask, box_concepts = self._boxes(rows, examples, scale, concepts, notes)
        caption_concepts = np.zeros((rows, self.num_captions), np.int32)
        caption_mask = np.zeros((rows, self.num_captions), bool)
        if self.num_captions:
            for row, texts in enumerate(concepts):
                caption_concepts[row, : len(texts)] = texts
                caption_mask[row, : len(texts)] = True
        batch = Batch(
            image=image,
            extent=extent,
            scale=scale,
            original_size=original_size,
            image_mask=np.arange(rows) < len(examples),
            example_id=example_id,
            boxes=boxes,
            box_mask=box_mask,
            box_concepts=box_concepts,
            concept_tokens=table.tokens,
            concept_mask=table.mask,
            concept_ids=np.stack([table.ids >> np.uint64(32), table.ids & np.uint64(0xFFFFFFFF)], 1).astype(np.uint32),
            caption_concepts=caption_concepts,
            caption_mask=caption_mask,
            class_names=np.ones(rows, bool) if self.class_names else None,
            federated=self._federated(examples, concepts, negatives) if self.num_verified else None,
        )
        return batch, notes

    def positions(self, n: int) -> range:
        """Returns where this host's rows of global batch n stand in the stream."""
        rows = self.batch_size // self.process_count
        start = n * self.batch_size + self.process_index * rows
        return range(start, start + rows if self.endless else min(start + rows, len(self.members)))

    def place(self, position: int, *, ahead: int = 0) -> tuple[int, int, int]:
        """Returns member, source and index in it of the example `ahead` of that at a position of the stream."""
        member = ((self._member(position) if self.endless else position) + ahead) % len(self.members)
        index = int(self.members[member])
        source = int(np.searchsorted(self._offsets, index, side="right")) - 1
        return member, source, index - int(self._offsets[source])

    def _read(self, position: int, out: np.ndarray, notes: Notes, *, short_side: int, flip: bool) -> _Example:
        """Writes the image at a position of the stream, or the next usable one, to its canvas."""
        for i in range(min(len(self.members), _MAX_TRIES) if self.endless else 1):
            member, source, index = self.place(position, ahead=i)
            try:
                record = self.sources[source][index]
                texts = record.concepts if self.kind is Kind.DETECTION else (record.caption,)
                flipped = flip and not speaks_of_sides(texts, self.unflippable)
                extent, size = transforms.place(
                    pixels_of(record),
                    out,
                    annotated_size=record.size,
                    short_side=short_side,
                    long_side=self.long_side,
                    flip=flipped,
                )
                return _Example(record, source, extent, size, flipped, position)
            except UnusableError as error:
                reason = error.reason
            except FileNotFoundError:
                reason = "missing file"
            except OSError as error:
                reason = f"unreadable file ({type(error).__name__})"
            notes.skipped[member] = Skipped(self.sources[source].describe(index), reason, self.sources[source].name)
        example, reason, _ = next(iter(notes.skipped.values()))
        raise DataError(f"{self.name}: {example} cannot be used ({reason}) and no other image takes its place")

    def _concepts(self, examples: Sequence[_Example], notes: Notes) -> tuple[Table, list[np.ndarray], list[np.ndarray]]:
        """Returns the table of the batch and, for each example, the rows of its own concepts and of its negatives."""
        nothing = self.encoder([])
        positives, negatives = nothing, nothing
        owned: list[list[int]] = []
        nums_drawn: list[int] = []
        if self.endless:
            positives, owned = self._positives(examples, notes)
            if self.pools:
                negatives, nums_drawn = self._negatives(examples)
        table = build_table(positives, negatives, capacity=self.capacity)
        if table.num_cut:
            notes.counts[NEGATIVES_CUT] += table.num_cut
        if table.num_truncated:
            notes.counts[TEXTS_TRUNCATED] += table.num_truncated
        ends = list(itertools.accumulate(nums_drawn, initial=0))
        drawn = [table.negative_rows[start:end] for start, end in itertools.pairwise(ends)]
        return table, [table.rows[indices] for indices in owned], drawn

    def _positives(self, examples: Sequence[_Example], notes: Notes) -> tuple[Encoded, list[list[int]]]:
        """Returns the concepts that are kept, encoded, and for each example the indices of its own, in order."""
        texts: list[str] = []
        captions: list[str] = []
        for record, source, *_ in examples:
            names = record.concepts
            if self.kind is Kind.IMAGE_TEXT:
                captions.append(names[0])
                names = names[1:]
            known = self.vocabularies[source]
            given = [known.definition(name) if self.definitions else "" for name in names]
            texts += map(concept_text, names, given)
            if self.definitions and self.kind is Kind.IMAGE_TEXT and "" in given:  # other kinds' are known beforehand
                notes.counts[BARE_PHRASES] += given.count("")
        encoded = self.encoder(texts)
        if self.kind is not Kind.IMAGE_TEXT:
            starts = itertools.accumulate((len(example.record.concepts) for example in examples), initial=0)
            return encoded, [
                list(range(start, start + len(example.record.concepts)))
                for example, start in zip(examples, starts, strict=False)
            ]
        # captions hardly ever recur: they are not remembered
        parts = (self.encoder(captions, remember=False), encoded)
        encoded = Encoded(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))
        ids, owned, start = encoded.ids.tolist(), [], len(captions)
        for i, example in enumerate(examples):
            num_phrases = len(example.record.concepts) - 1
            # the caption first, then each phrase that says something new
            first: dict[int, int] = {}
            for k in (i, *range(start, start + num_phrases)):
                first.setdefault(ids[k], k)
            distinct = list(first.values())
            if len(distinct) > self.num_captions:
                notes.counts[PHRASES_CUT] += len(distinct) - self.num_captions
            owned.append(distinct[: self.num_captions])
            start += num_phrases
        kept = sorted(itertools.chain.from_iterable(owned))
        place = {k: j for j, k in enumerate(kept)}
        return Encoded(*(array[kept] for array in encoded)), [[place[k] for k in indices] for indices in owned]

    def _negatives(self, examples: Sequence[_Example]) -> tuple[Encoded, list[int]]:
        """Returns the concepts that are drawn for each example, one after the other, and how many each has."""
        parts, nums, wide = [self.encoder([])], list[int](), num_draws(self.num_concepts)
        # one generator: its n-th numbers are those of the n-th position, wherever it starts (it counts in fours)
        start = np.random.Philox(key=self._tag, counter=examples[0].position * (wide // 4))
        rows = iter(np.random.Generator(start).random((len(examples), wide)))
        for pool, group in itertools.groupby(examples, lambda example: self.pools[example.source]):
            drawn = [
                pool.draw(
                    self.num_concepts - len(record.concepts),
                    next(rows),
                    present=record.concepts,
                    caption=record.caption,
                    first=record.negatives,
                    never=record.not_negatives,
                    more=not (self.num_verified and record.federated),
                )
                for record, *_ in group
            ]
            nums += map(len, drawn)
            parts.append(Encoded(*(array.take(np.concatenate(drawn), axis=0) for array in pool.encoded)))
        return Encoded(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True))), nums

    def _federated(
        self, examples: Sequence[_Example], concepts: Sequence[np.ndarray], negatives: Sequence[np.ndarray]
    ) -> Federated:
        """Returns what federated images were annotated for, of tables' rows of their own concepts and negatives."""
        shape = len(examples), self.num_verified
        rows, mask = np.zeros(shape, np.int32), np.zeros(shape, bool)
        for i, (record, *_) in enumerate(examples):
            if record.federated:
                doubtful = np.array([name in record.not_negatives for name in record.concepts], bool)
                known = np.concatenate([concepts[i][~doubtful], negatives[i][negatives[i] < self.capacity]])
                known = np.setdiff1d(known, concepts[i][doubtful])
                rows[i, : len(known)], mask[i, : len(known)] = known, True
        return Federated(np.array([example.record.federated for example in examples], bool), rows, mask)

    def _boxes(
        self, rows: int, examples: Sequence[_Example], scale: np.ndarray, concepts: Sequence[np.ndarray], notes: Notes
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns padded boxes, mask and table rows; of more than max_boxes the largest stay."""
        boxes = np.zeros((rows, self.max_boxes, 4), np.float32)
        mask, box_concepts = np.zeros((rows, self.max_boxes), bool), np.zeros((rows, self.max_boxes), np.int32)
        if self.max_boxes:
            for row, (record, _, extent, _, flip, _) in enumerate(examples):
                kept, num_cut = _distinct(record.boxes, concepts[row][record.box_concepts], self.max_box_concepts)
                if num_cut:
                    notes.counts[BOX_CONCEPTS_CUT] += num_cut
                if len(kept) > self.max_boxes:
                    largest = _largest(record.boxes[kept], self.max_boxes)
                    notes.counts[BOXES_CUT] += len(kept) - len(largest)
                    kept = kept[largest]
                num = len(kept)
                boxes[row, :num] = transforms.place_boxes(
                    record.boxes[kept], scale=scale[row], width=extent[1], flip=flip
                )
                mask[row, :num] = True
                box_concepts[row, :num] = concepts[row][record.box_concepts[kept]]
        return boxes, mask, box_concepts


def _distinct(boxes: np.ndarray, concepts: np.ndarray, max_box_concepts: int) -> tuple[np.ndarray, int]:
    """Returns which boxes stay, in order, and how many go because identical boxes have too many other concepts.

    A box that is there with the same concept already goes uncounted.
    """
    if len({*map(tuple, boxes.tolist())}) == len(boxes):  # as nearly always
        return np.arange(len(boxes)), 0
    group = np.unique(boxes, axis=0, return_inverse=True)[1].reshape(-1)
    _, first = np.unique(np.stack([group, concepts]), axis=1, return_index=True)
    kept, seen = [], collections.Counter[int]()
    for i in np.sort(first).tolist():
        seen[group[i]] += 1
        if seen[group[i]] <= max_box_concepts:
            kept.append(i)
    return np.array(kept, np.int64), len(first) - len(kept)


def _largest(boxes: np.ndarray, num: int) -> np.ndarray:
    """Returns which boxes stay, in order: at most `num`, the largest; of identical ones, which share a place, all."""
    areas = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
    places: dict[tuple[float, ...], list[int]] = {}
    for i in np.argsort(-areas, kind="stable").tolist():
        places.setdefault(tuple(boxes[i].tolist()), []).append(i)
    kept: list[int] = []
    for place in places.values():
        kept += place if len(kept) + len(place) <= num else []
    return np.array(sorted(kept), np.int64)


def pixels_of(record: Record) -> bytes | np.ndarray:
    """Returns the encoded bytes or the RGB pixels of a record; raises OSError if its file cannot be read."""
    if isinstance(record.image, bytes | np.ndarray):
        return record.image
    return files.read_bytes(record.image)


def table_capacity(
    section: Any, kind: Kind, *, num_images: int, table_multiple: int, most_concepts: int = 0, num_known: int = 0
) -> int:
    """Returns the rows of the concept table of a host, so many that nothing can overflow unless told otherwise.

    Args:
      section: config.detection, …
      kind: of data.
      num_images: of a batch on the host.
      table_multiple: the rows are a multiple of it and of 8.
      most_concepts: of any image; more than the section's number are kept, too.
      num_known: how many distinct concepts there are; 0: any number.
    """
    if kind is Kind.IMAGE_TEXT:
        num_rows = num_images * (section.max_phrases + 1)
    else:
        num_rows = num_images * max(section.num_concepts, most_concepts)
    if num_known:
        num_rows = min(num_rows, num_known)
    multiple = math.lcm(8, table_multiple)
    return -(-(section.max_concepts or num_rows) // multiple) * multiple
