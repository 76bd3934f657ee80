"""What the paper is about, with its losses alone: pairs teach which region a word means that no box ever had.

Images are six regions: features of objects, or noise. A linear layer embeds regions, a table words. Boxes exist for
base words; captions, which name half of the objects and sometimes an absent one, name the novel words as well.
"""

import functools

import flat
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from detclipv2_jax.losses import proposals

NUM_BASE, NUM_WORDS, NUM_IMAGES, NUM_REGIONS, NUM_FEATURES = 8, 12, 16, 6, 32
NUM_STEPS, CHUNK_BYTES = 1200, 1 << 20
TX = optax.adam(1e-2)
PROTOTYPES = np.random.default_rng(7).normal(size=(NUM_WORDS, NUM_FEATURES)).astype(np.float32)
LEFT = np.arange(NUM_REGIONS, dtype=np.float32)[:, None] * 20  # boxes that stand apart
BOXES = np.concatenate([LEFT, LEFT, LEFT + 10, LEFT + 10], axis=1)


def draw(rng, *, num_words):
    """Returns (features, word of each region or -1) of a batch: one to three objects an image."""
    words = np.full((NUM_IMAGES, NUM_REGIONS), -1)
    for row in words:
        places = rng.permutation(NUM_REGIONS)[: rng.integers(1, 4)]
        row[places] = rng.choice(num_words, size=len(places), replace=False)
    features = rng.normal(size=(*words.shape, NUM_FEATURES)).astype(np.float32)
    features = np.where((words >= 0)[..., None], PROTOTYPES[words] + 0.3 * features, features)
    return features, words


def captions(rng, words):
    """Returns (words, mask) of a batch of captions, three places each."""
    concepts, mask = np.zeros((NUM_IMAGES, 3), np.int32), np.zeros((NUM_IMAGES, 3), bool)
    for i, row in enumerate(words):
        named = [word for word in row[row >= 0] if rng.random() < 0.5] or [rng.choice(row[row >= 0])]
        named += [rng.integers(NUM_WORDS)] if rng.random() < 0.1 else []
        named = named[:3]
        concepts[i, : len(named)], mask[i, : len(named)] = named, True
    return concepts, mask


def embed(params, features):
    """Returns (embeddings of regions and of words, scale, bias), both of length 1."""
    regions, words = features @ params["regions"], params["words"]
    unit = lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True)  # noqa: E731
    return unit(regions), unit(words), jnp.float32(10.0), jnp.float32(-4.6)


def detection_loss(params, features, labels):
    regions, words, scale, bias = embed(params, features)
    positive = labels >= 0
    loss = flat.alignment_loss(
        regions, words, scale=scale, bias=bias, concept_mask=jnp.arange(NUM_WORDS) < NUM_BASE,
        anchor_mask=jnp.ones_like(positive), labels=labels, positive=positive, alpha=0.25, gamma=2.0,
        chunk_bytes=CHUNK_BYTES,
    )  # fmt: skip
    return loss / jnp.sum(positive)


def pair_loss(params, features, concepts, mask):
    regions, words, scale, bias = embed(params, features)
    table = {"concept_mask": jnp.ones(NUM_WORDS, bool), "canonical": jnp.arange(NUM_WORDS, dtype=jnp.int32)}
    everywhere = jnp.ones(regions.shape[:2])
    chosen = flat.select_proposals(
        regions, jnp.broadcast_to(BOXES, (NUM_IMAGES, NUM_REGIONS, 4)), words, scale, bias, centerness=everywhere,
        objectness=None, anchor_mask=everywhere > 0, caption_concepts=concepts, caption_mask=mask,
        batch_concepts=concepts, batch_concepts_mask=mask, selection="text_batch", scope="global", num_proposals=4,
        pre_nms=NUM_REGIONS, nms_iou=0.6, chunk_bytes=CHUNK_BYTES, **table,
    )  # fmt: skip
    loss, _ = flat.word_region_loss(
        proposals.take(regions, chosen.indices), words, scale, region_mask=chosen.mask, region_areas=None,
        caption_concepts=concepts, caption_mask=mask, image_mask=jnp.ones(NUM_IMAGES, bool), matching="one_to_one",
        side="text_to_image", temperature=0.5, label_smoothing=0.1, matching_temperature=0.1, chunk_bytes=CHUNK_BYTES,
        **table,
    )  # fmt: skip
    return 0.1 * loss


@functools.partial(jax.jit, static_argnums=0)
def step(loss, params, state, *batch):
    """Returns parameters and optimizer state after one update."""
    updates, state = TX.update(jax.grad(loss)(params, *batch), state)
    return optax.apply_updates(params, updates), state


@functools.cache
def trained(*, with_pairs):
    """Returns the parameters after NUM_STEPS detection steps, a step of pairs after each of them or none."""
    rng = np.random.default_rng(1)
    shapes = {"regions": (NUM_FEATURES, 16), "words": (NUM_WORDS, 16)}
    params = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
    state = TX.init(params)
    for _ in range(NUM_STEPS):
        params, state = step(detection_loss, params, state, *draw(rng, num_words=NUM_BASE))
        if with_pairs:
            features, words = draw(rng, num_words=NUM_WORDS)
            params, state = step(pair_loss, params, state, features, *captions(rng, words))
    return params


def margins(params, *, novel):
    """Returns by how much a word's own region is more similar to it than any other of its image, an object a row."""
    rng, found = np.random.default_rng(99), []
    for _ in range(10):
        features, words = draw(rng, num_words=NUM_WORDS)
        regions, table, scale, _ = embed(params, features)
        similarity = np.asarray(scale * jnp.einsum("brd,wd->brw", regions, table))
        for image, region in np.argwhere((words >= NUM_BASE) if novel else (words >= 0) & (words < NUM_BASE)):
            of_word = similarity[image, :, words[image, region]]
            found.append(of_word[region] - np.delete(of_word, region).max())
    return np.array(found)


@pytest.mark.slow
def test_pairs_teach_which_region_a_novel_word_means():
    apart = margins(trained(with_pairs=True), novel=True)
    assert np.mean(apart > 0) > 0.8
    assert np.mean(apart) > 1.0


@pytest.mark.slow
def test_boxes_alone_do_not():
    apart = margins(trained(with_pairs=False), novel=True)
    assert np.mean(apart > 0) < 0.4  # chance: 1/6
    assert np.mean(apart) < 0.0


def test_words_with_boxes_stay_learned():
    for with_pairs in (False, True):
        assert np.mean(margins(trained(with_pairs=with_pairs), novel=False) > 0) > 0.9
