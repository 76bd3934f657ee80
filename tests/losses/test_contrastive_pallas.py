"""The fused TPU kernel: interpreted, it equals the XLA form; and the TPU compiler accepts it."""

import contrastive_oracle as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from detclipv2_jax.losses import contrastive_pallas


def example(b, k, c, d, dtype):
    rng = np.random.default_rng(0)
    regions = jnp.asarray(rng.integers(-3, 4, size=(b, k, d)), dtype)  # integers: exact products, many ties
    text = jnp.asarray(rng.integers(-3, 4, size=(c, d)), dtype)
    return regions, jnp.asarray(rng.random((b, k)) < 0.7).at[:, -1].set(True), text


@pytest.mark.parametrize(
    ("b", "k", "c", "d", "dtype"),
    [(8, 16, 128, 32, "float32"), (11, 7, 50, 3, "float32"), (3, 13, 1030, 8, "bfloat16")],  # even and uneven blocks
)
def test_interpreted_kernel_equals_plain_reductions(b, k, c, d, dtype):
    regions, mask, text = example(b, k, c, d, dtype)
    value, index = contrastive_pallas.max_over_regions(regions, mask, text, interpret=True)
    similarity = np.einsum("bkd,cd->bkc", np.asarray(regions, np.float64), np.asarray(text, np.float64))
    similarity[~np.asarray(mask)] = -np.inf
    np.testing.assert_array_equal(value, similarity.max(axis=1))
    np.testing.assert_array_equal(index, similarity.argmax(axis=1))
    assert (np.sum(similarity == similarity.max(axis=1, keepdims=True), axis=1) > 1).any()  # ties did happen


def test_loss_with_the_interpreted_kernel_is_the_same(monkeypatch):
    def run_tpu_form(*args, tpu=None, **forms):
        return tpu(*args, interpret=True) if tpu else forms["cpu"](*args)

    monkeypatch.setattr(jax.lax, "platform_dependent", run_tpu_form)
    arrays, _ = oracle.example(6)
    result = oracle.run(arrays, impl="pallas", temperature=0.4)
    oracle.assert_close(result, oracle.loss_and_gradients(**arrays, temperature=0.4))


def test_other_platforms_than_tpu_compute_the_xla_form():
    arrays, _ = oracle.example(6)
    result = oracle.run(arrays, num_devices=8, impl="pallas", temperature=0.3)
    oracle.assert_close(result, oracle.loss_and_gradients(**arrays, temperature=0.3))


@pytest.mark.slow
def test_the_tpu_compiler_accepts_the_kernel(monkeypatch):
    """For described TPUs; sizes of the paper's batch, and sizes that fill no tile."""
    pytest.importorskip("libtpu", reason="needs libtpu (no TPU): pip install libtpu")
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    sharding = SingleDeviceSharding(topology.devices[0])
    for b, k, c, d, dtype in ((192, 100, 36864, 512, jnp.bfloat16), (5, 7, 100, 64, jnp.float32)):
        shapes = ((b, k, d), dtype), ((b, k), bool), ((c, d), dtype)
        args = [jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for shape, dtype in shapes]
        program = jax.jit(contrastive_pallas.max_over_regions).lower(*args).compile()
        assert "tpu_custom_call" in program.as_text()
        assert program.memory_analysis().temp_size_in_bytes < 0.01e9 + 2 * b * k * d * 4  # no similarities
