"""Merging of equal texts: against loops over the rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from detclipv2_jax.losses import concept_table


def table(seed, num_rows=64, num_names=12):
    rng = np.random.default_rng(seed)
    names = rng.integers(num_names, size=num_rows)
    # ids that share one of the two words, and the largest id of all
    ids = np.stack([names // 3, names % 3], axis=1).astype(np.uint32)
    ids[names == 5] = 0xFFFFFFFF
    mask = rng.random(num_rows) < 0.7
    first = [
        next(row for row in range(num_rows) if mask[row] and names[row] == names[i]) if mask[i] else i
        for i in range(num_rows)
    ]
    return ids, mask, np.array(first)


@pytest.mark.parametrize("seed", range(3))
def test_canonical_rows_are_the_first_valid_ones(seed):
    ids, mask, first = table(seed)
    np.testing.assert_array_equal(jax.jit(concept_table.canonical_rows)(ids, mask), first)


def test_rows_are_equal_only_where_both_words_are():
    rng, table_of = np.random.default_rng(0), jax.jit(concept_table.Table.of)
    for _ in range(40):  # few rows, so that neighbours in order share one word or the other, on both sides of 2^31
        ids = rng.integers(0, 3, (6, 2)).astype(np.uint32) * np.uint32(0x7FFFFFFF)
        mask = rng.random(6) < 0.7
        same = (ids[:, None] == ids[None]).all(axis=2) & mask[None]
        found = table_of(ids, mask)
        np.testing.assert_array_equal(found.canonical, np.where(mask, same.argmax(axis=1), np.arange(6)))
        np.testing.assert_array_equal(found.mask, mask)


def test_canonical_rows_of_a_table_split_over_devices():
    ids, mask, first = table(3)
    mesh = jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    split = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    rows = jax.jit(concept_table.canonical_rows)(jax.device_put(ids, split), jax.device_put(mask, split))
    np.testing.assert_array_equal(rows, first)


@pytest.mark.parametrize("mask", [np.zeros(8, bool), np.ones(8, bool)])
def test_canonical_rows_of_empty_and_equal_tables(mask):
    rows = concept_table.canonical_rows(jnp.zeros((8, 2), jnp.uint32), mask)
    np.testing.assert_array_equal(rows, np.zeros(8) if mask[0] else np.arange(8))


def test_unique_rows_number_the_canonical_rows_without_gaps():
    _, mask, first = table(4)
    unique = concept_table.unique_rows(jnp.asarray(first, jnp.int32), mask)
    expected = sorted(set(first[mask]))
    assert unique.count == len(expected)
    np.testing.assert_array_equal(unique.order[: len(expected)], expected)
    np.testing.assert_array_equal(np.sort(unique.order), np.arange(len(mask)))
    np.testing.assert_array_equal(unique.order[unique.slot[mask]], first[mask])
