"""Focal alignment loss against NumPy; chunks change nothing."""

import functools

import flat
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from detclipv2_jax.losses.alignment import focal_loss
from detclipv2_jax.preflight import hlo
from detclipv2_jax.runs import sharding

ALPHA, GAMMA = 0.3, 1.7  # no defaults of anything


def focal_oracle(logits, targets):
    """Sigmoid focal loss in float64, from the formula."""
    p = 1.0 / (1.0 + np.exp(-logits.astype(np.float64)))
    positive = -ALPHA * (1 - p) ** GAMMA * np.log(np.maximum(p, 1e-300))
    negative = -(1 - ALPHA) * p**GAMMA * np.log(np.maximum(1 - p, 1e-300))
    return np.where(targets, positive, negative)


def test_focal_loss_equals_the_formula():
    logits = np.linspace(-20, 20, 401, dtype=np.float32)
    for targets in (np.ones(401, bool), np.zeros(401, bool)):
        ours = focal_loss(jnp.asarray(logits), targets, alpha=ALPHA, gamma=GAMMA)
        np.testing.assert_allclose(ours, focal_oracle(logits, targets), rtol=1e-6, atol=1e-6)


def test_focal_gradient_equals_the_difference_quotient():
    logits = np.linspace(-8, 8, 161)
    for target in (True, False):
        gradient = jax.grad(lambda x: jnp.sum(focal_loss(x, jnp.full(161, target), alpha=ALPHA, gamma=GAMMA)))  # noqa: B023
        step = 1e-5
        expected = (focal_oracle(logits + step, target) - focal_oracle(logits - step, target)) / (2 * step)
        np.testing.assert_allclose(gradient(jnp.asarray(logits, jnp.float32)), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("logit", [-1e4, -100.0, 0.0, 100.0, 1e4])
@pytest.mark.parametrize("target", [True, False])
def test_focal_loss_has_finite_gradients_everywhere(logit, target):
    gradient = jax.grad(lambda x: focal_loss(x, jnp.asarray(target), alpha=ALPHA, gamma=GAMMA))(jnp.float32(logit))
    assert jnp.isfinite(gradient)


def inputs(seed=0, b=2, a=7, t=11, d=5):
    rng = np.random.default_rng(seed)
    concept_mask = rng.uniform(size=t) < 0.7
    arrays = {
        "concept_mask": concept_mask,
        "anchor_mask": rng.uniform(size=(b, a)) < 0.6,
        "labels": rng.choice(np.flatnonzero(concept_mask), (b, a)).astype(np.int32),
        "positive": rng.uniform(size=(b, a)) < 0.4,
    }
    # every mask masks something, and an anchor's own mask is not its label's
    assert not concept_mask.all()
    assert (arrays["positive"] & ~arrays["anchor_mask"]).any()
    assert (~arrays["positive"] & ~arrays["anchor_mask"]).any()
    return rng.normal(size=(b, a, d)).astype(np.float32), rng.normal(size=(t, d)).astype(np.float32), arrays


def loss(embeddings, text, scale, bias, *, chunk_bytes, arrays):
    return flat.alignment_loss(
        embeddings,
        text,
        scale=scale,
        bias=bias,
        alpha=ALPHA,
        gamma=GAMMA,
        chunk_bytes=chunk_bytes,
        **arrays,
    )


@pytest.mark.parametrize("federated", [False, True])
def test_alignment_loss_equals_brute_force_and_ignores_masked_places(federated):
    embeddings, text, arrays = inputs()
    verified = np.random.default_rng(1).uniform(size=(2, 11)) < 0.4 if federated else np.ones((2, 11), bool)
    expected = 0.0
    for i, j in zip(*np.nonzero(arrays["anchor_mask"]), strict=True):
        for c in np.flatnonzero(arrays["concept_mask"]):
            target = arrays["positive"][i, j] and arrays["labels"][i, j] == c
            if target or verified[i, c]:  # what an anchor is counts also where nothing is known of the others
                expected += focal_oracle(3.0 * embeddings[i, j] @ text[c] - 1.5, target)
    arrays["verified"] = verified if federated else None
    for chunk_bytes in (1 << 20, 4 * 7 * 2 * 4):
        ours = loss(embeddings, text, jnp.float32(3.0), jnp.float32(-1.5), chunk_bytes=chunk_bytes, arrays=arrays)
        assert float(ours) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("chunk_bytes", [1 << 20, 4 * 7 * 2 * 3])
def test_bfloat16_embeddings_have_float32_similarities(chunk_bytes):
    embeddings, text, arrays = inputs()
    rounded = [jnp.asarray(x, jnp.bfloat16) for x in (embeddings, text)]
    ours = loss(*rounded, jnp.float32(3.0), jnp.float32(-1.5), chunk_bytes=chunk_bytes, arrays=arrays)
    similarity = np.einsum("bad,cd->bac", *(np.asarray(x, np.float64) for x in rounded))
    hits = arrays["positive"][..., None] & (arrays["labels"][..., None] == np.arange(len(text)))
    counted = arrays["anchor_mask"][..., None] & arrays["concept_mask"]
    expected = focal_oracle(3.0 * similarity - 1.5, hits)[counted].sum()
    assert float(ours) == pytest.approx(float(expected), rel=1e-5)


def test_chunks_change_neither_value_nor_gradients():
    embeddings, text, arrays = inputs(t=37)
    arrays["concept_mask"][20:] = False  # whole chunks of padding are skipped
    arrays["labels"] %= 20
    results = []
    for chunk_bytes in (1 << 20, 4 * 7 * 2 * 8):

        def weighted(*inputs, chunk_bytes=chunk_bytes):
            return 3.0 * loss(*inputs, chunk_bytes=chunk_bytes, arrays=arrays)

        grads = jax.jit(jax.value_and_grad(weighted, argnums=(0, 1, 2, 3)))
        results.append(grads(embeddings, text, jnp.float32(3.0), jnp.float32(-1.5)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), *results)


@pytest.mark.parametrize("chunk", [8, 20])
def test_devices_agree_with_one_and_send_the_texts_gradient_once(chunk):
    """However many chunks: what goes over the network is the gradient of the texts, the loss, and two scalars."""
    b, a, t, d = 16, 7, 37, 8
    embeddings, text, arrays = inputs(b=b, a=a, t=t, d=d)
    arrays["concept_mask"][30:] = False
    arrays["labels"] %= 30

    def gradients(embeddings, text, arrays, chunk_bytes):
        function = functools.partial(loss, chunk_bytes=chunk_bytes, arrays=arrays)
        return jax.value_and_grad(function, argnums=(0, 1, 2, 3))(embeddings, text, 3.0, -1.5)

    mesh = sharding.make_mesh()
    split, whole = NamedSharding(mesh, sharding.BATCH), NamedSharding(mesh, sharding.REPLICATED)
    places = {"concept_mask": whole, "anchor_mask": split, "labels": split, "positive": split}
    on_devices = jax.device_put((embeddings, text, arrays), (split, whole, places))
    with jax.set_mesh(mesh):
        program = jax.jit(gradients, static_argnums=3).lower(*on_devices, 4 * a * (b // mesh.size) * chunk).compile()
    one_device = gradients(embeddings, text, arrays, 1 << 20)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5), program(*on_devices), one_device)
    num_rows = -(-t // chunk) * chunk
    assert hlo.traffic(program.as_text()).network == {"all-reduce": 4 * (num_rows * d + 3)}


def test_similarities_of_grounding_at_the_papers_size_are_never_held_whole():
    """Four images of 800 x 1344 px a device and 9,000 concepts, compiled only: S has 3.2 GB, its gradient as much."""
    b, a, t, d = 4, 22_400, 9_000, 512
    shape = jax.ShapeDtypeStruct
    arrays = {
        "concept_mask": shape((t,), bool),
        "anchor_mask": shape((b, a), bool),
        "labels": shape((b, a), jnp.int32),
        "positive": shape((b, a), bool),
    }

    def total(embeddings, text, arrays):
        return loss(embeddings, text, jnp.float32(1), jnp.float32(0), chunk_bytes=128 << 20, arrays=arrays)

    gradient = jax.jit(jax.grad(total, argnums=(0, 1)))
    program = gradient.lower(shape((b, a, d), jnp.bfloat16), shape((t, d), jnp.bfloat16), arrays).compile()
    # 0.54 GB: the gradient of the embeddings in float32 and one chunk with its gradient
    assert program.memory_analysis().temp_size_in_bytes < 4 * b * a * t / 4
