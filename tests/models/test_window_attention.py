"""Attention within windows: both forms against NumPy and automatic differentiation, and the compiled kernel."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, SingleDeviceSharding

from detclipv2_jax.models import window_attention as module
from detclipv2_jax.models.window_attention import window_attention
from detclipv2_jax.preflight import compile_step

HEADS, HEAD_SIZE = 2, 16


def example(*, batch=2, windows=6, length=49, shifted=True, dtype=jnp.float32):
    """Returns (qkv, bias, region or None, gradient of the result)."""
    rng = np.random.default_rng(length)
    channels = HEADS * HEAD_SIZE
    qkv = jnp.asarray(rng.normal(size=(batch, windows, length, 3 * channels)), dtype)
    bias = jnp.asarray(rng.normal(size=(HEADS, length, length)), jnp.float32)
    region = jnp.asarray(rng.integers(0, 3, size=(windows, length)), jnp.int32) if shifted else None
    return qkv, bias, region, jnp.asarray(rng.normal(size=(batch, windows, length, channels)), dtype)


def plain(qkv, bias, region):
    """The formula, differentiable, without a word on how it is computed."""
    query, key, value = jnp.moveaxis(qkv.reshape(*qkv.shape[:3], 3, HEADS, HEAD_SIZE), (3, 4), (0, 3))
    logits = query @ key.swapaxes(-1, -2) / HEAD_SIZE**0.5 + bias[None, None]
    if region is not None:
        logits -= 100.0 * (region[:, :, None] != region[:, None, :])[None, :, None]
    weights = jnp.exp(logits) / jnp.sum(jnp.exp(logits), axis=-1, keepdims=True)
    return jnp.moveaxis(weights @ value, 2, 3).reshape(*qkv.shape[:3], -1)


def results(function, qkv, bias, region, gradient):
    """Returns (value, gradient to qkv, gradient to the bias) in float32."""

    @jax.jit
    def run(qkv, bias, gradient):
        value, vjp = jax.vjp(lambda qkv, bias: function(qkv, bias, region), qkv, bias)
        return value, *vjp(gradient)

    return [np.asarray(x, np.float32) for x in run(qkv, bias, gradient)]


@pytest.fixture
def interpreted(monkeypatch):
    """Makes the kernels run on this machine."""
    for name in ("_kernel_forward", "_kernel_backward"):
        monkeypatch.setattr(module, name, functools.partial(getattr(module, name), interpret=True))


@pytest.mark.parametrize("impl", ["xla", "pallas"])
@pytest.mark.parametrize(("length", "shifted"), [(49, True), (49, False), (64, True), (4, False)])
def test_values_and_gradients_are_those_of_the_formula(interpreted, impl, length, shifted):
    arrays = example(length=length, shifted=shifted)
    found = results(functools.partial(window_attention, impl=impl), *arrays)
    for name, x, expected in zip(("value", "qkv", "bias"), found, results(plain, *arrays), strict=True):
        np.testing.assert_allclose(x, expected, rtol=1e-5, atol=1e-5, err_msg=name)


def test_the_kernel_errs_no_more_than_the_xla_form_in_bfloat16(interpreted):
    arrays = example(dtype=jnp.bfloat16)
    exact = results(plain, *(x if x is None else x.astype(jnp.float32) for x in arrays))
    xla, pallas = (results(functools.partial(window_attention, impl=impl), *arrays) for impl in ("xla", "pallas"))
    for name, truth, old, new in zip(("value", "qkv", "bias"), exact, xla, pallas, strict=True):
        assert np.abs(new - truth).mean() < 1.2 * np.abs(old - truth).mean(), name


def test_programs_share_windows_unevenly(interpreted, monkeypatch):
    monkeypatch.setattr(module, "PROGRAMS", 5 * HEADS)  # 12 windows: 3, 3, 3, 3; or 7: 2, 2, 2, 1
    for batch, windows in ((2, 6), (1, 7)):
        arrays = example(batch=batch, windows=windows, length=9)
        found = results(functools.partial(window_attention, impl="pallas"), *arrays)
        for x, expected in zip(found, results(plain, *arrays), strict=True):
            np.testing.assert_allclose(x, expected, rtol=1e-5, atol=1e-5)


def test_kernels_are_split_over_a_mesh(interpreted):
    arrays = example(batch=8, windows=2, length=9)
    expected = results(plain, *arrays)
    with jax.set_mesh(jax.make_mesh((4, 2), ("data", "fsdp"), (AxisType.Auto,) * 2)):
        found = results(functools.partial(window_attention, impl="pallas"), *arrays)
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "head_size"), [({"length": 65}, 16), ({"length": 9}, 8), ({"length": 9, "batch": 3}, 16)]
)
def test_what_the_kernel_cannot_hold_is_left_to_xla(monkeypatch, changes, head_size):
    monkeypatch.delattr(module, "_kernel_backward")
    monkeypatch.setattr(module, "_kernel_forward", None)
    qkv, bias, region, _ = example(**changes)
    qkv = qkv[..., : 3 * HEADS * head_size]
    with jax.set_mesh(jax.make_mesh((2,), ("data",), (AxisType.Auto,))):
        value = window_attention(qkv, bias, region, impl="pallas")
    assert value.shape == (*qkv.shape[:3], HEADS * head_size)


def test_what_the_kernel_just_holds_is_left_to_it(monkeypatch):
    forms = []
    monkeypatch.setattr(module, "_attention", lambda impl, *_: forms.append(impl))
    for length, heads, channels in ((module.TILE, 2, 32), (module.TILE + 1, 2, 32), (9, 2, 16), (9, 2, 48), (9, 1, 32)):
        qkv = np.zeros((1, 1, length, 3 * channels), np.float32)
        window_attention(qkv, np.zeros((heads, length, length), np.float32), None, impl="pallas")
    assert forms == ["pallas", "xla", "xla", "xla", "pallas"]


def test_unknown_forms_are_named():
    qkv, bias, region, _ = example(length=4)
    with pytest.raises(ValueError, match="no form 'cudnn'; allowed are auto, xla, pallas"):
        window_attention(qkv, bias, region, impl="cudnn")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("jax_cuda13_plugin") is None, reason="pip install 'jax[cuda13]' (no GPU)")
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_the_gpu_compiler_accepts_the_kernels(dtype):
    """For a described H100, at a stage's sizes of the paper's runs; no logits in memory."""
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="", target_config=compile_step.H100, topology="1x1x1"
    )
    place = SingleDeviceSharding(topology.devices[0])
    batch, windows, length, channels, heads = 32, 144, 49, 96, 3
    qkv, bias, region, gradient = (
        jax.ShapeDtypeStruct(shape, kind, sharding=place)
        for shape, kind in (
            ((batch, windows, length, 3 * channels), dtype),
            ((heads, length, length), "float32"),
            ((windows, length), "int32"),
            ((batch, windows, length, channels), dtype),
        )
    )

    def both_passes(qkv, bias, region, gradient):
        value, vjp = jax.vjp(lambda qkv, bias: window_attention(qkv, bias, region), qkv, bias)
        return value, *vjp(gradient)

    program = jax.jit(both_passes).trace(qkv, bias, region, gradient).lower(lowering_platforms=("cuda",)).compile()
    assert program.as_text().count('custom_call_target="__gpu$xla.gpu.triton"') == 2
    assert (
        program.memory_analysis().temp_size_in_bytes < batch * windows * heads * length**2
    )  # a quarter of the float32 logits
