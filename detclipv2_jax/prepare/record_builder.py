"""The TFDS builder that all kinds share: its features, and its examples from a reader of raw files.

| feature | content |
|---|---|
| image | the encoded file as it came (JPEG, PNG, …) |
| name | file, or key in a tar: names the example in messages |
| size | int32 (height, width) px of the photo as displayed, or as annotated where the annotator ignored EXIF |
| boxes | float32 [n, 4] absolute xyxy px in the frame of `size` |
| concepts | names of the categories present; annotated phrases; or the caption and then its noun phrases |
| box_concepts | int32 [n], index into `concepts` |
| caption | empty for detection |
| negatives | names verified to be absent (LVIS) |
| not_negatives | names that may be present without boxes (LVIS) |

Examples keep the order of the raw files, so that a built folder gives the same batches as the files it was made of.
"""

from __future__ import annotations

import collections
import dataclasses
import os
from collections.abc import Iterator
from typing import Any, Protocol, cast

import numpy as np
import tensorflow_datasets as tfds

from detclipv2_jax import files
from detclipv2_jax.data import tokenizer, transforms
from detclipv2_jax.data.concepts import Vocabulary
from detclipv2_jax.data.leakage import photo_of
from detclipv2_jax.data.schema import Kind, Record, UnusableError

CONTEXT_LENGTH = 16  # tokens of a concept; longer ones are counted, not changed
MAX_PHRASES = 100_000  # whose frequencies are kept: a dictionary has some 14,000 names


@dataclasses.dataclass
class Tally:
    """What happened to the items of one shard, or of all."""

    seen: int = 0  # items of the raw files: images, lines, samples
    examples: int = 0
    boxes: int = 0
    concepts: int = 0  # of all examples, with repetition
    long_concepts: int = 0  # distinct a shard, above CONTEXT_LENGTH tokens
    dropped: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)  # unusable
    noted: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)  # repaired, or left out
    longest: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)  # maxima
    leaked: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)  # by held-out photo
    phrases: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)  # of captions
    inputs: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)  # file → bytes, sha256

    def add(self, other: Tally) -> None:
        """Adds the counts of another shard."""
        for key in ("seen", "examples", "boxes", "concepts", "long_concepts"):
            setattr(self, key, getattr(self, key) + getattr(other, key))
        for key in ("dropped", "noted", "leaked", "phrases"):
            getattr(self, key).update(getattr(other, key))
        if len(self.phrases) > 4 * MAX_PHRASES:  # what is rare after many shards is never frequent
            self.phrases = collections.Counter(dict(self.phrases.most_common(2 * MAX_PHRASES)))
        self.longest |= collections.Counter(other.longest)
        self.inputs.update(other.inputs)


class Reader(Protocol):
    """Raw files of one data set, cut into shards; travels to worker processes."""

    kind: Kind
    vocabulary: Vocabulary  # categories or distinct phrases; empty for image-text
    num_shards: int
    num_items: int  # over all shards; 0: not known before they are read
    inputs: dict[str, dict[str, Any]]  # file → bytes and, where one process reads it, sha256
    counters: dict[str, int]  # what was left out while the files were opened, by reason
    facts: dict[str, Any]  # what else the report should say

    def read(self, shard: int, tally: Tally) -> Iterator[tuple[str, Record]]:
        """Yields name and record of the items of a shard, counting in `tally.seen`, `dropped` and `noted`."""
        ...


def features() -> tfds.features.FeaturesDict:
    """Returns the features of all kinds; see the module."""
    texts = tfds.features.Sequence(tfds.features.Text())
    return tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "name": tfds.features.Text(),
            "size": tfds.features.Tensor(shape=(2,), dtype=np.int32),
            "boxes": tfds.features.Tensor(shape=(None, 4), dtype=np.float32),
            "concepts": texts,
            "box_concepts": tfds.features.Tensor(shape=(None,), dtype=np.int32),
            "caption": tfds.features.Text(),
            "negatives": texts,
            "not_negatives": texts,
        }
    )


def checked(record: Record) -> Record:
    """Returns the record with its image's bytes and displayed size, after decoding it once.

    Raises:
      UnusableError: there is no image, it cannot be decoded, or its size is not the annotation's.
    """
    try:
        data = record.image if isinstance(record.image, bytes) else files.read_bytes(str(record.image))
    except FileNotFoundError:
        raise UnusableError("missing file") from None
    except OSError as error:
        raise UnusableError(f"unreadable file ({type(error).__name__})") from None
    header = transforms.read_header(data)
    size, _ = transforms.frame(header, record.size)
    transforms.decode(data, header, size=(1, 1))  # the smallest scale still reads the whole stream
    return dataclasses.replace(record, image=data, size=size)


def generate(
    reader: Reader, shard: int, tally: Tally, *, held_out: frozenset[str] = frozenset(), drop_held_out: bool = False
) -> Iterator[tuple[str, Record]]:
    """Yields name and checked record of each usable item of a shard, in order.

    Photos of validation sets that are met (`photo_of`) are counted, and left out with `drop_held_out`.
    """
    lengths: dict[str, int] = {}
    for name, record in reader.read(shard, tally):
        try:
            record = checked(record)
        except UnusableError as error:
            tally.dropped[error.reason] += 1
            continue
        if (photo := photo_of(name)) in held_out:
            tally.leaked[photo] += 1
            if drop_held_out:
                tally.noted["photo of a validation set left out"] += 1
                continue
        new = [text for text in dict.fromkeys(record.concepts) if text not in lengths]
        lengths.update(zip(new, tokenizer.num_tokens(new).tolist(), strict=True))
        if record.kind is Kind.IMAGE_TEXT:
            tally.phrases.update(phrase.lower() for phrase in record.concepts[1:])
            if len(record.concepts) == 1 and not reader.facts.get("class names"):
                tally.noted["caption without a noun phrase"] += 1
        tally.examples += 1
        tally.boxes += len(record.boxes)
        tally.concepts += len(record.concepts)
        tally.longest |= collections.Counter(
            {
                "boxes of an image": len(record.boxes),
                "concepts of an image": len(record.concepts),
                "tokens of a concept": max((lengths[text] for text in record.concepts), default=0),
                "characters of a caption": len(record.caption),
                "bytes of an image": len(cast("bytes", record.image)),  # `checked` read them
            }
        )
        yield name, record
    tally.long_concepts += sum(length > CONTEXT_LENGTH for length in lengths.values())


def to_example(name: str, record: Record) -> dict[str, Any]:
    """Returns the features of a checked record."""
    return {
        "image": record.image,
        "name": name,
        "size": np.array(record.size, np.int32),
        "boxes": record.boxes,
        "concepts": record.concepts,
        "box_concepts": record.box_concepts,
        "caption": record.caption,
        "negatives": record.negatives,
        "not_negatives": record.not_negatives,
    }


class RecordBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]  # TFDS has no types
    """Examples of one reader; a subclass names the raw format.

    `prepare` writes its shards in parallel and restartably; `download_and_prepare()` writes them one after another.
    """

    VERSION = tfds.core.Version("1.0.0")
    reader: Reader

    @classmethod
    def of(cls, reader: Reader, *, data_dir: str | os.PathLike[str]) -> RecordBuilder:
        """Returns the builder of a reader's files, writing ArrayRecord below `data_dir`."""
        builder = cls(data_dir=os.fspath(data_dir), file_format=tfds.core.FileFormat.ARRAY_RECORD)
        builder.reader = reader
        return builder

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self, description=type(self).__doc__, features=features(), disable_shuffling=True
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
        tally = Tally()
        for shard in range(self.reader.num_shards):
            for name, record in generate(self.reader, shard, tally):
                yield tally.examples, to_example(name, record)
