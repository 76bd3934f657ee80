"""Kernels of `window_attention` for TPUs (Pallas, Mosaic), forward and backward: logits never leave the chip.

A program holds a few windows and the channels of a few heads, those of a register's 128 lanes where 128 divides all
channels. Heads are not cut out of them: the other heads' lanes are set to zero in one factor of every product, which
takes 128 lanes whatever they hold. Rows are the tokens one window after the other, as the projections before and after
read and write them; a window is a tile of its own only within the program.

Compiled for v4, v5e, v5p and v6e; never run on one.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Float32

from detclipv2_jax.models.kernels_tpu import dot

LANES = 128
SUBLANES = 8  # a block has a multiple of as many windows, so that its rows fill whole tiles
BLOCK_BYTES = 1 << 20  # of query, key and value of a program's windows, if the least number of windows has less
MAX_BLOCK_BYTES = 5 << 20  # a program has 16 MiB in all, and holds what it writes twice


class _Blocks(NamedTuple):
    """What a program works on."""

    size: int  # windows
    length: int  # tokens of a window
    channels: int  # of all heads
    width: int  # channels of the program's heads
    head_size: int
    total: int  # windows
    rows: int  # of windows of an image
    columns: int

    def kind(self, window: Array) -> Array:
        """Returns the place of a window's mask: twice whether it is in the last row, and whether in the last column."""
        row, column = window // self.columns % self.rows, window % self.columns
        return 2 * (row == self.rows - 1).astype(jnp.int32) + (column == self.columns - 1)


def fits(qkv: Array) -> bool:
    """Returns whether a program can hold the least number of windows, of which it writes all channels at once."""
    return SUBLANES * _window_bytes(qkv) <= MAX_BLOCK_BYTES


def call(
    arrays: tuple[Array, ...],
    tables: tuple[Float32[Array, "h l l"], Float32[Array, "4 l l"]],
    *,
    columns: int,
    interpret: bool = False,
) -> tuple[Array, ...]:
    """Returns (result [b, n, l, c],) of `window_attention`, or its gradients to qkv and, as [1, h, l, l], to the bias.

    Args:
      arrays: qkv [b, n, l, 3c] of n windows in rows of `columns`; for gradients also that of the result [b, n, l, c].
      tables: bias of the logits, and masks that are added to them, too: those of windows that are neither in the last
        row nor in the last column, that are in the last column, in the last row, in both.
      columns: of windows.
      interpret: run without a TPU.
    """
    bias, masks = tables
    b, n, length, _ = arrays[0].shape
    channels, dtype = arrays[0].shape[3] // 3, arrays[0].dtype
    heads, backward = bias.shape[0], len(arrays) > 1
    size = SUBLANES * max(1, BLOCK_BYTES // (SUBLANES * _window_bytes(arrays[0])))
    width = LANES if channels % LANES == 0 and LANES % (channels // heads) == 0 else channels
    blocks = _Blocks(size, length, channels, width, channels // heads, b * n, n // columns, columns)
    groups = channels // width

    def part(place: int) -> pl.BlockSpec:  # query, key or value of a group of heads
        return pl.BlockSpec((size * length, width), lambda i, j: (i, place * groups + j))

    def whole(width: int) -> pl.BlockSpec:
        return pl.BlockSpec((size * length, width), lambda i, j: (i, 0))

    def table(count: int) -> pl.BlockSpec:
        return pl.BlockSpec((count, length, length), lambda i, j: (0, 0, 0))

    matrix, *gradients = (x.reshape(-1, x.shape[3]) for x in arrays)
    qkv, specs = ([matrix] * 3, [part(i) for i in range(3)]) if groups > 1 else ([matrix], [whole(3 * channels)])
    out_channels = 3 * channels if backward else channels
    out_shapes = [((matrix.shape[0], out_channels), dtype), (bias.shape, jnp.float32)]
    out = pl.pallas_call(
        functools.partial(_backward_kernel if backward else _forward_kernel, blocks=blocks),
        grid=(pl.cdiv(b * n, size), groups),
        in_specs=[table(heads), table(4), *specs, *(part(0) for _ in gradients)],
        out_specs=[whole(out_channels), table(heads)][: 1 + backward],
        out_shape=[jax.ShapeDtypeStruct(*shape) for shape in out_shapes[: 1 + backward]],
        scratch_shapes=[pltpu.VMEM((size, length, width), dtype)] * (7 if backward else 4),
        interpret=interpret,
        name="window_attention_gradient" if backward else "window_attention",
    )(bias, masks, *qkv, *gradients)
    return out[0].reshape(b, n, length, -1), *(x[None] for x in out[1:])


def _window_bytes(qkv: Array) -> int:
    """Returns what query, key and value of a window take on the chip, in whole registers."""
    _, _, length, channels = qkv.shape
    registers = math.ceil(length / SUBLANES) * 3 * math.ceil(channels / (3 * LANES))
    return registers * SUBLANES * LANES * qkv.dtype.itemsize


def _forward_kernel(bias_ref: Any, masks_ref: Any, *refs: Any, blocks: _Blocks) -> None:
    *qkv_refs, out_ref, query_ref, key_ref, value_ref, result_ref = refs
    _load(qkv_refs, (query_ref, key_ref, value_ref), blocks)
    heads = _heads(blocks)

    def one_window(place: Array, mask: Array) -> None:
        query, key, value = _scaled(query_ref[place], blocks), key_ref[place], value_ref[place]
        result = jnp.zeros(value.shape, jnp.float32)
        for head, alone in heads:
            weights = _weights(alone(query), key, bias_ref[head] + mask)
            result += dot(weights.astype(value.dtype), alone(value), 1, 0)
        result_ref[place] = result.astype(result_ref.dtype)

    _for_windows(one_window, masks_ref, blocks)
    _store(out_ref, 0, result_ref, blocks)


def _backward_kernel(bias_ref: Any, masks_ref: Any, *refs: Any, blocks: _Blocks) -> None:
    *qkv_refs, gradient_ref, out_ref, bias_gradient_ref = refs[:-7]
    query_ref, key_ref, value_ref, result_gradient_ref, *gradient_refs = refs[-7:]
    _load([*qkv_refs, gradient_ref], (query_ref, key_ref, value_ref, result_gradient_ref), blocks)
    heads = _heads(blocks)

    @pl.when((pl.program_id(0) == 0) & (pl.program_id(1) == 0))
    def start() -> None:
        bias_gradient_ref[...] = jnp.zeros_like(bias_gradient_ref)

    def one_window(place: Array, mask: Array) -> None:
        query, key, value = _scaled(query_ref[place], blocks), key_ref[place], value_ref[place]
        gradient = result_gradient_ref[place]
        gradients = [jnp.zeros(query.shape, jnp.float32)] * 3
        for head, alone in heads:
            weights = _weights(alone(query), key, bias_ref[head] + mask)
            weights_gradient = dot(alone(gradient), value, 1, 1)
            mean = jnp.sum(weights * weights_gradient, axis=1, keepdims=True)
            logits_gradient = weights * (weights_gradient - mean)
            bias_gradient_ref[head] += logits_gradient
            rounded = logits_gradient.astype(key.dtype)
            of_head = (
                dot(rounded, alone(key), 1, 0) * blocks.head_size**-0.5,
                dot(rounded, alone(query), 0, 0),
                dot(weights.astype(value.dtype), alone(gradient), 0, 0),
            )
            gradients = [total + x for total, x in zip(gradients, of_head, strict=True)]
        for ref, x in zip(gradient_refs, gradients, strict=True):
            ref[place] = x.astype(ref.dtype)

    _for_windows(one_window, masks_ref, blocks)
    for part, ref in enumerate(gradient_refs):
        _store(out_ref, part, ref, blocks)


def _load(refs: Sequence[Any], into: Sequence[Any], blocks: _Blocks) -> None:
    """Copies rows of query, key, value and what follows into windows; all heads' lie side by side in one matrix."""
    if blocks.width == blocks.channels:
        columns = [refs[0][:, i * blocks.width : (i + 1) * blocks.width] for i in range(3)]
        columns += [ref[...] for ref in refs[1:]]
    else:
        columns = [ref[...] for ref in refs]
    for ref, x in zip(into, columns, strict=True):
        ref[...] = x.reshape(ref.shape)


def _store(out_ref: Any, part: int, windows_ref: Any, blocks: _Blocks) -> None:
    """Writes windows as rows, into the columns of the program's heads within a part of the matrix."""
    rows = windows_ref[...].reshape(-1, blocks.width)
    first: Any = part * blocks.channels
    if blocks.width < blocks.channels:
        first = pl.multiple_of(first + pl.program_id(1) * blocks.width, LANES)
    out_ref[:, pl.ds(first, blocks.width)] = rows


def _for_windows(one_window: Callable[[Array, Array], None], masks_ref: Any, blocks: _Blocks) -> None:
    """Calls one_window(place in the block, mask) for all windows of the program; the last one may have fewer."""
    start = pl.program_id(0) * blocks.size

    def body(place: Array, _: None) -> None:
        one_window(place, masks_ref[blocks.kind(start + place)])

    jax.lax.fori_loop(0, jnp.minimum(blocks.size, blocks.total - start), body, None)


def _heads(blocks: _Blocks) -> list[tuple[Any, Callable[[Array], Array]]]:
    """Returns (number, what sets all lanes but the head's to zero) of the program's heads."""
    lane = jax.lax.broadcasted_iota(jnp.int32, (1, blocks.width), 1) // blocks.head_size
    count = blocks.width // blocks.head_size
    first = pl.program_id(1) * count

    def alone(place: int, x: Array) -> Array:
        return jnp.where(lane == place, x, jnp.zeros_like(x))

    return [(first + place, functools.partial(alone, place)) for place in range(count)]


def _scaled(query: Array, blocks: _Blocks) -> Array:
    return (query.astype(jnp.float32) * blocks.head_size**-0.5).astype(query.dtype)


def _weights(query: Array, key: Array, bias: Array) -> Float32[Array, "l l"]:
    logits = dot(query, key, 1, 1) + bias
    exponentials = jnp.exp(logits - jnp.max(logits, axis=1, keepdims=True))
    return exponentials / jnp.sum(exponentials, axis=1, keepdims=True)
