"""Attention within windows: both forms against NumPy and automatic differentiation, and the compiled kernel."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from detclipv2_jax.models import split, window_attention_tpu
from detclipv2_jax.models import window_attention as module
from detclipv2_jax.models.window_attention import window_attention
from detclipv2_jax.preflight import compile_step

HEADS, HEAD_SIZE = 2, 16


def example(*, batch=2, rows=2, columns=3, size=7, shift=3, dtype=jnp.float32):
    """Returns (map of qkv, bias, gradient of the result), and what makes its windows."""
    rng = np.random.default_rng(size)
    channels = HEADS * HEAD_SIZE
    shape = (batch, rows * size, columns * size, channels)
    qkv = jnp.asarray(rng.normal(size=(*shape[:3], 3 * channels)), dtype)
    bias = jnp.asarray(rng.normal(size=(HEADS, size**2, size**2)), jnp.float32)
    windows = {"size": size, "shift": shift, "heads": HEADS}
    return (qkv, bias, jnp.asarray(rng.normal(size=shape), dtype)), windows


def attend(qkv, bias, *, impl, **settings):
    windows = module.windows_of((*qkv.shape[:3], qkv.shape[3] // 3), impl=impl, **settings)
    return windows.join(window_attention(windows.split(qkv), bias, windows))


def plain(qkv, bias, *, size, shift, heads):
    """The formula, differentiable, without a word on how it is computed: one window after the other."""
    _, height, width, _ = qkv.shape
    shifts = [shift if side > size else 0 for side in (height, width)]
    output = jnp.zeros((*qkv.shape[:3], qkv.shape[3] // 3), qkv.dtype)
    for top in range(shifts[0], height + shifts[0], size):
        for left in range(shifts[1], width + shifts[1], size):
            y, x = (i.reshape(-1) for i in np.mgrid[top : top + size, left : left + size])
            part = (y >= height) * 2 + (x >= width)  # what wrapped around was no neighbour
            tokens = qkv[:, y % height, x % width].reshape(len(qkv), len(y), 3, heads, -1)
            query, key, value = jnp.moveaxis(tokens, (2, 3), (0, 2))
            logits = query @ key.swapaxes(-1, -2) / query.shape[-1] ** 0.5 + bias[None]
            logits -= 100.0 * (part[:, None] != part[None])[None, None]
            weights = jnp.exp(logits) / jnp.sum(jnp.exp(logits), axis=-1, keepdims=True)
            result = jnp.moveaxis(weights @ value, 1, 2).reshape(len(qkv), len(y), -1)
            output = output.at[:, y % height, x % width].set(result)
    return output


def results(function, qkv, bias, gradient):
    """Returns (value, gradient to qkv, gradient to the bias) in float32."""

    @jax.jit
    def run(qkv, bias, gradient):
        value, vjp = jax.vjp(function, qkv, bias)
        return value, *vjp(gradient)

    return [np.asarray(x, np.float32) for x in run(qkv, bias, gradient)]


def assert_equal_to_the_formula(arrays, settings, *, impl="pallas"):
    found = results(functools.partial(attend, impl=impl, **settings), *arrays)
    expected = results(functools.partial(plain, **settings), *arrays)
    for name, x, y in zip(("value", "qkv", "bias"), found, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.fixture(params=["cuda", "tpu"])
def interpreted(monkeypatch, request):
    """Makes the kernels of a platform run on this machine."""
    for name in ("_kernel_forward", "_kernel_backward", "_tpu_forward", "_tpu_backward"):
        monkeypatch.setattr(module, name, functools.partial(getattr(module, name), interpret=True))
    if request.param == "tpu":
        monkeypatch.setattr(split, "by_platform", lambda *arguments, tpu, default: tpu(*arguments))
    jax.clear_caches()  # of what was traced for another platform
    yield
    jax.clear_caches()


KINDS = [{}, {"shift": 0}, {"size": 8, "shift": 4}, {"size": 2, "shift": 1, "rows": 4, "columns": 1}, {"rows": 1}]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_xla_form_has_values_and_gradients_of_the_formula(kind):
    arrays, settings = example(**kind)
    assert_equal_to_the_formula(arrays, settings, impl="xla")


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_values_and_gradients_are_those_of_the_formula(interpreted, kind):
    arrays, settings = example(**kind)
    assert_equal_to_the_formula(arrays, settings)


def test_the_kernel_errs_no_more_than_the_xla_form_in_bfloat16(interpreted):
    arrays, settings = example(dtype=jnp.bfloat16)
    exact = results(functools.partial(plain, **settings), *(x.astype(jnp.float32) for x in arrays))
    xla, pallas = (results(functools.partial(attend, impl=impl, **settings), *arrays) for impl in ("xla", "pallas"))
    for name, truth, old, new in zip(("value", "qkv", "bias"), exact, xla, pallas, strict=True):
        assert np.abs(new - truth).mean() < 1.2 * np.abs(old - truth).mean(), name


def test_programs_share_windows_unevenly(interpreted, monkeypatch):
    monkeypatch.setattr(module, "PROGRAMS", 5 * HEADS)  # 12 windows: 3, 3, 3, 3; or 7: 2, 2, 2, 1
    for batch, columns in ((2, 3), (1, 7)):
        arrays, settings = example(batch=batch, rows=batch, columns=columns, size=3, shift=1)
        assert_equal_to_the_formula(arrays, settings)


def test_kernels_are_split_over_a_mesh(interpreted):
    arrays, settings = example(batch=8, rows=1, columns=2, size=3, shift=1)
    expected = results(functools.partial(plain, **settings), *arrays)
    with jax.set_mesh(jax.make_mesh((4, 2), ("data", "fsdp"), (AxisType.Auto,) * 2)):
        found = results(functools.partial(attend, impl="pallas", **settings), *arrays)
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "size", "heads"),
    [((2, 9, 9, 32), 9, 2), ((2, 6, 6, 16), 3, 2), ((2, 6, 6, 48), 3, 2), ((3, 6, 6, 32), 3, 2)],
)
def test_what_the_kernel_cannot_hold_is_left_to_xla(shape, size, heads):
    with jax.set_mesh(jax.make_mesh((2,), ("data",), (AxisType.Auto,))):
        for impl in module.IMPLS:
            assert module.windows_of(shape, size=size, shift=0, heads=heads, impl=impl).impl == "xla"
        fits = module.windows_of((2, 16, 8, 32), size=8, shift=4, heads=2, impl="pallas")
    assert fits == module.Windows(2, 1, 8, (4, 0), "pallas")


def test_what_does_not_fit_a_tpu_is_left_to_xla(monkeypatch):
    monkeypatch.setattr(split, "by_platform", lambda *arguments, tpu, default: tpu(*arguments))
    monkeypatch.setattr(window_attention_tpu, "call", None)
    arrays, settings = example()
    window = 56 * 3 * 128 * 4  # 49 tokens and 32 channels in whole registers
    monkeypatch.setattr(window_attention_tpu, "MAX_BLOCK_BYTES", 8 * window - 1)
    assert_equal_to_the_formula(arrays, settings)
    monkeypatch.setattr(window_attention_tpu, "MAX_BLOCK_BYTES", 8 * window)
    assert window_attention_tpu.fits(jnp.zeros((2, 6, 49, 3 * HEADS * HEAD_SIZE)))


def test_channels_of_a_tpu_s_program_are_those_of_whole_registers(interpreted, monkeypatch):
    """256 channels are two programs, and so are ten windows, of which one holds eight."""
    monkeypatch.setattr(window_attention_tpu, "BLOCK_BYTES", 1)
    rng = np.random.default_rng(0)
    qkv, bias, gradient = (
        jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((1, 6, 15, 768), (4, 9, 9), (1, 6, 15, 256))
    )
    assert_equal_to_the_formula((qkv, bias, gradient), {"size": 3, "shift": 1, "heads": 4})


def test_unknown_forms_are_named():
    with pytest.raises(ValueError, match="no form 'cudnn'; allowed are auto, xla, pallas"):
        module.windows_of((1, 7, 7, 32), size=7, shift=0, heads=2, impl="cudnn")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("jax_cuda13_plugin") is None, reason="pip install 'jax[cuda13]' (no GPU)")
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("gpu", ["h100", "rtx4090"])  # with the most and the least memory of a block
def test_the_gpu_compiler_accepts_the_kernels(dtype, gpu):
    """For a described GPU, at a stage's sizes of the paper's runs; no logits in memory."""
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="", target_config=compile_step.description(gpu), topology="1x1x1"
    )
    program = compiled("cuda", topology.devices[0], side=84, channels=96, heads=3, dtype=dtype)
    assert program.as_text().count('custom_call_target="__gpu$xla.gpu.triton"') == 2


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="pip install 'jax[tpu]' (no TPU)")
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize(("side", "channels", "heads"), [(84, 96, 3), (14, 768, 24)])  # the first and the last stage
@pytest.mark.parametrize("tpu", ["v5e:2x2", "v6e:2x2"])
def test_the_tpu_compiler_accepts_the_kernels(monkeypatch, tpu, side, channels, heads, dtype):
    topology = compile_step.Topology.parse(tpu)
    for name, value in topology.environment.items():
        monkeypatch.setenv(name, value)
    program = compiled("tpu", topology.devices()[0], side=side, channels=channels, heads=heads, dtype=dtype)
    assert program.as_text().count('custom_call_target="tpu_custom_call"') == 2


def compiled(platform, device, *, side, channels, heads, dtype):
    """Returns both passes for a described device, which hold no logits."""
    mesh = Mesh(np.array([device]), ("data",), axis_types=(AxisType.Auto,))
    place = NamedSharding(mesh, PartitionSpec("data"))
    batch, size = 32, 7
    qkv, gradient = (
        jax.ShapeDtypeStruct((batch, side, side, width), dtype, sharding=place) for width in (3 * channels, channels)
    )
    bias = jax.ShapeDtypeStruct((heads, size**2, size**2), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec()))

    def both_passes(qkv, bias, gradient):
        value, vjp = jax.vjp(functools.partial(attend, impl="auto", size=size, shift=3, heads=heads), qkv, bias)
        return value, *vjp(gradient)

    with jax.set_mesh(mesh):
        program = jax.jit(both_passes).trace(qkv, bias, gradient).lower(lowering_platforms=(platform,)).compile()
    assert f"[{batch},{(side // size) ** 2},{heads},{size**2},{size**2}]" not in program.as_text()
    return program
