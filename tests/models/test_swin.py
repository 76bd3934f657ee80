"""The backbone against timm, torchvision and transformers, on inputs of any size."""

import functools
import os
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_gradients import check, seeded_params

from detclipv2_jax.models.swin import Swin, SwinBlock, gelu

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
sys.path.insert(0, str(GOLDEN))
import cases  # noqa: E402  (lives beside the fixtures, which are made in another environment)
import seeded  # noqa: E402


def build(size, **options):
    """Returns (model, seeded parameters) of a size named in the cases."""
    model = Swin(**cases.SWIN_SIZES[size]._asdict(), **options)
    shapes = jax.eval_shape(lambda key: model.init(key, jnp.zeros((1, 32, 32, 3)), train=False), jax.random.key(0))

    def fill(path, leaf):
        return seeded.parameter("swin/" + jax.tree_util.keystr(path, simple=True, separator="/"), leaf.shape)

    return model, {"params": jax.tree_util.tree_map_with_path(fill, shapes["params"])}


@pytest.mark.slow
@pytest.mark.parametrize("case", cases.SWIN, ids=lambda case: case.name)
def test_equal_to_the_libraries(case):
    if case.name not in cases.QUICK and not os.environ.get("EXHAUSTIVE"):
        pytest.skip("one of the many large ones: set EXHAUSTIVE=1")
    golden = np.load(GOLDEN / "swin.npz")
    model, variables = build(case.size)
    image = seeded.uniform("image", (1, *case.canvas, 3))
    features = jax.jit(lambda v, x: model.apply(v, x, train=False))(variables, image)
    for library in case.libraries:
        for stage, feature in enumerate(features, start=2):
            key = f"{case.name}/{library}/stage{stage}"
            error = np.abs(seeded.sample(feature) - golden[key]).max() / golden[f"{key}/std"]
            assert error < 2e-4, f"{library} stage {stage}: {error:.1e} of the feature's standard deviation"


def test_gradients_equal_torchvision():
    case = cases.PARTS["classification"]
    model, image = Swin(**case.swin._asdict()), seeded.uniform("image", (2, *case.canvas, 3))
    check(
        "swin",
        lambda params, inputs: {
            f"feature{i}": x
            for i, x in enumerate(model.apply({"params": params["swin"]}, inputs["image"], train=False), start=2)
        },
        params={"swin": seeded_params("swin/", model, image, train=False)},
        inputs={"image": image},
    )


@pytest.mark.parametrize("canvas", [(64, 96), (33, 50), (1, 7)])
def test_sizes_round_up(canvas):
    model, variables = build("narrow")
    shapes = jax.eval_shape(lambda v, x: model.apply(v, x, train=False), variables, jnp.zeros((2, *canvas, 3)))
    for stride, channels, feature in zip((8, 16, 32), (32, 64, 128), shapes, strict=True):
        assert feature.shape == (2, -(-canvas[0] // stride), -(-canvas[1] // stride), channels)


def test_drop_path_keeps_the_mean():
    num_images, rate = 4096, 0.4
    block = SwinBlock(num_heads=1, window_size=2, shift=0, drops_paths=True)
    image = jnp.repeat(seeded.uniform("image", (1, 2, 2, 4)), num_images, axis=0)
    params = seeded_params("block/", block, image, jnp.float32(rate), False)
    for silent in ("mlp_out", "attention/projection"):  # leaves one branch, whose output then depends on nothing random
        variables = {"params": silence(params, silent)}
        run = functools.partial(block.apply, variables, image, rngs={"dropout": jax.random.key(0)})
        branch, dropped = run(jnp.float32(rate), False) - image, run(jnp.float32(rate), True) - image
        kept = np.abs(dropped).max(axis=(1, 2, 3)) > 0
        assert kept.mean() == pytest.approx(1 - rate, abs=5 * (rate * (1 - rate) / num_images) ** 0.5)
        np.testing.assert_allclose(dropped[kept] * (1 - rate), branch[kept], atol=1e-6)
        np.testing.assert_array_equal(run(jnp.float32(0.0), True) - image, branch)


def silence(params, *names):
    """Returns parameters with zeros in those of the modules of these names."""

    def zero(path, leaf):
        path = jax.tree_util.keystr(path, simple=True, separator="/")
        return leaf * 0 if any(f"{name}/" in path for name in names) else leaf

    return jax.tree_util.tree_map_with_path(zero, params)


@pytest.mark.parametrize("depths", [(1, 2, 2, 1), (1, 1, 8, 1)], ids=["written out", "in a loop"])
def test_drop_path_rises_with_depth_and_differs_between_blocks(depths):
    num_images, rate = 512, 0.5
    model = Swin(4, depths, (1, 1, 1, 1), 2, drop_path_rate=rate)
    image = jnp.repeat(seeded.uniform("image", (1, 8, 8, 3)), num_images, axis=0)
    params = seeded_params("swin/", model, image, train=False)
    run = jax.jit(
        lambda params, key, train: model.apply({"params": params}, image, train=train, rngs={"dropout": key}),
        static_argnums=2,
    )
    names = [f"stage{stage}_block{i}" for stage, depth in enumerate(depths, start=1) for i in range(depth)]
    kept = {}
    for place, name in enumerate(names):
        for branch, other in (("attention/projection", "mlp_out"), ("mlp_out", "attention/projection")):
            silent = [f"{n}/{b}" for n in names for b in (branch, other) if (n, b) != (name, branch)]
            stage = max(int(name[5]), 2)  # the first features after the block
            chosen, nothing = silence(params, *silent), silence(params, *silent, f"{name}/{branch}")
            features = run(chosen, jax.random.key(0), True)[stage - 2]
            without = run(nothing, jax.random.key(0), False)[stage - 2]
            kept[name, branch] = np.abs(features - without).max(axis=(1, 2, 3)) > 1e-6
            expected = 1 - rate * place / (len(names) - 1)
            bound = 5 * (expected * (1 - expected) / num_images) ** 0.5
            assert kept[name, branch].mean() == pytest.approx(expected, abs=bound), (name, branch)
    # independent draws agree by chance alone
    random = np.stack([x for x in kept.values() if not x.all()])
    assert len(random) == 2 * len(names) - 2
    correlation = np.corrcoef(random) - np.eye(len(random))
    assert np.abs(correlation).max() < 6 / num_images**0.5
    other_key = run(params, jax.random.key(1), True)[-1]
    assert np.abs(run(params, jax.random.key(0), True)[-1] - other_key).max() > 0.1


def test_drop_path_needs_a_key():
    model, variables = build("narrow", drop_path_rate=0.4)
    with pytest.raises(Exception, match="dropout"):
        model.apply(variables, seeded.uniform("image", (1, 32, 32, 3)), train=True)
    model, variables = build("narrow", drop_path_rate=0.0)
    jax.eval_shape(lambda: model.apply(variables, jnp.zeros((1, 32, 32, 3)), train=True))  # there is nothing to draw


def test_bfloat16_is_near_float32():
    image = seeded.uniform("image", (1, 40, 56, 3))
    outputs = []
    for dtype in (jnp.float32, jnp.bfloat16):
        model, variables = build("narrow", dtype=dtype)
        outputs.append(jax.jit(lambda v, m=model: m.apply(v, jnp.asarray(image), train=False))(variables))
    for exact, rounded in zip(*outputs, strict=True):
        assert rounded.dtype == jnp.bfloat16
        assert np.abs(exact - rounded.astype(jnp.float32)).mean() < 0.03 * np.std(exact)


def test_gelu_and_its_gradient():
    x = np.linspace(-12, 12, 4001, dtype=np.float32)
    value, gradient = jax.jit(jax.vmap(jax.value_and_grad(gelu)))(x)
    from math import erf, exp, pi, sqrt

    expected = [v * 0.5 * (1 + erf(v / sqrt(2))) for v in x.astype(np.float64)]
    slope = [0.5 * (1 + erf(v / sqrt(2))) + v * exp(-v * v / 2) / sqrt(2 * pi) for v in x.astype(np.float64)]
    np.testing.assert_allclose(value, expected, atol=1e-6)
    np.testing.assert_allclose(gradient, slope, atol=1e-6)
