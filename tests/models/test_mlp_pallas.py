"""The kernels of a Swin block's MLP: interpreted, they equal XLA's form; and the GPU's compiler accepts them."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, SingleDeviceSharding

from detclipv2_jax.models import mlp_pallas
from detclipv2_jax.models.swin import SwinBlock
from detclipv2_jax.preflight import compile_step


def block(impl, dtype=jnp.float32, *, heads=1):
    return SwinBlock(heads, 4, 0, drops_paths=True, attention_impl="xla", mlp_impl=impl, dtype=dtype)


def results(impl, *, dtype=jnp.float32, batch=8, train=True):
    """Returns (value, gradients to x and all parameters) of a block of 32 channels, in float32."""
    rng = np.random.default_rng(0)
    x, gradient = (jnp.asarray(rng.normal(size=(batch, 5, 7, 32)), dtype) for _ in range(2))
    shapes = jax.eval_shape(lambda: block("xla").init(jax.random.key(0), x, jnp.float32(0.0), False))
    params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 0.3, jnp.float32), shapes)

    @jax.jit
    def run(params, x, gradient):
        apply = functools.partial(block(impl, dtype).apply, rngs={"dropout": jax.random.key(1)})
        value, vjp = jax.vjp(lambda params, x: apply(params, x, jnp.float32(0.4), train), params, x)
        return value, *vjp(gradient)

    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), run(params, x, gradient))


@pytest.fixture
def interpreted(monkeypatch):
    """Makes the kernels run on this machine."""
    for name in ("forward", "backward"):
        monkeypatch.setattr(mlp_pallas, name, functools.partial(getattr(mlp_pallas, name), interpret=True))


def assert_close(found, expected):
    for path, exact in jax.tree_util.tree_leaves_with_path(expected):
        value = functools.reduce(lambda tree, key: tree[getattr(key, "key", getattr(key, "idx", None))], path, found)
        np.testing.assert_allclose(value, exact, atol=1e-5 * max(np.abs(exact).max(), 1), err_msg=str(path))


@pytest.mark.parametrize("train", [True, False])
def test_kernels_equal_the_layers(interpreted, train):
    assert_close(results("pallas", train=train), results("xla", train=train))


def test_kernels_are_split_over_a_mesh(interpreted):
    expected = results("xla")
    with jax.set_mesh(jax.make_mesh((4, 2), ("data", "fsdp"), (AxisType.Auto,) * 2)):
        assert_close(results("pallas"), expected)


def test_other_platforms_than_cuda_compute_the_layers():
    assert_close(results("auto"), results("xla"))


def test_bfloat16_is_as_near_float32_as_the_layers_are(interpreted):
    exact = jax.tree.leaves(results("xla"))
    errors = [
        sum(np.abs(a - b).mean() / np.abs(b).mean() for a, b in zip(jax.tree.leaves(found), exact, strict=True))
        for found in (results("pallas", dtype=jnp.bfloat16), results("xla", dtype=jnp.bfloat16))
    ]
    assert errors[0] < 1.1 * errors[1]


def test_what_the_kernels_cannot_hold_is_left_to_xla(monkeypatch):
    monkeypatch.setattr(mlp_pallas, "forward", None)
    assert not mlp_pallas.fits(384, 1536)
    assert not mlp_pallas.fits(48, 192)
    with jax.set_mesh(jax.make_mesh((2,), ("data",), (AxisType.Auto,))):
        results("pallas", batch=3)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("jax_cuda13_plugin") is None, reason="pip install 'jax[cuda13]' (no GPU)")
@pytest.mark.parametrize(("channels", "dtype"), [(96, jnp.bfloat16), (192, jnp.bfloat16), (96, jnp.float32)])
def test_the_gpu_compiler_accepts_the_kernels(channels, dtype):
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="", target_config=compile_step.H100, topology="1x1x1"
    )
    place = SingleDeviceSharding(topology.devices[0])
    small = jnp.zeros((1, 4, 4, channels))
    heads = channels // 32
    shapes = jax.eval_shape(lambda: block("xla", heads=heads).init(jax.random.key(0), small, jnp.float32(0.0), False))
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), shapes)
    x = jax.ShapeDtypeStruct((8, 40, 40, channels), dtype, sharding=place)

    def both_passes(params, x, gradient):
        apply = functools.partial(block("auto", dtype, heads=heads).apply, params, rngs={"dropout": jax.random.key(1)})
        value, vjp = jax.vjp(lambda x: apply(x, jnp.float32(0.1), True), x)
        return value, vjp(gradient)

    program = jax.jit(both_passes).trace(params, x, x).lower(lowering_platforms=("cuda",)).compile()
    assert program.as_text().count('custom_call_target="__gpu$xla.gpu.triton"') == 2
