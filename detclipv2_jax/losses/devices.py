"""Work of the losses split over all axes of the mesh, and its collectives; without a mesh all is on one device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array

_Tree = TypeVar("_Tree")

SPLIT, WHOLE = "split", "whole"  # how an array lies on the devices: by rows, or the same on all


def num_devices() -> int:
    """Returns over how many devices rows are split."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.size if mesh.axis_names else 1


def chunk_size(num_rows: int, row_bytes: int, budget_bytes: int) -> int:
    """Returns how many rows of `row_bytes` fit into the budget: at least 1, multiples of 128 (TPU lanes) above that."""
    size = max(1, budget_bytes // row_bytes)
    return min(num_rows, size - size % 128 if size > 128 else size)


def in_chunks(count: Array, size: int, body: Callable[[Array, Any], Any], carry: Any, *, most: int) -> Any:
    """Returns the carry after `body(n, carry)` for every chunk n of the first `count` concepts, of at most `most`.

    Devices alone know how many there are; by the loop's name preflight can tell how often it turns (`hlo.traffic`).
    """
    with jax.named_scope(f"chunks_of_{size}_of_{most}_concepts"):
        return jax.lax.fori_loop(0, (count + size - 1) // size, body, carry)


def on_each_device(*num_rows: int) -> tuple[tuple[str, ...], Callable[..., Callable]]:
    """Returns (mesh axes, decorator): a function of one device's rows becomes a function of global arrays.

    The mesh is that of `jax.set_mesh`; all axes split the rows, in order. Without a mesh there are no axes, and the
    function is called as it is. The decorator is told how arguments and results lie on the devices, SPLIT or WHOLE, one
    word for all or a tree of words. A gradient may be taken if it is `differentiable`; `shard_map` then checks types,
    without which code that knows nothing of it runs inside.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = tuple(mesh.axis_names)
    if axes and any(n % mesh.size for n in num_rows):
        raise ValueError(f"arrays of {num_rows} rows cannot be split evenly over {mesh.size} devices; pad them")

    def specs(places: Any) -> Any:
        return jax.tree.map(lambda place: PartitionSpec(axes) if place == SPLIT else PartitionSpec(), places)

    def wrap(function: Callable, *, arguments: Any = SPLIT, results: Any, differentiable: bool = False) -> Callable:
        if not axes:
            return function
        return jax.shard_map(function, in_specs=specs(arguments), out_specs=specs(results), check_vma=differentiable)

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


def total(x: Array, axes: tuple[str, ...]) -> Array:
    """Returns the sum of x over all entries and devices."""
    x = jnp.sum(x, dtype=jnp.float32)
    return jax.lax.psum(x, axes) if axes else x


def vary(x: _Tree, axes: tuple[str, ...]) -> _Tree:
    """Returns x marked as different on each device, as loop carries inside `shard_map` must be."""
    return jax.lax.pcast(x, axes, to="varying") if axes else x


def zeros_after(x: Array, shape: tuple[int, ...], axes: tuple[str, ...]) -> Array:
    """Returns float32 zeros that cannot be made before x is; XLA's CPU backend would hold them from the start."""
    return vary(jnp.zeros(shape, jnp.float32), axes) + 0.0 * x.reshape(-1)[0]
