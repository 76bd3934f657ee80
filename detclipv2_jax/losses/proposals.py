"""Choice of the regions that take part in the contrastive loss (paper section 3.2, Table 2a, 2d)."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int32

from detclipv2_jax.geometry.nms import nms
from detclipv2_jax.losses import devices, selection_pallas
from detclipv2_jax.losses.concept_table import Captions, Concepts, Table, unique_rows
from detclipv2_jax.losses.devices import SPLIT, chunk_size, gather, on_each_device
from detclipv2_jax.losses.matching import LOW
from detclipv2_jax.models import split
from detclipv2_jax.models.detclip import Regions

if TYPE_CHECKING:
    from ml_collections import ConfigDict

SELECTIONS = ("classification", "iou", "centerness", "text_sample", "text_batch", "text_batch_centerness")
SCOPES = ("device", "global")


class Proposals(NamedTuple):
    """The chosen anchors of each image, best first; unused places hold anchor 0."""

    indices: Int32[Array, "b k"]  # into the anchors
    mask: Bool[Array, "b k"]
    boxes: Float32[Array, "b k 4"]


def take(x: Float[Array, "b a d"], indices: Int32[Array, "b k"]) -> Float[Array, "b k d"]:
    """Returns x at the chosen anchors; its gradient reaches those anchors only."""
    return jnp.take_along_axis(x, indices[:, :, None], axis=1)


@dataclasses.dataclass(frozen=True)
class SelectionSettings:
    """How proposals are chosen; hashable, because it is static."""

    # the score. classification | iou: the extra head. centerness. text_sample: maximum similarity to the concepts of
    # the own caption. text_batch: to those of the batch. text_batch_centerness: its sigmoid times centerness's
    selection: str
    # the batch of text_batch. device: the captions of this device, the paper's choice, which depends on the number of
    # devices; global: all
    scope: str
    num_proposals: int  # k
    pre_nms: int  # anchors an image that enter NMS
    nms_iou: float
    chunk_bytes: int  # a device; bounds the similarities held at once

    def __post_init__(self) -> None:
        for name, value, allowed in (("selection", self.selection, SELECTIONS), ("scope", self.scope, SCOPES)):
            if value not in allowed:
                raise ValueError(f"{name}={value!r} is unknown; allowed are {', '.join(allowed)}")
        if self.num_proposals < 1 or self.pre_nms < self.num_proposals:
            raise ValueError(
                f"need 1 <= num_proposals <= pre_nms, not num_proposals={self.num_proposals}, pre_nms={self.pre_nms}"
            )


def settings_of(config: ConfigDict) -> SelectionSettings:
    """Returns the settings of `config.loss`."""
    return SelectionSettings(
        selection=config.selection,
        scope=config.selection_scope,
        num_proposals=config.num_proposals,
        pre_nms=config.selection_pre_nms,
        nms_iou=config.selection_nms_iou,
        chunk_bytes=config.chunk_bytes,
    )


def select_proposals(
    regions: Regions,
    boxes: Float32[Array, "b a 4"],
    concepts: Concepts,
    *,
    anchor_mask: Bool[Array, "b a"],
    table: Table,
    captions: Captions,
    batch_captions: Captions,
    settings: SelectionSettings,
) -> Proposals:
    """Returns up to `num_proposals` anchors of each image: 1. scores, 2. top `pre_nms`, 3. class-agnostic NMS.

    Of equal scores the lower anchor index comes first. No gradient passes. Similarities of anchors and concepts are
    computed in chunks and reduced at once. Arrays are global and split by rows over the mesh, as in
    `contrastive.word_region_loss`.

    Args:
      regions: of all anchors; classification and iou need their objectness.
      boxes: of all anchors.
      concepts: the rows of the global batch's table, encoded.
      anchor_mask: anchors that may be chosen, i.e. those on the photo.
      table: which rows are concepts.
      captions: of the images at hand.
      batch_captions: of all images of the step, which scope="device" looks at; under gradient accumulation those are
        more than the images at hand.
      settings: of the choice.
    """
    selection = settings.selection
    if selection in ("classification", "iou") and regions.objectness is None:
        raise ValueError(f"selection={selection!r} needs objectness: set model.head.objectness={selection!r}")
    if selection in ("classification", "iou"):
        score = functools.partial(_given, name="objectness")
    elif selection == "centerness":
        score = functools.partial(_given, name="centerness")
    else:
        score = functools.partial(_text_score, settings=settings)

    arrays = {
        "embeddings": regions.embeddings,
        "boxes": boxes,
        "text": concepts.text * concepts.scale,
        "bias": jnp.broadcast_to(concepts.bias, boxes.shape[:1]),
        "centerness": regions.centerness,
        "anchor_mask": anchor_mask,
        "table": table,
        "captions": captions,
        "batch_captions": batch_captions,
    }
    if regions.objectness is not None:
        arrays["objectness"] = regions.objectness

    axes, per_device = on_each_device(boxes.shape[0], concepts.text.shape[0], batch_captions.mask.shape[0])

    def local(arrays: dict[str, Any]) -> Proposals:
        mask = arrays["anchor_mask"]
        scores = jnp.where(mask, score(arrays, axes).astype(jnp.float32), LOW)
        return Proposals(*jax.vmap(functools.partial(_top_boxes, settings=settings))(arrays["boxes"], scores, mask))

    return per_device(local, results=SPLIT)(jax.lax.stop_gradient(arrays))


def _given(arrays: dict[str, Any], axes: tuple[str, ...], *, name: str) -> Float[Array, "b a"]:
    return arrays[name]


def _text_score(arrays: dict[str, Any], axes: tuple[str, ...], *, settings: SelectionSettings) -> Float32[Array, "b a"]:
    """Returns the logit of the most similar concept (monotonous in its sigmoid, but free of saturation)."""
    embeddings = arrays["embeddings"]
    table = gather(arrays["text"].astype(embeddings.dtype), axes)
    captions, in_batch = arrays["captions"], arrays["batch_captions"]
    if settings.selection == "text_sample":
        image_text = table[captions.concepts]
        similarity = jnp.einsum("bad,bmd->bam", embeddings, image_text, preferred_element_type=jnp.float32)
        return jnp.max(jnp.where(captions.mask[:, None], similarity, LOW), axis=2)
    if settings.scope == "device":
        used = in_batch.mask.reshape(-1)
        rows = in_batch.concepts.reshape(-1)[jnp.argsort(~used, stable=True)]
        count = jnp.sum(used, dtype=jnp.int32)
    else:
        rows, _, count = unique_rows(gather(arrays["table"].canonical, axes), gather(arrays["table"].mask, axes))
    best = max_over_concepts(embeddings, table, rows, count, chunk_bytes=settings.chunk_bytes)
    if settings.selection == "text_batch":
        return best
    return jax.nn.log_sigmoid(best + arrays["bias"][:, None]) + jax.nn.log_sigmoid(arrays["centerness"])


def max_over_concepts(
    embeddings: Float[Array, "b a d"],
    table: Float[Array, "t d"],
    rows: Int32[Array, " n"],
    count: Int32[Array, ""],
    *,
    chunk_bytes: int,
) -> Float32[Array, "b a"]:
    """Returns for each anchor the largest similarity to `table[rows[:count]]`; LOW where count is 0."""
    in_chunks = functools.partial(_max_in_chunks, chunk_bytes=chunk_bytes)
    if embeddings.shape[2] % selection_pallas.DEPTH:
        return in_chunks(embeddings, table, rows, count)
    kernel = functools.partial(selection_pallas.max_over_concepts, low=LOW)
    return split.by_platform(embeddings, table, rows, count, cuda=kernel, default=in_chunks)


def _max_in_chunks(embeddings: Array, table: Array, rows: Array, count: Array, *, chunk_bytes: int) -> Array:
    """One image and one chunk of concepts at a time.

    Rows past `count` repeat the first one, which changes no maximum and is cheaper than a mask.
    """
    b, a, _ = embeddings.shape
    num_rows = rows.shape[0]
    size = chunk_size(num_rows, 8 * a, chunk_bytes)  # similarities, and as much again for XLA's copies
    rows = jnp.where(jnp.arange(num_rows) < count, rows, rows[0])

    def body(n: Array, best: Array) -> Array:
        start = jnp.minimum(n * size, num_rows - size)
        concepts = devices.take(table, jax.lax.dynamic_slice_in_dim(rows, start, size))

        def image(i: Array) -> Array:
            regions = devices.take(embeddings, i)
            return jnp.max(jnp.einsum("ad,cd->ac", regions, concepts, preferred_element_type=jnp.float32), axis=1)

        return jnp.maximum(best, jax.lax.map(image, jnp.arange(b)))

    return devices.in_chunks(count, size, body, jnp.full((b, a), LOW, jnp.float32), most=num_rows)


def _top_boxes(
    boxes: Float32[Array, "a 4"], scores: Float32[Array, " a"], mask: Bool[Array, " a"], *, settings: SelectionSettings
) -> tuple[Int32[Array, " k"], Bool[Array, " k"], Float32[Array, "k 4"]]:
    """Returns (anchor indices, mask, boxes) of one image, `num_proposals` long or as many as there are anchors."""
    num_anchors = mask.shape[0]
    top_scores, top = jax.lax.top_k(scores, min(settings.pre_nms, num_anchors))
    kept, kept_mask = nms(
        boxes[top],
        top_scores,
        iou_threshold=settings.nms_iou,
        max_outputs=min(settings.num_proposals, num_anchors),
        mask=mask[top],
    )
    indices = jnp.where(kept_mask, top[kept], 0)
    return indices, kept_mask, boxes[indices]
