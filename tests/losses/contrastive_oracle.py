"""The word-region contrastive loss in float64 NumPy loops, written from the formulas, with analytic gradients.

Also an example and ways to run ours on it.
"""

import contextlib
import functools
import os
import pathlib

import flat
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType


def example(seed=0, *, b=16, k=5, d=8, m=4, t=48, dtype=np.float32, distinct=20, used=0.8):
    """Returns (arrays, ids): ragged captions, repeated phrases, missing proposals, padding.

    A share `used` of the table's rows is in use; names are drawn from `distinct` ones. The arrays are the positional
    and keyword array arguments of `word_region_loss`; ids are those of the table.
    """
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(distinct, d))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    names = rng.integers(distinct, size=t)
    concept_mask = rng.random(t) < used
    ids = np.stack([names // 3, names % 3], axis=1).astype(np.uint32)
    canonical = np.arange(t, dtype=np.int32)
    for row in range(t):
        same = [other for other in range(t) if concept_mask[other] and names[other] == names[row]]
        if concept_mask[row]:
            canonical[row] = same[0]
    caption_mask = np.arange(m)[None] < rng.integers(1, m + 1, size=(b, 1))  # at least the caption itself
    rows = np.flatnonzero(concept_mask)
    caption_concepts = np.where(caption_mask, rng.choice(rows, size=(b, m)), 0).astype(np.int32)
    region_mask = rng.permuted(np.arange(k)[None] < rng.integers(1, k + 1, size=(b, 1)), axis=1)
    image_mask = np.ones(b, bool)
    image_mask[3] = False
    return {
        "regions": rng.normal(size=(b, k, d)).astype(dtype),
        "text": vectors[names].astype(dtype),  # equal texts have equal embeddings
        "scale": np.asarray(1.7, dtype),
        "region_mask": region_mask,
        "region_areas": rng.random((b, k)).astype(np.float32),
        "concept_mask": concept_mask,
        "canonical": canonical,
        "caption_concepts": caption_concepts,
        "caption_mask": caption_mask,
        "image_mask": image_mask,
    }, ids


def loss_and_gradients(
    regions,
    text,
    scale,
    *,
    region_mask,
    region_areas,
    concept_mask,
    canonical,
    caption_concepts,
    caption_mask,
    image_mask,
    matching="one_to_one",
    side="text_to_image",
    temperature=0.5,
    label_smoothing=0.1,
    matching_temperature=0.1,
):
    """Returns (loss, gradients of regions, text and scale, metrics), all float64."""
    regions, text, scale = (np.asarray(x, np.float64) for x in (regions, text, scale))
    pairs = [i for i in range(len(regions)) if image_mask[i] and region_mask[i].any() and caption_mask[i].any()]
    n = len(pairs)
    concepts = {
        j: [canonical[c] for c, used in zip(caption_concepts[j], caption_mask[j], strict=True) if used] for j in pairs
    }
    if matching == "max_size":
        concepts = {j: [canonical[caption_concepts[j][0]]] for j in pairs}

    def best(c, i):
        """Returns the region of image i that concept c is matched with, the first one among equals."""
        values = region_areas[i] if matching == "max_size" else scale * regions[i] @ text[c]
        return np.argmax(np.where(region_mask[i], values, -np.inf))

    scores = np.zeros((n, n))  # caption, image
    parts = {}  # (caption, image) -> [(concept, region, d score / d similarity)]
    for y, j in enumerate(pairs):
        for x, i in enumerate(pairs):
            parts[y, x] = []
            for c in concepts[j]:
                s = scale * regions[i] @ text[c]
                weights = np.zeros(len(s))
                if matching == "one_to_many":
                    valid = np.flatnonzero(region_mask[i])
                    p = np.exp((s[valid] - s[valid].max()) / matching_temperature)
                    p /= p.sum()
                    value = p @ s[valid]
                    weights[valid] = p * (1 + (s[valid] - value) / matching_temperature)
                else:
                    weights[best(c, i)] = 1.0
                    value = s[best(c, i)]
                scores[y, x] += value / len(concepts[j])
                parts[y, x] += [(c, r, weights[r] / len(concepts[j])) for r in np.flatnonzero(weights)]

    # the image's side: the best concept of every proposal, averaged over the proposals (section 3.2)
    image_scores, image_parts = np.zeros((n, n)), {}
    for y, j in enumerate(pairs):
        for x, i in enumerate(pairs):
            valid = [best(0, i)] if matching == "max_size" else np.flatnonzero(region_mask[i])
            named = [max(concepts[j], key=lambda c: scale * regions[i][r] @ text[c]) for r in valid]
            image_parts[y, x] = [(c, r, 1 / len(valid)) for c, r in zip(named, valid, strict=True)]
            image_scores[y, x] = np.mean([scale * regions[i][r] @ text[c] for c, r, _ in image_parts[y, x]])

    target = (1 - label_smoothing) * np.eye(n) + label_smoothing / n
    to_images, to_texts = (scores, parts, 1), (image_scores, image_parts, 0)  # the axis of the softmax
    sides = {
        "text_to_image": [(to_images, 1.0)],
        "image_to_text": [(to_texts, 1.0)],
        "bilateral": [(to_images, 0.5), (to_texts, 0.5)],
    }[side]
    loss, regions_bar, text_bar, scale_bar = 0.0, np.zeros_like(regions), np.zeros_like(text), 0.0
    for (s, terms_of, axis), share in sides:
        z = s / temperature
        log_p = z - z.max(axis=axis, keepdims=True)
        log_p -= np.log(np.exp(log_p).sum(axis=axis, keepdims=True))
        loss += share * -(target * log_p).sum() / n
        scores_bar = share * (np.exp(log_p) - target) / n / temperature
        for (y, x), terms in terms_of.items():
            for c, r, weight in terms:
                bar = scores_bar[y, x] * weight
                regions_bar[pairs[x], r] += bar * scale * text[c]
                text_bar[c] += bar * scale * regions[pairs[x], r]
                scale_bar += bar * regions[pairs[x], r] @ text[c]

    all_concepts = set(np.flatnonzero(concept_mask & (canonical == np.arange(len(canonical)))))
    ranks = [(scores[y] >= scores[y, y]).sum() for y in range(n)]
    own = [len({best(c, i) for c in concepts[i]}) / region_mask[i].sum() for i in pairs]
    others = [len({best(c, i) for c in all_concepts - set(concepts[i])}) / region_mask[i].sum() for i in pairs]
    metrics = {
        "accuracy": np.mean(np.equal(ranks, 1)),
        "rank": np.mean(ranks),
        "similarity": np.mean(np.diagonal(scores)),
        "chosen_by_own": np.mean(own),
        "chosen_by_others": np.mean(others),
        "num_concepts": float(len(all_concepts)),
    }
    return loss, (regions_bar, text_bar, scale_bar), metrics


def split_over(num_devices):
    """Returns a context: the mesh of `num_devices` simulated devices, or none at all for 0."""
    if num_devices == 0:
        return contextlib.nullcontext()
    shape = (num_devices, 1) if num_devices < 4 else (num_devices // 2, 2)
    devices = jax.devices()[:num_devices]
    return jax.set_mesh(jax.make_mesh(shape, ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2, devices=devices))


@functools.lru_cache
def _compiled(settings):
    def loss(learned, rest):
        return flat.word_region_loss(**learned, **rest, **dict(settings))

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def run(arrays, *, num_devices=0, gather=True, **settings):
    """Returns (loss, gradients of regions, text and scale, metrics) of `word_region_loss`, like the oracle.

    With `gather=False` the gradients stay where they are.
    """
    settings = {
        "matching": "one_to_one",
        "side": "text_to_image",
        "temperature": 0.5,
        "label_smoothing": 0.1,
        "matching_temperature": 0.1,
        "chunk_bytes": 16 * 5 * 8 * 7,  # 7 concepts without a mesh
    } | settings
    learned = {name: jnp.asarray(arrays[name]) for name in ("regions", "text", "scale")}
    rest = {name: x for name, x in arrays.items() if name not in learned}
    with split_over(num_devices):
        (loss, metrics), gradients = _compiled(tuple(sorted(settings.items())))(learned, rest)
    gradients = tuple(np.asarray(gradients[name]) if gather else gradients[name] for name in learned)
    return float(loss), gradients, {name: float(x) for name, x in metrics.items()}


def assert_close(result, expected, tolerance=1e-5):
    """Compares (loss, gradients, metrics)."""
    np.testing.assert_allclose(result[0], expected[0], rtol=tolerance, atol=tolerance)
    for name, x, y in zip(("regions", "text", "scale"), result[1], expected[1], strict=True):
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance, err_msg=f"gradient of {name}")
    assert result[2].keys() == expected[2].keys()
    for name, x in result[2].items():
        np.testing.assert_allclose(x, expected[2][name], rtol=1e-5, atol=1e-5, err_msg=name)


def environment():
    """Returns the environment of a Python process that imports the package, without this one's number of devices."""
    root = str(pathlib.Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    return {name: x for name, x in os.environ.items() if name != "XLA_FLAGS"} | {"PYTHONPATH": path}
