"""Similarity of images with captions from the images' side: the best concept of every region (paper section 3.2)."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int32

from detclipv2_jax.losses.devices import gather, reduce_scatter
from detclipv2_jax.losses.matching import LOW, chunk_size


def image_scores(
    axes: tuple[str, ...],
    regions: Float[Array, "b k d"],
    text: Float32[Array, "t_local d"],
    region_mask: Bool[Array, "b k"],
    rows: Int32[Array, "captions m"],
    mask: Bool[Array, "captions m"],
    *,
    chunk_bytes: int,
) -> Float32[Array, "captions b"]:
    """Returns the score of every caption of the global batch with every image of this device.

    score[j, i] is the mean over the proposals of image i of the largest similarity to a concept of caption j, which are
    `rows` of the global table. Runs inside `shard_map` with the rows of `text` of this device, as
    `matching.caption_scores` does. Similarities exist for a chunk of captions at a time, on the way back again.
    """
    b, k, _ = regions.shape
    num_captions, m = rows.shape
    dtype = regions.dtype
    size = chunk_size(num_captions, 8 * b * k * m, chunk_bytes)
    num_chunks = -(-num_captions // size)
    padding = ((0, num_chunks * size - num_captions), (0, 0))
    chunks = tuple(jnp.pad(x, padding).reshape(num_chunks, size, m) for x in (rows, mask))
    share = region_mask / jnp.maximum(jnp.sum(region_mask, axis=1, keepdims=True, dtype=jnp.float32), 1.0)

    @jax.checkpoint
    def score(regions: Array, table: Array, rows: Array, mask: Array) -> Array:
        named = table[rows.reshape(-1)].astype(dtype)
        similarity = jnp.einsum("bkd,cd->bkc", regions.astype(dtype), named, preferred_element_type=jnp.float32)
        similarity = jnp.where(mask[None, None], similarity.reshape(b, k, size, m), LOW)
        return jnp.einsum("bkj,bk->jb", jnp.max(similarity, axis=3), share)

    # in float32, so that the chunks' gradients add up in it
    regions, table = regions.astype(jnp.float32), _gathered(text, axes, dtype)
    _, scores = jax.lax.scan(lambda _, chunk: (None, score(regions, table, *chunk)), None, chunks)
    return scores.reshape(-1, b)[:num_captions]


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gathered(text: Float32[Array, "t_local d"], axes: tuple[str, ...], dtype: Any) -> Float32[Array, "t d"]:
    """Returns the rows of all devices, sent in `dtype`; their gradient is summed in float32."""
    return gather(text.astype(dtype), axes).astype(jnp.float32)


_gathered.defvjp(
    lambda text, axes, dtype: (_gathered(text, axes, dtype), None),
    lambda axes, dtype, _, bar: (reduce_scatter(bar, axes),),
)
