"""The kernels of the focal loss against all concepts: interpreted, and accepted by the compilers."""

import functools
import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from products import bytes_of_products

from detclipv2_jax.losses import alignment, alignment_pallas, alignment_tpu
from detclipv2_jax.losses.concept_table import Concepts
from detclipv2_jax.models import split
from detclipv2_jax.preflight import compile_step, hlo


def example(*, num_regions=256, num_concepts=128, size=128, dtype="float32", reach=1.0):
    """Returns the arguments of the kernel; some regions and concepts do not count, regions have no to three labels."""
    rng = np.random.default_rng(num_concepts)
    rows = np.where(rng.random(num_concepts) < 0.2, -2, rng.permutation(num_concepts))
    labels = rng.integers(0, num_concepts, (num_regions, 3))
    labels[::3], labels[1::3, 1:] = -1, labels[1::3, :1]
    return {
        "embeddings": jnp.asarray(reach * rng.normal(size=(num_regions, size)), dtype),
        "text": jnp.asarray(rng.normal(size=(num_concepts, size)) / np.sqrt(size), dtype),
        "rows": jnp.asarray(rows, jnp.int32),
        "labels": jnp.asarray(labels, jnp.int32),
        "mask": jnp.asarray(rng.random(num_regions) < 0.8),
        "scale": jnp.float32(1.7),
        "bias": jnp.float32(-1.3),
    }


def plain(similarity, scale, bias, *, rows, labels, mask, **settings):
    hits = (labels[:, :, None] == rows[None, None]).any(axis=1)
    loss = alignment.focal_loss(scale * similarity + bias, hits, **settings)
    return jnp.sum(jnp.where(mask[:, None] & (rows >= 0)[None], loss, 0.0))


KERNELS = pytest.mark.parametrize("kernels", [alignment_pallas, alignment_tpu], ids=["gpu", "tpu"])


@KERNELS
@pytest.mark.parametrize(
    ("dtype", "alpha", "gamma", "reach"),
    [("float32", 0.25, 2.0, 1.0), ("float32", 0.6, 1.5, 1.0), ("float32", 0.25, 0.0, 1.0), ("bfloat16", 0.25, 2.0, 1.0),
     ("float32", 0.25, 2.0, 8.0)],
)  # fmt: skip
def test_interpreted_kernel_equals_the_plain_loss_and_its_gradient(kernels, dtype, alpha, gamma, reach):
    """Also where logits are so large that probabilities are 0 or 1."""
    sizes = {"num_regions": 2 * kernels.REGIONS, "num_concepts": 2 * kernels.CONCEPTS}
    given, settings = example(dtype=dtype, reach=reach, **sizes), {"alpha": alpha, "gamma": gamma}
    product = functools.partial(jnp.einsum, "rd,cd->rc", precision="highest", preferred_element_type=jnp.float32)
    similarity = product(given["embeddings"], given["text"])
    masks = {name: given[name] for name in ("rows", "labels", "mask")}
    loss, (bar, *scalars) = jax.value_and_grad(functools.partial(plain, **masks, **settings), (0, 1, 2))(
        similarity, given["scale"], given["bias"]
    )
    sums, found = kernels.sums_and_gradient(**given, **settings, interpret=True)
    np.testing.assert_allclose(sums, [loss, *scalars], rtol=4e-6)
    assert found.dtype == dtype
    tolerance = {"rtol": 2e-5 * reach, "atol": 1e-6} if dtype == "float32" else {"rtol": 2**-8, "atol": 1e-4}
    np.testing.assert_allclose(found.astype(jnp.float32), bar, **tolerance)
    assert np.any(found[np.flatnonzero(given["mask"])[:5]])
    assert not np.any(found[np.flatnonzero(~given["mask"])])


@KERNELS
@pytest.mark.parametrize("chunk_bytes", [1 << 30, 4 * 2 * 128 * 70])  # one chunk; two, one concept in the last
def test_the_loss_with_the_kernel_is_that_without(kernels, chunk_bytes, monkeypatch):
    """Anchors and concepts that are no multiples of its tiles are padded; the gradients are those of what was given."""
    platform = "cuda" if kernels is alignment_pallas else "tpu"
    monkeypatch.setattr(split, "by_platform", lambda *arguments, default, **forms: forms[platform](*arguments))
    monkeypatch.setattr(kernels, "sums_and_gradient", functools.partial(kernels.sums_and_gradient, interpret=True))
    monkeypatch.setattr(alignment_tpu, "REGIONS", 128)
    monkeypatch.setattr(alignment_tpu, "CONCEPTS", 64)
    rng = np.random.default_rng(0)
    embeddings = jnp.asarray(rng.normal(size=(2, 67, 64)), jnp.float32)
    text = jnp.asarray(rng.normal(size=(150, 64)) / 8, jnp.float32)
    targets = alignment.AnchorTargets(
        mask=jnp.asarray(rng.random((2, 67)) < 0.8),
        positive=jnp.asarray(rng.random((2, 67)) < 0.4),
        rows=jnp.asarray(rng.integers(0, 150, (2, 67, 2))),
    )

    def loss(embeddings, text, scale, bias, *, targets=targets):
        return 3.0 * alignment.alignment_loss(
            embeddings,
            Concepts(text, scale, bias),
            concept_mask=jnp.arange(150) < 129,
            targets=targets,
            settings=alignment.FocalSettings(alpha=0.25, gamma=2.0, chunk_bytes=chunk_bytes),
        )

    arguments = (embeddings, text, jnp.float32(2.0), jnp.float32(-1.0))
    found = jax.value_and_grad(loss, (0, 1, 2, 3))(*arguments)
    every = targets._replace(verified=jnp.ones((2, 150), bool))  # the same, for which there is no kernel
    expected = jax.value_and_grad(functools.partial(loss, targets=every), (0, 1, 2, 3))(*arguments)
    for ours, plain_one in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, plain_one, rtol=1e-5, atol=1e-6 * np.abs(plain_one).max())
    assert np.any(found[1][1][:129], axis=1).all()
    assert not np.any(found[1][1][129:])


def test_a_large_budget_makes_no_gradient_whose_offsets_need_more_than_32_bits(monkeypatch):
    seen = []

    def kernel(embeddings, text, **rest):
        seen.append((embeddings.shape[0], text.shape[0]))
        return jnp.zeros(3), jnp.zeros((embeddings.shape[0], text.shape[0]), embeddings.dtype)

    monkeypatch.setattr(split, "by_platform", lambda *arguments, cuda, tpu, default: cuda(*arguments))
    monkeypatch.setattr(alignment_pallas, "sums_and_gradient", kernel)
    shape = jax.ShapeDtypeStruct

    def loss(embeddings, text, rows):
        return alignment.alignment_loss(
            embeddings,
            Concepts(text, jnp.float32(1.0), jnp.float32(0.0)),
            concept_mask=jnp.ones(text.shape[0], bool),
            targets=alignment.AnchorTargets(rows[..., 0] > -2, rows[..., 0] >= 0, rows),
            settings=alignment.FocalSettings(alpha=0.25, gamma=2.0, chunk_bytes=1 << 40),
        )

    jax.eval_shape(
        loss, shape((64, 22400, 64), "bfloat16"), shape((12800, 64), "bfloat16"), shape((64, 22400, 1), "int32")
    )
    assert seen[0][0] == 64 * 22400
    assert 2**29 < seen[0][0] * seen[0][1] < 2**31


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_a_block_holds_of_a_product_fits_the_smallest_gpu(dtype):
    given = example(size=512, dtype=dtype)
    kernel = functools.partial(alignment_pallas.sums_and_gradient, alpha=0.25, gamma=2.0)
    (held,) = bytes_of_products(jax.make_jaxpr(lambda given: kernel(**given))(given).jaxpr)
    assert held == (128 + 64) * 64 * 2  # three of them, the product's stages, are below 99 KiB


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("jax_cuda13_plugin") is None, reason="pip install 'jax[cuda13]' (no GPU)")
@pytest.mark.parametrize(
    ("gpu", "dtype", "gamma"), [("h100", "bfloat16", 2.0), ("rtx4090", "bfloat16", 1.5), ("rtx4090", "float32", 2.0)]
)
def test_the_gpu_compiler_accepts_the_kernel_and_no_similarities_are_held(gpu, dtype, gamma):
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="", target_config=compile_step.description(gpu), topology="1x1x1"
    )
    text = compiled("cuda", topology.devices[0], dtype=dtype, gamma=gamma)
    assert text.count('custom_call_target="__gpu$xla.gpu.triton"') == 1


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="pip install 'jax[tpu]' (no TPU)")
@pytest.mark.parametrize("tpu", ["v5e:2x2", "v6e:2x2"])
@pytest.mark.parametrize(("dtype", "gamma"), [("bfloat16", 2.0), ("float32", 1.5)])
def test_the_tpu_compiler_accepts_the_kernel_and_no_similarities_are_held(monkeypatch, tpu, dtype, gamma):
    topology = compile_step.Topology.parse(tpu)
    for name, value in topology.environment.items():
        monkeypatch.setenv(name, value)
    text = compiled("tpu", topology.devices()[0], dtype=dtype, gamma=gamma)
    assert re.search(r"%alignment_loss[.\d]* = .* custom-call", text)


def compiled(platform, device, *, dtype, gamma):
    """Returns the text of the loss and its gradients for a described device."""
    mesh = Mesh(np.array([device]), ("data",), axis_types=(AxisType.Auto,))
    rows, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data",), ()))
    shapes = [
        ((4, 20251, 512), dtype, rows),
        ((2560, 512), dtype, whole),
        ((), "float32", whole),
        ((), "float32", whole),
        ((4, 20251, 2), "int32", rows),
    ]
    arguments = [jax.ShapeDtypeStruct(shape, kind, sharding=place) for shape, kind, place in shapes]

    def loss(embeddings, text, scale, bias, rows):
        return alignment.alignment_loss(
            embeddings,
            Concepts(text, scale, bias),
            concept_mask=jnp.arange(2560) < 2500,
            targets=alignment.AnchorTargets(rows[..., 0] > -2, rows[..., 0] >= 0, rows),
            settings=alignment.FocalSettings(alpha=0.25, gamma=gamma, chunk_bytes=512 << 20),
        )

    with jax.set_mesh(mesh):
        step = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3))).trace(*arguments)
        text = step.lower(lowering_platforms=(platform,)).compile().as_text()
    similarities = 4 * 20251 * 2560 * jnp.dtype(dtype).itemsize
    assert hlo.traffic(text, num_concepts=2560).memory < 8 * similarities
    return text
