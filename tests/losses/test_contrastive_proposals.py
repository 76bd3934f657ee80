"""Choice of proposals: against greedy suppression in NumPy loops for every selection and scope."""

import functools

import contrastive_oracle as oracle
import flat
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from detclipv2_jax import config as config_lib
from detclipv2_jax.losses import proposals

SCALE, BIAS = 1.3, -4.6


def example(seed=0, num_anchors=30):
    """Returns the arguments of `select_proposals` by name, for the table and captions of the loss's example."""
    arrays, _ = oracle.example(seed)
    rng = np.random.default_rng(seed + 100)
    b, d = 16, 8
    corner = rng.random((b, num_anchors, 2)) * 50
    boxes = np.concatenate([corner, corner + 5 + rng.random((b, num_anchors, 2)) * 40], axis=2)
    arrays["text"][~arrays["concept_mask"]] *= 10.0  # would win every maximum
    return {
        "embeddings": rng.normal(size=(b, num_anchors, d)).astype(np.float32),
        "boxes": boxes.astype(np.float32),
        "text": arrays["text"],
        "scale": np.float32(SCALE),
        "bias": np.float32(BIAS),
        "centerness": rng.normal(size=(b, num_anchors)).astype(np.float32),
        "objectness": rng.normal(size=(b, num_anchors)).astype(np.float32),
        "anchor_mask": rng.random((b, num_anchors)) < 0.8,
        "concept_mask": arrays["concept_mask"],
        "canonical": arrays["canonical"],
        "caption_concepts": arrays["caption_concepts"],
        "caption_mask": arrays["caption_mask"],
        "batch_concepts": arrays["caption_concepts"],
        "batch_concepts_mask": arrays["caption_mask"],
    }


@functools.lru_cache
def _compiled(settings):
    return jax.jit(lambda arrays: flat.select_proposals(**arrays, **dict(settings)))


def run(arrays, *, num_devices=0, **settings):
    settings = {
        "selection": "text_batch",
        "scope": "global",
        "num_proposals": 6,
        "pre_nms": 20,
        "nms_iou": 0.45,
        "chunk_bytes": 30 * 8 * 7,  # 7 concepts
    } | settings
    with oracle.split_over(num_devices):
        return _compiled(tuple(sorted(settings.items())))(arrays)


def scores_of(arrays, selection, concepts_of_image):
    """Returns float64 scores [b, a] from the definition; `concepts_of_image(i)` are rows of the table."""
    sigmoid = lambda x: 1 / (1 + np.exp(-np.asarray(x, np.float64)))  # noqa: E731 – a formula
    if selection in ("classification", "iou"):
        return np.asarray(arrays["objectness"], np.float64)
    if selection == "centerness":
        return np.asarray(arrays["centerness"], np.float64)
    text = np.asarray(arrays["text"], np.float64)
    best = np.stack(
        [
            np.max(SCALE * np.asarray(regions, np.float64) @ text[concepts_of_image(i)].T, axis=1)
            for i, regions in enumerate(arrays["embeddings"])
        ]
    )
    return sigmoid(best + BIAS) * sigmoid(arrays["centerness"]) if selection == "text_batch_centerness" else best


def iou(a, b):
    width, height = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
    overlap = max(width, 0) * max(height, 0)
    return overlap / (np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2]) - overlap)


def greedy(boxes, scores, mask, *, num_proposals, pre_nms, nms_iou):
    """Returns the indices of the kept anchors, best first."""
    order = [int(a) for a in np.argsort(-np.where(mask, scores, -np.inf), kind="stable")[:pre_nms] if mask[a]]
    kept = []
    for a in order:
        if len(kept) < num_proposals and all(iou(boxes[a], boxes[other]) <= nms_iou for other in kept):
            kept.append(a)
    return kept


def assert_selected(result, arrays, scores, *, num_proposals=6, pre_nms=20, nms_iou=0.45):
    limits = {"num_proposals": num_proposals, "pre_nms": pre_nms, "nms_iou": nms_iou}
    for i, (indices, mask) in enumerate(zip(result.indices, result.mask, strict=True)):
        expected = greedy(arrays["boxes"][i], scores[i], arrays["anchor_mask"][i], **limits)
        assert list(np.asarray(indices)[np.asarray(mask)]) == expected, f"image {i}"
        assert mask[: len(expected)].all()
        np.testing.assert_array_equal(result.boxes[i], arrays["boxes"][i][indices])


@pytest.mark.parametrize("selection", proposals.SELECTIONS)
def test_equals_brute_force(selection):
    arrays = example()
    everything = np.flatnonzero(arrays["concept_mask"])
    own = lambda i: arrays["caption_concepts"][i][arrays["caption_mask"][i]]  # noqa: E731
    scores = scores_of(arrays, selection, own if selection == "text_sample" else lambda i: everything)
    assert_selected(run(arrays, selection=selection), arrays, scores)


@pytest.mark.parametrize(("scope", "num_devices"), [("global", 8), ("device", 8), ("device", 2)])
def test_scope_global_does_not_depend_on_devices_but_scope_device_does(scope, num_devices):
    arrays = example()
    images = 16 // num_devices  # a device

    def concepts(i):
        first = i // images * images if scope == "device" else 0
        captions = slice(first, first + images if scope == "device" else 16)
        if scope == "global":
            return np.flatnonzero(arrays["concept_mask"])
        return arrays["caption_concepts"][captions][arrays["caption_mask"][captions]]

    result = run(arrays, scope=scope, num_devices=num_devices)
    assert_selected(result, arrays, scores_of(arrays, "text_batch", concepts))


def test_scope_device_looks_at_the_captions_of_the_step_not_of_the_chunk():
    """Images in two chunks choose the same proposals as at once."""
    arrays = example()
    whole = run(arrays, scope="device")
    by_image = ("embeddings", "boxes", "centerness", "objectness", "anchor_mask", "caption_concepts", "caption_mask")
    halves = [run(arrays | {x: arrays[x][part] for x in by_image}, scope="device") for part in (slice(8), slice(8, 16))]
    for name, expected in whole._asdict().items():
        np.testing.assert_array_equal(np.concatenate([getattr(half, name) for half in halves]), expected)


def test_few_survivors_leave_places_unused():
    arrays = example()
    arrays["boxes"][:8] = arrays["boxes"][:8, :1]  # all in one place: one proposal
    arrays["anchor_mask"][8] = False  # none
    result = run(arrays)
    everything = np.flatnonzero(arrays["concept_mask"])
    assert_selected(result, arrays, scores_of(arrays, "text_batch", lambda i: everything))
    np.testing.assert_array_equal(result.mask[:9].sum(axis=1), [1] * 8 + [0])
    np.testing.assert_array_equal(result.indices[8], 0)
    np.testing.assert_array_equal(result.indices[:8, 1:], 0)  # not the best one again
    assert result.indices[:8, 0].any()


def test_what_may_not_be_chosen_takes_no_place_before_suppression():
    arrays = example()
    arrays["objectness"][~arrays["anchor_mask"]] += 10.0
    assert_selected(run(arrays, selection="iou", pre_nms=6), arrays, arrays["objectness"], pre_nms=6)


def test_of_equal_scores_the_lower_anchor_comes_first():
    arrays = example()
    arrays["centerness"] = np.zeros_like(arrays["centerness"])
    assert_selected(run(arrays, selection="centerness"), arrays, np.zeros((16, 30)))


def test_more_candidates_than_anchors_are_no_error():
    arrays = example()
    assert_selected(run(arrays, selection="iou", pre_nms=1000), arrays, arrays["objectness"], pre_nms=1000)


def test_fewer_anchors_than_proposals_are_no_error():
    limits = {"num_proposals": 40, "pre_nms": 50}
    arrays = example()
    result = run(arrays, selection="iou", **limits)
    assert_selected(result, arrays, arrays["objectness"], **limits)
    assert result.indices.shape == (16, 30)


@pytest.mark.parametrize("selection", ["text_sample", "text_batch"])
def test_bfloat16_is_exact_up_to_its_rounding(selection):
    """Scaled texts are rounded, products and their maximum are float32: no two anchors become equal."""
    arrays = example()
    embeddings, text = jnp.asarray(arrays["embeddings"], jnp.bfloat16), np.float32(SCALE) * arrays["text"]
    rounded = {
        "embeddings": np.asarray(embeddings),
        "text": np.asarray(jnp.asarray(text, jnp.bfloat16), np.float64) / SCALE,
    }
    everything = np.flatnonzero(arrays["concept_mask"])
    own = lambda i: arrays["caption_concepts"][i][arrays["caption_mask"][i]]  # noqa: E731
    scores = scores_of(arrays | rounded, selection, own if selection == "text_sample" else lambda i: everything)
    assert_selected(run(arrays | {"embeddings": embeddings}, selection=selection), arrays, scores)


def test_settings_are_those_of_the_configuration():
    config = config_lib.loss()
    config.update({"selection": "iou", "selection_scope": "device", "num_proposals": 7, "selection_pre_nms": 70})
    config.update({"selection_nms_iou": 0.33, "chunk_bytes": 11})
    assert proposals.settings_of(config) == proposals.SelectionSettings("iou", "device", 7, 70, 0.33, 11)


def test_gradient_of_the_choice_is_zero_and_of_the_taken_embeddings_is_local():
    arrays = {name: jnp.asarray(x) for name, x in example().items()}
    learned = ("embeddings", "boxes", "text", "scale", "bias", "centerness")
    settings = {"selection": "text_batch_centerness", "scope": "global", "chunk_bytes": 1 << 20}
    limits = {"num_proposals": 6, "pre_nms": 20, "nms_iou": 0.5}

    @jax.jit
    def gradient_and_choice(learned):
        def total(learned):
            chosen = flat.select_proposals(**arrays | learned, **settings, **limits)
            regions = proposals.take(learned["embeddings"], chosen.indices)
            return jnp.sum(jnp.where(chosen.mask[:, :, None], regions, 0.0)) + jnp.sum(chosen.boxes), chosen

        return jax.grad(total, has_aux=True)(learned)

    gradient, chosen = gradient_and_choice({name: arrays[name] for name in learned})
    taken = np.zeros((16, 30))
    for i in range(16):
        taken[i, chosen.indices[i][chosen.mask[i]]] = 1.0
    np.testing.assert_array_equal(gradient.pop("embeddings"), np.repeat(taken[:, :, None], 8, axis=2))
    assert not any(np.any(x) for x in gradient.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"selection": "best"}, "selection='best' is unknown; allowed are classification, iou"),
        ({"scope": "host"}, "scope='host' is unknown; allowed are device, global"),
        ({"pre_nms": 5}, "need 1 <= num_proposals <= pre_nms, not num_proposals=6, pre_nms=5"),
        ({"num_proposals": 0}, "need 1 <= num_proposals <= pre_nms, not num_proposals=0, pre_nms=20"),
    ],
)
def test_wrong_settings_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        run(example(), **change)


def test_missing_head_is_named():
    with pytest.raises(ValueError, match=r"selection='iou' needs objectness: set model.head.objectness='iou'"):
        run(example() | {"objectness": None}, selection="iou")
