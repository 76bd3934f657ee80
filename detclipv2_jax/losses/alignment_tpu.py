"""The kernel of `alignment_pallas` for TPUs (Pallas, Mosaic): compiled for v5e and v6e, never run on one."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Float32, Int32

from detclipv2_jax.losses.alignment_pallas import focal
from detclipv2_jax.models.kernels_tpu import dot

REGIONS, CONCEPTS = 512, 512  # of a program


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
    """See `alignment_pallas.sums_and_gradient`; r and c are multiples of this module's REGIONS and CONCEPTS."""
    (num_regions, d), num_concepts = embeddings.shape, text.shape[0]

    def of_regions(width: int) -> pl.BlockSpec:
        return pl.BlockSpec((REGIONS, width), lambda j, i: (i, 0))

    sums, bar = pl.pallas_call(
        functools.partial(_kernel, alpha=alpha, gamma=gamma),
        grid=(num_concepts // CONCEPTS, num_regions // REGIONS),  # concepts stay while all regions pass
        in_specs=[
            pl.BlockSpec(memory_space=pltpu.SMEM),
            of_regions(d),
            of_regions(labels.shape[1]),
            of_regions(1),
            pl.BlockSpec((CONCEPTS, d), lambda j, i: (j, 0)),
            pl.BlockSpec((1, CONCEPTS), lambda j, i: (0, j)),
        ],
        out_specs=[
            pl.BlockSpec((3, CONCEPTS), lambda j, i: (0, j)),
            pl.BlockSpec((REGIONS, CONCEPTS), lambda j, i: (i, j)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct((3, num_concepts), jnp.float32),
            jax.ShapeDtypeStruct((num_regions, num_concepts), embeddings.dtype),
        ],
        interpret=interpret,
        name="alignment_loss",
    )(jnp.stack([scale, bias]), embeddings, labels, mask.astype(jnp.int32)[:, None], text, rows[None])
    return jnp.sum(sums, axis=1), bar


def _kernel(
    logit_ref: Any, regions_ref: Any, labels_ref: Any, mask_ref: Any, text_ref: Any, rows_ref: Any, sums_ref: Any,
    bar_ref: Any, *, alpha: float, gamma: float,
) -> None:  # fmt: skip
    scale, bias = logit_ref[0], logit_ref[1]
    similarity = dot(regions_ref[...], text_ref[...], 1, 1)
    rows, labels = rows_ref[...], labels_ref[...]
    hits = functools.reduce(jnp.logical_or, (labels[:, k : k + 1] == rows for k in range(labels.shape[1])))
    loss, bar = focal(scale * similarity + bias, hits, alpha=alpha, gamma=gamma)
    counts = (mask_ref[...] > 0) & (rows >= 0)
    loss, bar = jnp.where(counts, loss, 0.0), jnp.where(counts, bar, 0.0)
    bar_ref[...] = (scale * bar).astype(bar_ref.dtype)

    @pl.when(pl.program_id(1) == 0)
    def start() -> None:
        sums_ref[...] = jnp.zeros_like(sums_ref)

    for i, part in enumerate((loss, bar * similarity, bar)):
        sums_ref[i : i + 1, :] += jnp.sum(part, axis=0, keepdims=True)
