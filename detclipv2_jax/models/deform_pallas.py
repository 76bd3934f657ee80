"""Kernels of the deformable layer for NVIDIA GPUs (Pallas, Triton): samples and their gradients stay on the chip.

Forward: a block of cells gathers the corners of its samples, a tap and 64 channels at a time, and multiplies them with
the kernel's part. Backward: one kernel computes the gradients of a block's samples and adds them to the features' with
atomic operations; another gathers the samples again for the gradient of the kernel.

The five levels of 384 images of 320 x 320 would not fit on the chip, but neighbouring blocks read the same cells.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Bool, Float, Float32, Int32

from detclipv2_jax.models import split

CELLS = 64  # of a block
CHANNELS = 64  # at a time; the number of input channels is a multiple of it
MAX_OUTPUTS = 256  # channels: CELLS rows of float32 sums are kept in registers
SPLITS = 11  # of the cells, for the kernel's gradient: 396 programs of 256 channels for the 132 processors of an H100


def fits(kernel: Float[Array, "3 3 c o"]) -> bool:
    """Returns whether the kernels can hold a layer of this many channels."""
    inputs, outputs = kernel.shape[2:]
    return inputs % CHANNELS == 0 and 16 <= outputs <= MAX_OUTPUTS and outputs & (outputs - 1) == 0


def forward(
    features: Float[Array, "b h w c"],
    weights: Float32[Array, "b 9 n 4"],
    index: Int32[Array, "b 9 n"],
    kernel: Float[Array, "3 3 c o"],
    *,
    interpret: bool = False,
) -> Float[Array, "b h w o"]:
    """Returns the layer's output; weights and index are those of `deform_conv._corners`, images first."""

    def local(rows, whole):
        features, weights, index = rows
        (kernel,) = whole
        flat, sizes = _flat(features, kernel)
        num_cells, outputs = flat.shape[0], kernel.shape[3]
        out = _call(
            functools.partial(_forward_kernel, **sizes),
            [flat, *_by_tap(weights, index), kernel.reshape(9, *kernel.shape[2:])],
            [jax.ShapeDtypeStruct((num_cells, outputs), features.dtype)],
            grid=(pl.cdiv(num_cells, CELLS),),
            name="deformable",
            interpret=interpret,
        )[0]
        return out.reshape(*features.shape[:3], outputs)

    return split.by_rows(local, (features, weights, index), (kernel,))


def backward(
    features: Float[Array, "b h w c"],
    weights: Float32[Array, "b 9 n 4"],
    index: Int32[Array, "b 9 n"],
    kernel: Float[Array, "3 3 c o"],
    gradient: Float[Array, "b h w o"],
    *,
    interpret: bool = False,
) -> tuple[Float32[Array, "b h w c"], Float32[Array, "b 9 n 4"], Float32[Array, "3 3 c o"]]:
    """Returns the gradients to features, weights and kernel."""

    def local(rows, whole):
        features, weights, index, gradient = rows
        (kernel,) = whole
        flat, sizes = _flat(features, kernel)
        num_cells, inputs = flat.shape
        outputs = kernel.shape[3]
        arrays = [flat, *_by_tap(weights, index), gradient.reshape(num_cells, outputs)]
        feature_gradient, weight_gradient = _call(
            functools.partial(_sample_gradient_kernel, interpret=interpret, **sizes),
            [*arrays, kernel.reshape(9, inputs, outputs), jnp.zeros((num_cells, inputs), jnp.float32)],
            [
                jax.ShapeDtypeStruct((num_cells, inputs), jnp.float32),
                jax.ShapeDtypeStruct((36, num_cells), jnp.float32),
            ],
            aliases={5: 0},
            grid=(pl.cdiv(num_cells, CELLS),),
            name="deformable_sample_gradient",
            interpret=interpret,
        )
        kernel_gradient = _call(
            functools.partial(_kernel_gradient_kernel, **sizes),
            arrays,
            [jax.ShapeDtypeStruct((SPLITS, 9, inputs, outputs), jnp.float32)],
            grid=(SPLITS * 9 * (inputs // CHANNELS),),
            name="deformable_kernel_gradient",
            interpret=interpret,
        )[0]
        weight_gradient = weight_gradient.reshape(9, 4, features.shape[0], -1).transpose(2, 0, 3, 1)
        return feature_gradient.reshape(features.shape), weight_gradient, kernel_gradient

    feature_gradient, weight_gradient, kernel_gradient = split.by_rows(
        local, (features, weights, index, gradient), (kernel,)
    )
    return feature_gradient, weight_gradient, jnp.sum(kernel_gradient, axis=0).reshape(kernel.shape)


def _flat(features: Array, kernel: Array) -> tuple[Float[Array, "cells c"], dict[str, int]]:
    height, width = features.shape[1:3]
    return features.reshape(-1, features.shape[3]), {"height": height, "width": width}


def _by_tap(weights: Array, index: Array) -> tuple[Float32[Array, "36 cells"], Int32[Array, "9 cells"]]:
    return weights.transpose(1, 3, 0, 2).reshape(36, -1), index.swapaxes(0, 1).reshape(9, -1)


def _call(kernel, inputs, out_shape, *, grid, name, interpret, aliases=None):
    return pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)] * len(inputs),
        out_specs=[pl.BlockSpec(memory_space=pl.ANY)] * len(out_shape),
        out_shape=out_shape,
        input_output_aliases=aliases or {},
        compiler_params=triton.CompilerParams(num_warps=8, num_stages=2),
        interpret=interpret,
        name=name,
    )(*inputs)


def _forward_kernel(features_ref, weights_ref, index_ref, kernel_ref, out_ref, *, height, width):
    num_cells, outputs = out_ref.shape
    first = pl.program_id(0) * CELLS

    def one_tap(tap, total):
        corners = _corners(weights_ref, index_ref, tap, first, height=height, width=width)

        def add(i, total):
            channels = pl.ds(i * CHANNELS, CHANNELS)
            return total + _dot(_sample(features_ref, corners, channels), kernel_ref[tap, channels, :])

        return jax.lax.fori_loop(0, features_ref.shape[1] // CHANNELS, add, total)

    total = jax.lax.fori_loop(0, 9, one_tap, jnp.zeros((CELLS, outputs), jnp.float32))
    mask = _is_cell(first, num_cells, outputs)
    triton.store(out_ref.at[pl.ds(first, CELLS), :], total.astype(out_ref.dtype), mask=mask)


def _sample_gradient_kernel(
    features_ref, weights_ref, index_ref, gradient_ref, kernel_ref, _, feature_gradient_ref, weight_gradient_ref,
    *, height, width, interpret,
):  # fmt: skip
    num_cells = gradient_ref.shape[0]
    first = pl.program_id(0) * CELLS
    gradient = _read(gradient_ref, first)
    mask = first + jnp.arange(CELLS) < num_cells

    def one_tap(tap, _):
        corners = _corners(weights_ref, index_ref, tap, first, height=height, width=width)

        def add(i, weight_gradients):
            channels = pl.ds(i * CHANNELS, CHANNELS)
            sample_gradient = _dot(gradient, kernel_ref[tap, channels, :], trans_b=True)
            for row, weight, _ in corners:
                update = weight[:, None] * sample_gradient
                adds = jnp.broadcast_to((weight != 0.0)[:, None], update.shape)
                _add(feature_gradient_ref, row, channels, update, adds, interpret=interpret)
            return tuple(
                total + jnp.sum(features_ref[row, channels].astype(jnp.float32) * sample_gradient, axis=1)
                for total, (row, _, _) in zip(weight_gradients, corners, strict=True)
            )

        start = (jnp.zeros((CELLS,), jnp.float32),) * 4
        totals = jax.lax.fori_loop(0, features_ref.shape[1] // CHANNELS, add, start)
        for i, (total, (_, _, valid)) in enumerate(zip(totals, corners, strict=True)):
            place = weight_gradient_ref.at[4 * tap + i, pl.ds(first, CELLS)]
            triton.store(place, jnp.where(valid, total, 0.0), mask=mask)

    jax.lax.fori_loop(0, 9, one_tap, None)


def _kernel_gradient_kernel(features_ref, weights_ref, index_ref, gradient_ref, kernel_gradient_ref, *, height, width):
    num_cells, outputs = gradient_ref.shape
    chunks = features_ref.shape[1] // CHANNELS
    # all parts of the kernel run together on the same cells, which they share in the cache
    program = pl.program_id(0)
    part, tap, i = program // (9 * chunks), program // chunks % 9, program % chunks
    channels = pl.ds(i * CHANNELS, CHANNELS)
    size = pl.cdiv(pl.cdiv(num_cells, CELLS), SPLITS)

    def one_block(block, total):
        first = block * CELLS
        corners = _corners(weights_ref, index_ref, tap, first, height=height, width=width)
        gradient = _read(gradient_ref, first)
        return total + _dot(_sample(features_ref, corners, channels), gradient, trans_a=True)

    start = jnp.zeros((CHANNELS, outputs), jnp.float32)
    total = jax.lax.fori_loop(part * size, (part + 1) * size, one_block, start)
    kernel_gradient_ref[part, tap, channels, :] = total


def _corners(
    weights_ref: Any, index_ref: Any, tap: Array, first: Array, *, height: int, width: int
) -> list[tuple[Int32[Array, " p"], Float32[Array, " p"], Bool[Array, " p"]]]:
    """Returns (row of the features, weight, on the map) of the four corners of every cell's sample.

    Off the map the row is some other and the weight 0.
    """
    num_cells = index_ref.shape[1]
    cell = first + jnp.arange(CELLS)
    inside = cell < num_cells
    index = triton.load(index_ref.at[tap, pl.ds(first, CELLS)], mask=inside, other=0)
    image = jnp.minimum(cell, num_cells - 1) // (height * width) * (height * width)  # its first cell
    corners = []
    for i, (down, right) in enumerate(((0, 0), (0, 1), (1, 0), (1, 1))):
        y, x = index // (width + 1) - 1 + down, index % (width + 1) - 1 + right
        valid = inside & (y >= 0) & (y < height) & (x >= 0) & (x < width)
        weight = triton.load(weights_ref.at[4 * tap + i, pl.ds(first, CELLS)], mask=valid, other=0.0)
        corners.append((jnp.where(valid, image + y * width + x, image), weight, valid))
    return corners


def _sample(features_ref: Any, corners: list[tuple[Array, ...]], channels: Any) -> Float[Array, "p c"]:
    parts = [weight[:, None] * features_ref[row, channels].astype(jnp.float32) for row, weight, _ in corners]
    return functools.reduce(jnp.add, parts).astype(features_ref.dtype)


def _read(gradient_ref: Any, first: Array) -> Float[Array, "p o"]:
    mask = _is_cell(first, *gradient_ref.shape)
    return triton.load(gradient_ref.at[pl.ds(first, CELLS), :], mask=mask, other=0.0)


def _is_cell(first: Array, num_cells: int, columns: int) -> Bool[Array, "p columns"]:
    return first + jax.lax.broadcasted_iota(jnp.int32, (CELLS, columns), 0) < num_cells


def _dot(a, b, **transposed):
    """Returns the float32 product; of float32 factors without rounding them to the GPU's short format."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return triton.dot(a, b, precision=precision, **transposed)


def _add(ref: Any, rows: Array, channels: Any, values: Array, mask: Array, *, interpret: bool) -> None:
    """Adds values to rows, which other programs do as well, and the same row may occur more than once."""
    if not interpret:
        triton.atomic_add(ref, (rows, channels), values, mask=mask)
        return

    def one_row(i, _):  # an interpreted atomic operation would count equal rows once
        ref[rows[i], channels] += jnp.where(mask[i], values[i], 0.0)

    jax.lax.fori_loop(0, rows.shape[0], one_row, None)
