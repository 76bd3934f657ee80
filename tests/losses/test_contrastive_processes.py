"""The loss over 2 processes with 4 devices each equals brute force; this file is also the program of a process."""

import sys

import contrastive_oracle as oracle
import jax
import numpy as np
import pytest
import two_processes
from jax.sharding import AxisType, NamedSharding, PartitionSpec


@pytest.mark.slow
def test_two_processes_equal_brute_force():
    for output in two_processes.outputs_of(__file__, timeout_s=120):
        assert "8 devices of 2 processes" in output


def main(address, process_id):
    jax.distributed.initialize(address, num_processes=2, process_id=process_id)
    mesh = jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    host, _ = oracle.example()
    expected_loss, expected, _ = oracle.loss_and_gradients(**host, side="bilateral")
    split = PartitionSpec(("data", "fsdp"))
    arrays = {
        name: jax.make_array_from_callback(
            x.shape, NamedSharding(mesh, split if x.ndim else PartitionSpec()), lambda index, x=x: x[index]
        )
        for name, x in host.items()
    }
    with jax.set_mesh(mesh):
        loss, gradients, _ = oracle.run(arrays, side="bilateral", gather=False)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
    for gradient, y in zip(gradients, expected, strict=True):
        for shard in gradient.addressable_shards:
            np.testing.assert_allclose(shard.data, y[shard.index], rtol=1e-5, atol=1e-5)
    print(f"{jax.device_count()} devices of {jax.process_count()} processes")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
