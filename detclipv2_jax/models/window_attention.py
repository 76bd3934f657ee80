"""Attention within the windows of a Swin Transformer, in two exact forms.

xla: products, softmax and their gradients as XLA compiles them; logits and probabilities pass through memory.
pallas: one kernel forward and one backward for NVIDIA GPUs (Pallas, Triton). A head of a window, 49 tokens in a tile of
  64, stays on the chip: the kernel reads query, key and value where the projection wrote them, and writes the result.

Both compute logits and softmax in float32 and recompute them in the backward pass. cuDNN's attention does not fit: of a
bias with a gradient it wants an even number of tokens.

A block of Swin-T's first stage, 384 images of 320 x 320 in bfloat16, forward, recomputed and backward, moves 134 GB in
the xla form and 72 GB in the other (programs compiled for one H100).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Bool, Float, Float32, Int32

from detclipv2_jax.models import split

IMPLS = ("auto", "xla", "pallas")
MASKED = -100.0  # added to the logits of pairs that the cyclic shift brought together, as in the reference
PADDED = -1e30  # logits of the tile's columns that are no token
TILE = 64  # rows and columns of a kernel's tile, a power of two: windows up to 8 x 8
PROGRAMS = 2112  # of a kernel at most: 16 for each of an H100's 132 processors; each works on many windows


def window_attention(
    qkv: Float[Array, "b n l 3c"],
    bias: Float32[Array, "h l l"],
    region: Int32[Array, "n l"] | None,
    *,
    impl: str = "auto",
) -> Float[Array, "b n l c"]:
    """Returns softmax(query · key / sqrt(d) + bias) · value for h heads of size d = c / h in each of n windows.

    Args:
      qkv: query, key and value side by side, the channels of a head together.
      bias: for each head and pair of positions.
      region: of every token; tokens of different regions hardly see each other. None: all are of one region.
      impl: "xla", "pallas", or "auto": the kernel where the program is compiled for NVIDIA GPUs, else xla. Windows of
        more than 64 tokens are computed by xla whatever it says, and so are heads whose size is no power of two from 16
        on, and batches that cannot be split evenly over the mesh.
    """
    if impl not in IMPLS:
        raise ValueError(f"window_attention has no form {impl!r}; allowed are {', '.join(IMPLS)}")
    head_size = qkv.shape[3] // 3 // bias.shape[0]
    fits = qkv.shape[2] <= TILE and head_size >= 16 and head_size & (head_size - 1) == 0
    if not fits or qkv.shape[0] % split.num_parts():
        impl = "xla"
    return _attention(impl, qkv, bias, region)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(impl: str, qkv: Array, bias: Array, region: Array | None) -> Array:
    return _dispatch(impl, _kernel_forward, _xla_forward, qkv, bias, region)


def _forward(impl: str, *arguments: Any) -> tuple[Array, tuple[Any, ...]]:
    return _attention(impl, *arguments), arguments


def _backward(impl: str, arguments: tuple[Any, ...], gradient: Array) -> tuple[Array | None, ...]:
    return (*_dispatch(impl, _kernel_backward, _xla_backward, *arguments, gradient), None)


_attention.defvjp(_forward, _backward)


def _dispatch(impl: str, kernel: Any, xla: Any, *arguments: Any) -> Any:
    if impl == "auto":
        return jax.lax.platform_dependent(*arguments, cuda=kernel, default=xla)
    return (kernel if impl == "pallas" else xla)(*arguments)


# --- XLA form


def _xla_forward(qkv: Array, bias: Array, region: Array | None) -> Array:
    query, key, value = _split(qkv, bias.shape[0])
    x = jnp.einsum("bnhqk,bnkhd->bnqhd", _weights(query, key, bias, region=region), value)
    return x.reshape(*x.shape[:3], -1)


def _xla_backward(qkv: Array, bias: Array, region: Array | None, gradient: Array) -> tuple[Array, Array]:
    (query, key, value), split_vjp = jax.vjp(lambda qkv: _split(qkv, bias.shape[0]), qkv)
    weights, weights_vjp = jax.vjp(functools.partial(_weights, region=region), query, key, bias)
    gradient = gradient.reshape(value.shape)
    value_gradient = jnp.einsum("bnhqk,bnqhd->bnkhd", weights, gradient)
    query_gradient, key_gradient, bias_gradient = weights_vjp(jnp.einsum("bnqhd,bnkhd->bnhqk", gradient, value))
    return split_vjp((query_gradient, key_gradient, value_gradient))[0], bias_gradient


def _split(qkv: Float[Array, "b n l 3c"], heads: int) -> tuple[Float[Array, "b n l h d"], ...]:
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


# --- kernels


def _kernel_forward(qkv: Array, bias: Array, region: Array | None, *, interpret: bool = False) -> Array:
    call = functools.partial(_call, _forward_kernel, backward=False, interpret=interpret)
    return split.by_rows(call, (qkv,), (bias, region))


def _kernel_backward(
    qkv: Array, bias: Array, region: Array | None, gradient: Array, *, interpret: bool = False
) -> tuple[Array, Array]:
    call = functools.partial(_call, _backward_kernel, backward=True, interpret=interpret)
    qkv_gradient, bias_gradient = split.by_rows(call, (qkv, gradient), (bias, region))
    length = bias.shape[1]
    return qkv_gradient, jnp.sum(bias_gradient, axis=0)[:, :length, :length]


def _call(
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
    inputs += [x.reshape(b * n, *x.shape[2:]) for x in arrays]
    out_shape = [jax.ShapeDtypeStruct((b * n, length, channels if backward else channels // 3), arrays[0].dtype)]
    if backward:
        out_shape.append(jax.ShapeDtypeStruct((groups, heads, TILE, TILE), jnp.float32))
    out, *partial = pl.pallas_call(
        functools.partial(kernel, heads=heads, size=size, num_windows=b * n, shifted=region is not None),
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


def _forward_kernel(bias_ref: Any, *refs: Any, heads: int, size: int, num_windows: int, shifted: bool) -> None:
    region_ref, (qkv_ref, out_ref) = (refs[0], refs[1:]) if shifted else (None, refs)
    head, group = _program(heads)
    bias = bias_ref[head]
    channels = out_ref.shape[2]
    head_size = channels // heads

    def one_window(window: Array, _: None) -> None:
        query, key, value = (_read(qkv_ref, window, part * channels + head * head_size, head_size) for part in range(3))
        weights = _tile_weights(_scaled(query), key, bias, region_ref, window)
        _write(out_ref, window, head * head_size, _dot(weights.astype(value.dtype), value))
        return None

    jax.lax.fori_loop(group * size, jnp.minimum((group + 1) * size, num_windows), one_window, None)


def _backward_kernel(bias_ref: Any, *refs: Any, heads: int, size: int, num_windows: int, shifted: bool) -> None:
    region_ref, refs = (refs[0], refs[1:]) if shifted else (None, refs)
    qkv_ref, gradient_ref, qkv_gradient_ref, bias_gradient_ref = refs
    head, group = _program(heads)
    bias = bias_ref[head]
    channels = gradient_ref.shape[2]
    head_size = channels // heads
    places = [part * channels + head * head_size for part in range(3)]

    def one_window(window: Array, bias_gradient: Array) -> Array:
        query, key, value = (_read(qkv_ref, window, place, head_size) for place in places)
        query, gradient = _scaled(query), _read(gradient_ref, window, places[0], head_size)
        weights = _tile_weights(query, key, bias, region_ref, window)
        _write(qkv_gradient_ref, window, places[2], _dot(weights.astype(value.dtype), gradient, trans_a=True))
        weights_gradient = _dot(gradient, value, trans_b=True)
        mean = jnp.sum(weights * weights_gradient, axis=1, keepdims=True)
        logits_gradient = weights * (weights_gradient - mean)
        rounded = logits_gradient.astype(key.dtype)
        _write(qkv_gradient_ref, window, places[0], _dot(rounded, key) * key.shape[1] ** -0.5)
        _write(qkv_gradient_ref, window, places[1], _dot(rounded, query, trans_a=True))
        return bias_gradient + logits_gradient

    stop = jnp.minimum((group + 1) * size, num_windows)
    start = jnp.zeros((TILE, TILE), jnp.float32)
    bias_gradient_ref[group, head] = jax.lax.fori_loop(group * size, stop, one_window, start)


def _program(heads: int) -> tuple[Array, Array]:
    """Returns (head, group of windows); heads of the same windows run together, because they share lines of memory."""
    program = pl.program_id(0)
    return program % heads, program // heads


def _read(ref: Any, window: Array, first: Array, head_size: int) -> Float[Array, "64 d"]:
    """Returns the channels from `first` on of a window's tokens, and zeros for the rest of the tile."""
    place = ref.at[window, _rows(window), pl.ds(first, head_size)]
    return triton.load(place, mask=_is_token(ref, head_size), other=0.0)


def _write(ref: Any, window: Array, first: Array, x: Float32[Array, "64 d"]) -> None:
    place = ref.at[window, _rows(window), pl.ds(first, x.shape[1])]
    triton.store(place, x.astype(ref.dtype), mask=_is_token(ref, x.shape[1]))


def _rows(window: Array) -> Any:
    """Returns the slice of a whole tile; where JAX 0.12 knows its start, it refuses one beyond the tokens."""
    return pl.ds(0 * window, TILE)


def _is_token(ref: Any, head_size: int) -> Bool[Array, "64 d"]:
    return jax.lax.broadcasted_iota(jnp.int32, (TILE, head_size), 0) < ref.shape[1]


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
