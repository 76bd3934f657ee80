"""What devices decide: kernels work on one device's rows, and each kind of device has its own form of a layer.

XLA splits programs over the mesh, but not what happens within a kernel.
"""

from __future__ import annotations

import contextlib
import contextvars
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax import Array
from jax.sharding import AxisType, PartitionSpec

# scope of a branch that few batches take; `preflight.hlo` counts the other one
RARELY = "rarely"
_PLAIN = contextvars.ContextVar("plain forms alone", default=False)


def num_parts() -> int:
    """Returns over how many devices the rows of an array are split here; inside `shard_map` they already are."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty or AxisType.Manual in mesh.axis_types else mesh.size


def by_rows(function: Callable[..., Any], rows: tuple[Array, ...], whole: tuple[Array | None, ...]) -> Any:
    """Returns function(rows, whole) with the rows of this device; its results are joined by rows, too."""
    if num_parts() == 1:
        return function(rows, whole)
    split = PartitionSpec(jax.sharding.get_abstract_mesh().axis_names)
    return jax.shard_map(function, in_specs=(split, PartitionSpec()), out_specs=split, check_vma=False)(rows, whole)


def device_kind() -> str:
    """Returns what JAX calls the devices of `jax.set_mesh`, of which some may not be there, or else its own."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.devices()[0].device_kind if device is None else device.device_kind


def on_cpus() -> bool:
    """Returns whether the devices of `jax.set_mesh` are CPUs."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device is not None and device.platform == "cpu"


def by_platform(*arguments: Any, default: Callable[..., Any], **others: Callable[..., Any]) -> Any:
    """Returns what `jax.lax.platform_dependent` does; forms of others are not traced where the mesh is of CPUs.

    With DETCLIP_KERNELS=off in the environment it is what `default` returns, on whatever device; ValueError for other
    values than "on" and "off".
    """
    kernels = os.environ.get("DETCLIP_KERNELS", "on")
    if kernels not in ("on", "off"):
        raise ValueError(f"DETCLIP_KERNELS={kernels} is unknown; allowed are on (the default) and off")
    if _PLAIN.get() or kernels == "off":
        return default(*arguments)
    if on_cpus():
        return others.get("cpu", default)(*arguments)
    return jax.lax.platform_dependent(*arguments, default=default, **others)


@contextlib.contextmanager
def plain_forms() -> Iterator[None]:
    """Within it a program is traced without kernels, whose arithmetic is not counted."""
    token = _PLAIN.set(True)
    try:
        yield
    finally:
        _PLAIN.reset(token)
