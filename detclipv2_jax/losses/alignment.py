"""Alignment of all regions with all concepts of the global batch (paper section 3.1): focal loss on S."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from detclipv2_jax.losses import alignment_pallas, alignment_tpu
from detclipv2_jax.losses.concept_table import Concepts
from detclipv2_jax.losses.devices import SPLIT, WHOLE, chunk_size, in_chunks, num_devices, on_each_device
from detclipv2_jax.models import split


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
def _(gamma: float, primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    # in closed form, because the chain rule would keep one array of similarities for each of its factors
    (x,), (dx,) = primals, tangents
    wrong = jax.nn.sigmoid(-x)
    power = wrong**gamma
    log_p = jax.nn.log_sigmoid(x)
    return -power * log_p, power * (gamma * (1.0 - wrong) * log_p - wrong) * dx


@dataclasses.dataclass(frozen=True)
class FocalSettings:
    """Of the focal loss against all concepts; hashable, because it is static."""

    alpha: float
    gamma: float
    chunk_bytes: int  # a device; bounds the float32 similarities held at once


class AnchorTargets(NamedTuple):
    """What the anchors of each image shall say of the concepts."""

    mask: Bool[Array, "b a"]  # False for anchors that take no part (outside the photo, padding image)
    positive: Bool[Array, "b a"]  # anchors with a box
    rows: Int[Array, "b a k"]  # of the texts: all that that box is, repeated where it is less; any value without one
    # texts of which the image's other anchors are negatives; None: all. Of others nothing is known there
    verified: Bool[Array, "b t"] | None = None


@jax.named_scope("alignment_loss")
def alignment_loss(
    embeddings: Float[Array, "b a d"],
    concepts: Concepts,
    *,
    concept_mask: Bool[Array, " t"],
    targets: AnchorTargets,
    settings: FocalSettings,
) -> Float[Array, ""]:
    """Returns the focal loss summed over all anchors and concepts; the caller divides by the number of positives.

    S = scale * embeddings . text^T + bias is computed in chunks of concepts, each with its gradient, and never held
    whole: for grounding it has 4 images x 22,400 anchors x 12,800 concepts a device. Every device goes through the
    chunks on its own; the gradient of the texts is summed over the devices once, at the end. On NVIDIA GPUs and TPUs a
    kernel holds no chunk of S either, see `alignment_pallas`; federated data are left to XLA.

    Rows of `embeddings` are split over the devices of `jax.set_mesh`. `concepts`, de-duplicated ones first, are the
    same on all devices; `concept_mask` is False for rows of its text that are no concept.
    """
    labels = jnp.where(targets.positive[..., None], targets.rows, -1)
    compared = _Regions(embeddings, concepts.scale, concepts.bias, targets.mask, labels)
    columns = _Columns(concepts.text, concept_mask, jnp.arange(concepts.text.shape[0]), targets.verified)
    gpu, tpu = (functools.partial(_with_kernel, kernels, settings) for kernels in (alignment_pallas, alignment_tpu))
    xla = functools.partial(_with_xla, settings)
    if targets.verified is not None or embeddings.shape[2] % alignment_pallas.DEPTH:
        return xla(compared, columns)
    return split.by_platform(compared, columns, cuda=gpu, tpu=tpu, default=xla)


class _Regions(NamedTuple):
    """What is compared with concepts."""

    embeddings: Float[Array, "b a d"]
    scale: Float[Array, ""]  # of the logit
    bias: Float[Array, ""]
    mask: Bool[Array, "b a"]
    labels: Int[Array, "b a k"]


class _Columns(NamedTuple):
    """Concepts that regions are compared with, of one chunk or (one axis more) of all."""

    text: Float[Array, "*chunks c d"]
    mask: Bool[Array, "*chunks c"]
    rows: Int[Array, "*chunks c"]  # their numbers
    verified: Bool[Array, "b *chunks c"] | None  # see `AnchorTargets`; within the loop over chunks they come first

    def chunks(self, size: int) -> _Columns:
        """Returns the same in chunks of a size, the last one padded with what is no concept."""
        num_chunks = math.ceil(self.text.shape[0] / size)
        padding = num_chunks * size - self.text.shape[0]
        verified = self.verified
        if verified is not None:
            verified = jnp.pad(verified, ((0, 0), (0, padding))).reshape(-1, num_chunks, size)
        return _Columns(
            jnp.pad(self.text, ((0, padding), (0, 0))).reshape(num_chunks, size, -1),
            jnp.pad(self.mask, (0, padding)).reshape(num_chunks, size),
            jnp.arange(num_chunks * size).reshape(num_chunks, size),
            verified,
        )


_OfChunk = Callable[[FocalSettings, _Regions, _Columns], tuple[Array, Array, Array]]  # see `_of_chunk`


def _with_xla(settings: FocalSettings, regions: _Regions, columns: _Columns) -> Float[Array, ""]:
    num_rows = columns.text.shape[0]
    size = chunk_size(num_rows, 4 * _num_regions(regions), settings.chunk_bytes)
    if size == num_rows and split.on_cpus():  # a loop of one turn costs them a twentieth of the loss
        return _sum(settings, _similarity(regions.embeddings, columns.text), regions, columns)
    return _in_chunks(settings, _of_chunk, regions, columns.chunks(size))


def _with_kernel(kernels: Any, settings: FocalSettings, regions: _Regions, columns: _Columns) -> Float[Array, ""]:
    """`kernels`: `alignment_pallas` or `alignment_tpu`."""
    embeddings, scale, bias, mask, labels = regions
    more = -embeddings.shape[1] % kernels.REGIONS  # padded here, once, and not for each product of each chunk
    regions = _Regions(
        jnp.pad(embeddings, ((0, 0), (0, more), (0, 0))), scale, bias, jnp.pad(mask, ((0, 0), (0, more))),
        jnp.pad(labels, ((0, 0), (0, more), (0, 0))),
    )  # fmt: skip
    entry = embeddings.dtype.itemsize
    budget = min(settings.chunk_bytes, alignment_pallas.MAX_ENTRIES * entry)
    size = chunk_size(columns.text.shape[0], entry * _num_regions(regions), budget)
    of_chunk, tile = functools.partial(_of_chunk_in_kernel, kernels), kernels.CONCEPTS
    return _in_chunks(settings, of_chunk, regions, columns.chunks(math.ceil(size / tile) * tile))


def _num_regions(regions: _Regions) -> int:
    """Returns how many regions a device has."""
    num_images, num_anchors, _ = regions.embeddings.shape
    return num_anchors * math.ceil(num_images / num_devices())


def _similarity(embeddings: Float[Array, "b a d"], text: Float[Array, "c d"]) -> Float[Array, "b a c"]:
    return jnp.einsum("bad,cd->bac", embeddings, text, preferred_element_type=jnp.float32)


def _sum(
    settings: FocalSettings, similarity: Float[Array, "b a c"], regions: _Regions, columns: _Columns
) -> Float[Array, ""]:
    _, scale, bias, anchor_mask, labels = regions
    # one comparison after the other: a reduction over k would be an array of its own
    hits = functools.reduce(
        jnp.logical_or, (labels[..., k, None] == columns.rows[None, None] for k in range(labels.shape[2]))
    )
    loss = focal_loss(scale * similarity + bias, hits, alpha=settings.alpha, gamma=settings.gamma)
    counts = anchor_mask[..., None] & columns.mask[None, None]
    if columns.verified is not None:
        counts &= hits | columns.verified[:, None]
    return jnp.sum(jnp.where(counts, loss, 0.0))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _in_chunks(settings: FocalSettings, of_chunk: _OfChunk, regions: _Regions, columns: _Columns) -> Float[Array, ""]:
    """Returns the loss.

    The gradient is computed together with the sum, so that similarities are computed once. It is written by hand,
    since the compiler would keep the similarities of a scan for the backward pass and gather them on all devices.
    """
    return _forward(settings, of_chunk, regions, columns)[0]


def _forward(
    settings: FocalSettings, of_chunk: _OfChunk, regions: _Regions, columns: _Columns
) -> tuple[Float[Array, ""], tuple[Array, ...]]:
    embeddings, scale, bias, _, _ = regions
    axes, per_device = on_each_device(embeddings.shape[0])
    places: Any = (_Regions, _Columns)
    on_devices = per_device(
        functools.partial(_of_device, settings, of_chunk, axes),
        arguments=(places[0](SPLIT, WHOLE, WHOLE, SPLIT, SPLIT), places[1](WHOLE, WHOLE, WHOLE, SPLIT)),
        results=(SPLIT, WHOLE, WHOLE),
    )
    embeddings_bar, text_bar, (total, scale_bar, bias_bar) = on_devices(regions, columns)
    return total, (embeddings_bar, scale_bar.astype(scale.dtype), bias_bar.astype(bias.dtype), text_bar)


def _of_device(
    settings: FocalSettings, of_chunk: _OfChunk, axes: tuple[str, ...], regions: _Regions, columns: _Columns
) -> tuple[Array, Array, Array]:
    """Returns gradients of (this device's embeddings, text), and loss and gradients of (scale, bias)."""
    embeddings, size = regions.embeddings, columns.text.shape[1]
    if columns.verified is not None:
        columns = columns._replace(verified=columns.verified.swapaxes(0, 1))

    def body(n: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        scalars, embeddings_bar, text_bar = carry
        chunk = jax.tree.map(lambda x: x[n], columns)
        more, of_embeddings, of_text = of_chunk(settings, regions, chunk)
        # chunks' gradients add up in float32
        return scalars + more, embeddings_bar + of_embeddings, text_bar.at[n].set(of_text)

    # padding and repeated concepts stand last; chunks that hold nothing else are left out
    count = jnp.max(jnp.where(columns.mask, columns.rows + 1, 0))
    zeros = [jnp.zeros(shape, jnp.float32) for shape in ((3,), embeddings.shape, columns.text.shape)]
    scalars, embeddings_bar, text_bar = in_chunks(count, size, body, tuple(zeros), most=columns.rows.size)
    text_bar, scalars = jax.lax.psum((text_bar, scalars), axes) if axes else (text_bar, scalars)
    return embeddings_bar.astype(embeddings.dtype), text_bar.astype(columns.text.dtype), scalars


def _of_chunk(settings: FocalSettings, regions: _Regions, chunk: _Columns) -> tuple[Array, Array, Array]:
    """Returns (loss and its gradients of scale and bias; float32 gradients of embeddings and of text)."""
    embeddings, scale, bias, _, _ = regions

    def loss(similarity: Array, scale: Array, bias: Array) -> Array:
        return _sum(settings, similarity, regions._replace(scale=scale, bias=bias), chunk)

    total, pull = jax.vjp(loss, _similarity(embeddings, chunk.text), scale, bias)
    bar, *scalars_bar = pull(jnp.ones((), total.dtype))
    bar = bar.astype(embeddings.dtype)
    dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    return (
        jnp.stack([total, *scalars_bar]),
        dot("bac,cd->bad", bar, chunk.text),
        dot("bac,bad->cd", bar, embeddings),
    )


def _of_chunk_in_kernel(
    kernels: Any, settings: FocalSettings, regions: _Regions, chunk: _Columns
) -> tuple[Array, Array, Array]:
    """The same without similarities in memory."""
    embeddings, scale, bias, mask, labels = regions
    flat = embeddings.reshape(-1, embeddings.shape[-1])
    scalars, bar = kernels.sums_and_gradient(
        flat,
        chunk.text,
        rows=jnp.where(chunk.mask, chunk.rows, -2),
        labels=labels.reshape(flat.shape[0], -1),
        mask=mask.reshape(-1),
        scale=scale,
        bias=bias,
        alpha=settings.alpha,
        gamma=settings.gamma,
    )
    dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    return scalars, dot("rc,cd->rd", bar, chunk.text).reshape(embeddings.shape), dot("rc,rd->cd", bar, flat)


def _backward(
    settings: FocalSettings, of_chunk: _OfChunk, residuals: tuple[Array, ...], total_bar: Float[Array, ""]
) -> tuple:
    bars = jax.tree.map(lambda bar: (total_bar * bar).astype(bar.dtype), residuals)
    embeddings_bar, scale_bar, bias_bar, text_bar = bars
    none: Any = None  # the gradient of what is no number
    return _Regions(embeddings_bar, scale_bar, bias_bar, none, none), _Columns(text_bar, none, none, none)


_in_chunks.defvjp(_forward, _backward)
