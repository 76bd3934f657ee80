"""Similarity of captions with images through the best region of every concept, never stored as a whole.

The (images × proposals × concepts) similarities of one device are computed in chunks of concepts, from the
canonical rows of the concept table only: neither padding nor repeated texts cost anything. What survives a chunk is
one number and one proposal index for each (concept, image); the backward pass needs nothing else.

`caption_scores` runs inside `shard_map`: images and captions of this device, rows of the concept table of
this device. The collectives are one all-gather of the table on the way forward and one reduce-scatter of its
gradient on the way back.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int16, Int32

from detclipv2_jax.losses.concept_table import UniqueRows
from detclipv2_jax.losses.devices import chunk_size, gather, in_chunks, reduce_scatter, take, vary, zeros_after

LOW = -1e30  # finite, so that a fully masked row stays free of NaN


@dataclasses.dataclass(frozen=True)
class Settings:
    """How similarities are computed; hashable, because it is static."""

    axes: tuple[str, ...]  # mesh axes over which images, captions and table rows are split; () is one device
    matching: str  # one_to_many, or else the best region counts (with max_size there is only one)
    temperature: float  # tau_t of one_to_many
    chunk_bytes: int


class Kept(NamedTuple):
    """What the backward pass takes from the forward one."""

    regions: Float[Array, "b k d"]
    region_mask: Bool[Array, "b k"]
    table: Float[Array, "t d"]  # of all devices
    unique: UniqueRows
    chosen: Int16[Array, "t b"]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def caption_scores(
    settings: Settings,
    regions: Float[Array, "b k d"],
    text: Float32[Array, "t_local d"],
    region_mask: Bool[Array, "b k"],
    unique: UniqueRows,
    slots: Int32[Array, "captions m"],
    weights: Float32[Array, "captions m"],
) -> tuple[Float32[Array, "captions b"], Int16[Array, "t b"], Int32[Array, "b k"]]:
    """Returns (score of every caption of the global batch with every image of this device, chosen proposals, votes).

    score[j, i] = sum_m weights[j, m] · best[slots[j, m], i], where best[c, i] is the similarity of concept
    `unique.order[c]` with its best proposal of image i (Eq. 2, 3), or with all of them softmax-weighted
    (one_to_many, Eq. 4). chosen[c, i] is the index of the most similar proposal, the lowest one among equals; rows
    from `unique.count` on are meaningless. votes[i, k] counts the concepts that chose proposal k.

    The embeddings are multiplied in the dtype of `regions` and summed in float32; `text` is cast before it is gathered,
    its gradient is summed over devices in float32.
    """
    return _forward(settings, regions, text, region_mask, unique, slots, weights)[0]


def _forward(settings: Settings, *arguments: Any) -> tuple[tuple[Array, Array, Array], tuple[Kept, Array, Array]]:
    regions, text, region_mask, unique, slots, weights = arguments
    b, k, _ = regions.shape
    table = gather(text.astype(regions.dtype), settings.axes)
    t = table.shape[0]
    size = chunk_size(t, 8 * b * k, settings.chunk_bytes)  # similarities, and one array as large for the indices

    def body(n: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        best, chosen, votes = carry
        start, rows, fresh = _chunk(unique, n, size)
        value, index = _best(settings, regions, region_mask, take(table, rows))
        best = jax.lax.dynamic_update_slice_in_dim(best, value.T, start, axis=0)
        chosen = jax.lax.dynamic_update_slice_in_dim(chosen, index.T.astype(jnp.int16), start, axis=0)
        vote = (index[:, None, :] == jnp.arange(k, dtype=jnp.int32)[None, :, None]) & fresh[None, None]
        return best, chosen, votes + jnp.sum(vote, axis=2, dtype=jnp.int32)

    carry = jnp.zeros((t, b), jnp.float32), jnp.zeros((t, b), jnp.int16), jnp.zeros((b, k), jnp.int32)
    best, chosen, votes = in_chunks(unique.count, size, body, vary(carry, settings.axes), most=t)

    # a loop, because [captions, m, b] at once would be the largest array of the loss
    def add_concept(m: Array, scores: Array) -> Array:
        return scores + weights[:, m, None] * best[slots[:, m]]

    scores = vary(jnp.zeros((slots.shape[0], b), jnp.float32), settings.axes)
    scores = jax.lax.fori_loop(0, slots.shape[1], add_concept, scores)
    return (scores, chosen, votes), (Kept(regions, region_mask, table, unique, chosen), slots, weights)


def _backward(
    settings: Settings, residuals: tuple[Kept, Array, Array], cotangents: tuple[Array, Array, Array]
) -> tuple[Array | None, ...]:
    kept, slots, weights = residuals
    regions, _, table, _, _ = kept
    scores_bar, _, _ = cotangents

    def add_concept(m: Array, best_bar: Array) -> Array:
        return best_bar.at[slots[:, m]].add(weights[:, m, None] * scores_bar)

    best_bar = zeros_after(scores_bar, (table.shape[0], regions.shape[0]), settings.axes)
    best_bar = jax.lax.fori_loop(0, slots.shape[1], add_concept, best_bar)

    pull: Callable[[Kept, Array], tuple[Array, Array]] = functools.partial(_pull_all, settings=settings)
    if settings.matching != "one_to_many":
        # A CPU saves almost all work by following the indices; matrix units prefer the same sum as a product with a
        # one-hot matrix (their scatters are serial).
        pull = functools.partial(
            jax.lax.platform_dependent,
            cpu=functools.partial(pull_by_index, settings=settings),
            default=functools.partial(pull_by_product, settings=settings),
        )

    regions_bar, table_bar = pull(kept, best_bar)
    return regions_bar.astype(regions.dtype), reduce_scatter(table_bar, settings.axes), None, None, None, None


caption_scores.defvjp(_forward, _backward)


def _chunk(unique: UniqueRows, n: Array, size: int) -> tuple[Array, Int32[Array, " size"], Bool[Array, " size"]]:
    """Returns (position, table rows, mask) of the n-th chunk of concepts.

    The last chunk of the table may overlap the one before. The mask leaves those concepts out, and what is no concept.
    """
    start = jnp.minimum(n * size, unique.order.shape[0] - size)
    position = start + jnp.arange(size)
    rows = jax.lax.dynamic_slice_in_dim(unique.order, start, size)
    return start, rows, (position >= n * size) & (position < unique.count)


def _similarity(regions: Array, region_mask: Array, text: Array) -> Float32[Array, "b k c"]:
    """Returns float32 similarities [b, k, c]; those of masked regions are LOW."""
    similarity = jnp.einsum("bkd,cd->bkc", regions, text, preferred_element_type=jnp.float32)
    return jnp.where(region_mask[:, :, None], similarity, LOW)


def _scaled(similarity: Array, region_mask: Array, temperature: float) -> Float32[Array, "b k c"]:
    """Returns similarity / temperature, exactly LOW where masked.

    A compiler may round LOW / temperature at one place and not at another. Their difference is then 1e23 instead of 0,
    and the softmax of an image without any region NaN.
    """
    return jnp.where(region_mask[:, :, None], similarity / temperature, LOW)


def _best(settings: Settings, regions: Array, region_mask: Array, text: Array) -> tuple[Array, Array]:
    """Returns (value of each concept for each image, index of its most similar region), each [b, c]."""
    similarity = _similarity(regions, region_mask, text)
    best, index = jax.lax.platform_dependent(similarity, cpu=max_by_two_passes, default=max_by_one_pass)
    if settings.matching == "one_to_many":
        weight = jax.nn.softmax(_scaled(similarity, region_mask, settings.temperature), axis=1)
        best = jnp.sum(weight * similarity, axis=1)
    return best, index


def max_by_two_passes(similarity: Float32[Array, "b k c"]) -> tuple[Float32[Array, "b c"], Int32[Array, "b c"]]:
    """Returns the maximum over regions and its lowest index, by two plain reductions, which vectorise on a CPU."""
    k = similarity.shape[1]
    best = jnp.max(similarity, axis=1)
    is_max = similarity == best[:, None]
    return best, jnp.min(jnp.where(is_max, jnp.arange(k, dtype=jnp.int32)[None, :, None], k - 1), axis=1)


def max_by_one_pass(similarity: Float32[Array, "b k c"]) -> tuple[Float32[Array, "b c"], Int32[Array, "b c"]]:
    """Returns what `max_by_two_passes` does, reading the similarities once; of several NaNs any index."""

    def larger(a: tuple[Array, Array], b: tuple[Array, Array]) -> tuple[Array, Array]:
        (value, index), (other, other_index) = a, b
        first = (value > other) | (value != value) | ((value == other) & (index < other_index))
        return jnp.where(first, value, other), jnp.where(first, index, other_index)

    index = jax.lax.broadcasted_iota(jnp.int32, similarity.shape, 1)
    smallest = jnp.float32(-jnp.inf), jnp.int32(similarity.shape[1] - 1)
    best, chosen = jax.lax.reduce((similarity, index), smallest, larger, (1,))
    return best, chosen


def _pull(
    similarity_bar: Callable[[Array, Array, Array], Array], settings: Settings, kept: Kept, best_bar: Array, size: int
) -> tuple[Array, Array]:
    """Returns gradients of (regions, table), both float32, from the gradient of one chunk's similarities.

    `similarity_bar(start, rows, best_bar of the chunk)` returns [b, k, c].
    """
    regions, _, table, unique, _ = kept

    def body(n: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        regions_bar, table_bar = carry
        start, rows, fresh = _chunk(unique, n, size)
        chunk_bar = jnp.where(fresh[:, None], jax.lax.dynamic_slice_in_dim(best_bar, start, size), 0.0)
        bar = similarity_bar(start, rows, chunk_bar.T).astype(regions.dtype)
        dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
        regions_bar = regions_bar + dot("bkc,cd->bkd", bar, take(table, rows))
        table_bar = table_bar.at[rows].add(dot("bkc,bkd->cd", bar, regions), unique_indices=True)
        return regions_bar, table_bar

    carry = tuple(zeros_after(best_bar, x.shape, settings.axes) for x in (regions, table))
    return in_chunks(unique.count, size, body, carry, most=table.shape[0])


def pull_by_product(kept: Kept, best_bar: Array, *, settings: Settings) -> tuple[Array, Array]:
    """Returns gradients of (regions, table) of the one-to-one matching, as products with one-hot matrices."""
    b, k, _ = kept.regions.shape
    size = chunk_size(kept.table.shape[0], 4 * b * k, settings.chunk_bytes)

    def similarity_bar(start: Array, rows: Array, chunk_bar: Array) -> Array:
        index = jax.lax.dynamic_slice_in_dim(kept.chosen, start, size).T
        one_hot = index[:, None, :] == jnp.arange(k, dtype=index.dtype)[None, :, None]
        return jnp.where(one_hot, chunk_bar[:, None, :], 0.0)

    return _pull(similarity_bar, settings, kept, best_bar, size)


def _pull_all(kept: Kept, best_bar: Array, *, settings: Settings) -> tuple[Array, Array]:
    """Returns gradients of (regions, table) of the one-to-many matching; similarities are computed again.

    v = sum_k p_k s_k with p = softmax(s / tau): dv/ds_k = p_k (1 + (s_k - v) / tau).
    """
    regions, region_mask, table, _, _ = kept
    b, k, _ = regions.shape
    size = chunk_size(table.shape[0], 8 * b * k, settings.chunk_bytes)

    def similarity_bar(start: Array, rows: Array, chunk_bar: Array) -> Array:
        similarity = _similarity(regions, region_mask, take(table, rows))
        scaled = _scaled(similarity, region_mask, settings.temperature)
        scaled = scaled - jnp.max(scaled, axis=1, keepdims=True)  # before the difference below, which would cancel
        weight = jax.nn.softmax(scaled, axis=1)
        return chunk_bar[:, None, :] * weight * (1.0 + scaled - jnp.sum(weight * scaled, axis=1, keepdims=True))

    return _pull(similarity_bar, settings, kept, best_bar, size)


def pull_by_index(kept: Kept, best_bar: Array, *, settings: Settings) -> tuple[Array, Array]:
    """Returns gradients of (regions, table) of the one-to-one matching, from the chosen regions alone."""
    regions, _, table, unique, chosen = kept
    b, k, d = regions.shape
    size = chunk_size(table.shape[0], 4 * b * k, settings.chunk_bytes)

    def body(n: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        regions_bar, table_bar = carry
        start, rows, fresh = _chunk(unique, n, size)
        chunk_bar = jnp.where(fresh[:, None], jax.lax.dynamic_slice_in_dim(best_bar, start, size), 0.0)
        index = jax.lax.dynamic_slice_in_dim(chosen, start, size)
        text = take(table, rows).astype(jnp.float32)

        def image(i: Array, inner: tuple[Array, Array]) -> tuple[Array, Array]:
            regions_bar, text_bar = inner
            weight = chunk_bar[:, i, None]
            text_bar = text_bar + weight * regions[i][index[:, i]]
            regions_bar = regions_bar.at[i, index[:, i]].add(weight * text)
            return regions_bar, text_bar

        inner = regions_bar, vary(jnp.zeros((size, d), jnp.float32), settings.axes)
        regions_bar, text_bar = jax.lax.fori_loop(0, b, image, inner)
        return regions_bar, table_bar.at[rows].add(text_bar, unique_indices=True)

    carry = tuple(zeros_after(best_bar, x.shape, settings.axes) for x in (regions, table))
    return in_chunks(unique.count, size, body, carry, most=table.shape[0])
