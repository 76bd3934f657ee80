"""The banded form of the deformable layer in kernels for TPUs (Pallas, Mosaic): no sample passes through memory.

A step of the grid takes eight rows of an image, with the rows before in memory of the chip, and goes through their
tiles of 8 x 8 cells. The bilinear weights of a tile's samples are one matrix [neighbourhood, samples], as in the banded
form, so that sampling is one product, and its gradients are two. Gradients of the map add up where neighbourhoods
overlap, also in memory of the chip, and in a fixed order.

Compiled for v5e, v5p and v6e; never run on one. Older TPUs have too little memory on the chip.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Float, Float32

from detclipv2_jax.models import split
from detclipv2_jax.models.kernels_tpu import dot

TILE = 8  # cells; a strip is a row of tiles
CELLS = TILE * TILE
LANES = 128
TAPS = 9
ROWS, COLUMNS = (
    18,
    24,
)  # of a neighbourhood: offsets below 4 cells reach 5 beyond the tile; columns fill whole registers
MEMORY = 48 << 20  # bytes of the chip for one program, of 64 MiB on v5p and 128 on v5e and v6e
TOO_SMALL = ("TPU v2", "TPU v3", "TPU v4")  # they have 16 MiB


def fits(shape: tuple[int, ...], outputs: int) -> bool:
    """Returns whether a program can hold what it needs of maps [b, h, w, c] on the devices of the mesh."""
    columns = -(-shape[2] // TILE)
    row = TILE * (columns + 2)
    channels, outputs = (LANES * -(-x // LANES) for x in (shape[3], outputs))  # in whole registers
    rings = 2 * 3 * TILE * row * channels * 4
    blocks = TILE * row * (4 * channels + 5 * outputs) * 4
    kernels = TAPS * channels * outputs * 4 * 4
    tiles = ROWS * COLUMNS * TAPS * CELLS * 4 * 8
    return rings + blocks + kernels + tiles <= MEMORY and split.device_kind() not in TOO_SMALL


def forward(
    features: Float[Array, "b h w c"],
    positions: Float32[Array, "b r t 3 s"],
    kernel: Float[Array, "9 c o"],
    *,
    interpret: bool = False,
) -> Float[Array, "b h w o"]:
    """Returns the layer's output.

    Args:
      features: the map.
      positions: row and column within its tile's neighbourhood, which begins 5 cells before the tile, and mask, of the
        samples of the t tiles of the r strips; the 64 cells' first tap, then the second.
      kernel: by tap.
      interpret: run without a TPU.
    """

    def local(rows: tuple[Array, ...], whole: tuple[Array, ...]) -> Array:
        return _call(*rows, *whole, interpret=interpret)[0]

    _, h, w, _ = features.shape
    return split.by_rows(local, (features, positions), (kernel,))[:, :h, :w]


def backward(
    features: Float[Array, "b h w c"],
    positions: Float32[Array, "b r t 3 s"],
    kernel: Float[Array, "9 c o"],
    gradient: Float[Array, "b h w o"],
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "b h w c"], Float32[Array, "b r t 3 s"], Float32[Array, "9 c o"]]:
    """Returns the gradients of features, positions and kernel."""

    def local(rows: tuple[Array, ...], whole: tuple[Array, ...]) -> tuple[Array, Array, Array]:
        features, positions, gradient = rows
        of_features, of_positions, of_kernel = _call(features, positions, *whole, gradient, interpret=interpret)
        return of_features, of_positions, of_kernel[None]

    _, h, w, _ = features.shape
    of_features, of_positions, of_kernel = split.by_rows(local, (features, positions, gradient), (kernel,))
    halo = (ROWS - TILE) // 2
    return of_features[:, halo : halo + h, halo : halo + w], of_positions, jnp.sum(of_kernel, axis=0)


def _call(features: Array, positions: Array, kernel: Array, *gradient: Array, interpret: bool) -> tuple[Array, ...]:
    (b, h, w, c), (_, strips, tiles, _, samples), outputs = features.shape, positions.shape, kernel.shape[2]
    halo, height, width = (ROWS - TILE) // 2, TILE * strips, TILE * tiles
    row = width + COLUMNS - TILE  # cells of a padded row
    features = jnp.pad(features, ((0, 0), (halo, height + 2 * TILE - h - halo), (halo, row - w - halo), (0, 0)))
    gradient = tuple(jnp.pad(x, ((0, 0), (0, height - h), (0, width - w), (0, 0))) for x in gradient)

    # step t of an image brings its rows 8t to 8t + 7; from 2 on the strip t - 2 has all that it needs
    def strip(t: Array) -> Array:
        return jnp.clip(t - 2, 0, strips - 1)

    padded = pl.BlockSpec((1, TILE, row, c), lambda i, t: (i, jnp.minimum(t, strips + 1), 0, 0))
    of_tiles = pl.BlockSpec((1, 1, tiles, 3, samples), lambda i, t: (i, strip(t), 0, 0, 0))
    of_cells = pl.BlockSpec((1, TILE, width, outputs), lambda i, t: (i, strip(t), 0, 0))
    whole = pl.BlockSpec(kernel.shape, lambda i, t: (0, 0, 0))
    ring = pltpu.VMEM((3 * TILE, row, c), jnp.float32)
    cells = pltpu.VMEM((TILE, width, outputs), jnp.float32)
    if gradient:  # one more step writes the rows below the last strip
        out_specs = [pl.BlockSpec((1, TILE, row, c), lambda i, t: (i, jnp.maximum(t - 2, 0), 0, 0)), of_tiles, whole]
        out_shape = [((b, height + TILE, row, c), features.dtype), (positions.shape, jnp.float32)]
        out_shape += [(kernel.shape, jnp.float32)]
        scratch = [ring, ring, cells]
    else:
        out_specs, out_shape, scratch = [of_cells], [((b, height, width, outputs), features.dtype)], [ring, cells]
    return tuple(
        pl.pallas_call(
            functools.partial(_backward_kernel, strips=strips) if gradient else _forward_kernel,
            grid=(b, strips + 2 + len(gradient)),
            in_specs=[padded, of_tiles, whole] + [of_cells] * len(gradient),
            out_specs=out_specs,
            out_shape=[jax.ShapeDtypeStruct(*shape) for shape in out_shape],
            scratch_shapes=scratch,
            compiler_params=pltpu.CompilerParams(vmem_limit_bytes=MEMORY),
            interpret=interpret,
            name="deformable_gradient" if gradient else "deformable",
        )(features, positions, kernel, *gradient)
    )


def _forward_kernel(
    rows_ref: Any, positions_ref: Any, kernel_ref: Any, out_ref: Any, ring_ref: Any, cells_ref: Any
) -> None:
    step = pl.program_id(1)
    _bring(rows_ref, ring_ref)

    @pl.when(step >= 2)
    def strip() -> None:
        def tile(j: Array, _: None) -> None:
            samples = _sampled(positions_ref[0, 0, j], _neighbourhood(ring_ref, j, kernel_ref.dtype))[0]
            parts = jnp.split(samples, TAPS)
            out = sum((dot(part, kernel_ref[tap], 1, 0) for tap, part in enumerate(parts)), start=jnp.float32(0.0))
            cells_ref[:, _columns(j, TILE), :] = out.reshape(TILE, TILE, -1)

        jax.lax.fori_loop(0, positions_ref.shape[2], tile, None)
        out_ref[0] = cells_ref[...].astype(out_ref.dtype)


def _backward_kernel(
    rows_ref: Any, positions_ref: Any, kernel_ref: Any, gradient_ref: Any, *refs: Any, strips: int
) -> None:
    of_rows_ref, of_positions_ref, of_kernel_ref, ring_ref, of_ring_ref, cells_ref = refs
    step = pl.program_id(1)
    _bring(rows_ref, ring_ref)

    @pl.when((pl.program_id(0) == 0) & (step == 0))
    def start() -> None:
        of_kernel_ref[...] = jnp.zeros_like(of_kernel_ref)

    @pl.when(step == 0)
    def start_image() -> None:
        of_ring_ref[...] = jnp.zeros_like(of_ring_ref)

    @pl.when((step >= 2) & (step < strips + 2))
    def strip() -> None:
        cells_ref[...] = gradient_ref[0].astype(jnp.float32)

        def tile(j: Array, _: None) -> None:
            neighbourhood = _neighbourhood(ring_ref, j, kernel_ref.dtype)
            samples, weights, slopes = _sampled(positions_ref[0, 0, j], neighbourhood)
            gradient = cells_ref[:, _columns(j, TILE), :].reshape(CELLS, -1).astype(kernel_ref.dtype)
            for tap, part in enumerate(jnp.split(samples, TAPS)):
                of_kernel_ref[tap] += dot(part, gradient, 0, 0)
            of_samples = jnp.concatenate(
                [dot(gradient, kernel_ref[tap], 1, 1).astype(kernel_ref.dtype) for tap in range(TAPS)]
            )
            of_weights = dot(neighbourhood, of_samples, 1, 1)
            for i, slope in enumerate(slopes):
                of_positions_ref[0, 0, j, i : i + 1, :] = jnp.sum(of_weights * slope, axis=0, keepdims=True)
            of_neighbourhood = dot(weights, of_samples, 1, 0).reshape(ROWS, COLUMNS, -1)
            of_ring_ref[:ROWS, _columns(j, COLUMNS), :] += of_neighbourhood

        jax.lax.fori_loop(0, positions_ref.shape[2], tile, None)

    @pl.when(step >= 2)
    def finish_rows() -> None:
        of_rows_ref[0] = of_ring_ref[:TILE].astype(of_rows_ref.dtype)
        _move_up(of_ring_ref)
        of_ring_ref[2 * TILE :] = jnp.zeros((TILE, *of_ring_ref.shape[1:]), jnp.float32)


def _bring(rows_ref: Any, ring_ref: Any) -> None:
    """Puts the step's rows behind the sixteen before them; products of matrices want tiles of float32."""
    _move_up(ring_ref)
    ring_ref[2 * TILE :] = rows_ref[0].astype(jnp.float32)


def _move_up(ring_ref: Any) -> None:
    for first in (0, TILE):
        ring_ref[first : first + TILE] = ring_ref[first + TILE : first + 2 * TILE]


def _columns(j: Array, size: int) -> Any:
    return pl.ds(pl.multiple_of(j * TILE, TILE), size)


def _neighbourhood(ring_ref: Any, j: Array, dtype: Any) -> Float[Array, "k c"]:
    return ring_ref[:ROWS, _columns(j, COLUMNS), :].reshape(ROWS * COLUMNS, -1).astype(dtype)


def _sampled(
    positions: Float32[Array, "3 s"], neighbourhood: Float[Array, "k c"]
) -> tuple[Float[Array, "s c"], Float[Array, "k s"], tuple[Float32[Array, "k s"], ...]]:
    """Returns (samples, their weights, derivatives of the weights by row, column and mask)."""
    shape = (ROWS * COLUMNS, positions.shape[1])
    place = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    (vertical, of_vertical), (horizontal, of_horizontal) = (
        _tent(position - cell.astype(jnp.float32))
        for position, cell in ((positions[0:1], place // COLUMNS), (positions[1:2], place % COLUMNS))
    )
    mask = positions[2:3]
    product = vertical * horizontal
    weights = (product * mask).astype(neighbourhood.dtype)
    samples = dot(weights, neighbourhood, 0, 0).astype(neighbourhood.dtype)
    return samples, weights, (of_vertical * horizontal * mask, vertical * of_horizontal * mask, product)


def _tent(distance: Float32[Array, "k s"]) -> tuple[Float32[Array, "k s"], Float32[Array, "k s"]]:
    """Returns `deform_conv._tent` and its slope."""
    inside = (distance >= -1.0) & (distance < 1.0)
    slope = jnp.where(inside, jnp.where(distance >= 0.0, -1.0, 1.0), 0.0)
    return jnp.where(inside, 1.0, 0.0) + slope * distance, slope
