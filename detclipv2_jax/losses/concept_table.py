"""Equal texts of the global concept table are merged here: one canonical row for each distinct text.

Every host contributes its own rows, so the table of the global batch repeats common names. A repeated name
must be one column: as two columns it would be its own negative. All shapes are static; everything works
under `jit` with the table sharded by rows (the ids are small, XLA gathers them).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32, UInt32


def canonical_rows(ids: UInt32[Array, "t 2"], mask: Bool[Array, " t"]) -> Int32[Array, " t"]:
    """Returns for each row the first valid row with the same id; a masked row returns itself.

    Steps: 1. sort rows by (valid first, id, row); 2. the first row of every run of equal ids is canonical;
    3. sort back (a second sort is faster than a scatter on TPUs).
    """
    rows = jnp.arange(ids.shape[0], dtype=jnp.int32)
    masked, high, low, row = jax.lax.sort((~mask, ids[:, 0], ids[:, 1], rows), num_keys=4)
    starts = (high[1:] != high[:-1]) | (low[1:] != low[:-1]) | masked[1:]
    starts = jnp.concatenate([jnp.ones((1,), bool), starts])
    first = row[jax.lax.cummax(jnp.where(starts, rows, 0))]
    return jax.lax.sort((row, first), num_keys=1)[1]


class Table(NamedTuple):
    """Which rows of the global concept table hold concepts, and which of them repeat others."""

    mask: Bool[Array, " t"]
    canonical: Int32[Array, " t"]  # the first row with the same text, whose embedding stands for all

    @classmethod
    def of(cls, ids: UInt32[Array, "t 2"], mask: Bool[Array, " t"]) -> Table:
        """Returns the table of a batch from the ids of its rows' texts."""
        return cls(mask, canonical_rows(ids, mask))


class Concepts(NamedTuple):
    """What a logit needs beside a region: scale * region . text + bias."""

    text: Float[Array, "t d"]  # L2-normalised embeddings
    scale: Float[Array, ""]
    bias: Float[Array, ""]


class Captions(NamedTuple):
    """The concepts of each caption as rows of the table, the caption itself first, then its phrases."""

    concepts: Int32[Array, "b m"]
    mask: Bool[Array, "b m"]


class UniqueRows(NamedTuple):
    """The canonical rows of a table, numbered without gaps."""

    order: Int32[Array, " t"]  # the canonical rows in ascending order, then all others
    slot: Int32[Array, " t"]  # for each row the position of its canonical row in `order`
    count: Int32[Array, ""]  # type: ignore[assignment]  # number of canonical rows; hides tuple.count


@jax.named_scope("concept_table")
def unique_rows(canonical: Int32[Array, " t"], mask: Bool[Array, " t"]) -> UniqueRows:
    """Returns the canonical rows first, so that a loop over `count` of them skips padding and repetitions."""
    is_unique = mask & (canonical == jnp.arange(canonical.shape[0], dtype=jnp.int32))
    order = jnp.argsort(~is_unique, stable=True).astype(jnp.int32)
    slot = jnp.cumsum(is_unique, dtype=jnp.int32) - 1
    return UniqueRows(order, jnp.maximum(slot, 0)[canonical], jnp.sum(is_unique, dtype=jnp.int32))
