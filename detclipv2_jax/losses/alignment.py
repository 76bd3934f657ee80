"""Alignment of all regions with all concepts of the global batch (paper section 3.1): focal loss on S."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def focal_loss(
    logits: Float[Array, "*shape"], targets: Bool[Array, "*shape"], *, alpha: float, gamma: float
) -> Float[Array, "*shape"]:
    """Returns the sigmoid focal loss of every entry (Lin et al. 2017; same as torchvision's `sigmoid_focal_loss`)."""
    weight = jnp.where(targets, alpha, 1.0 - alpha)
    return weight * _unweighted_focal_loss(jnp.where(targets, logits, -logits), gamma)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _unweighted_focal_loss(x: Float[Array, "*shape"], gamma: float) -> Float[Array, "*shape"]:
    """Returns -(1 - p)^gamma log(p) where x are the log-odds of the right answer, whose probability is p."""
    return -(jax.nn.sigmoid(-x) ** gamma) * jax.nn.log_sigmoid(x)


@_unweighted_focal_loss.defjvp
def _(gamma, primals, tangents):
    # in closed form, because the chain rule would keep one array of similarities for each of its factors
    (x,), (dx,) = primals, tangents
    wrong = jax.nn.sigmoid(-x)
    power = wrong**gamma
    log_p = jax.nn.log_sigmoid(x)
    return -power * log_p, power * (gamma * (1.0 - wrong) * log_p - wrong) * dx


def alignment_loss(
    embeddings: Float[Array, "b a d"],
    text: Float[Array, "t d"],
    *,
    scale: Float[Array, ""],
    bias: Float[Array, ""],
    concept_mask: Bool[Array, " t"],
    anchor_mask: Bool[Array, "b a"],
    labels: Int[Array, "b a"],
    positive: Bool[Array, "b a"],
    alpha: float,
    gamma: float,
    num_devices: int,
    chunk_bytes: int,
) -> Float[Array, ""]:
    """Returns the focal loss summed over all anchors and concepts; the caller divides by the number of positives.

    S = scale * embeddings . text^T + bias is computed in chunks of concepts, again in the backward pass, and never held
    whole: for grounding it has 4 images x 22,400 anchors x about 9,000 concepts a device.

    Args:
      embeddings: of the regions; rows are split over the devices.
      text: embeddings of the concepts of the global batch, de-duplicated ones first, the same on all devices.
      scale, bias: of the logit.
      concept_mask: False for rows that are no concept.
      anchor_mask: False for anchors that take no part (outside the photo, padding image).
      labels: row of `text` that an anchor's box carries; any value where `positive` is False.
      positive: anchors with a box.
      alpha, gamma: of the focal loss.
      num_devices: over which `b` is split.
      chunk_bytes: a device; bounds the float32 similarities held at once.
    """
    num_images, num_anchors, _ = embeddings.shape
    row_bytes = 4 * num_anchors * math.ceil(num_images / num_devices)
    chunk = min(text.shape[0], max(8, chunk_bytes // row_bytes))
    num_chunks = math.ceil(text.shape[0] / chunk)
    padding = num_chunks * chunk - text.shape[0]
    text = jnp.pad(text, ((0, padding), (0, 0))).reshape(num_chunks, chunk, -1)
    concept_mask = jnp.pad(concept_mask, (0, padding)).reshape(num_chunks, chunk)
    rows = jnp.arange(num_chunks * chunk).reshape(num_chunks, chunk)
    labels = jnp.where(positive, labels, -1)

    def chunk_sum(embeddings, scale, bias, text, concept_mask, rows):
        similarity = jnp.einsum("bad,cd->bac", embeddings, text, preferred_element_type=jnp.float32)
        targets = labels[..., None] == rows[None, None]
        loss = focal_loss(scale * similarity + bias, targets, alpha=alpha, gamma=gamma)
        return jnp.sum(jnp.where(anchor_mask[..., None] & concept_mask[None, None], loss, 0.0))

    if num_chunks == 1:
        return chunk_sum(embeddings, scale, bias, text[0], concept_mask[0], rows[0])

    embeddings32 = embeddings.astype(jnp.float32)

    @functools.partial(jax.checkpoint, prevent_cse=False)  # a scan keeps the two passes apart
    def body(total, chunk):
        def compute():
            # float32 outside, so that the chunks' gradients add up in float32; the product is in the given type
            return chunk_sum(embeddings32.astype(embeddings.dtype), scale, bias, *chunk)

        # padding and repeated concepts stand last, and a chunk of nothing else costs nothing
        return total + jax.lax.cond(jnp.any(chunk[1]), compute, lambda: jnp.zeros((), jnp.float32)), None

    total, _ = jax.lax.scan(body, jnp.zeros((), jnp.float32), (text, concept_mask, rows))
    return total
