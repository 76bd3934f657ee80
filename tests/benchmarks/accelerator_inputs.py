"""Random inputs of `accelerator`, as full as those of a real run: photos smaller than their canvas, sparse tables."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import ml_dtypes
import numpy as np

from detclipv2_jax.data.schema import Batch, Kind

SOS, EOS = 49_406, 49_407  # of CLIP's vocabulary
MEAN_TOKENS = {Kind.DETECTION: 11, Kind.GROUNDING: 5, Kind.IMAGE_TEXT: 4.25}  # a concept, [SOS] and [EOS] included
MEAN_CAPTION_TOKENS = 13
MEAN_BOXES = 20  # an image
MEAN_CAPTION_ROWS = 5.3  # of captions and their phrases, in Conceptual Captions
MIN_EXTENT = 0.6  # of a canvas's side; photos cover 0.5 to 0.6 of its area
REPEATED = 0.1  # of the concepts of a batch
BLOCK = 1 << 20  # random numbers drawn; more are the same ones again


@dataclasses.dataclass(frozen=True)
class Normal:
    """An array of normally distributed numbers that is made only when a program runs."""

    shape: tuple[int, ...]
    dtype: Any = np.float32
    std: float = 1.0
    limit: float = np.inf

    def make(self) -> np.ndarray:
        numbers = np.random.default_rng(0).standard_normal(BLOCK, dtype=np.float32) * np.float32(self.std)
        return np.resize(numbers.clip(-self.limit, self.limit).astype(self.dtype), self.shape)


def bfloat16(*shape: int) -> Normal:
    """Returns an array in the compute type."""
    return Normal(shape, ml_dtypes.bfloat16)


def shape_of(leaf: Any) -> Any:
    """Returns what a program is traced with for an argument."""
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if hasattr(leaf, "shape") else leaf


def made(leaf: Any) -> Any:
    """Returns what a program runs with for an argument."""
    return jax.device_put(leaf.make() if isinstance(leaf, Normal) else leaf) if hasattr(leaf, "shape") else leaf


def tokens(means: np.ndarray, length: int, rng: np.random.Generator) -> np.ndarray:
    """Returns rows of tokens as the tokenizer makes them: [SOS], words, [EOS], zeros; so many on average."""
    used = np.clip(rng.poisson(means - 3) + 3, 3, length)
    rows = rng.integers(1, SOS, (len(means), length), np.int32)
    place = np.arange(length)[None]
    rows[:, 0] = SOS
    return np.where(place < used[:, None] - 1, rows, np.where(place == used[:, None] - 1, EOS, 0)).astype(np.int32)


def boxes(num_images: int, num_boxes: int, extent: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Returns xyxy boxes inside the photos, from a twentieth of a side to all of it."""
    size = extent[:, None, ::-1] * np.exp(rng.uniform(np.log(0.05), 0.0, (num_images, num_boxes, 2)))
    corner = rng.uniform(0.0, 1.0, size.shape) * (extent[:, None, ::-1] - size)
    return np.concatenate([corner, corner + size], axis=-1).astype(np.float32)


def of_one_device(config: Any, *, share: int) -> Any:
    """Returns the configuration with a `share`-th of its batches."""
    config = config.copy_and_resolve_references()
    for kind in Kind:
        least = config.optimizer.accumulate[kind.value]
        config[kind.value].batch_size = max(config[kind.value].batch_size // share // least, 1) * least
    return config


def table_rows(config: Any, kind: Kind, num_names: int) -> int:
    """Returns the rows of a device's concept table as `data.streams` derives them."""
    section = config[kind.value]
    of_image = section.max_phrases + 1 if kind is Kind.IMAGE_TEXT else section.num_concepts
    rows = min(section.batch_size * of_image, num_names or section.batch_size * of_image)
    return -(-rows // 8) * 8


def batch(config: Any, kind: Kind, canvas: tuple[int, int], *, num_names: int = 0) -> Batch:
    """Returns a batch of `config`'s sizes; `num_names` of a vocabulary, 0 where every image has its own phrases."""
    rng = np.random.default_rng(0)
    section, pairs = config[kind.value], kind is Kind.IMAGE_TEXT
    b, t = section.batch_size, table_rows(config, kind, num_names)
    n, m = (0, section.max_phrases + 1) if pairs else (section.max_boxes, 0)
    extent = (np.array(canvas) * rng.uniform(MIN_EXTENT, 1.0, (b, 2))).astype(np.int32)
    scale = np.ones((b, 2), np.float32)
    box_mask = np.arange(n)[None] < np.clip(rng.poisson(MEAN_BOXES, (b, 1)), 1, max(n, 1))
    caption_mask = np.arange(m)[None] < np.clip(rng.poisson(MEAN_CAPTION_ROWS - 1, (b, 1)) + 1, 1, max(m, 1))
    used = int(caption_mask.sum()) if pairs else num_names or t
    caption_concepts = np.where(caption_mask, caption_mask.cumsum().reshape(b, m) - 1, 0)
    means = np.full(t, MEAN_TOKENS[kind])
    means[caption_concepts[:, :1]] = MEAN_CAPTION_TOKENS  # an image's first
    names = np.arange(t) if num_names else np.where(rng.uniform(size=t) < REPEATED, rng.integers(0, t, t), np.arange(t))
    pixels = rng.integers(0, 256, (b, *canvas, 3), np.uint8)
    return Batch(
        image=pixels,
        extent=extent,
        scale=scale,
        original_size=extent,
        image_mask=np.ones(b, bool),
        example_id=np.arange(b, dtype=np.int32),
        boxes=boxes(b, n, extent, rng) * box_mask[..., None],
        box_mask=box_mask,
        box_concepts=rng.integers(0, used, (b, n), np.int32),
        concept_tokens=tokens(means, config.model.text.context_length, rng),
        concept_mask=np.arange(t) < used,
        concept_ids=np.stack([names, names], axis=1).astype(np.uint32),
        caption_concepts=caption_concepts.astype(np.int32),
        caption_mask=caption_mask,
    )


def num_distinct(of: Batch) -> int:
    """Returns the distinct concepts of a batch."""
    return len(np.unique(of.concept_ids[of.concept_mask, 0]))
