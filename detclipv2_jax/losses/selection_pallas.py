"""Fused kernel for NVIDIA GPUs (Pallas, Triton): the largest similarity of every region, no similarities in memory.

XLA writes the similarities in float32 and reads them again for the maximum. Here a block of 128 regions keeps a running
maximum while the concepts pass by: the traffic is the embeddings in and one number a region out.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float, Float32, Int32

BLOCK = 128  # regions, and concepts, of a tile
DEPTH = 64  # of the embeddings at a time, half of it in float32; their size must be a multiple of it


def max_over_concepts(
    embeddings: Float[Array, "b a d"],
    table: Float[Array, "t d"],
    rows: Int32[Array, " n"],
    count: Int32[Array, ""],
    *,
    low: float,
    interpret: bool = False,
) -> Float32[Array, "b a"]:
    """Returns for each anchor the largest similarity to `table[rows[:count]]`; `low` where count is 0."""
    b, a, d = embeddings.shape
    place = jnp.arange(pl.cdiv(rows.shape[0], BLOCK) * BLOCK)
    # places past `count` repeat the first concept, which changes no maximum and is cheaper than a mask
    concepts = table[jnp.where(place < count, rows[jnp.minimum(place, rows.shape[0] - 1)], rows[0])]
    num_blocks = pl.cdiv(b * a, BLOCK)
    best = pl.pallas_call(
        functools.partial(_kernel, low=low),
        grid=(num_blocks,),
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)] * 3,
        out_specs=pl.BlockSpec((BLOCK,), lambda i: (i,)),
        out_shape=jax.ShapeDtypeStruct((num_blocks * BLOCK,), jnp.float32),
        compiler_params=triton.CompilerParams(num_warps=8, num_stages=3),
        interpret=interpret,
        name="max_over_concepts",
    )(embeddings.reshape(b * a, d), concepts, (count[None] + BLOCK - 1) // BLOCK)
    return best[: b * a].reshape(b, a)


def _kernel(regions_ref: Any, concepts_ref: Any, num_blocks_ref: Any, best_ref: Any, *, low: float) -> None:
    num_regions, d = regions_ref.shape
    first = pl.program_id(0) * BLOCK
    size = 2 * DEPTH // regions_ref.dtype.itemsize  # a block has 99 KiB of shared memory on some GPUs
    inside = first + jax.lax.broadcasted_iota(jnp.int32, (BLOCK, size), 0) < num_regions
    precision = jax.lax.Precision.HIGHEST if regions_ref.dtype == jnp.float32 else None

    def one_block(n: Array, best: Array) -> Array:
        def add(i: Array, similarity: Array) -> Array:
            depth = pl.ds(i * size, size)
            regions = triton.load(regions_ref.at[pl.ds(first, BLOCK), depth], mask=inside, other=0.0)
            concepts = concepts_ref[pl.ds(n * BLOCK, BLOCK), depth]
            return similarity + triton.dot(regions, concepts, trans_b=True, precision=precision)

        similarity = jax.lax.fori_loop(0, d // size, add, jnp.zeros((BLOCK, BLOCK), jnp.float32))
        return jnp.maximum(best, jnp.max(similarity, axis=1))

    best_ref[:] = jax.lax.fori_loop(0, num_blocks_ref[0], one_block, jnp.full((BLOCK,), low, jnp.float32))
