"""The mesh, who holds what on it, and host batches made global.

Axes ("data", "fsdp"): batch rows and concept-table rows are split over both, parameters and Adam moments over "fsdp".
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from detclipv2_jax import chips
from detclipv2_jax.data.schema import Batch, Federated, Kind

if TYPE_CHECKING:
    from ml_collections import ConfigDict

AXES = ("data", "fsdp")
BATCH = P(AXES)  # axis 0 of every array of a batch, concept table included
REPLICATED = P()


def make_mesh(*, fsdp: int = 1, devices: list[jax.Device] | None = None) -> Mesh:
    """Returns the mesh of `devices` (all by default) with `fsdp` of them sharing one copy of the parameters."""
    devices = jax.devices() if devices is None else devices
    if fsdp < 1 or len(devices) % fsdp:
        raise ValueError(f"mesh.fsdp={fsdp} must divide the number of devices, {len(devices)}")
    # process by process: `jax.make_mesh` orders TPUs by their place in the torus, which scatters a process's rows over
    # the global batch, and `to_global` counts on them being together
    ordered = sorted(devices, key=lambda device: (device.process_index, device.id))
    # Explicit axes (the default) would break the window reshape of Swin and nn.Embed
    return Mesh(np.array(ordered).reshape(-1, fsdp), AXES, axis_types=(AxisType.Auto,) * 2)


@functools.cache
def compiler_options(mesh: Mesh) -> dict[str, bool]:
    """Returns those of `chips.COMPILER_OPTIONS` that the compiler of the mesh knows; a warning names the others."""

    def known(option: str, value: bool) -> bool:
        scalar = jax.ShapeDtypeStruct((), np.float32, sharding=NamedSharding(mesh, REPLICATED))
        try:
            jax.jit(jnp.negative, compiler_options={option: value}).trace(scalar).lower().compile()
        except jax.errors.JaxRuntimeError as error:
            logging.warning("this compiler has no option %s: %s", option, str(error).splitlines()[0])
            return False
        return True

    options = chips.COMPILER_OPTIONS.get(mesh.devices.flat[0].platform, {})
    return {option: value for option, value in options.items() if known(option, value)}


def param_spec(shape: tuple[int, ...], *, fsdp: int) -> P:
    """Returns the spec of a parameter: its largest axis that "fsdp" divides is split; without one it is replicated."""
    axes = [axis for axis, size in enumerate(shape) if size % fsdp == 0 and size >= fsdp]
    if fsdp == 1 or not axes:
        return REPLICATED
    largest = max(axes, key=lambda axis: (shape[axis], axis))
    return P(*(("fsdp" if axis == largest else None) for axis in range(len(shape))))


def param_shardings(mesh: Mesh, params: Any) -> Any:
    """Returns the NamedSharding of every parameter of a tree of arrays or shapes."""
    fsdp = mesh.shape["fsdp"]
    return jax.tree.map(lambda p: NamedSharding(mesh, param_spec(p.shape, fsdp=fsdp)), params)


def summed(counts: dict[str, int], mesh: Mesh) -> dict[str, Any]:
    """Returns the sums of all processes' counts, computed by the devices when they get there."""
    if jax.process_count() == 1:
        return counts
    rows = np.zeros((jax.local_device_count(), len(counts)), np.int32)
    rows[0] = list(counts.values())
    device_counts = jax.make_array_from_process_local_data(NamedSharding(mesh, BATCH), rows)
    return dict(zip(counts, jax.jit(_sums, out_shardings=NamedSharding(mesh, REPLICATED))(device_counts), strict=True))


def _sums(rows: jax.Array) -> tuple[jax.Array, ...]:
    return tuple(rows.sum(axis=0))


def to_global(batch: Batch, mesh: Mesh) -> Batch:
    """Returns the global batch on the devices of `mesh`, built from this process's rows.

    Concept-table rows of process p follow those of process p-1, so its indices grow by the number of rows before.
    """
    offset = jax.process_index() * batch.concept_tokens.shape[0]
    batch = batch._replace(
        box_concepts=batch.box_concepts + np.int32(offset), caption_concepts=batch.caption_concepts + np.int32(offset)
    )
    if batch.federated is not None:
        concepts = batch.federated.concepts + np.int32(offset)
        batch = batch._replace(federated=batch.federated._replace(concepts=concepts))
    sharding = NamedSharding(mesh, BATCH)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


def split_rows(tree: Any, num_chunks: int, mesh: Mesh) -> Any:
    """Returns the tree with the batch axis cut into [num_chunks, rows]; each device's rows stay on it."""

    def split(x: jax.Array) -> jax.Array:
        per_device = x.shape[0] // (mesh.size * num_chunks)
        x = x.reshape(mesh.size, num_chunks, per_device, *x.shape[1:]).swapaxes(0, 1)
        x = x.reshape(num_chunks, mesh.size * per_device, *x.shape[3:])
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(None, *BATCH)))

    return jax.tree.map(split, tree)


def join_rows(tree: Any, mesh: Mesh) -> Any:
    """Undoes `split_rows`."""

    def join(x: jax.Array) -> jax.Array:
        num_chunks, rows = x.shape[:2]
        x = x.reshape(num_chunks, mesh.size, rows // mesh.size, *x.shape[2:]).swapaxes(0, 1)
        return jax.lax.with_sharding_constraint(x.reshape(num_chunks * rows, *x.shape[3:]), NamedSharding(mesh, BATCH))

    return jax.tree.map(join, tree)


def batch_shapes(
    config: ConfigDict,
    kind: Kind,
    canvas: tuple[int, int],
    *,
    table_rows: int,
    num_verified: int = 0,
    class_names: bool = False,
    mesh: Mesh | None = None,
) -> Batch:
    """Returns the shapes of a global batch, with their place on a mesh if there is one."""
    place = NamedSharding(mesh, BATCH) if mesh else None
    section = config[kind.value]
    b = section.batch_size
    num_captions = 1 if class_names else section.max_phrases + 1 if kind is Kind.IMAGE_TEXT else 0
    n, m = (0, num_captions) if kind is Kind.IMAGE_TEXT else (section.max_boxes, 0)

    def shape(sizes: tuple[int, ...], dtype: Any) -> Any:
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=place)

    return Batch(
        image=shape((b, *canvas, 3), np.uint8),
        extent=shape((b, 2), np.int32),
        scale=shape((b, 2), np.float32),
        original_size=shape((b, 2), np.int32),
        image_mask=shape((b,), bool),
        example_id=shape((b,), np.int32),
        boxes=shape((b, n, 4), np.float32),
        box_mask=shape((b, n), bool),
        box_concepts=shape((b, n), np.int32),
        concept_tokens=shape((table_rows, config.model.text.context_length), np.int32),
        concept_mask=shape((table_rows,), bool),
        concept_ids=shape((table_rows, 2), np.uint32),
        caption_concepts=shape((b, m), np.int32),
        caption_mask=shape((b, m), bool),
        class_names=shape((b,), bool) if class_names else None,
        federated=Federated(shape((b,), bool), shape((b, num_verified), np.int32), shape((b, num_verified), bool))
        if num_verified
        else None,
        concept_text=shape((table_rows, config.model.embed_dim), np.float32) if config.optimizer.text_once else None,
    )
