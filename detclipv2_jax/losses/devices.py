"""Collectives of the contrastive loss over all axes of the mesh; without a mesh everything is on one device."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array


def on_each_device(*num_rows: int) -> tuple[tuple[str, ...], Callable[..., Callable]]:
    """Returns (mesh axes, decorator): a function of one device's rows becomes a function of global arrays.

    The mesh is that of `jax.set_mesh`; all axes split the rows, in order. Without a mesh there are no axes, and the
    function is called as it is. Results of the function are the same on all devices with `replicated=True`;
    otherwise they are split by rows and no gradient may be taken (`shard_map` checks no types then, which lets code
    written without it run inside).
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = tuple(mesh.axis_names)
    if axes and any(n % mesh.size for n in num_rows):
        raise ValueError(f"arrays of {num_rows} rows cannot be split evenly over {mesh.size} devices; pad them")

    def wrap(function: Callable, *, replicated: bool) -> Callable:
        if not axes:
            return function
        out_specs = PartitionSpec() if replicated else PartitionSpec(axes)
        return jax.shard_map(function, in_specs=PartitionSpec(axes), out_specs=out_specs, check_vma=replicated)

    return axes, wrap


def gather(x: Array, axes: tuple[str, ...]) -> Array:
    """Returns the rows of all devices in the order of the global array; not differentiable."""
    return _as_bits(lambda bits: jax.lax.all_gather(bits, axes, tiled=True), x) if axes else x


def take(x: Array, index: Array) -> Array:
    """Returns x[index]; not differentiable."""
    return jax.lax.platform_dependent(
        x, index, cpu=lambda x, index: _as_bits(lambda bits: bits[index], x), default=lambda x, index: x[index]
    )


def _as_bits(move: Callable[[Array], Array], x: Array) -> Array:
    """Returns move(x) for a function that only moves data; XLA's CPU backend would widen bfloat16 to float32 first."""
    if x.dtype != jnp.bfloat16:
        return move(x)
    return jax.lax.bitcast_convert_type(move(jax.lax.bitcast_convert_type(x, jnp.uint16)), x.dtype)


def reduce_scatter(x: Array, axes: tuple[str, ...]) -> Array:
    """Returns the sum over all devices of this device's rows of x."""
    return jax.lax.psum_scatter(x, axes, tiled=True) if axes else x


def vary(x: Array, axes: tuple[str, ...]) -> Array:
    """Returns x marked as different on each device, as loop carries inside `shard_map` must be."""
    return jax.lax.pcast(x, axes, to="varying") if axes else x


def zeros_after(x: Array, shape: tuple[int, ...], axes: tuple[str, ...]) -> Array:
    """Returns float32 zeros that cannot be made before x is; XLA's CPU backend would hold them from the start."""
    return vary(jnp.zeros(shape, jnp.float32), axes) + 0.0 * x.reshape(-1)[0]
