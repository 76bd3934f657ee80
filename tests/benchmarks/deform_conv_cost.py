"""Prints FLOPs and bytes of both forms of the deformable layer, from programs compiled for one TPU v5e.

    pip install libtpu && TPU_SKIP_MDS_QUERY=1 python tests/benchmarks/deform_conv_cost.py     (no TPU needed)

The layer's input is P3 of an 800 x 1344 image, three quarters of all five levels' cells. XLA counts the body of a loop
once; here it is multiplied by the number of turns (9 taps, or the rows of tiles), which both forms spend all work in.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from detclipv2_jax.models import deform_conv

HEIGHT, WIDTH, CHANNELS = 100, 168, 256


def main() -> None:
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
    placed = NamedSharding(Mesh(np.array(devices[:1]), ("data",)), PartitionSpec())
    features, offsets, mask, kernel = (
        jax.ShapeDtypeStruct(shape, dtype, sharding=placed)
        for shape, dtype in (
            ((1, HEIGHT, WIDTH, CHANNELS), jnp.bfloat16),
            ((1, HEIGHT, WIDTH, 9, 2), jnp.float32),
            ((1, HEIGHT, WIDTH, 9), jnp.float32),
            ((3, 3, CHANNELS, CHANNELS), jnp.bfloat16),
        )
    )
    turns = {"gather": 9, "banded": -(-HEIGHT // deform_conv.TILE)}
    print(f"{'':20}{'GFLOP':>8}{'GB moved':>10}")
    for impl, (forward, backward) in deform_conv.FORMS.items():
        arguments = (features, offsets, mask, kernel)
        for name, function, given in (("forward", forward, arguments), ("backward", backward, (*arguments, features))):
            cost = jax.jit(function).lower(*given).compile().cost_analysis()
            flops, moved = (turns[impl] * cost[key] / 1e9 for key in ("flops", "bytes accessed"))
            print(f"{impl + ', ' + name:20}{flops:8.1f}{moved:10.2f}", flush=True)


if __name__ == "__main__":
    main()
