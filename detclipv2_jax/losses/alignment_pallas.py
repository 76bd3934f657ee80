"""Fused kernel for NVIDIA GPUs (Pallas, Triton): the focal loss of similarities and its gradient, in one pass.

XLA writes the similarities in float32 and reads them again for each sum. Here a block of 128 regions meets 64 concepts
at a time: what is written is the gradient with respect to the similarities, in the type of the embeddings, which the
two products of the way back read.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Bool, Float, Float32, Int32

from detclipv2_jax.losses.selection_pallas import DEPTH

REGIONS, CONCEPTS = 128, 64  # of a tile, of which several arrays are at work at once
MAX_ENTRIES = 1 << 30  # of a gradient: offsets within a kernel have 32 bits


def sums_and_gradient(
    embeddings: Float[Array, "r d"],
    text: Float[Array, "c d"],
    *,
    rows: Int32[Array, " c"],
    labels: Int32[Array, "r k"],
    mask: Bool[Array, " r"],
    scale: Float32[Array, ""],
    bias: Float32[Array, ""],
    alpha: float,
    gamma: float,
    interpret: bool = False,
) -> tuple[Float32[Array, " 3"], Float[Array, "r c"]]:
    """Returns (loss and its gradients of scale and bias; the gradient of the similarities, in the embeddings' type).

    Args:
      embeddings: regions, a multiple of REGIONS of them; their size must be one of DEPTH.
      text: concepts, a multiple of CONCEPTS of them.
      rows: their numbers; negative where there is no concept.
      labels: numbers of the concepts that a region is; negative without one.
      mask: False for regions that take no part.
      scale, bias: of the logit.
      alpha, gamma: see `alignment.focal_loss`.
      interpret: run on any device, slowly.
    """
    num_regions = embeddings.shape[0]
    sums = jax.ShapeDtypeStruct((3, num_regions), jnp.float32)
    gradient = jax.ShapeDtypeStruct((num_regions, text.shape[0]), embeddings.dtype)
    everywhere = pl.BlockSpec(memory_space=pl.ANY)
    found, bar = pl.pallas_call(
        functools.partial(_kernel, alpha=alpha, gamma=gamma),
        grid=(num_regions // REGIONS,),
        in_specs=[everywhere] * 6,
        out_specs=[everywhere, everywhere],
        out_shape=[sums, gradient],
        compiler_params=triton.CompilerParams(num_warps=8, num_stages=3),
        interpret=interpret,
        name="alignment_loss",
    )(embeddings, text, rows, labels.T.reshape(-1), mask.astype(jnp.int32), jnp.stack([scale, bias]))
    return jnp.sum(found, axis=1), bar


def _kernel(
    regions_ref: Any, text_ref: Any, rows_ref: Any, labels_ref: Any, mask_ref: Any, logit_ref: Any, sums_ref: Any,
    bar_ref: Any, *, alpha: float, gamma: float,
) -> None:  # fmt: skip
    num_regions, d = regions_ref.shape
    first = pl.program_id(0) * REGIONS
    here = pl.ds(first, REGIONS)
    size = 2 * DEPTH // regions_ref.dtype.itemsize  # a block has 99 KiB of shared memory on some GPUs
    counted = mask_ref[here] > 0
    labels = [labels_ref[pl.ds(start + first, REGIONS)] for start in range(0, labels_ref.shape[0], num_regions)]
    scale, bias = logit_ref[0], logit_ref[1]
    precision = jax.lax.Precision.HIGHEST if regions_ref.dtype == jnp.float32 else None

    def one_tile(n: Array, sums: tuple[Array, ...]) -> tuple[Array, ...]:
        there = pl.ds(n * CONCEPTS, CONCEPTS)

        def add(i: Array, similarity: Array) -> Array:
            depth = pl.ds(i * size, size)
            return similarity + triton.dot(
                regions_ref[here, depth], text_ref[there, depth], trans_b=True, precision=precision
            )

        similarity = jax.lax.fori_loop(0, d // size, add, jnp.zeros((REGIONS, CONCEPTS), jnp.float32))
        rows = rows_ref[there]
        hits = functools.reduce(jnp.logical_or, (label[:, None] == rows[None] for label in labels))
        loss, bar = focal(scale * similarity + bias, hits, alpha=alpha, gamma=gamma)
        counts = counted[:, None] & (rows >= 0)[None]
        loss, bar = jnp.where(counts, loss, 0.0), jnp.where(counts, bar, 0.0)
        bar_ref[here, there] = (scale * bar).astype(bar_ref.dtype)
        return tuple(x + jnp.sum(y, axis=1) for x, y in zip(sums, (loss, bar * similarity, bar), strict=True))

    zeros = jnp.zeros((REGIONS,), jnp.float32)
    for i, x in enumerate(jax.lax.fori_loop(0, text_ref.shape[0] // CONCEPTS, one_tile, (zeros, zeros, zeros))):
        sums_ref[i, here] = x


def focal(logits: Array, hits: Array, *, alpha: float, gamma: float) -> tuple[Array, Array]:
    """Returns (`alignment.focal_loss`, its gradient) within a kernel: of one exponential and one logarithm."""
    sign = jnp.where(hits, 1.0, -1.0)
    weight = jnp.where(hits, alpha, 1.0 - alpha)
    x = sign * logits  # log-odds of the right answer
    small = jnp.exp(-jnp.abs(x))
    wrong = jnp.where(x > 0, small, 1.0) / (1.0 + small)
    softplus = jnp.log1p(small)
    log_p, log_wrong = jnp.minimum(x, 0.0) - softplus, jnp.minimum(-x, 0.0) - softplus
    power = jax.lax.integer_pow(wrong, int(gamma)) if gamma == int(gamma) else jnp.exp(gamma * log_wrong)
    return -weight * power * log_p, sign * weight * power * (gamma * (1.0 - wrong) * log_p - wrong)
