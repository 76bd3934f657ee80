"""The deformable layer in kernels for NVIDIA GPUs (Pallas, Triton); all sums in a fixed order, so that runs repeat.

Forward: a block of cells gathers the corners of its samples, a tap and 64 channels at a time, and multiplies them with
the kernel's part; no sample passes through memory. The five levels of 384 images of 320 x 320 would not fit on the
chip, but neighbouring blocks read the same cells.

Backward: the gradients of all samples are one matrix product, and so is the gradient of the kernel. Between them one
kernel samples again and compares with the gradients, for those of the weights; another gives every cell its gradient:
the samples are sorted by place, so that a cell finds those that touch it in two runs and adds them without atomic
operations.

16 x 100 x 168 x 256 in bfloat16 on an H200 (2026-11-27, jax 0.11.2, `python -m tests.benchmarks.accelerator`): forward
2.4 ms, the gather form 3.8; both ways 7.3 ms, the gather form 17.6.
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
TAPS = 9
SAMPLES = 1 << 29  # bytes at most of the samples of the images that are pulled back together, and of their gradients
TOUCHING = 4  # samples that a cell reads at a time; 36 corners touch one where offsets are small
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
        (out,) = _call(
            functools.partial(_forward_kernel, **sizes),
            (flat, *_by_tap(weights, index), kernel.reshape(TAPS, *kernel.shape[2:])),
            [jax.ShapeDtypeStruct((num_cells, outputs), features.dtype)],
            grid=(pl.cdiv(num_cells, CELLS),),
            warps=8,
            name="deformable",
            interpret=interpret,
        )
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
) -> tuple[Float[Array, "b h w c"], Float32[Array, "b 9 n 4"], Float32[Array, "3 3 c o"]]:
    """Returns the gradients to features, weights and kernel."""

    def local(rows: tuple[Array, ...], whole: tuple[Array, ...]) -> tuple[Array, ...]:
        (kernel,) = whole
        b, height, width, channels = rows[0].shape
        of_image = height * width * TAPS * channels * rows[0].dtype.itemsize
        parts = next(n for n in range(1, b + 1) if b % n == 0 and (n == b or b // n * of_image <= SAMPLES))
        of_part = functools.partial(_backward, kernel=kernel, interpret=interpret)
        start = jnp.zeros((TAPS * channels, kernel.shape[3]), jnp.float32)
        split_rows = jax.tree.map(lambda x: x.reshape(parts, b // parts, *x.shape[1:]), rows)
        kernel_gradient, joined = jax.lax.scan(of_part, start, split_rows)
        return *(x.reshape(b, *x.shape[2:]) for x in joined), kernel_gradient[None]

    *of_images, kernel_gradient = split.by_rows(local, (features, weights, index, gradient), (kernel,))
    return *of_images, jnp.sum(kernel_gradient, axis=0).reshape(kernel.shape)


def _backward(
    total: Float32[Array, "9c o"], rows: tuple[Array, ...], *, kernel: Float[Array, "3 3 c o"], interpret: bool
) -> tuple[Array, tuple[Array, Array]]:
    """Adds the kernel's gradient of some images to `total`; returns with it those to their features and weights."""
    features, weights, index, gradient = rows
    flat, sizes = _flat(features, kernel)
    num_cells, channels = flat.shape
    gradient = gradient.reshape(num_cells, -1)
    sample_gradient = gradient @ kernel.reshape(TAPS * channels, -1).T  # [cells, 9 * c]
    samples, weight_gradient = _call(
        functools.partial(_sample_kernel, **sizes),
        (flat, *_by_tap(weights, index), sample_gradient),
        [
            jax.ShapeDtypeStruct(sample_gradient.shape, flat.dtype),
            jax.ShapeDtypeStruct((4 * TAPS, num_cells), jnp.float32),
        ],
        grid=(pl.cdiv(num_cells, CELLS) * TAPS,),
        warps=8,
        name="deformable_samples",
        interpret=interpret,
    )
    order, first = _by_place(weights, index, **sizes)
    (feature_gradient,) = _call(
        functools.partial(_cell_kernel, **sizes),
        (sample_gradient.reshape(-1, channels), order, first, weights.swapaxes(1, 2).reshape(-1, 4)),
        [jax.ShapeDtypeStruct(flat.shape, flat.dtype)],
        grid=(num_cells,),
        warps=1,
        name="deformable_cells",
        interpret=interpret,
    )
    total += jnp.matmul(samples.T, gradient, preferred_element_type=jnp.float32)
    weight_gradient = weight_gradient.reshape(TAPS, 4, features.shape[0], -1).transpose(2, 0, 3, 1)
    return total, (feature_gradient.reshape(features.shape), weight_gradient)


def _call(
    kernel: Any, inputs: tuple[Array, ...], out_shape: list[Any], *, grid: tuple[int], warps: int, name: str,
    interpret: bool,
) -> Any:  # fmt: skip
    return pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)] * len(inputs),
        out_specs=[pl.BlockSpec(memory_space=pl.ANY)] * len(out_shape),
        out_shape=out_shape,
        compiler_params=triton.CompilerParams(num_warps=warps, num_stages=2),
        interpret=interpret,
        name=name,
    )(*inputs)


def _by_place(
    weights: Float32[Array, "b 9 n 4"], index: Int32[Array, "b 9 n"], *, height: int, width: int
) -> tuple[Int32[Array, " samples"], Int32[Array, " places"]]:
    """Returns the samples (cell * 9 + tap) in the order of their places, and where each place begins in it.

    Places are the rows of `deform_conv._pack_corners`, one image after the other. Samples off the map come last.
    """
    of_image = (height + 1) * (width + 1)
    places = weights.shape[0] * of_image
    image = jnp.arange(weights.shape[0], dtype=jnp.int32)[:, None, None] * of_image
    place = jnp.where(jnp.any(weights != 0.0, axis=-1), index + image, places).swapaxes(1, 2).reshape(-1)
    place, order = jax.lax.sort((place, jnp.arange(place.size, dtype=jnp.int32)), num_keys=1, is_stable=True)
    return order, jnp.searchsorted(place, jnp.arange(places + 1, dtype=jnp.int32)).astype(jnp.int32)


def _flat(features: Array, kernel: Array) -> tuple[Float[Array, "cells c"], dict[str, int]]:
    height, width = features.shape[1:3]
    return features.reshape(-1, features.shape[3]), {"height": height, "width": width}


def _by_tap(weights: Array, index: Array) -> tuple[Float32[Array, "36 cells"], Int32[Array, "9 cells"]]:
    return weights.transpose(1, 3, 0, 2).reshape(4 * TAPS, -1), index.swapaxes(0, 1).reshape(TAPS, -1)


def _forward_kernel(
    features_ref: Any, weights_ref: Any, index_ref: Any, kernel_ref: Any, out_ref: Any, *, height: int, width: int
) -> None:
    num_cells, outputs = out_ref.shape
    first = pl.program_id(0) * CELLS
    depth = 2 * CHANNELS // features_ref.dtype.itemsize  # a block has 99 KiB of shared memory on some GPUs

    def one_tap(tap: Array, total: Array) -> Array:
        corners = _corners(weights_ref, index_ref, tap, first, height=height, width=width)

        def add(i: Array, total: Array) -> Array:
            channels = pl.ds(i * depth, depth)
            parts = [features_ref[row, channels].astype(jnp.float32) for row, _, _ in corners]
            return total + _dot(_weighted(parts, corners).astype(features_ref.dtype), kernel_ref[tap, channels, :])

        return jax.lax.fori_loop(0, features_ref.shape[1] // depth, add, total)

    total = jax.lax.fori_loop(0, TAPS, one_tap, jnp.zeros((CELLS, outputs), jnp.float32))
    mask = _is_cell(first, num_cells, outputs)
    triton.store(out_ref.at[pl.ds(first, CELLS), :], total.astype(out_ref.dtype), mask=mask)


def _sample_kernel(
    features_ref: Any, weights_ref: Any, index_ref: Any, gradient_ref: Any, samples_ref: Any, weight_gradient_ref: Any,
    *, height: int, width: int,
) -> None:  # fmt: skip
    """Samples a block of cells for one tap and compares each corner with the sample's gradient."""
    num_cells, channels = features_ref.shape
    first, tap = pl.program_id(0) // TAPS * CELLS, pl.program_id(0) % TAPS
    corners = _corners(weights_ref, index_ref, tap, first, height=height, width=width)
    mask = _is_cell(first, num_cells, CHANNELS)

    def add(i: Array, totals: tuple[Array, ...]) -> tuple[Array, ...]:
        place = pl.ds(first, CELLS), pl.ds(tap * channels + i * CHANNELS, CHANNELS)
        gradient = triton.load(gradient_ref.at[place], mask=mask, other=0.0).astype(jnp.float32)
        parts = [features_ref[row, pl.ds(i * CHANNELS, CHANNELS)].astype(jnp.float32) for row, _, _ in corners]
        triton.store(samples_ref.at[place], _weighted(parts, corners).astype(samples_ref.dtype), mask=mask)
        return tuple(total + jnp.sum(part * gradient, axis=1) for total, part in zip(totals, parts, strict=True))

    totals = jax.lax.fori_loop(0, channels // CHANNELS, add, (jnp.zeros((CELLS,), jnp.float32),) * 4)
    for i, (total, (_, _, valid)) in enumerate(zip(totals, corners, strict=True)):
        place = weight_gradient_ref.at[4 * tap + i, pl.ds(first, CELLS)]
        triton.store(place, jnp.where(valid, total, 0.0), mask=first + jnp.arange(CELLS) < num_cells)


def _cell_kernel(
    gradient_ref: Any, order_ref: Any, first_ref: Any, weights_ref: Any, out_ref: Any, *, height: int, width: int
) -> None:
    """Adds the gradients of the samples that touch one cell: those to its lower right and left, then the upper ones."""
    cell = pl.program_id(0)
    image, y, x = cell // (height * width), cell % (height * width) // width, cell % width
    chunks = [pl.ds(start, CHANNELS) for start in range(0, out_ref.shape[1], CHANNELS)]

    def add_run(down: int, totals: tuple[Array, ...]) -> tuple[Array, ...]:
        # two neighbouring places, of which the cell is the right corner, then the left one
        place = (image * (height + 1) + y + 1 - down) * (width + 1) + x
        begin, middle, end = (first_ref[place + i] for i in range(3))

        def add(turn: Array, totals: tuple[Array, ...]) -> tuple[Array, ...]:
            position = begin + turn * TOUCHING + jnp.arange(TOUCHING)
            touches = position < end
            sample = triton.load(order_ref.at[position], mask=touches, other=0)
            corner = 2 * down + (position < middle).astype(jnp.int32)
            weight = triton.load(weights_ref.at[sample, corner], mask=touches, other=0.0)
            return tuple(
                total + weight[:, None] * gradient_ref[sample, channels].astype(jnp.float32)
                for total, channels in zip(totals, chunks, strict=True)
            )

        return jax.lax.fori_loop(0, pl.cdiv(end - begin, TOUCHING), add, totals)

    totals = (jnp.zeros((TOUCHING, CHANNELS), jnp.float32),) * len(chunks)
    for total, channels in zip(add_run(1, add_run(0, totals)), chunks, strict=True):
        out_ref[cell, channels] = jnp.sum(total, axis=0).astype(out_ref.dtype)


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


def _weighted(parts: Sequence[Array], corners: Sequence[tuple[Array, ...]]) -> Float32[Array, "p c"]:
    """Returns the samples: sums of what lies at their corners."""
    return functools.reduce(jnp.add, (w[:, None] * part for part, (_, w, _) in zip(parts, corners, strict=True)))


def _is_cell(first: Array, num_cells: int, columns: int) -> Bool[Array, "p columns"]:
    return first + jax.lax.broadcasted_iota(jnp.int32, (CELLS, columns), 0) < num_cells


def _dot(a: Array, b: Array) -> Array:
    """Returns the float32 product; of float32 factors without rounding them to the GPU's short format."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return triton.dot(a, b, precision=precision)
