"""The word-region contrastive loss: against float64 loops, over devices and chunks of images, and does it learn?"""

import functools

import contrastive_oracle as oracle
import flat
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from detclipv2_jax import config as config_lib
from detclipv2_jax.losses import contrastive, matching
from detclipv2_jax.losses.concept_table import unique_rows

LEARNED = ("regions", "text", "scale")
SWITCHES = [
    # every matching with every side; the other values differ from case to case
    ("one_to_one", "text_to_image", {}),
    ("one_to_one", "image_to_text", {"label_smoothing": 0.0, "chunk_bytes": 1 << 20}),
    ("one_to_one", "bilateral", {"temperature": 0.07}),
    ("one_to_many", "text_to_image", {"matching_temperature": 1.0}),
    ("one_to_many", "image_to_text", {"label_smoothing": 0.3, "chunk_bytes": 1}),
    ("one_to_many", "bilateral", {}),
    ("max_size", "text_to_image", {"temperature": 1.0}),
    ("max_size", "image_to_text", {"label_smoothing": 0.3}),
    ("max_size", "bilateral", {"label_smoothing": 0.0}),
]


def both(arrays, *, num_devices=0, **settings):
    """Returns (ours, brute force)."""
    formula = {name: x for name, x in settings.items() if name != "chunk_bytes"}
    return oracle.run(arrays, num_devices=num_devices, **settings), oracle.loss_and_gradients(**arrays, **formula)


@pytest.mark.parametrize("match", contrastive.MATCHINGS)
def test_brute_force_gradients_are_its_finite_differences(match):
    arrays, _ = oracle.example(1, b=5, k=3, d=3, m=3, t=10, dtype=np.float64)
    settings = {"matching": match, "side": "bilateral", "matching_temperature": 0.5}
    _, gradients, _ = oracle.loss_and_gradients(**arrays, **settings)
    step = 1e-6
    for name, gradient in zip(LEARNED, gradients, strict=True):
        differences = np.zeros_like(gradient)
        for index in np.ndindex(gradient.shape):
            values = []
            for sign in (1, -1):
                moved = arrays[name].copy()
                moved[index] += sign * step
                values.append(oracle.loss_and_gradients(**arrays | {name: moved}, **settings)[0])
            differences[index] = (values[0] - values[1]) / (2 * step)
        np.testing.assert_allclose(gradient, differences, atol=1e-8)


@pytest.mark.parametrize(("match", "side", "settings"), SWITCHES)
def test_equals_brute_force(match, side, settings):
    arrays, _ = oracle.example()
    oracle.assert_close(*both(arrays, matching=match, side=side, **settings))


@pytest.mark.parametrize("match", ["one_to_one", "one_to_many"])
def test_concepts_of_two_chunks_count_once(match):
    """48 different concepts in chunks of 7: the last chunk begins with concepts of the one before."""
    arrays, _ = oracle.example(distinct=1 << 14, used=1.0)
    result, expected = both(arrays, matching=match)
    assert expected[2]["num_concepts"] == 48
    oracle.assert_close(result, expected)


@pytest.mark.parametrize("seed", range(2, 5))
def test_equals_brute_force_on_other_examples(seed):
    oracle.assert_close(*both(oracle.example(seed)[0]))


@pytest.mark.parametrize(
    ("match", "num_devices"),
    [("one_to_one", 1), ("one_to_one", 2), ("one_to_one", 8), ("one_to_many", 8), ("max_size", 8)],
)
def test_number_of_devices_changes_nothing(match, num_devices):
    result, expected = both(oracle.example()[0], num_devices=num_devices, matching=match, side="bilateral")
    oracle.assert_close(result, expected)


@pytest.mark.parametrize("num_devices", [0, 8])
def test_permutations_change_nothing(num_devices):
    """Of pairs (with 8 devices: also over devices), of concepts within captions, of table rows, of proposals."""
    arrays, _ = oracle.example()
    settings = {"num_devices": num_devices, "side": "bilateral"}
    loss, gradients, metrics = oracle.run(arrays, **settings)
    rng = np.random.default_rng(7)
    b, k, _ = arrays["regions"].shape
    t = len(arrays["text"])

    pairs = rng.permutation(b)
    by_pair = [name for name in arrays if name not in ("text", "scale", "canonical", "concept_mask")]
    permuted = oracle.run(arrays | {name: arrays[name][pairs] for name in by_pair}, **settings)
    oracle.assert_close(permuted, (loss, (gradients[0][pairs], *gradients[1:]), metrics))

    within = np.stack([rng.permutation(arrays["caption_mask"].shape[1]) for _ in range(b)])
    mixed = {name: np.take_along_axis(arrays[name], within, axis=1) for name in ("caption_concepts", "caption_mask")}
    oracle.assert_close(oracle.run(arrays | mixed, **settings), (loss, gradients, metrics))

    rows = rng.permutation(t)
    new_row = np.argsort(rows).astype(np.int32)  # of each old row
    # within a group of equal texts the gradient moves to the row that is now the first
    mask, old = arrays["concept_mask"][rows], arrays["canonical"][rows]
    canonical = np.array([np.flatnonzero((old == old[i]) & mask)[0] if mask[i] else i for i in range(t)], np.int32)
    table = {
        "text": arrays["text"][rows],
        "concept_mask": mask,
        "canonical": canonical,
        "caption_concepts": new_row[arrays["caption_concepts"]],
    }
    text_bar = np.zeros_like(gradients[1])
    text_bar[canonical[new_row[arrays["canonical"]]]] = gradients[1][arrays["canonical"]]
    oracle.assert_close(oracle.run(arrays | table, **settings), (loss, (gradients[0], text_bar, gradients[2]), metrics))

    regions = rng.permutation(k)
    mixed = {name: arrays[name][:, regions] for name in ("regions", "region_mask", "region_areas")}
    oracle.assert_close(
        oracle.run(arrays | mixed, **settings), (loss, (gradients[0][:, regions], *gradients[1:]), metrics)
    )


@pytest.mark.parametrize("match", ["one_to_one", "one_to_many"])
def test_what_is_masked_has_no_influence_and_no_gradient(match):
    arrays, _ = oracle.example()
    settings = {"matching": match, "side": "bilateral"}
    expected = oracle.run(arrays, **settings)
    garbage = {name: arrays[name].copy() for name in ("regions", "text", "caption_concepts")}
    garbage["regions"][~arrays["region_mask"]] = 1e3
    garbage["regions"][~arrays["image_mask"]] = 1e3
    garbage["text"][~arrays["concept_mask"]] = 1e3
    garbage["text"][arrays["canonical"] != np.arange(len(arrays["canonical"]))] = 1e3  # repetitions
    garbage["caption_concepts"][~arrays["caption_mask"]] = 11
    result = oracle.run(arrays | garbage, **settings)
    oracle.assert_close(result, expected)
    assert not result[1][0][~arrays["region_mask"]].any()
    assert not result[1][0][~arrays["image_mask"]].any()
    assert not result[1][1][~arrays["concept_mask"]].any()


@pytest.mark.parametrize("match", contrastive.MATCHINGS)
@pytest.mark.parametrize("chunk_bytes", [4480, 1 << 20])
def test_images_without_proposals_and_captions_without_concepts_make_no_pair(match, chunk_bytes):
    arrays, _ = oracle.example()
    arrays["region_mask"][5] = False
    arrays["caption_mask"][6] = False
    for side in ("text_to_image", "bilateral"):
        result, expected = both(arrays, side=side, matching=match, chunk_bytes=chunk_bytes)
        oracle.assert_close(result, expected)
        assert not result[1][0][5:7].any()


def test_a_batch_without_pairs_gives_zero():
    arrays, _ = oracle.example()
    loss, gradients, metrics = oracle.run(arrays | {"image_mask": np.zeros(16, bool)}, side="bilateral")
    assert loss == 0.0
    assert not any(gradient.any() for gradient in gradients)
    assert all(np.isfinite(x) for x in metrics.values())


def test_of_equal_regions_the_first_one_gets_the_gradient():
    arrays, _ = oracle.example()
    rng = np.random.default_rng(0)
    arrays["regions"] = rng.integers(-2, 3, size=arrays["regions"].shape).astype(np.float32)  # exact products
    arrays["text"] = rng.integers(-2, 3, size=arrays["text"].shape).astype(np.float32)[arrays["canonical"]]
    arrays["regions"][:, 2:4] = arrays["regions"][:, 1:2]
    arrays["region_mask"][:, 1:4] = True
    arrays["scale"] = np.float32(0.25)
    result, expected = both(arrays)
    for metrics in (result[2], expected[2]):
        del metrics["rank"], metrics["accuracy"]  # images tie up to rounding
    oracle.assert_close(result, expected)
    assert result[1][0][:, 1].any()
    assert not result[1][0][:, 2:4].any()


def test_equal_scores_are_no_hit():
    arrays, _ = oracle.example()
    arrays["image_mask"][:] = True
    _, _, metrics = oracle.run(arrays | {"regions": np.ones_like(arrays["regions"])}, side="bilateral")
    assert metrics["accuracy"] == 0.0
    assert metrics["rank"] == 16.0


def test_a_negative_scale_turns_the_choice_of_regions():
    arrays, _ = oracle.example()
    oracle.assert_close(*both(arrays | {"scale": np.float32(-1.3)}))


@pytest.mark.parametrize("side", ["text_to_image", "bilateral"])
def test_bfloat16_is_exact_up_to_its_rounding(side):
    """Products of rounded embeddings are exact in float32; only the gradient of the regions is rounded again.

    From the images' side gradients of products are rounded, too.
    """
    arrays, _ = oracle.example()
    arrays["scale"] = np.float32(2.0)  # a power of two commutes with the rounding
    regions = jnp.asarray(arrays["regions"], jnp.bfloat16)
    loss, gradients, _ = oracle.run(arrays | {"regions": regions}, side=side)
    rounded = {name: np.asarray(jnp.asarray(arrays[name], jnp.bfloat16), np.float64) for name in ("regions", "text")}
    expected_loss, expected, _ = oracle.loss_and_gradients(**arrays | rounded, side=side)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
    assert gradients[0].dtype == jnp.bfloat16
    by_products = (2**-8, 1e-4, 1e-6) if side == "text_to_image" else (2**-6, 2**-6, 1e-3)
    np.testing.assert_allclose(gradients[0].astype(np.float32), expected[0], rtol=by_products[0], atol=by_products[2])
    np.testing.assert_allclose(gradients[1], expected[1], rtol=by_products[1], atol=by_products[2])


def test_both_forms_of_the_backward_pass_agree():
    """Following the indices (CPU) and products with one-hot matrices (TPU, GPU)."""
    arrays, _ = oracle.example(5)
    b, k, _ = arrays["regions"].shape
    rng = np.random.default_rng(0)
    t = len(arrays["text"])
    chosen = jnp.asarray(rng.integers(k, size=(t, b)), jnp.int16)
    best_bar = jnp.asarray(rng.normal(size=(t, b)), jnp.float32)
    unique = unique_rows(jnp.asarray(arrays["canonical"]), jnp.asarray(arrays["concept_mask"]))
    settings = matching.Settings((), "one_to_one", 0.1, 4 * b * k * 5)
    kept = matching.Kept(*(jnp.asarray(arrays[name]) for name in ("regions", "region_mask", "text")), unique, chosen)
    results = [
        jax.jit(functools.partial(pull, settings=settings))(kept, best_bar)
        for pull in (matching.pull_by_index, matching.pull_by_product)
    ]
    for x, y in zip(*results, strict=True):
        assert np.abs(x).max() > 1.0
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_gradient_accumulation_over_chunks_of_images_is_exact():
    """Embed all chunks, take the loss's gradient of the embeddings once, pull it through the encoder chunk by chunk."""
    arrays, _ = oracle.example()
    rng = np.random.default_rng(0)
    pixels = jnp.asarray(rng.normal(size=(16, 5, 6)), jnp.float32)
    tokens = jnp.asarray(rng.normal(size=(48, 6)), jnp.float32)[arrays["canonical"]]
    params = {
        "image": jnp.asarray(rng.normal(size=(6, 8)), jnp.float32),
        "text": jnp.asarray(rng.normal(size=(6, 8)), jnp.float32),
        "scale": jnp.float32(2.0),
    }
    rest = {name: x for name, x in arrays.items() if name not in LEARNED}
    values = {"temperature": 0.5, "label_smoothing": 0.1, "matching_temperature": 0.1, "chunk_bytes": 1 << 20}
    switches = {"matching": "one_to_one", "side": "text_to_image"}

    def embed_images(params, pixels):
        return jnp.tanh(pixels @ params["image"])

    def embed_text(params):
        text = tokens @ params["text"]
        return text / jnp.linalg.norm(text, axis=1, keepdims=True)

    def loss(regions, text, scale):
        return flat.word_region_loss(regions, text, scale, **rest, **values, **switches)[0]

    @jax.jit
    def at_once(params):
        return jax.value_and_grad(lambda p: loss(embed_images(p, pixels), embed_text(p), p["scale"]))(params)

    @functools.partial(jax.jit, static_argnames="num_chunks")
    def in_chunks(params, *, num_chunks):
        chunks = pixels.reshape(num_chunks, -1, 5, 6)
        regions = jax.lax.map(lambda chunk: embed_images(params, chunk), chunks)
        text, pull_text = jax.vjp(embed_text, params)
        value, (regions_bar, text_bar, scale_bar) = jax.value_and_grad(loss, (0, 1, 2))(
            regions.reshape(16, 5, 8), text, params["scale"]
        )
        (total,) = pull_text(text_bar)
        for chunk, chunk_bar in zip(chunks, regions_bar.reshape(regions.shape), strict=True):
            (gradient,) = jax.vjp(lambda p, chunk=chunk: embed_images(p, chunk), params)[1](chunk_bar)
            total = jax.tree.map(jnp.add, total, gradient)
        return value, total | {"scale": total["scale"] + scale_bar}

    value, gradient = at_once(params)
    assert all(np.abs(x).max() > 1e-3 for x in gradient.values())
    for num_chunks in (2, 4, 8):
        chunked_value, chunked_gradient = in_chunks(params, num_chunks=num_chunks)
        np.testing.assert_allclose(chunked_value, value, rtol=1e-6)
        for name, x in gradient.items():
            tolerance = 1e-5 * np.abs(x).max()
            np.testing.assert_allclose(chunked_gradient[name], x, rtol=0, atol=tolerance, err_msg=name)


@pytest.mark.slow
def test_gradient_steps_find_the_planted_regions():
    """Which region shows a concept is never told: only which images and captions belong together."""
    rng = np.random.default_rng(0)
    b, k, d, m, num_names = 192, 8, 16, 3, 32
    names = np.stack([rng.choice(num_names, size=m, replace=False) for _ in range(b)])
    text = rng.normal(size=(num_names, d))
    text /= np.linalg.norm(text, axis=1, keepdims=True)
    mixing = np.linalg.qr(rng.normal(size=(d, d)))[0]  # what has to be learned
    features = rng.normal(size=(b, k, d)) / np.sqrt(d)
    planted = np.stack([rng.permutation(k)[:m] for _ in range(b)])
    for i in range(b):
        features[i, planted[i]] = text[names[i]] @ mixing + 0.02 * rng.normal(size=(m, d))
    text, features = jnp.asarray(text, jnp.float32), jnp.asarray(features, jnp.float32)
    weights = jnp.asarray(rng.normal(size=(d, d)) / np.sqrt(d), jnp.float32)

    def loss(weights):
        return flat.word_region_loss(
            features @ weights,
            text,
            jnp.float32(5.0),
            region_mask=jnp.ones((b, k), bool),
            region_areas=None,
            concept_mask=jnp.ones(num_names, bool),
            canonical=jnp.arange(num_names, dtype=jnp.int32),
            caption_concepts=jnp.asarray(names, jnp.int32),
            caption_mask=jnp.ones((b, m), bool),
            image_mask=jnp.ones(b, bool),
            matching="one_to_one",
            side="text_to_image",
            temperature=0.5,
            label_smoothing=0.1,
            matching_temperature=0.1,
            chunk_bytes=1 << 24,
        )

    optimizer = optax.adam(3e-2)

    @jax.jit
    def step(weights, state):
        gradient, metrics = jax.grad(loss, has_aux=True)(weights)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(weights, updates), state, metrics

    def found(weights):
        similarity = jnp.einsum("bkd,bmd->bkm", features @ weights, text[names])
        return np.mean(np.argmax(similarity, axis=1) == planted)

    assert found(weights) < 0.5
    state = optimizer.init(weights)
    for _ in range(150):
        weights, state, metrics = step(weights, state)
    assert found(weights) >= 0.99
    assert metrics["accuracy"] > 0.95
    np.testing.assert_allclose(metrics["chosen_by_own"], m / k, rtol=0.05)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"matching": "best"}, "matching='best' is unknown; allowed are max_size, one_to_one, one_to_many"),
        ({"side": "both"}, "side='both' is unknown; allowed are text_to_image, image_to_text, bilateral"),
        ({"label_smoothing": 1.0}, r"label_smoothing=1.0 must be in \[0, 1\)"),
        ({"temperature": 0.0}, "temperature=0.0 must be positive"),
        ({"matching_temperature": -1.0}, "matching_temperature=-1.0 must be positive"),
    ],
)
def test_wrong_settings_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        oracle.run(oracle.example()[0], **change)


def test_settings_are_those_of_the_configuration():
    config = config_lib.loss()
    values = {"matching": "max_size", "side": "bilateral", "temperature": 0.3, "label_smoothing": 0.2}
    values |= {"matching_temperature": 0.7, "chunk_bytes": 11}
    config.update(values)
    assert contrastive.settings_of(config) == contrastive.ContrastiveSettings(**values)


def test_missing_areas_and_uneven_splits_are_named():
    arrays, _ = oracle.example(b=12)
    with pytest.raises(ValueError, match=r"matching='max_size' needs proposed\.areas"):
        oracle.run(arrays | {"region_areas": None}, matching="max_size")
    with pytest.raises(ValueError, match=r"arrays of \(12, 48\) rows cannot be split evenly over 8 devices"):
        oracle.run(arrays, num_devices=8)
