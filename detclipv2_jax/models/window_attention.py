"""Attention within the (shifted) windows of a Swin Transformer, in exact forms.

xla: the map is cut into windows; products, softmax and their gradients as XLA compiles them; logits and probabilities
  pass through memory.
pallas: one kernel forward and one backward, for NVIDIA GPUs (Pallas, Triton) and TPUs (`window_attention_tpu`). On a
  GPU a head of a window, 49 tokens in a tile of 64, stays on the chip: the kernel reads query, key and value where the
  projection wrote them, from the rows of the map that the window covers, and writes the result there; nothing is cut,
  shifted or copied. Kernels for TPUs read windows as the xla form cuts them.

All compute logits and softmax in float32 and recompute them in the backward pass. cuDNN's attention does not fit: of a
bias with a gradient it wants an even number of tokens.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Bool, Float, Float32, Int32

from detclipv2_jax.models import split, window_attention_tpu

IMPLS = ("auto", "xla", "pallas")
MASKED = -100.0  # added to the logits of pairs that the cyclic shift brought together, as in the reference
PADDED = -1e30  # logits of the tile's columns that are no token
TILE = 64  # rows and columns of a kernel's tile, a power of two: windows up to 8 x 8
PROGRAMS = 2112  # of a kernel at most: 16 for each of an H100's 132 processors; each works on many windows
Form = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Windows:
    """The windows of a map, and the form that computes attention in them.

    Tokens [b, n, l, c] are the map's cells in the order of the form: as they lie for kernels of GPUs, else window after
    window.
    """

    rows: int  # of windows
    columns: int
    size: int  # cells of a side
    shifts: tuple[int, int]  # of the windows, down and right; what sticks out wraps around
    impl: str

    @property
    def region(self) -> Int32[Array, "n l"] | None:
        """A number for every place of every window; places with different numbers were not neighbours.

        Only the last window of an axis holds two parts: the end of the image and its wrapped beginning. None: no shift.
        """
        if not any(self.shifts):
            return None
        counts, size = (self.rows, self.columns), self.size
        wrapped = [np.arange(n * size) >= n * size - s for n, s in zip(counts, self.shifts, strict=True)]
        region = wrapped[0][:, None] * 2 + wrapped[1][None, :]
        # windows before the last are one region whatever their number; only differences within a window count
        region = region.reshape(self.rows, size, self.columns, size).transpose(0, 2, 1, 3)
        return jnp.asarray(region.reshape(self.rows * self.columns, size**2), jnp.int32)

    def split(self, x: Float[Array, "b h w c"]) -> Float[Array, "b n l c"]:
        """Returns the cells of a map as tokens."""
        return _split(self, x)

    def join(self, tokens: Float[Array, "b n l c"]) -> Float[Array, "b h w c"]:
        """Returns the map of the tokens."""
        return _join(self, tokens)

    @property
    def masks(self) -> Float32[Array, "4 l l"]:
        """What is added to the logits, by (in the last row, in the last column): 00, 01, 10, 11."""
        length = self.size**2
        if self.region is None:
            return jnp.zeros((4, length, length), jnp.float32)
        region = self.region.reshape(self.rows, self.columns, length)[jnp.array([0, -1])][:, jnp.array([0, -1])]
        region = region.reshape(4, length)
        return jnp.where(region[:, :, None] != region[:, None, :], MASKED, 0.0)

    def _dispatch(self, xla: Form, *arguments: Any, cuda: Form, tpu: Form) -> Any:
        """Returns what the form computes; `auto`: a kernel where the program is compiled for a GPU or a TPU."""
        if self.impl == "xla":
            return xla(*arguments)
        if self.impl == "pallas":
            return split.by_platform(*arguments, tpu=tpu, default=cuda)
        return split.by_platform(*arguments, cuda=cuda, tpu=tpu, default=xla)


def windows_of(shape: tuple[int, ...], *, size: int, shift: int, heads: int, impl: str = "auto") -> Windows:
    """Returns the windows of a map [b, h, w, c] whose sides are multiples of `size`.

    Args:
      shape: of the map.
      size: of a window's side.
      shift: of the windows, down and right. An axis that one window covers has nothing to shift.
      heads: c / heads channels each.
      impl: "xla", "pallas", or "auto": kernels where the program is compiled for NVIDIA GPUs or TPUs, else xla. Windows
        of more than 64 tokens are computed by xla whatever it says, and so are heads whose size is no power of two from
        16 on, and batches that cannot be split evenly over the mesh.
    """
    if impl not in IMPLS:
        raise ValueError(f"window attention has no form {impl!r}; allowed are {', '.join(IMPLS)}")
    batch, height, width, channels = shape
    head_size = channels // heads
    fits = size**2 <= TILE and head_size >= 16 and head_size & (head_size - 1) == 0
    rows, columns = height // size, width // size
    shifts = (shift if rows > 1 else 0, shift if columns > 1 else 0)
    return Windows(rows, columns, size, shifts, impl if fits and batch % split.num_parts() == 0 else "xla")


def window_attention(
    qkv: Float[Array, "b n l 3c"], bias: Float32[Array, "h l l"], windows: Windows
) -> Float[Array, "b n l c"]:
    """Returns softmax(query · key / sqrt(d) + bias) · value for h heads of size d = c / h in each window.

    Tokens of one window that are not neighbours on the map hardly see each other.

    `qkv` has query, key and value side by side, the channels of a head together.
    """
    return _attention(windows, qkv, bias)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _split(windows: Windows, x: Array) -> Array:
    """The gradient joins: those of slices and rolls would be padded sums."""
    tokens = (x.shape[0], windows.rows * windows.columns, windows.size**2, x.shape[3])

    def cut(x: Array) -> Array:
        if any(windows.shifts):
            x = jnp.roll(x, (-windows.shifts[0], -windows.shifts[1]), axis=(1, 2))
        x = x.reshape(x.shape[0], windows.rows, windows.size, windows.columns, windows.size, x.shape[3])
        return x.transpose(0, 1, 3, 2, 4, 5).reshape(tokens)

    return windows._dispatch(cut, x, cuda=lambda x: x.reshape(tokens), tpu=cut)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _join(windows: Windows, tokens: Array) -> Array:
    shape = (tokens.shape[0], windows.rows * windows.size, windows.columns * windows.size, tokens.shape[3])

    def paste(x: Array) -> Array:
        x = x.reshape(x.shape[0], windows.rows, windows.columns, windows.size, windows.size, x.shape[3])
        x = x.transpose(0, 1, 3, 2, 4, 5).reshape(shape)
        return jnp.roll(x, windows.shifts, axis=(1, 2)) if any(windows.shifts) else x

    return windows._dispatch(paste, tokens, cuda=lambda x: x.reshape(shape), tpu=paste)


_split.defvjp(lambda windows, x: (_split(windows, x), None), lambda windows, _, gradient: (_join(windows, gradient),))
_join.defvjp(lambda windows, x: (_join(windows, x), None), lambda windows, _, gradient: (_split(windows, gradient),))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(windows: Windows, qkv: Array, bias: Array) -> Array:
    xla, cuda, tpu = (functools.partial(form, windows) for form in (_xla_forward, _kernel_forward, _tpu_forward))
    return windows._dispatch(xla, qkv, bias, cuda=cuda, tpu=tpu)


def _forward(windows: Windows, *arguments: Any) -> tuple[Array, tuple[Any, ...]]:
    return _attention(windows, *arguments), arguments


def _backward(windows: Windows, arguments: tuple[Any, ...], gradient: Array) -> tuple[Array, ...]:
    xla, cuda, tpu = (functools.partial(form, windows) for form in (_xla_backward, _kernel_backward, _tpu_backward))
    return windows._dispatch(xla, *arguments, gradient, cuda=cuda, tpu=tpu)


_attention.defvjp(_forward, _backward)


# --- XLA form


def _xla_forward(windows: Windows, qkv: Array, bias: Array) -> Array:
    query, key, value = _by_head(qkv, bias.shape[0])
    x = jnp.einsum("bnhqk,bnkhd->bnqhd", _weights(query, key, bias, region=windows.region), value)
    return x.reshape(*x.shape[:3], -1)


def _xla_backward(windows: Windows, qkv: Array, bias: Array, gradient: Array) -> tuple[Array, Array]:
    (query, key, value), by_head_vjp = jax.vjp(lambda qkv: _by_head(qkv, bias.shape[0]), qkv)
    weights, weights_vjp = jax.vjp(functools.partial(_weights, region=windows.region), query, key, bias)
    gradient = gradient.reshape(value.shape)
    value_gradient = jnp.einsum("bnhqk,bnqhd->bnkhd", weights, gradient)
    query_gradient, key_gradient, bias_gradient = weights_vjp(jnp.einsum("bnqhd,bnkhd->bnhqk", gradient, value))
    return by_head_vjp((query_gradient, key_gradient, value_gradient))[0], bias_gradient


def _by_head(qkv: Float[Array, "b n l 3c"], heads: int) -> tuple[Float[Array, "b n l h d"], ...]:
    """Returns query, scaled, key and value."""
    query, key, value = (part.reshape(*part.shape[:3], heads, -1) for part in jnp.split(qkv, 3, axis=-1))
    return query * query.shape[-1] ** -0.5, key, value


def _weights(query: Array, key: Array, bias: Array, *, region: Array | None) -> Float[Array, "b n h q k"]:
    logits = jnp.einsum("bnqhd,bnkhd->bnhqk", query, key, preferred_element_type=jnp.float32)
    logits += bias[None, None]
    if region is not None:
        apart = region[:, :, None] != region[:, None, :]
        logits = jnp.where(apart[None, :, None], logits + MASKED, logits)
    return jax.nn.softmax(logits, axis=-1).astype(query.dtype)


# --- kernels for TPUs


def _tpu_forward(windows: Windows, qkv: Array, bias: Array, *, interpret: bool = False) -> Array:
    if not window_attention_tpu.fits(qkv):
        return _xla_forward(windows, qkv, bias)
    call = functools.partial(window_attention_tpu.call, columns=windows.columns, interpret=interpret)
    return split.by_rows(call, (qkv,), (bias, windows.masks))[0]


def _tpu_backward(
    windows: Windows, qkv: Array, bias: Array, gradient: Array, *, interpret: bool = False
) -> tuple[Array, Array]:
    if not window_attention_tpu.fits(qkv):
        return _xla_backward(windows, qkv, bias, gradient)
    call = functools.partial(window_attention_tpu.call, columns=windows.columns, interpret=interpret)
    out, bias_gradient = split.by_rows(call, (qkv, gradient), (bias, windows.masks))
    return out, jnp.sum(bias_gradient, axis=0)


# --- kernels for NVIDIA GPUs


def _kernel_forward(windows: Windows, qkv: Array, bias: Array, *, interpret: bool = False) -> Array:
    call = functools.partial(_call, windows, _forward_kernel, backward=False, interpret=interpret)
    return split.by_rows(call, (qkv,), (bias, windows.region))


def _kernel_backward(
    windows: Windows, qkv: Array, bias: Array, gradient: Array, *, interpret: bool = False
) -> tuple[Array, Array]:
    call = functools.partial(_call, windows, _backward_kernel, backward=True, interpret=interpret)
    qkv_gradient, bias_gradient = split.by_rows(call, (qkv, gradient), (bias, windows.region))
    length = bias.shape[1]
    return qkv_gradient, jnp.sum(bias_gradient, axis=0)[:, :length, :length]


def _call(
    windows: Windows,
    kernel: Callable[..., None],
    arrays: tuple[Array, ...],
    tables: tuple[Array, Array | None],
    *,
    backward: bool,
    interpret: bool,
) -> Any:
    """Returns the kernel's results: each of its programs works on one head of a run of windows."""
    bias, region = tables
    b, n, length, channels = arrays[0].shape
    heads = bias.shape[0]
    groups = min(b * n, pl.cdiv(PROGRAMS, heads))
    size = pl.cdiv(b * n, groups)
    groups = pl.cdiv(b * n, size)
    padding = TILE - length
    bias = jnp.pad(bias, ((0, 0), (0, padding), (0, padding)), constant_values=PADDED)
    inputs = [bias] if region is None else [bias, jnp.pad(region, ((0, 0), (0, padding)))]
    inputs += [x.reshape(-1, x.shape[3]) for x in arrays]
    out_shape = [jax.ShapeDtypeStruct((b * n * length, channels if backward else channels // 3), arrays[0].dtype)]
    if backward:
        out_shape.append(jax.ShapeDtypeStruct((groups, heads, TILE, TILE), jnp.float32))
    out, *partial = pl.pallas_call(
        functools.partial(kernel, windows=windows, heads=heads, size=size),
        grid=(groups * heads,),
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)] * len(inputs),
        out_specs=[pl.BlockSpec(memory_space=pl.ANY)] * len(out_shape),
        out_shape=out_shape,
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="window_attention_gradient" if backward else "window_attention",
    )(*inputs)
    out = out.reshape(b, n, length, -1)
    return (out, *partial) if backward else out


def _forward_kernel(bias_ref: Any, *refs: Any, windows: Windows, heads: int, size: int) -> None:
    region_ref, (qkv_ref, out_ref) = (refs[0], refs[1:]) if any(windows.shifts) else (None, refs)
    head, group = _program(heads)
    bias = bias_ref[head]
    channels = out_ref.shape[1]
    head_size = channels // heads

    def one_window(window: Array, _: None) -> None:
        cells = _cells(windows, window, qkv_ref.shape[0])
        query, key, value = (_read(qkv_ref, cells, part * channels + head * head_size, head_size) for part in range(3))
        weights = _tile_weights(_scaled(query), key, bias, region_ref, window)
        _write(out_ref, cells, head * head_size, _dot(weights.astype(value.dtype), value))
        return None

    stop = jnp.minimum((group + 1) * size, qkv_ref.shape[0] // windows.size**2)
    jax.lax.fori_loop(group * size, stop, one_window, None)


def _backward_kernel(bias_ref: Any, *refs: Any, windows: Windows, heads: int, size: int) -> None:
    region_ref, refs = (refs[0], refs[1:]) if any(windows.shifts) else (None, refs)
    qkv_ref, gradient_ref, qkv_gradient_ref, bias_gradient_ref = refs
    head, group = _program(heads)
    bias = bias_ref[head]
    channels = gradient_ref.shape[1]
    head_size = channels // heads
    places = [part * channels + head * head_size for part in range(3)]

    def one_window(window: Array, bias_gradient: Array) -> Array:
        cells = _cells(windows, window, qkv_ref.shape[0])
        query, key, value = (_read(qkv_ref, cells, place, head_size) for place in places)
        query, gradient = _scaled(query), _read(gradient_ref, cells, places[0], head_size)
        weights = _tile_weights(query, key, bias, region_ref, window)
        _write(qkv_gradient_ref, cells, places[2], _dot(weights.astype(value.dtype), gradient, trans_a=True))
        weights_gradient = _dot(gradient, value, trans_b=True)
        mean = jnp.sum(weights * weights_gradient, axis=1, keepdims=True)
        logits_gradient = weights * (weights_gradient - mean)
        rounded = logits_gradient.astype(key.dtype)
        _write(qkv_gradient_ref, cells, places[0], _dot(rounded, key) * key.shape[1] ** -0.5)
        _write(qkv_gradient_ref, cells, places[1], _dot(rounded, query, trans_a=True))
        return bias_gradient + logits_gradient

    stop = jnp.minimum((group + 1) * size, qkv_ref.shape[0] // windows.size**2)
    start = jnp.zeros((TILE, TILE), jnp.float32)
    bias_gradient_ref[group, head] = jax.lax.fori_loop(group * size, stop, one_window, start)


def _program(heads: int) -> tuple[Array, Array]:
    """Returns (head, group of windows); heads of the same windows run together, because they share lines of memory."""
    program = pl.program_id(0)
    return program % heads, program // heads


def _cells(windows: Windows, window: Array, num_cells: int) -> tuple[Int32[Array, " 64"], Bool[Array, " 64"]]:
    """Returns (cell, is one) of the tile's tokens; those beyond the window have a cell off the map."""
    size, height, width = windows.size, windows.rows * windows.size, windows.columns * windows.size
    count = windows.rows * windows.columns
    image, place = window // count, window % count
    token = jnp.arange(TILE)
    y = (place // windows.columns * size + token // size + windows.shifts[0]) % height
    x = (place % windows.columns * size + token % size + windows.shifts[1]) % width
    inside = token < size**2
    return jnp.where(inside, (image * height + y) * width + x, num_cells), inside


def _read(ref: Any, cells: tuple[Array, Array], first: Array, head_size: int) -> Float[Array, "64 d"]:
    """Returns the channels from `first` on of a window's tokens, and zeros for the rest of the tile."""
    place, mask = _place(cells, first, head_size)
    return triton.load(ref.at[place], mask=mask, other=0.0)


def _write(ref: Any, cells: tuple[Array, Array], first: Array, x: Float32[Array, "64 d"]) -> None:
    place, mask = _place(cells, first, x.shape[1])
    triton.store(ref.at[place], x.astype(ref.dtype), mask=mask)


def _place(cells: tuple[Array, Array], first: Array, head_size: int) -> tuple[tuple[Array, Array], Array]:
    row, inside = (jnp.broadcast_to(x[:, None], (TILE, head_size)) for x in cells)
    return (row, first + jax.lax.broadcasted_iota(jnp.int32, (TILE, head_size), 1)), inside


def _scaled(query: Array) -> Array:
    return (query.astype(jnp.float32) * query.shape[1] ** -0.5).astype(query.dtype)


def _dot(a: Array, b: Array, **transposed: bool) -> Array:
    """Returns the float32 product; of float32 factors without rounding them to the GPU's short format."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return triton.dot(a, b, precision=precision, **transposed)


def _tile_weights(query: Array, key: Array, bias: Array, region_ref: Any, window: Array) -> Array:
    logits = _dot(query, key, trans_b=True) + bias
    if region_ref is not None:
        region = region_ref[window % region_ref.shape[0]]
        logits = jnp.where(region[:, None] != region[None, :], logits + MASKED, logits)
    exponentials = jnp.exp(logits - jnp.max(logits, axis=1, keepdims=True))
    return exponentials / jnp.sum(exponentials, axis=1, keepdims=True)
