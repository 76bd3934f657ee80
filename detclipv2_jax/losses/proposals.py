"""Choice of the regions that take part in the contrastive loss (paper section 3.2, Table 2a, 2d)."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int32

from detclipv2_jax.geometry.nms import nms
from detclipv2_jax.losses import devices, selection_pallas
from detclipv2_jax.losses.concept_table import unique_rows
from detclipv2_jax.losses.devices import gather, on_each_device
from detclipv2_jax.losses.matching import LOW, chunk_size

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


def select_proposals(
    embeddings: Float[Array, "b a d"],
    boxes: Float32[Array, "b a 4"],
    text: Float32[Array, "t d"],
    scale: Float32[Array, ""],
    bias: Float32[Array, ""],
    *,
    centerness: Float32[Array, "b a"],
    objectness: Float32[Array, "b a"] | None,
    anchor_mask: Bool[Array, "b a"],
    concept_mask: Bool[Array, " t"],
    canonical: Int32[Array, " t"],
    caption_concepts: Int32[Array, "b m"],
    caption_mask: Bool[Array, "b m"],
    batch_concepts: Int32[Array, "n m"],
    batch_concepts_mask: Bool[Array, "n m"],
    selection: str,
    scope: str,
    num_proposals: int,
    pre_nms: int,
    nms_iou: float,
    chunk_bytes: int,
) -> Proposals:
    """Returns up to `num_proposals` anchors of each image: 1. scores, 2. top `pre_nms`, 3. class-agnostic NMS.

    Of equal scores the lower anchor index comes first. No gradient passes. Similarities of anchors and concepts are
    reduced at once: in a kernel on NVIDIA GPUs, elsewhere in chunks. Arrays are global and split by rows over the mesh,
    as in `contrastive.word_region_loss`.

    Args:
      embeddings, boxes, centerness: of all anchors; centerness as logits.
      text: L2-normalised concept embeddings of the global batch.
      scale, bias: of the logit.
      objectness: logits of the extra head; classification and iou need it.
      anchor_mask: anchors that may be chosen, i.e. those on the photo.
      concept_mask, canonical: of the table, see `contrastive.word_region_loss`.
      caption_concepts, caption_mask: concepts of each image's own caption, as rows of `text`.
      batch_concepts, batch_concepts_mask: the same for all captions of the step, which scope="device" looks at;
        under gradient accumulation those are more than the images at hand.
      selection: the score. classification | iou: the extra head. centerness. text_sample: maximum similarity to the
        concepts of the own caption. text_batch: to those of the batch. text_batch_centerness: the product of that
        one's sigmoid and the centerness's.
      scope: the batch of text_batch. device: the captions of this device, the paper's choice, which depends on the
        number of devices; global: all.
      num_proposals: k.
      pre_nms: anchors an image that enter NMS.
      nms_iou: threshold of NMS.
      chunk_bytes: a device; bounds the similarities held at once.
    """
    for name, value, allowed in (("selection", selection, SELECTIONS), ("scope", scope, SCOPES)):
        if value not in allowed:
            raise ValueError(f"{name}={value!r} is unknown; allowed are {', '.join(allowed)}")
    if selection in ("classification", "iou") and objectness is None:
        raise ValueError(f"selection={selection!r} needs objectness: set model.head.objectness={selection!r}")
    if num_proposals < 1 or pre_nms < num_proposals:
        raise ValueError(f"need 1 <= num_proposals <= pre_nms, not num_proposals={num_proposals}, pre_nms={pre_nms}")
    if selection in ("classification", "iou"):
        score = functools.partial(_given, name="objectness")
    elif selection == "centerness":
        score = functools.partial(_given, name="centerness")
    else:
        score = functools.partial(_text_score, selection=selection, scope=scope, chunk_bytes=chunk_bytes)

    arrays = {
        "embeddings": embeddings,
        "boxes": boxes,
        "text": text * scale,
        "bias": jnp.broadcast_to(bias, embeddings.shape[:1]),
        "centerness": centerness,
        "anchor_mask": anchor_mask,
        "concept_mask": concept_mask,
        "canonical": canonical,
        "caption_concepts": caption_concepts,
        "caption_mask": caption_mask,
        "batch_concepts": batch_concepts,
        "batch_concepts_mask": batch_concepts_mask,
    }
    if objectness is not None:
        arrays["objectness"] = objectness

    axes, per_device = on_each_device(embeddings.shape[0], text.shape[0], batch_concepts.shape[0])

    def local(arrays):
        mask = arrays["anchor_mask"]
        scores = jnp.where(mask, score(arrays, axes).astype(jnp.float32), LOW)
        suppress = functools.partial(
            _top_boxes, pre_nms=min(pre_nms, mask.shape[1]), num_proposals=num_proposals, nms_iou=nms_iou
        )
        return Proposals(*jax.vmap(suppress)(arrays["boxes"], scores, mask))

    return per_device(local, replicated=False)(jax.lax.stop_gradient(arrays))


def _given(arrays: dict[str, Array], axes: tuple[str, ...], *, name: str) -> Float[Array, "b a"]:
    return arrays[name]


def _text_score(arrays, axes, *, selection, scope, chunk_bytes) -> Float32[Array, "b a"]:
    """Returns the logit of the most similar concept (monotonous in its sigmoid, but free of saturation)."""
    embeddings = arrays["embeddings"]
    table = gather(arrays["text"].astype(embeddings.dtype), axes)
    if selection == "text_sample":
        own = table[arrays["caption_concepts"]]
        similarity = jnp.einsum("bad,bmd->bam", embeddings, own, preferred_element_type=jnp.float32)
        return jnp.max(jnp.where(arrays["caption_mask"][:, None], similarity, LOW), axis=2)
    if scope == "device":
        used = arrays["batch_concepts_mask"].reshape(-1)
        rows = arrays["batch_concepts"].reshape(-1)[jnp.argsort(~used, stable=True)]
        count = jnp.sum(used, dtype=jnp.int32)
    else:
        rows, _, count = unique_rows(gather(arrays["canonical"], axes), gather(arrays["concept_mask"], axes))
    best = max_over_concepts(embeddings, table, rows, count, chunk_bytes=chunk_bytes)
    if selection == "text_batch":
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
    return jax.lax.platform_dependent(embeddings, table, rows, count, cuda=kernel, default=in_chunks)


def _max_in_chunks(embeddings, table, rows, count, *, chunk_bytes):
    """One image and one chunk of concepts at a time.

    Rows past `count` repeat the first one, which changes no maximum and is cheaper than a mask.
    """
    b, a, _ = embeddings.shape
    num_rows = rows.shape[0]
    size = chunk_size(num_rows, 8 * a, chunk_bytes)  # similarities, and as much again for XLA's copies
    rows = jnp.where(jnp.arange(num_rows) < count, rows, rows[0])

    def body(n, best):
        start = jnp.minimum(n * size, num_rows - size)
        concepts = devices.take(table, jax.lax.dynamic_slice_in_dim(rows, start, size))

        def image(i):
            regions = devices.take(embeddings, i)
            return jnp.max(jnp.einsum("ad,cd->ac", regions, concepts, preferred_element_type=jnp.float32), axis=1)

        return jnp.maximum(best, jax.lax.map(image, jnp.arange(b)))

    return jax.lax.fori_loop(0, (count + size - 1) // size, body, jnp.full((b, a), LOW, jnp.float32))


def _top_boxes(boxes, scores, mask, *, pre_nms, num_proposals, nms_iou):
    """Returns (anchor indices, mask, boxes) of one image, `num_proposals` long."""
    top_scores, top = jax.lax.top_k(scores, pre_nms)
    kept, kept_mask = nms(boxes[top], top_scores, iou_threshold=nms_iou, max_outputs=num_proposals, mask=mask[top])
    indices = jnp.where(kept_mask, top[kept], 0)
    return indices, kept_mask, boxes[indices]
