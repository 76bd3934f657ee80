"""Alignment of all regions with all concepts of the global batch (paper section 3.1): focal loss on S."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
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

    S = scale * embeddings . text^T + bias is computed in chunks of concepts, each with its gradient, and never held
    whole: for grounding it has 4 images x 22,400 anchors x 12,800 concepts a device. Every device goes through the
    chunks on its own; the gradient of the texts is summed over the devices once, at the end.

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
    focal = functools.partial(focal_loss, alpha=alpha, gamma=gamma)
    if num_chunks == 1:
        return _sum(focal, _similarity(embeddings, text[0]), scale, bias, anchor_mask, labels, concept_mask[0], rows[0])
    return _in_chunks(focal, embeddings, scale, bias, anchor_mask, labels, text, concept_mask, rows)


def _similarity(embeddings, text):
    return jnp.einsum("bad,cd->bac", embeddings, text, preferred_element_type=jnp.float32)


def _sum(focal, similarity, scale, bias, anchor_mask, labels, concept_mask, rows):
    loss = focal(scale * similarity + bias, labels[..., None] == rows[None, None])
    return jnp.sum(jnp.where(anchor_mask[..., None] & concept_mask[None, None], loss, 0.0))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _in_chunks(focal, embeddings, scale, bias, anchor_mask, labels, text, concept_mask, rows):
    """Returns the loss; `text` is [chunks, c, d], what belongs to it [chunks, c].

    The gradient is computed together with the sum, so that similarities are computed once. It is written by hand,
    since the compiler would keep the similarities of a scan for the backward pass and gather them on all devices.
    """
    return _forward(focal, embeddings, scale, bias, anchor_mask, labels, text, concept_mask, rows)[0]


def _forward(focal, embeddings, scale, bias, anchor_mask, labels, text, concept_mask, rows):
    axes = tuple(jax.sharding.get_abstract_mesh().axis_names)
    of_devices = functools.partial(_of_device, focal, axes)
    if axes:
        split, whole = PartitionSpec(axes), PartitionSpec()
        of_devices = jax.shard_map(
            of_devices,
            in_specs=(split, split, split, whole, whole, whole, whole, whole),
            out_specs=(split, whole, whole),
            check_vma=False,  # no gradient is taken of it
        )
    embeddings_bar, text_bar, (total, scale_bar, bias_bar) = of_devices(
        embeddings, anchor_mask, labels, scale, bias, text, concept_mask, rows
    )
    return total, (embeddings_bar, scale_bar.astype(scale.dtype), bias_bar.astype(bias.dtype), text_bar)


def _of_device(focal, axes, embeddings, anchor_mask, labels, scale, bias, text, concept_mask, rows):
    """Returns gradients of (this device's embeddings, text), and loss and gradients of (scale, bias)."""
    dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)

    def body(carry, chunk):
        text, concept_mask, rows = chunk

        def compute(carry):
            def loss(similarity, scale, bias):
                return _sum(focal, similarity, scale, bias, anchor_mask, labels, concept_mask, rows)

            total, pull = jax.vjp(loss, _similarity(embeddings, text), scale, bias)
            bar, *scalars_bar = pull(jnp.ones((), total.dtype))
            bar = bar.astype(embeddings.dtype)
            embeddings_bar, scalars = carry
            # chunks' gradients add up in float32
            embeddings_bar = embeddings_bar + dot("bac,cd->bad", bar, text)
            return (embeddings_bar, scalars + jnp.stack([total, *scalars_bar])), dot("bac,bad->cd", bar, embeddings)

        # padding and repeated concepts stand last; a chunk that holds nothing else is skipped
        zeros = jnp.zeros(text.shape, jnp.float32)
        return jax.lax.cond(jnp.any(concept_mask), compute, lambda carry: (carry, zeros), carry)

    carry = jnp.zeros(embeddings.shape, jnp.float32), jnp.zeros(3, jnp.float32)
    (embeddings_bar, scalars), text_bar = jax.lax.scan(body, carry, (text, concept_mask, rows))
    text_bar, scalars = jax.lax.psum((text_bar, scalars), axes) if axes else (text_bar, scalars)
    return embeddings_bar.astype(embeddings.dtype), text_bar.astype(text.dtype), scalars


def _backward(focal, residuals, total_bar):
    bars = jax.tree.map(lambda bar: (total_bar * bar).astype(bar.dtype), residuals)
    embeddings_bar, scale_bar, bias_bar, text_bar = bars
    return embeddings_bar, scale_bar, bias_bar, None, None, text_bar, None, None


_in_chunks.defvjp(_forward, _backward)
