"""Work split over devices: rows of chunks, sums, what is split and what is whole, in losses and around kernels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from detclipv2_jax.losses import devices
from detclipv2_jax.models import split
from detclipv2_jax.runs import sharding

ROWS = np.arange(48, dtype=np.float32).reshape(16, 3)


@pytest.mark.parametrize(
    ("num_rows", "row_bytes", "budget", "size"),
    [(1000, 10, 5, 1), (1000, 10, 1280, 128), (1000, 10, 2559, 128), (1000, 10, 2560, 256), (50, 10, 2560, 50)],
)
def test_sizes_of_chunks(num_rows, row_bytes, budget, size):
    assert devices.chunk_size(num_rows, row_bytes, budget) == size


@pytest.mark.parametrize(("count", "chunks"), [(0, 0), (1, 1), (3, 1), (4, 2), (6, 2), (7, 3)])
def test_the_first_concepts_are_taken_in_as_many_chunks_as_they_fill(count, chunks):
    met = devices.in_chunks(jnp.int32(count), 3, lambda n, met: met.at[n].add(1), jnp.zeros(5, jnp.int32), most=15)
    assert met.tolist() == [1] * chunks + [0] * (5 - chunks)


def test_without_a_mesh_a_function_is_called_as_it_is():
    assert devices.num_devices() == 1
    axes, per_device = devices.on_each_device(7)
    assert axes == ()

    def function(x):
        return x

    assert per_device(function, results=devices.SPLIT) is function
    for whole in (devices.gather, devices.reduce_scatter, devices.vary):
        np.testing.assert_array_equal(whole(ROWS, ()), ROWS)


def test_rows_are_split_in_order_and_sums_are_shared():
    with jax.set_mesh(sharding.make_mesh(fsdp=2)):
        assert devices.num_devices() == 8
        axes, per_device = devices.on_each_device(16, 8)
        assert axes == ("data", "fsdp")

        def local(x):
            assert x.shape == (2, 3)
            everything = devices.gather(x, axes)
            zeros = devices.zeros_after(x, (4,), axes)
            return {
                "sum": devices.reduce_scatter(2 * everything, axes),
                "place": jax.lax.axis_index(axes)[None] + zeros,
            }

        found = jax.jit(per_device(local, results=devices.SPLIT))(ROWS)
        np.testing.assert_array_equal(found["sum"], 8 * 2 * ROWS)  # every device has all rows
        np.testing.assert_array_equal(found["place"], np.arange(8).repeat(4))
        with pytest.raises(
            ValueError, match=r"arrays of \(12, 16\) rows cannot be split evenly over 8 devices; pad them"
        ):
            devices.on_each_device(12, 16)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_rows_are_gathered_and_taken_bit_for_bit(dtype):
    rows = jnp.asarray(ROWS, dtype).at[0, 0].set(jnp.nan)
    whole_bits = {jnp.bfloat16: np.uint16, jnp.float32: np.uint32}[dtype]
    bits = np.asarray(rows).view(whole_bits)
    np.testing.assert_array_equal(np.asarray(devices.take(rows, jnp.array([5, 0]))).view(whole_bits), bits[[5, 0]])
    with jax.set_mesh(sharding.make_mesh()):
        axes, per_device = devices.on_each_device(16)
        gathered = jax.jit(per_device(lambda x: devices.gather(x, axes), results=devices.WHOLE))(rows)
    assert gathered.dtype == dtype
    np.testing.assert_array_equal(np.asarray(gathered).view(whole_bits), bits)


def test_kernels_get_the_rows_of_one_device():
    seen = []

    def kernel(rows, whole):
        seen.append((split.num_parts(), rows[0].shape, whole[0].shape, whole[1]))
        return rows[0] + whole[0][:1]

    expected = ROWS + ROWS[:1]
    np.testing.assert_array_equal(split.by_rows(kernel, (jnp.asarray(ROWS),), (ROWS, None)), expected)
    with jax.set_mesh(sharding.make_mesh(fsdp=4)):
        assert split.num_parts() == 8
        found = jax.jit(lambda x: split.by_rows(kernel, (x,), (jnp.asarray(ROWS), None)))(ROWS)
    np.testing.assert_array_equal(found, expected)
    assert seen == [(1, (16, 3), (16, 3), None), (1, (2, 3), (16, 3), None)]
