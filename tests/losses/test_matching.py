"""Scores of captions from the similarities of their concepts: against loops."""

import jax
import numpy as np

from detclipv2_jax.losses import matching
from detclipv2_jax.losses.concept_table import unique_rows


def test_scores_choices_and_votes_equal_loops():
    rng = np.random.default_rng(0)
    b, k, t, d, m = 3, 200, 10, 5, 3  # more regions than eight bits count
    regions, text = rng.normal(size=(b, k, d)).astype(np.float32), rng.normal(size=(t, d)).astype(np.float32)
    text[7] = text[2]
    canonical, mask = np.arange(t, dtype=np.int32), np.arange(t) != 4
    canonical[7] = 2
    unique = unique_rows(canonical, mask)
    region_mask = rng.random((b, k)) < [[1.0], [0.5], [0.01]]
    rows = rng.choice(np.flatnonzero(mask), size=(5, m))
    weights = rng.random((5, m)).astype(np.float32)
    settings = matching.Settings((), "max_sim", 1.0, 8 * b * k * 3)  # 3 concepts at once
    run = jax.jit(matching.caption_scores, static_argnums=0)
    scores, chosen, votes = run(settings, regions, text, region_mask, unique, np.asarray(unique.slot)[rows], weights)
    similarity = np.where(region_mask[:, :, None], np.einsum("bkd,td->bkt", regions, text), -np.inf)
    best = similarity.max(axis=1)  # [b, t]
    np.testing.assert_allclose(scores, np.einsum("cm,bcm->cb", weights, best[:, rows]), rtol=1e-5)
    order, count = np.asarray(unique.order), int(unique.count)
    assert sorted(order[:count].tolist()) == [0, 1, 2, 3, 5, 6, 8, 9]
    winners = similarity.argmax(axis=1)[:, order[:count]]  # [b, count]
    np.testing.assert_array_equal(np.asarray(chosen)[:count].T, winners)
    np.testing.assert_array_equal(votes, [np.bincount(row, minlength=k) for row in winners])


def test_one_pass_finds_the_same_maximum_and_index_as_two():
    rng = np.random.default_rng(0)
    similarity = rng.integers(-3, 4, (4, 50, 30)).astype(np.float32)  # with many equals: the lowest index counts
    similarity[1, 20:] = matching.LOW
    similarity[2] = matching.LOW
    for find in (matching.max_by_one_pass, matching.max_by_two_passes):
        best, index = jax.jit(find)(similarity)
        np.testing.assert_array_equal(best, similarity.max(axis=1))
        np.testing.assert_array_equal(index, similarity.argmax(axis=1))
        assert index.dtype == np.int32
    similarity[3, 7, 5] = np.nan
    assert np.isnan(jax.jit(matching.max_by_one_pass)(similarity)[0]).sum() == 1  # a loss must not hide it
