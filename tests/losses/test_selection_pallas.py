"""The kernel that finds every region's most similar concept: interpreted, and accepted by the GPU's compiler."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding
from products import bytes_of_products

from detclipv2_jax.losses import proposals, selection_pallas
from detclipv2_jax.preflight import compile_step


@pytest.mark.parametrize(("num_rows", "count"), [(300, 300), (300, 129), (300, 1), (300, 0), (5, 3)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_interpreted_kernel_equals_a_plain_maximum(num_rows, count, dtype):
    rng = np.random.default_rng(count)
    embeddings = jnp.asarray(rng.integers(-3, 4, size=(3, 70, 128)), dtype)  # integers: exact products
    table = jnp.asarray(rng.integers(-3, 4, size=(400, 128)), dtype)
    rows = jnp.asarray(rng.permutation(400)[:num_rows], jnp.int32)
    found = selection_pallas.max_over_concepts(
        embeddings, table, rows, jnp.int32(count), low=proposals.LOW, interpret=True
    )
    similarity = np.asarray(embeddings, np.float64) @ np.asarray(table, np.float64)[rows[:count]].T
    expected = similarity.max(axis=2) if count else np.full((3, 70), proposals.LOW, np.float32)
    np.testing.assert_array_equal(found, expected)
    chunks = proposals.max_over_concepts(embeddings, table, rows, jnp.int32(count), chunk_bytes=1 << 16)
    np.testing.assert_array_equal(found, chunks)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_a_block_holds_of_a_product_fits_the_smallest_gpu(dtype):
    shapes = (((256, 512), dtype), ((300, 512), dtype), ((300,), "int32"), ((), "int32"))
    embeddings, *rest = (jax.ShapeDtypeStruct(*shape) for shape in shapes)
    embeddings = jax.ShapeDtypeStruct((1, *embeddings.shape), dtype)
    kernel = functools.partial(selection_pallas.max_over_concepts, low=-1.0)
    (held,) = bytes_of_products(jax.make_jaxpr(kernel)(embeddings, *rest).jaxpr)
    assert held == 2 * 128 * 64 * 2  # three of them, the product's stages, are below 99 KiB


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("jax_cuda13_plugin") is None, reason="pip install 'jax[cuda13]' (no GPU)")
@pytest.mark.parametrize(
    ("gpu", "size", "kernels", "dtype"),
    [("h100", 512, 1, jnp.bfloat16), ("h100", 48, 0, jnp.bfloat16),  # embeddings of 48 are left to XLA
     ("rtx4090", 512, 1, jnp.bfloat16), ("rtx4090", 512, 1, jnp.float32)],
)  # fmt: skip
def test_the_gpu_compiler_accepts_the_kernel(gpu, size, kernels, dtype):
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="", target_config=compile_step.description(gpu), topology="1x1x1"
    )
    place = SingleDeviceSharding(topology.devices[0])
    arguments = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=place)
        for shape, dtype in (
            ((64, 2134, size), dtype),
            ((9216, size), dtype),
            ((6912,), jnp.int32),
            ((), jnp.int32),
        )
    ]
    function = jax.jit(proposals.max_over_concepts, static_argnames="chunk_bytes")
    program = function.trace(*arguments, chunk_bytes=1 << 30).lower(lowering_platforms=("cuda",)).compile()
    assert program.as_text().count('custom_call_target="__gpu$xla.gpu.triton"') == kernels
    if kernels:
        assert program.memory_analysis().temp_size_in_bytes < 0.04e9  # the concepts; no similarities
