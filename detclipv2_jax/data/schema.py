"""The one record behind all three kinds of data, and the batch of arrays made from it.

Boxes are absolute xyxy in pixels. In a `Record` they refer to the photo as it is displayed (EXIF rotation applied),
in a `Batch` to the padded network image, the canvas.
"""

from __future__ import annotations

import dataclasses
import enum
import os
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int32, UInt8, UInt32


class Kind(enum.StrEnum):
    """What annotates an image; one global batch holds one kind."""

    DETECTION = "detection"
    GROUNDING = "grounding"
    IMAGE_TEXT = "image_text"


@dataclasses.dataclass(frozen=True, slots=True)
class Record:
    """One example of a source, before augmentation and before negatives are sampled."""

    kind: Kind
    source: str  # its name, for messages
    example_id: int  # position in the source
    image: bytes | str | os.PathLike[str] | np.ndarray  # encoded, a file's path, or RGB uint8 [h, w, 3]
    size: tuple[int, int]  # annotated (height, width), the frame of the boxes; (0, 0) where the source does not tell
    boxes: np.ndarray  # float32 [n, 4]; valid, inside the image; n = 0 for image-text
    concepts: tuple[str, ...]  # categories present; annotated phrases; or the caption and then its noun phrases
    box_concepts: np.ndarray  # int32 [n], index into `concepts`
    caption: str = ""  # "" for detection
    negatives: tuple[str, ...] = ()  # names verified to be absent (LVIS); sampled before others
    not_negatives: tuple[str, ...] = ()  # names that may be present without boxes (LVIS); never sampled
    federated: bool = False  # what is neither in `concepts` nor in `negatives` may be present, too (LVIS)


class Federated(NamedTuple):
    """Which images were annotated for some concepts only, and for which: the only negatives there (LVIS).

    b images, v concepts.
    """

    images: Bool[Any, " b"]  # False: annotated for all concepts
    concepts: Int32[Any, "b v"]  # rows of the concept table: verified absent, or present with a box for every instance
    mask: Bool[Any, "b v"]


class Batch(NamedTuple):
    """One host's rows of a global batch, NumPy arrays (JAX's within a step); every padded axis has its mask.

    b images, h w canvas, n boxes, t rows of the concept table, l tokens, m concepts of a caption.
    """

    image: UInt8[Any, "b h w 3"]  # RGB, zero at the bottom right outside `extent`
    extent: Int32[Any, "b 2"]  # valid (height, width) px of the canvas
    scale: Float32[Any, "b 2"]  # (y, x) canvas px per px of the photo
    original_size: Int32[Any, "b 2"]  # (height, width) px of the photo as displayed
    image_mask: Bool[Any, " b"]  # False: padding image of the last evaluation batch
    example_id: Int32[Any, " b"]  # position of the example in its source
    boxes: Float32[Any, "b n 4"]  # n = 0 for image-text
    box_mask: Bool[Any, "b n"]
    box_concepts: Int32[Any, "b n"]  # row of the concept table
    concept_tokens: Int32[Any, "t l"]
    concept_mask: Bool[Any, " t"]
    concept_ids: UInt32[Any, "t 2"]  # 64-bit id of the encoded text (high, low word), equal on all hosts
    caption_concepts: Int32[Any, "b m"]  # rows of the table, the caption first; m = 0 without captions
    caption_mask: Bool[Any, "b m"]
    class_names: Bool[Any, " b"] | None = None  # None, or True: the caption is the name of the image's class
    federated: Federated | None = None  # None: every image is annotated for all concepts
    concept_text: Float32[Any, "t d"] | None = None  # None, or embeddings of the table: no text tower is asked


class DataError(ValueError):
    """The data of a run cannot be read on; the message names the stream or the file."""


class StalledError(DataError):
    """A stream gave no batch in time; the thread that reads it may never end."""


class UnusableError(ValueError):
    """An example that cannot be used; `reason` is short and equal for equal causes, so that it can be counted."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason
