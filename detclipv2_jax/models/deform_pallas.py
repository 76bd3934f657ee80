"""The deformable layer's forward pass in one kernel for NVIDIA GPUs (Pallas, Triton): samples stay on the chip.

A block of cells gathers the corners of its samples, a tap and 64 channels at a time, and multiplies them with the
kernel's part. The five levels of 384 images of 320 x 320 would not fit on the chip, but neighbouring blocks read the
same cells. On an H200 it takes 2.4 ms where the gather form takes 3.8 (16 x 100 x 168 x 256, 2026-11-27, jax 0.11.2).
Kernels for the backward pass, with atomic additions, took 23 ms against the gather form's 15 and are gone.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
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

    def local(rows: tuple[Array, ...], whole: tuple[Array, ...]) -> Array:
        features, weights, index = rows
        (kernel,) = whole
        flat, sizes = _flat(features, kernel)
        num_cells, outputs = flat.shape[0], kernel.shape[3]
        out = pl.pallas_call(
            functools.partial(_forward_kernel, **sizes),
            grid=(pl.cdiv(num_cells, CELLS),),
            in_specs=[pl.BlockSpec(memory_space=pl.ANY)] * 4,
            out_specs=pl.BlockSpec(memory_space=pl.ANY),
            out_shape=jax.ShapeDtypeStruct((num_cells, outputs), features.dtype),
            compiler_params=triton.CompilerParams(num_warps=8, num_stages=2),
            interpret=interpret,
            name="deformable",
        )(flat, *_by_tap(weights, index), kernel.reshape(9, *kernel.shape[2:]))
        return out.reshape(*features.shape[:3], outputs)

    return split.by_rows(local, (features, weights, index), (kernel,))


def _flat(features: Array, kernel: Array) -> tuple[Float[Array, "cells c"], dict[str, int]]:
    height, width = features.shape[1:3]
    return features.reshape(-1, features.shape[3]), {"height": height, "width": width}


def _by_tap(weights: Array, index: Array) -> tuple[Float32[Array, "36 cells"], Int32[Array, "9 cells"]]:
    return weights.transpose(1, 3, 0, 2).reshape(36, -1), index.swapaxes(0, 1).reshape(9, -1)


def _forward_kernel(
    features_ref: Any, weights_ref: Any, index_ref: Any, kernel_ref: Any, out_ref: Any, *, height: int, width: int
) -> None:
    num_cells, outputs = out_ref.shape
    first = pl.program_id(0) * CELLS

    def one_tap(tap: Array, total: Array) -> Array:
        corners = _corners(weights_ref, index_ref, tap, first, height=height, width=width)

        def add(i: Array, total: Array) -> Array:
            channels = pl.ds(i * CHANNELS, CHANNELS)
            return total + _dot(_sample(features_ref, corners, channels), kernel_ref[tap, channels, :])

        return jax.lax.fori_loop(0, features_ref.shape[1] // CHANNELS, add, total)

    total = jax.lax.fori_loop(0, 9, one_tap, jnp.zeros((CELLS, outputs), jnp.float32))
    mask = _is_cell(first, num_cells, outputs)
    triton.store(out_ref.at[pl.ds(first, CELLS), :], total.astype(out_ref.dtype), mask=mask)


def _corners(
    weights_ref: Any, index_ref: Any, tap: Array, first: Array, *, height: int, width: int
) -> list[tuple[Int32[Array, " p"], Float32[Array, " p"]]]:
    """Returns (row of the features, weight) of the four corners of every cell's sample.

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
        corners.append((jnp.where(valid, image + y * width + x, image), weight))
    return corners


def _sample(features_ref: Any, corners: Sequence[tuple[Array, ...]], channels: Any) -> Float[Array, "p c"]:
    parts = [weight[:, None] * features_ref[row, channels].astype(jnp.float32) for row, weight in corners]
    return functools.reduce(jnp.add, parts).astype(features_ref.dtype)


def _is_cell(first: Array, num_cells: int, columns: int) -> Bool[Array, "p columns"]:
    return first + jax.lax.broadcasted_iota(jnp.int32, (CELLS, columns), 0) < num_cells


def _dot(a: Array, b: Array) -> Array:
    """Returns the float32 product; of float32 factors without rounding them to the GPU's short format."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return triton.dot(a, b, precision=precision)
