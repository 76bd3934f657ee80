"""From regions and words to boxes: scores fused with top-k and NMS; best regions and similarity maps of phrases."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8

from detclipv2_jax.geometry import anchors as anchor_lib
from detclipv2_jax.geometry import boxes as box_lib
from detclipv2_jax.geometry import nms as nms_lib
from detclipv2_jax.models.detclip import Regions

if TYPE_CHECKING:
    from ml_collections import ConfigDict

# words scored at once: 22,400 anchors x 128 words are 11 MB of scores an image, however large the vocabulary is
WORD_CHUNK = 128
MOST_DETECTIONS = 100_000  # an image: memory is taken for as many as are asked for
# what ranks boxes: their words times centerness; or, whatever they show, the heads of the regression tower (OLN)
SCORES = ("words", "centerness", "objectness", "centerness_objectness")
AnyArray = Array | np.ndarray
Pairs = tuple[Float[Array, "b k"], Int[Array, "b k"], Int[Array, "b k"]]  # minus scores, anchors, words


class Photos(NamedTuple):
    """A batch of photos on one canvas; the fields are those of `data.schema.Batch`."""

    image: UInt8[AnyArray, "b h w 3"]
    extent: Int[AnyArray, "b 2"]
    scale: Float[AnyArray, "b 2"]
    original_size: Int[AnyArray, "b 2"]


@flax.struct.dataclass
class Detections:
    """Boxes found on a batch of images, best first, in pixels of the original images; zero where not `mask`."""

    boxes: Float[Array, "b n 4"]  # xyxy, inside the image
    scores: Float[Array, "b n"]
    labels: Int[Array, "b n"]  # rows of the vocabulary
    mask: Bool[Array, "b n"]


@flax.struct.dataclass
class Limits:
    """What counts as a detection. A new value of one that is no float compiles anew."""

    score_threshold: float  # in [0, 1); only scores above it count
    nms_iou: float  # a box is removed by a better one if their IoU is above it
    pre_nms: int = flax.struct.field(pytree_node=False)  # pairs an image that enter NMS
    max_detections: int = flax.struct.field(pytree_node=False)  # boxes an image
    # boxes of different words remove each other too
    class_agnostic: bool = flax.struct.field(pytree_node=False, default=False)
    score: str = flax.struct.field(pytree_node=False, default="words")  # of SCORES; others than words name no class

    @classmethod
    def from_config(
        cls,
        config: ConfigDict,
        *,
        score_threshold: float | None = None,
        nms_iou: float | None = None,
        max_detections: int | None = None,
        score: str | None = None,
    ) -> Limits:
        """Returns the limits of `config.eval`, each replaced where given; ValueError if one is out of range."""
        score_threshold = config.score_threshold if score_threshold is None else score_threshold
        nms_iou = config.nms_iou if nms_iou is None else nms_iou
        max_detections = config.max_detections if max_detections is None else max_detections
        for name, value in (("score_threshold", score_threshold), ("nms_iou", nms_iou)):
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"{name} is {value}; it must lie between 0 and 1")
        if not 1 <= max_detections <= MOST_DETECTIONS:
            raise ValueError(f"max_detections is {max_detections}; it must lie between 1 and {MOST_DETECTIONS:,}")
        score = config.score if score is None else score
        if score not in SCORES:
            raise ValueError(f"score is {score!r}; allowed are {', '.join(SCORES)}")
        pre_nms = max(config.pre_nms, max_detections)
        by_words = score == "words"
        return cls(score_threshold, nms_iou, pre_nms, max_detections, class_agnostic=not by_words, score=score)


def detect(
    regions: Regions,
    text: Float[AnyArray, "w d"],
    text_mask: Bool[AnyArray, " w"],
    photos: Photos,
    *,
    anchors: Float[AnyArray, "a 4"],
    scale: Float[Array, ""],
    bias: Float[Array, ""],
    limits: Limits,
    word_chunk: int = WORD_CHUNK,
) -> Detections:
    """Returns the best boxes of every image (docs/decisions.md: score and limits at test).

    1. score = sigmoid(scale * region . word + bias) * sigmoid(centerness); 0 for masked words and for anchors whose
       centre lies on the padding;
    2. the best `pre_nms` (anchor, word) pairs; of equal scores the lower anchor comes first, then the lower word;
    3. their boxes in the original image, cut at its border; those without area or not above the threshold are left out;
    4. NMS within each word (over all words if they are `class_agnostic`), the best `max_detections`.

    With another score than words, 1. it is that of an anchor alone, 2. the best `pre_nms` anchors are taken, and the
    boxes that stay are called by their best word.

    Args:
      regions: of a canvas (padded network image) whose `anchors` are given.
      text: L2-normalised word embeddings; w must be a multiple of `word_chunk`, see `vocabulary.pad`.
      text_mask: which rows are words.
      photos: where they lie on the canvas; their pixels are not read.
      anchors: of the canvas, all levels.
      scale, bias: of the logit.
      limits: what counts.
      word_chunk: words scored at once; changes memory and speed only.
    """
    anchors = jnp.asarray(anchors)
    # 1
    by_words = limits.score == "words"
    own_scores = _own_scores(regions, "centerness" if by_words else limits.score)
    own_scores = jnp.where(anchor_lib.on_photo(anchors, photos.extent), own_scores, 0.0)
    # 2
    if by_words:
        scores, anchor_of, words = _best_pairs(
            regions.embeddings,
            text,
            text_mask,
            own_scores,
            scale=scale,
            bias=bias,
            num=limits.pre_nms,
            word_chunk=word_chunk,
        )
    else:
        scores, anchor_of = jax.lax.top_k(own_scores, min(limits.pre_nms, own_scores.shape[1]))
        words = jnp.zeros_like(anchor_of)
    # 3
    deltas = jnp.take_along_axis(regions.box_deltas, anchor_of[..., None], axis=1)
    boxes = box_lib.decode_deltas(anchors[anchor_of], deltas)
    boxes = box_lib.scale(boxes, 1.0 / jnp.asarray(photos.scale)[:, None])
    boxes = box_lib.clip(boxes, jnp.asarray(photos.original_size)[:, None])
    mask = (scores > limits.score_threshold) & (box_lib.area(boxes) > 0.0)
    # 4
    keep = functools.partial(nms_lib.nms, iou_threshold=limits.nms_iou, max_outputs=limits.max_detections)
    classes = jnp.zeros_like(words) if limits.class_agnostic else words
    kept, used = jax.vmap(lambda b, s, m, c: keep(b, s, mask=m, classes=c))(boxes, scores, mask, classes)
    labels = jnp.take_along_axis(words, kept, axis=1)
    if not by_words:
        anchor_of = jnp.take_along_axis(anchor_of, kept, axis=1)
        labels = _best_words(jnp.take_along_axis(regions.embeddings, anchor_of[..., None], axis=1), text, text_mask)
    return Detections(
        boxes=jnp.take_along_axis(boxes, kept[..., None], axis=1) * used[..., None],
        scores=jnp.take_along_axis(scores, kept, axis=1) * used,
        labels=labels * used,
        mask=used,
    )


def _own_scores(regions: Regions, score: str) -> Float[Array, "b a"]:
    """Returns what heads of the regression tower say of every anchor: one of them, or the geometric mean of both."""
    centerness = jax.nn.sigmoid(regions.centerness)
    if score == "centerness":
        return centerness
    if regions.objectness is None:
        raise ValueError(f"score {score!r} needs a model with the extra head: it has model.head.objectness='none'")
    objectness = jax.nn.sigmoid(regions.objectness)
    return objectness if score == "objectness" else jnp.sqrt(centerness * objectness)


def _best_words(
    embeddings: Float[Array, "b n d"], text: Float[AnyArray, "w d"], text_mask: Bool[AnyArray, " w"]
) -> Int[Array, "b n"]:
    """Returns the most similar word of every region, the first of equals."""
    words = jnp.asarray(text).astype(embeddings.dtype)
    similarity = jnp.einsum("bnd,wd->bnw", embeddings, words, preferred_element_type=jnp.float32)
    return jnp.argmax(jnp.where(jnp.asarray(text_mask)[None, None], similarity, -jnp.inf), axis=-1).astype(jnp.int32)


def _best_pairs(
    embeddings: Float[Array, "b a d"],
    text: Float[AnyArray, "w d"],
    text_mask: Bool[AnyArray, " w"],
    centerness: Float[Array, "b a"],
    *,
    scale: Float[Array, ""],
    bias: Float[Array, ""],
    num: int,
    word_chunk: int,
) -> tuple[Float[Array, "b k"], Int[Array, "b k"], Int[Array, "b k"]]:
    """Returns (scores, anchors, words) of the best `num` pairs of every image, in order; score 0: an empty place.

    One chunk of words after the other is scored and merged into the best pairs so far, so that no (anchors x words)
    array exists. Within a chunk the best `num` anchors, by their best word, hold the best `num` pairs: a pair of any
    other anchor has `num` better ones, one on each of these.
    """
    num_images, num_anchors, _ = embeddings.shape
    if text.shape[0] % word_chunk:
        raise ValueError(f"{text.shape[0]} words are no multiple of word_chunk={word_chunk}; use vocabulary.pad")
    chunks = (
        text.reshape(-1, word_chunk, text.shape[1]),
        text_mask.reshape(-1, word_chunk),
        jnp.arange(0, text.shape[0], word_chunk),
    )

    def merge(best: Pairs, chunk: tuple[AnyArray, AnyArray, Array]) -> tuple[Pairs, None]:
        words, mask, first_word = chunk
        words = words.astype(embeddings.dtype)  # here, not outside the loop: no second copy of a large vocabulary
        similarity = jnp.einsum("bad,wd->baw", embeddings, words, preferred_element_type=jnp.float32)
        scores = jax.nn.sigmoid(scale * similarity + bias) * centerness[..., None] * mask[None, None]
        _, rows = jax.lax.top_k(jnp.max(scores, axis=-1), min(num, num_anchors))
        rows = jnp.sort(rows, axis=-1)  # so that positions below are in the order of (anchor, word)
        scores = jnp.take_along_axis(scores, rows[..., None], axis=1).reshape(num_images, -1)
        scores, position = jax.lax.top_k(scores, min(num, scores.shape[1]))
        found = (-scores, jnp.take_along_axis(rows, position // word_chunk, axis=1), position % word_chunk + first_word)
        both = [jnp.concatenate(pair, axis=1) for pair in zip(best, found, strict=True)]
        first, second, third = (x[:, :num] for x in jax.lax.sort(both, dimension=1, num_keys=3))
        return (first, second, third), None

    nothing = jnp.zeros((num_images, num), jnp.int32)
    start = (jnp.zeros((num_images, num), jnp.float32), nothing, nothing)
    (negative_scores, anchor_of, words), _ = jax.lax.scan(merge, start, chunks)
    return -negative_scores, anchor_of, words


def describe(
    regions: Regions, boxes: Float[AnyArray, "b 4"], photos: Photos, *, canvas: tuple[int, int]
) -> Float[Array, "b d"]:
    """Returns for one box (xyxy, px of the original) of every photo the unit embedding of the region that shows it.

    That is the anchor on the photo with the largest product of centerness and overlap of its own box with the given
    one; of equal ones the first.
    """
    grid = jnp.asarray(anchor_lib.grid(canvas).boxes)
    boxes = box_lib.scale(jnp.asarray(boxes, jnp.float32), jnp.asarray(photos.scale))

    def one(embeddings: Array, deltas: Array, centerness: Array, box: Array) -> Array:
        overlap = box_lib.iou(box_lib.decode_deltas(grid, deltas), jnp.broadcast_to(box, grid.shape))
        best = embeddings[jnp.argmax(overlap * centerness)].astype(jnp.float32)
        return best / jnp.maximum(jnp.linalg.norm(best), 1e-6)

    on_photo = anchor_lib.on_photo(grid, photos.extent)
    centerness = jnp.where(on_photo, jax.nn.sigmoid(regions.centerness), -1.0)
    return jax.vmap(one)(regions.embeddings, regions.box_deltas, centerness, boxes)


@flax.struct.dataclass
class Alignment:
    """For every phrase its best region on one image of a batch."""

    boxes: Float[Array, "m 4"]  # xyxy in pixels of the original image
    scores: Float[Array, " m"]  # similarity, the contrastive loss's s
    ranks: Int[Array, " m"]  # place of the image in the batch ordered by best similarity, from 1
    maps: Float[Array, "m h w"]  # similarity at every cell of P3, the best of the levels; -inf on the padding

    def photo_maps(self, extent: Int[np.ndarray, " 2"]) -> Float[np.ndarray, "m h w"]:
        """Returns the maps without padding, given the image's (height, width) px on the canvas."""
        rows, columns = np.maximum(np.ceil(np.asarray(extent) / anchor_lib.STRIDES[0] - 0.5), 1).astype(int)
        return np.asarray(self.maps)[:, :rows, :columns]


def align(
    regions: Regions,
    phrases: Float[AnyArray, "m d"],
    photos: Photos,
    *,
    index: int | Int[Array, ""],
    canvas: tuple[int, int],
    scale: Float[Array, ""],
) -> Alignment:
    """Returns the best region on image `index` of the batch for every phrase, and what it means among the batch.

    Similarity is scale * region . phrase, as in the contrastive loss, over all anchors whose centre lies on the photo.
    """
    grid = anchor_lib.grid(canvas)
    on_image = anchor_lib.on_photo(grid.boxes, photos.extent)
    words = phrases.astype(regions.embeddings.dtype)
    similarity = scale * jnp.einsum("bad,md->bma", regions.embeddings, words, preferred_element_type=jnp.float32)
    similarity = jnp.where(on_image[:, None], similarity, -jnp.inf)
    best = jnp.max(similarity, axis=-1)  # [b, m]
    anchor_of = jnp.argmax(similarity[index], axis=-1)
    boxes = box_lib.decode_deltas(jnp.asarray(grid.boxes)[anchor_of], regions.box_deltas[index][anchor_of])
    boxes = box_lib.clip(box_lib.scale(boxes, (1.0 / photos.scale[index])[None]), photos.original_size[index][None])
    (height, width), *_ = sizes = anchor_lib.level_sizes(canvas)
    maps, start = jnp.full((len(phrases), height, width), -jnp.inf), 0
    for level_height, level_width in sizes:
        level = similarity[index, :, start : start + level_height * level_width]
        start += level_height * level_width
        rows, columns = np.arange(height) * level_height // height, np.arange(width) * level_width // width
        maps = jnp.maximum(maps, level.reshape(-1, level_height, level_width)[:, rows][:, :, columns])
    return Alignment(boxes, best[index], 1 + jnp.sum(best > best[index][None], axis=0), maps)
