"""Texts of a batch in groups by length: short ones are not padded to the longest."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from detclipv2_jax.models import split


def num_rows(groups: Sequence[tuple[int, float]], rows: int) -> list[tuple[int, int]]:
    """Returns (length, number of rows) of every group, for the rows of a device's table."""
    left, found = rows, []
    for length, share in groups:
        found.append((length, min(left, math.ceil(share * rows))))
        left -= found[-1][1]
    return found


def encode_by_length(
    encode: Callable[[Any, Int[Array, "t l"]], Float[Array, "t d"]],
    params: Any,
    tokens: Int[Array, "t l"],
    mask: Bool[Array, " t"],
    groups: Sequence[tuple[int, float]],
) -> tuple[Float[Array, "t d"], Bool[Array, ""]]:
    """Returns what encode(params, tokens) does for the rows in `mask` (zeros for others), and whether a group was full.

    The rows of each device are sorted by length, the longest first; each group takes its share of them and encodes them
    at its own length. Rows that are longer than their group's, or for which no group is left, are all encoded at full
    length in a second pass, which runs only if there are any. So the result hangs on `groups` by rounding alone.

    Args:
      encode: of a causal text tower: what follows [EOS] changes nothing.
      params: its parameters.
      tokens: rows of [SOS], words, [EOS] (the largest id) and padding; split over the devices of `jax.set_mesh`.
      mask: rows that are used.
      groups: (length, share of a device's rows), the longest first.
    """
    parts = split.num_parts()
    tokens, used = tokens.reshape(parts, -1, tokens.shape[1]), mask.reshape(parts, -1)
    lengths = jnp.where(used, jnp.argmax(tokens, axis=2) + 1, 0)
    order = jnp.argsort(-lengths, axis=1)
    tokens, lengths = jnp.take_along_axis(tokens, order[..., None], axis=1), jnp.take_along_axis(lengths, order, axis=1)

    def encoded(params: Any, rows: Int[Array, "p r l"]) -> Float[Array, "p r d"]:
        return encode(params, rows.reshape(-1, rows.shape[2])).reshape(*rows.shape[:2], -1)

    texts, limits, start = [], [], 0
    for length, num in num_rows(groups, tokens.shape[1]):
        texts.append(encoded(params, tokens[:, start : start + num, :length]))
        limits.append(jnp.full(num, length))
        start += num
    rest = tokens.shape[1] - start
    texts.append(jnp.zeros((parts, rest, texts[0].shape[2]), texts[0].dtype))
    text, limit = jnp.concatenate(texts, axis=1), jnp.concatenate([*limits, jnp.zeros(rest, jnp.int32)])
    missed = lengths > limit[None]
    is_full = jnp.any(missed)

    @jax.checkpoint  # what the way back needs, if it were kept, would be written as zeros where this does not run
    def again(params: Any, rows: Int[Array, "p r l"]) -> Float[Array, "p r d"]:
        with jax.named_scope(split.RARELY):
            return encoded(params, rows)

    second = jax.lax.cond(is_full, again, lambda *_: jnp.zeros_like(text), params, tokens)
    text = jnp.where(missed[..., None], second, jnp.where((lengths > 0)[..., None], text, 0.0))
    text = jnp.take_along_axis(text, jnp.argsort(order, axis=1)[..., None], axis=1)
    return text.reshape(-1, text.shape[2]), is_full
