"""The forms of the deformable convolution against torchvision: values and all gradients."""

import functools
import importlib.util
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from products import bytes_of_products

from detclipv2_jax.models import deform_conv, deform_pallas, deform_tpu, split
from detclipv2_jax.preflight import compile_step, hlo

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
sys.path.insert(0, str(GOLDEN))
import cases  # noqa: E402  (lives beside the fixtures, which are made in another environment)

NAMES = ("output", "features", "offsets", "mask", "kernel")


def evaluate(impl):
    """Returns a compiled function: (four arguments, gradient from above) -> output and four gradients."""

    @jax.jit
    def run(arguments, gradient):
        output, vjp = jax.vjp(lambda *a: deform_conv.deform_conv2d(*a, impl=impl), *arguments)
        return output, *vjp(gradient)

    return run


@pytest.mark.parametrize("impl", ["gather", "banded"])
@pytest.mark.parametrize("size", cases.DEFORM_SIZES, ids=str)
def test_equal_to_torchvision(impl, size):
    golden = np.load(GOLDEN / "deform_conv.npz")
    run = evaluate(impl)  # one compilation for all kinds of offsets
    for kind in cases.DEFORM_OFFSETS:
        case = cases.deform_case(size, kind)
        for name, value in zip(NAMES, run(case[:4], case.gradient), strict=True):
            expected = golden[f"{size[0]}x{size[1]}/{kind}/{name}"]
            np.testing.assert_allclose(
                value, expected, atol=1e-5 * max(np.abs(expected).max(), 1), err_msg=f"{kind} {name}"
            )


def test_the_band_is_left_only_for_larger_offsets():
    # the forms round differently, so bits tell which one ran
    case = cases.deform_case((13, 18), "small")
    runs, radius = [evaluate(impl) for impl in ("gather", "banded")], deform_conv.BAND_RADIUS
    for largest, in_band in ((radius - 0.001, True), (radius + 0.5, False), (0.001 - radius, True), (-radius, False)):
        offsets = case.offsets.copy()
        offsets[0, 5, 5, 0, 0] = largest
        arguments = (case.features, offsets, case.mask, case.kernel)
        gather, banded = (np.asarray(run(arguments, case.gradient)[0]) for run in runs)
        np.testing.assert_allclose(gather, banded, atol=1e-5)
        assert np.array_equal(gather, banded) != in_band


@pytest.mark.parametrize("batch", [2, 3])  # also what two devices cannot share
def test_what_is_beyond_the_band_is_the_gather_form_on_several_devices(batch):
    case = cases.deform_case((3, 2), "large", batch=batch)
    expected = evaluate("gather")(case[:4], case.gradient)
    with jax.set_mesh(jax.make_mesh((2,), ("data",), (AxisType.Auto,))):
        found = evaluate("banded")(case[:4], case.gradient)
    for name, value, exact in zip(NAMES, found, expected, strict=True):
        np.testing.assert_allclose(value, exact, atol=1e-5 * max(np.abs(exact).max(), 1), err_msg=name)


def test_zero_offsets_and_full_masks_are_a_convolution():
    case = cases.deform_case((8, 9), "zero")
    value = deform_conv.deform_conv2d(case.features, case.offsets, np.ones_like(case.mask), case.kernel)
    expected = jax.lax.conv_general_dilated(
        case.features, case.kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    np.testing.assert_allclose(value, expected, atol=1e-5)


KERNEL_CHANNELS = {"channels": 64, "outputs": 16}


@pytest.fixture
def interpreted(monkeypatch):
    """Makes the kernels run on this machine."""
    for name in ("forward", "backward"):
        monkeypatch.setattr(deform_pallas, name, functools.partial(getattr(deform_pallas, name), interpret=True))


@pytest.mark.parametrize("size", [(13, 18), (3, 2), (1, 1)], ids=str)
def test_kernels_equal_the_gather_form(interpreted, size, monkeypatch):
    monkeypatch.setattr(deform_pallas, "SAMPLES", 1)  # images one after the other
    pallas, gather = evaluate("pallas"), evaluate("gather")
    for kind in cases.DEFORM_OFFSETS:
        case = cases.deform_case(size, kind, **KERNEL_CHANNELS)
        results = zip(NAMES, *(run(case[:4], case.gradient) for run in (pallas, gather)), strict=True)
        for name, value, expected in results:
            atol = 1e-5 * max(np.abs(expected).max(), 1)
            np.testing.assert_allclose(value, expected, atol=atol, err_msg=f"{kind} {name}")


@pytest.fixture
def on_a_tpu(monkeypatch):
    """Makes the kernels for TPUs run on this machine."""
    for name in ("forward", "backward"):
        monkeypatch.setattr(deform_tpu, name, functools.partial(getattr(deform_tpu, name), interpret=True))
    monkeypatch.setattr(split, "by_platform", lambda *arguments, tpu, default: tpu(*arguments))
    monkeypatch.setitem(deform_conv.FORMS, "banded", (None, None))
    jax.clear_caches()  # of what was traced for another platform
    yield
    jax.clear_caches()


def test_kernels_for_tpus_are_split_over_a_mesh(on_a_tpu):
    case = cases.deform_case((8, 9), "small", batch=8, **KERNEL_CHANNELS)
    expected = evaluate("gather")(case[:4], case.gradient)
    with jax.set_mesh(jax.make_mesh((4, 2), ("data", "fsdp"), (AxisType.Auto,) * 2)):
        found = evaluate("pallas")(case[:4], case.gradient)
    for name, value, exact in zip(NAMES, found, expected, strict=True):
        np.testing.assert_allclose(value, exact, atol=1e-5 * max(np.abs(exact).max(), 1), err_msg=name)


def test_what_does_not_fit_a_tpu_is_left_to_the_banded_form(on_a_tpu, monkeypatch):
    monkeypatch.setattr(deform_tpu, "forward", None)
    monkeypatch.setattr(deform_tpu, "MEMORY", 1 << 20)
    monkeypatch.setitem(deform_conv.FORMS, "banded", (deform_conv._banded_forward, None))
    case = cases.deform_case((3, 2), "small", **KERNEL_CHANNELS)
    found = deform_conv.deform_conv2d(*case[:4], impl="pallas")
    np.testing.assert_allclose(found, deform_conv.deform_conv2d(*case[:4], impl="gather"), atol=1e-5)
    assert deform_tpu.fits((4, 100, 168, 256), 256) is False
    monkeypatch.undo()
    assert deform_tpu.fits((4, 100, 168, 256), 256)  # the largest level of the paper's canvases
    assert not deform_tpu.fits((4, 200, 336, 256), 256)
    monkeypatch.setattr(split, "device_kind", lambda: "TPU v4")
    assert not deform_tpu.fits((4, 100, 168, 256), 256)


@pytest.mark.parametrize("size", [(13, 18), (3, 2), (22, 8)], ids=str)
def test_kernels_for_tpus_equal_the_gather_form(on_a_tpu, size):
    kernels, gather = evaluate("pallas"), evaluate("gather")
    for kind in (*cases.DEFORM_OFFSETS, "band"):  # the last one fills it
        case = cases.deform_case(size, "small" if kind == "band" else kind, **KERNEL_CHANNELS)
        if kind == "band":
            reach = 0.99 * deform_conv.BAND_RADIUS / np.abs(case.offsets).max()
            case = case._replace(offsets=case.offsets * reach)
        results = zip(NAMES, *(run(case[:4], case.gradient) for run in (kernels, gather)), strict=True)
        for name, value, expected in results:
            atol = 1e-5 * max(np.abs(expected).max(), 1)
            np.testing.assert_allclose(value, expected, atol=atol, err_msg=f"{kind} {name}")


def test_every_place_has_its_samples_in_order_and_those_off_the_map_come_last():
    rng, num_images, height, width = np.random.default_rng(0), 11, 1, 3  # more images than taps
    places = (height + 1) * (width + 1)
    weights = rng.integers(0, 2, (num_images, 9, height * width, 4)) * rng.random((num_images, 9, height * width, 1))
    weights *= rng.random((num_images, 9, height * width, 1)) < 0.5
    index = rng.integers(0, places, (num_images, 9, height * width))
    given = jnp.asarray(weights, jnp.float32), jnp.asarray(index, jnp.int32)
    order, first = (np.asarray(x).tolist() for x in deform_pallas._by_place(*given, height=height, width=width))
    expected = [[] for _ in range(num_images * places + 1)]
    for image, cell, tap in np.ndindex(num_images, height * width, 9):
        on_map = weights[image, tap, cell].any()
        place = image * places + index[image, tap, cell] if on_map else num_images * places
        expected[place].append((image * height * width + cell) * 9 + tap)
    assert [order[start:end] for start, end in zip(first, [*first[1:], None], strict=True)] == expected
    assert expected[-1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_a_block_holds_of_a_product_fits_the_smallest_gpu(dtype):
    shapes = ((1, 8, 9, 256), (1, 9, 72, 4), (1, 9, 72), (3, 3, 256, 256))
    dtypes = (dtype, "float32", "int32", dtype)
    arguments = [jax.ShapeDtypeStruct(*array) for array in zip(shapes, dtypes, strict=True)]
    (held,) = bytes_of_products(jax.make_jaxpr(deform_pallas.forward)(*arguments).jaxpr)
    assert held == (64 + 256) * 64 * 2  # two of them, the product's stages, are below 99 KiB


def test_kernels_are_split_over_a_mesh(interpreted):
    case = cases.deform_case((8, 9), "large", batch=8, **KERNEL_CHANNELS)
    expected = evaluate("gather")(case[:4], case.gradient)
    with jax.set_mesh(jax.make_mesh((4, 2), ("data", "fsdp"), (AxisType.Auto,) * 2)):
        found = evaluate("pallas")(case[:4], case.gradient)
    for name, value, exact in zip(NAMES, found, expected, strict=True):
        np.testing.assert_allclose(value, exact, atol=1e-5 * max(np.abs(exact).max(), 1), err_msg=name)


@pytest.mark.parametrize("batch", [2, 3])  # 5 channels, or a batch that 2 devices cannot share
def test_what_the_kernels_cannot_hold_is_left_to_xla(monkeypatch, batch):
    monkeypatch.setattr(deform_pallas, "forward", None)
    case = cases.deform_case((3, 2), "small", batch=batch, **(KERNEL_CHANNELS if batch == 3 else {}))
    expected = deform_conv.deform_conv2d(*case[:4], impl="gather")
    with jax.set_mesh(jax.make_mesh((2,), ("data",), (AxisType.Auto,))):
        found = deform_conv.deform_conv2d(*case[:4], impl="pallas")
    np.testing.assert_array_equal(found, expected)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("jax_cuda13_plugin") is None, reason="pip install 'jax[cuda13]' (no GPU)")
@pytest.mark.parametrize("gpu", ["h100", "rtx4090"])  # with the most and the least memory of a block
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_the_gpu_compiler_accepts_the_kernels(dtype, gpu):
    """For a described GPU, P3 of the paper's runs; forward no samples in memory."""
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="", target_config=compile_step.description(gpu), topology="1x1x1"
    )
    place = SingleDeviceSharding(topology.devices[0])
    shapes = (
        ((32, 40, 40, 256), dtype),
        ((32, 40, 40, 9, 2), jnp.float32),
        ((32, 40, 40, 9), jnp.float32),
        ((3, 3, 256, 256), dtype),
    )
    arguments = (jax.ShapeDtypeStruct(shape, kind, sharding=place) for shape, kind in shapes)
    traced = jax.jit(deform_conv.deform_conv2d).trace(*arguments)
    program = traced.lower(lowering_platforms=("cuda",)).compile()
    assert program.as_text().count('custom_call_target="__gpu$xla.gpu.triton"') == 1
    assert program.memory_analysis().temp_size_in_bytes < 32 * 40 * 40 * (2 * 36 + 9) * 4  # weights and indices


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="pip install 'jax[tpu]' (no TPU)")
@pytest.mark.parametrize("tpu", ["v5e:2x2", "v6e:2x2"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_the_tpu_compiler_accepts_the_kernels(monkeypatch, dtype, tpu):
    """For a described TPU, the largest level of the paper's runs; no samples in memory."""
    topology = compile_step.Topology.parse(tpu)
    for name, value in topology.environment.items():
        monkeypatch.setenv(name, value)
    mesh = Mesh(np.array(topology.devices()[:1]), ("data",), axis_types=(AxisType.Auto,))
    shape = (4, 100, 168, 256)
    shapes = ((shape, dtype), ((*shape[:3], 9, 2), jnp.float32), ((*shape[:3], 9), jnp.float32))
    arguments = [
        *(jax.ShapeDtypeStruct(*array, sharding=NamedSharding(mesh, PartitionSpec("data"))) for array in shapes),
        jax.ShapeDtypeStruct((3, 3, 256, 256), dtype, sharding=NamedSharding(mesh, PartitionSpec())),
    ]

    def both_passes(*arguments):
        value, vjp = jax.vjp(deform_conv.deform_conv2d, *arguments)
        return value, *vjp(value)

    with jax.set_mesh(mesh):
        program = jax.jit(both_passes).trace(*arguments).lower(lowering_platforms=("tpu",)).compile()
    assert program.as_text().count('custom_call_target="tpu_custom_call"') == 2
    samples = 9 * np.prod(shape) * jnp.dtype(dtype).itemsize
    assert hlo.traffic(program.as_text()).memory < 4 * samples


@pytest.mark.parametrize("impl", ["gather", "banded"])
def test_bfloat16_is_near_float32(impl):
    assert_low_precision_is_near(impl)


def test_kernels_for_tpus_in_bfloat16_are_near_float32(on_a_tpu):
    assert_low_precision_is_near("pallas", **KERNEL_CHANNELS)


def assert_low_precision_is_near(impl, **channels):
    case = cases.deform_case((8, 9), "small", **channels)
    exact = evaluate("gather")(case[:4], case.gradient)
    low = [jnp.asarray(x, jnp.bfloat16) for x in (case.features, case.kernel, case.gradient)]
    rounded = evaluate(impl)((low[0], case.offsets, case.mask, low[1]), low[2])
    for name, a, b in zip(NAMES, exact, rounded, strict=True):
        assert b.dtype == (jnp.float32 if name in ("offsets", "mask") else jnp.bfloat16)
        np.testing.assert_allclose(a, b.astype(jnp.float32), atol=0.03 * np.abs(a).max(), err_msg=name)


def test_memory_does_not_hold_all_samples():
    shapes = [(2, 64, 64, 32), (2, 64, 64, 9, 2), (2, 64, 64, 9), (3, 3, 32, 32), (2, 64, 64, 32)]
    *arguments, gradient = (jax.ShapeDtypeStruct(shape, np.float32) for shape in shapes)
    compiled = evaluate("gather").lower(tuple(arguments), gradient).compile()
    features = 2 * 64 * 64 * 32 * 4
    # packed corners, their gradient, one tap's corners and update, offsets and small change; the samples alone are 9
    assert compiled.memory_analysis().temp_size_in_bytes < 26 * features


def test_channels_that_the_kernels_hold():
    held = {(i, o) for i in (32, 48, 64, 96, 128, 256) for o in (1, 8, 16, 24, 64, 128, 192, 256, 512)
            if deform_pallas.fits(np.zeros((3, 3, i, o), np.uint8))}  # fmt: skip
    assert held == {(i, o) for i in (64, 128, 256) for o in (16, 64, 128, 256)}


def test_unknown_form():
    case = cases.deform_case((1, 1), "zero")
    with pytest.raises(ValueError, match="auto, xla, gather, banded, pallas"):
        deform_conv.deform_conv2d(*case[:4], impl="scatter")
