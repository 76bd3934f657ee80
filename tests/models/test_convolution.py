"""The gradient of large convolutions on CPUs against XLA's own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from detclipv2_jax.models.convolution import MIN_CHANNELS, conv_general_dilated
from detclipv2_jax.runs import sharding

MANY = MIN_CHANNELS


def gradients(hook, x, bar, *, channels, stride=1, kernel=3, dtype=None, mesh=None):
    """Returns (value, gradients to the input and to the parameters, the traced program) of a layer."""
    layer = nn.Conv(channels, (kernel, kernel), strides=stride, padding=kernel // 2, dtype=dtype,
                    conv_general_dilated=hook)  # fmt: skip
    params = nn.Conv(channels, (kernel, kernel)).init(jax.random.key(0), x)

    def loss(x, params):
        return jnp.sum(layer.apply(params, x) * bar)

    function = jax.value_and_grad(loss, argnums=(0, 1))
    with jax.set_mesh(mesh or sharding.make_mesh(devices=jax.devices()[:1])):
        program = str(jax.make_jaxpr(function)(x, params))
        return *jax.jit(function)(x, params), program


@pytest.mark.parametrize("num_devices", [1, 2])
@pytest.mark.parametrize("size", [(5, 9), (1, 1)])
def test_gradients_equal_those_of_xla(num_devices, size):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, *size, MANY)).astype(np.float32)
    bar = rng.normal(size=(2, *size, MANY + 8)).astype(np.float32)
    mesh = sharding.make_mesh(devices=jax.devices()[:num_devices])
    expected_value, expected, plain = gradients(None, x, bar, channels=MANY + 8)
    value, found, program = gradients(conv_general_dilated, x, bar, channels=MANY + 8, mesh=mesh)
    np.testing.assert_allclose(value, expected_value, rtol=1e-4)
    scale = float(np.abs(expected[1]["params"]["kernel"]).max())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * scale), found, expected)
    assert "dot_general" in program
    assert "dot_general" not in plain


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((1, 4, 4, MANY - 1), {"channels": MANY}),
        ((1, 4, 4, MANY), {"channels": MANY - 1}),
        ((1, 4, 4, MANY), {"channels": MANY, "stride": 2}),
        ((1, 4, 4, MANY), {"channels": MANY, "kernel": 1}),
        ((1, 4, 4, MANY), {"channels": MANY, "dtype": jnp.bfloat16}),
    ],
)
def test_other_layers_are_left_to_xla(shape, options):
    x = jnp.zeros(shape)
    program = functools.partial(gradients, x=x, bar=jnp.float32(1.0), **options)
    assert program(conv_general_dilated)[2] == program(None)[2]


def test_programs_for_other_devices_are_those_of_xla():
    x = jnp.zeros((1, 4, 4, MANY))

    def program(hook):
        layer = nn.Conv(MANY, (3, 3), padding=1, conv_general_dilated=hook)
        params = {"params": {"kernel": jnp.zeros((3, 3, MANY, MANY)), "bias": jnp.zeros(MANY)}}
        return str(jax.make_jaxpr(jax.grad(lambda x: jnp.sum(layer.apply(params, x))))(x))

    assert program(conv_general_dilated) == program(None)  # no mesh says what they are for
