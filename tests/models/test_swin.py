"""The backbone against timm, torchvision and transformers, on inputs of any size."""

import os
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from detclipv2_jax.models.swin import Swin, gelu

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


@pytest.mark.parametrize("canvas", [(64, 96), (33, 50), (1, 7)])
def test_sizes_round_up(canvas):
    model, variables = build("narrow")
    shapes = jax.eval_shape(lambda v, x: model.apply(v, x, train=False), variables, jnp.zeros((2, *canvas, 3)))
    for stride, channels, feature in zip((8, 16, 32), (32, 64, 128), shapes, strict=True):
        assert feature.shape == (2, -(-canvas[0] // stride), -(-canvas[1] // stride), channels)


def test_drop_path_drops_images_independently_and_keeps_the_mean():
    model, variables = build("narrow", drop_path_rate=0.4)
    image = jnp.repeat(seeded.uniform("image", (1, 32, 32, 3)), 64, axis=0)
    run = jax.jit(lambda v, key, train: model.apply(v, image, train=train, rngs={"dropout": key})[0], static_argnums=2)
    first, again, other = (run(variables, jax.random.key(key), True) for key in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0.1
    assert len({np.asarray(x).tobytes() for x in first}) > 8  # equal images, different depths
    steady = run(variables, jax.random.key(0), False)
    np.testing.assert_array_equal(steady[0], steady[1])
    with pytest.raises(Exception, match="dropout"):
        model.apply(variables, image[:1], train=True)


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
