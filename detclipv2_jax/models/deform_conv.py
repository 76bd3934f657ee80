"""Modulated deformable 3x3 convolution (DCNv2, Zhu et al. 2019), stride 1, zero padding 1, in exact forms.

gather: for each of the nine taps one gather brings the four corners of every sample, packed side by side in one row.
banded: no gathers, for TPUs, where they are slow. The map is cut into tiles; a sample is a product of two tents
  (bilinear weights) with the tile's neighbourhood, so that all samples of a tile are one matrix product. It holds
  every offset below `BAND_RADIUS`; a level with a larger one is computed by the gather form instead (`lax.cond`).
pallas: kernels for NVIDIA GPUs (`deform_pallas`), where samples and their gradients pass through memory once on the way
  back, and for TPUs (`deform_tpu`), where they never do; those compute the banded form.

All recompute the samples in the backward pass instead of keeping them (9 x the feature map).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Float32, Int

from detclipv2_jax.models import deform_pallas, deform_tpu, split

TAPS = np.stack(np.meshgrid((-1, 0, 1), (-1, 0, 1), indexing="ij"), axis=-1).reshape(9, 2)  # (dy, dx), row-major
BAND_RADIUS = 4  # cells; the cost of the banded form grows with (TILE + 2 * BAND_RADIUS + 2)^2
TILE = 8  # cells
IMPLS = ("auto", "xla", "gather", "banded", "pallas")


def deform_conv2d(
    features: Float[Array, "b h w c"],
    offsets: Float[Array, "b h w 9 2"],
    mask: Float[Array, "b h w 9"],
    kernel: Float[Array, "3 3 c o"],
    *,
    impl: str = "auto",
) -> Float[Array, "b h w o"]:
    """Returns sum over taps of mask * features(position + tap + offset) @ kernel[tap], sampled bilinearly.

    offsets are (dy, dx) in cells, taps in row-major order; samples outside the map are zero. Values and gradients
    (to all four arguments) are those of torchvision.ops.deform_conv2d; at integer positions, where bilinear
    interpolation has a kink, the gradient to the offset is the one towards larger positions. `features` and
    `kernel` may be bfloat16; sums are float32.

    impl: "gather", "banded", "pallas"; "xla": banded where the program is compiled for TPU, else gather; "auto": pallas
      where it is compiled for NVIDIA GPUs or TPUs, else xla. What the kernels cannot hold (see `fits` of both), and a
      batch that is not split evenly over the mesh, xla computes.
    """
    if impl not in IMPLS:
        raise ValueError(f"deform_conv2d has no form {impl!r}; allowed are {', '.join(IMPLS)}")
    if not deform_pallas.fits(kernel) or features.shape[0] % split.num_parts():
        impl = {"auto": "xla", "pallas": "xla"}.get(impl, impl)
    return _deform_conv2d(impl, features, offsets, mask, kernel)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _deform_conv2d(impl: str, features: Array, offsets: Array, mask: Array, kernel: Array) -> Array:
    return _dispatch(impl, 0, features, offsets, mask, kernel)


def _forward(impl: str, *arguments: Array) -> tuple[Array, tuple[Array, ...]]:
    return _deform_conv2d(impl, *arguments), arguments


def _backward(impl: str, arguments: tuple[Array, ...], gradient: Array) -> tuple[Array, ...]:
    return _dispatch(impl, 1, *arguments, gradient)


_deform_conv2d.defvjp(_forward, _backward)


def _dispatch(impl: str, direction: int, *arguments: Array) -> Any:
    """Returns what the chosen form computes from the arguments, forward (0) or backward (1)."""
    gather, banded, gpu, tpu = (FORMS[name][direction] for name in ("gather", "banded", "pallas", "tpu"))
    if not deform_tpu.fits(arguments[0].shape, arguments[3].shape[3]):
        tpu = banded

    def beyond_band(*arguments: Array) -> Any:
        with jax.named_scope(split.RARELY):
            if arguments[0].shape[0] % split.num_parts():
                return gather(*arguments)
            return _image_by_image(gather, *arguments)

    def within(form: Callable[..., Any], *arguments: Array) -> Any:
        return jax.lax.cond(jnp.max(jnp.abs(arguments[1])) < BAND_RADIUS, form, beyond_band, *arguments)

    if impl == "gather":
        return gather(*arguments)
    if impl == "banded":
        return within(banded, *arguments)
    if impl == "pallas":
        return split.by_platform(*arguments, tpu=functools.partial(within, tpu), default=gpu)
    others = {"cuda": gpu} if impl == "auto" else {}
    on_tpus = functools.partial(within, tpu if impl == "auto" else banded)
    return split.by_platform(*arguments, tpu=on_tpus, default=gather, **others)


def _image_by_image(form: Callable[..., Any], features: Array, offsets: Array, mask: Array, *rest: Array) -> Any:
    """Returns what a form does in the memory of one image: what runs rarely shall not decide how much a step needs."""
    kernel, *gradient = rest

    def local(rows: tuple[Array, ...], whole: tuple[Array, ...]) -> Any:
        def add_image(of_kernel: Array, row: tuple[Array, ...]) -> tuple[Array, Any]:
            features, offsets, mask, *gradient = (x[None] for x in row)
            results = form(features, offsets, mask, *whole, *gradient)
            if not gradient:
                return of_kernel, results[0]
            *of_image, more = results
            return of_kernel + more, tuple(x[0] for x in of_image)

        of_kernel, results = jax.lax.scan(add_image, jnp.zeros(kernel.shape, jnp.float32), rows)
        return (*results, of_kernel[None]) if gradient else results

    results = split.by_rows(local, (features, offsets, mask, *gradient), (kernel,))
    return (*results[:-1], jnp.sum(results[-1], axis=0).astype(kernel.dtype)) if gradient else results


# --- gather form


def _gather_forward(features: Array, offsets: Array, mask: Array, kernel: Array) -> Array:
    b, h, w, c = features.shape
    packed = _pack_corners(features)
    weights, index = _corners(offsets, mask)  # for all taps first: else XLA computes them anew for every channel

    def add_tap(total: Array, tap: tuple[Array, Array, Array]) -> tuple[Array, None]:
        tap_index, tap_weights, tap_kernel = tap
        samples = _weighted_sum(_take(packed, tap_index), tap_weights.astype(features.dtype))
        return total + jnp.matmul(samples, tap_kernel, preferred_element_type=jnp.float32), None

    start = jnp.zeros((b, h * w, kernel.shape[-1]), jnp.float32)
    total, _ = jax.lax.scan(add_tap, start, (index, weights, kernel.reshape(9, c, -1)))
    return total.reshape(b, h, w, -1).astype(features.dtype)


def _gather_backward(features: Array, offsets: Array, mask: Array, kernel: Array, gradient: Array) -> tuple[Array, ...]:
    b, h, w, c = features.shape
    packed = _pack_corners(features)
    weights, weights_vjp, index = jax.vjp(_corners, offsets, mask, has_aux=True)
    gradient = gradient.reshape(b * h * w, -1)

    def one_tap(packed_gradient: Array, tap: tuple[Array, Array, Array]) -> tuple[Array, tuple[Array, Array]]:
        tap_index, tap_weights, tap_kernel = tap
        corners = jax.lax.optimization_barrier(_take(packed, tap_index))  # gathered once for both uses
        samples = _weighted_sum(corners, tap_weights.astype(features.dtype)).reshape(-1, c)
        kernel_gradient = jnp.matmul(samples.T, gradient, preferred_element_type=jnp.float32)
        sample_gradient = jnp.matmul(gradient, tap_kernel.T).reshape(b, -1, c)  # rounded once, for both uses
        weight_gradient = jnp.einsum("bnfc,bnc->bnf", corners, sample_gradient, preferred_element_type=jnp.float32)
        update = (tap_weights[..., None] * sample_gradient[:, :, None]).reshape(b, -1, 4 * c)
        packed_gradient = jax.vmap(lambda into, i, rows: into.at[i].add(rows, mode="promise_in_bounds"))(
            packed_gradient, tap_index, update
        )
        return packed_gradient, (weight_gradient, kernel_gradient)

    start = jnp.zeros((b, (h + 1) * (w + 1), 4 * c), jnp.float32)
    packed_gradient, (weight_gradient, kernel_gradient) = jax.lax.scan(
        one_tap, start, (index, weights, kernel.reshape(9, c, -1))
    )
    unpack = jax.linear_transpose(_pack_corners, jax.ShapeDtypeStruct(features.shape, jnp.float32))
    offset_gradient, mask_gradient = weights_vjp(weight_gradient)
    return (
        unpack(packed_gradient)[0].astype(features.dtype),
        offset_gradient,
        mask_gradient,
        kernel_gradient.reshape(kernel.shape).astype(kernel.dtype),
    )


def _pack_corners(features: Float[Array, "b h w c"]) -> Float[Array, "b n 4c"]:
    """Returns, for every 2x2 neighbourhood that touches the map, its four cells side by side; zeros outside.

    Row (y + 1) * (w + 1) + x + 1 holds (y, x), (y, x + 1), (y + 1, x), (y + 1, x + 1).
    """
    b, _, _, c = features.shape
    x = jnp.pad(features, ((0, 0), (1, 1), (1, 1), (0, 0)))
    corners = [x[:, :-1, :-1], x[:, :-1, 1:], x[:, 1:, :-1], x[:, 1:, 1:]]
    return jnp.concatenate(corners, axis=-1).reshape(b, -1, 4 * c)


def _corners(
    offsets: Float[Array, "b h w 9 2"], mask: Float[Array, "b h w 9"]
) -> tuple[Float[Array, "9 b n 4"], Int[Array, "9 b n"]]:
    """Returns the weights of the four corners of every sample, and the row of the packed corners; taps first."""
    b, h, w, _, _ = offsets.shape
    offsets, mask = jnp.moveaxis(offsets.astype(jnp.float32), 3, 0), jnp.moveaxis(mask.astype(jnp.float32), 3, 0)
    y = offsets[..., 0] + (TAPS[:, 0, None] + np.arange(h)).astype(np.float32)[:, None, :, None]
    x = offsets[..., 1] + (TAPS[:, 1, None] + np.arange(w)).astype(np.float32)[:, None, None, :]
    top, left = jax.lax.stop_gradient((jnp.floor(y), jnp.floor(x)))
    inside = (top >= -1) & (top < h) & (left >= -1) & (left < w)
    row = jnp.clip(top, -1, h - 1).astype(jnp.int32) + 1
    column = jnp.clip(left, -1, w - 1).astype(jnp.int32) + 1
    down, right = y - top, x - left
    mask = jnp.where(inside, mask, 0.0)
    upper, lower = mask * (1.0 - down), mask * down
    weights = [upper * (1.0 - right), upper * right, lower * (1.0 - right), lower * right]
    return jnp.stack(weights, axis=-1).reshape(9, b, -1, 4), (row * (w + 1) + column).reshape(9, b, -1)


def _take(packed: Float[Array, "b m 4c"], index: Int[Array, "b n"]) -> Float[Array, "b n 4 c"]:
    """Returns the four corners of every sample."""
    rows = jax.vmap(lambda table, i: table.at[i].get(mode="promise_in_bounds"))(packed, index)
    return rows.reshape(*rows.shape[:2], 4, -1)


def _weighted_sum(corners: Float[Array, "b n 4 c"], weights: Float[Array, "b n 4"]) -> Float[Array, "b n c"]:
    return functools.reduce(jnp.add, (corners[:, :, i] * weights[:, :, i, None] for i in range(4)))


# --- banded form


def _banded_forward(features: Array, offsets: Array, mask: Array, kernel: Array) -> Array:
    """Works on one row of tiles at a time, recomputed in the backward pass: that bounds the memory."""
    b, h, w, c = features.shape
    halo = BAND_RADIUS + 1
    rows, columns = -(-h // TILE), -(-w // TILE)
    bottom, right = rows * TILE - h, columns * TILE - w
    side = TILE + 2 * halo  # of a tile's neighbourhood
    padded = jnp.pad(features, ((0, 0), (halo, halo + bottom), (halo, halo + right), (0, 0)))
    strips = jnp.stack([padded[:, i * TILE : i * TILE + side] for i in range(rows)])
    kernel = kernel.reshape(9 * c, -1)

    def tiles(x: Array) -> Array:  # [b, h, w, 9] -> [rows, b, columns, TILE * TILE * 9]
        x = jnp.pad(x, ((0, 0), (0, bottom), (0, right), (0, 0)))
        x = x.reshape(b, rows, TILE, columns, TILE, 9).transpose(1, 0, 3, 2, 4, 5)
        return x.reshape(rows, b, columns, -1)

    # position of a sample within its neighbourhood, before the offset
    inner = np.stack(np.meshgrid(np.arange(TILE), np.arange(TILE), indexing="ij"), axis=-1)[:, :, None] + TAPS + halo
    inner = inner.reshape(-1, 2).astype(np.float32)
    cell = np.stack(np.meshgrid(np.arange(side), np.arange(side), indexing="ij"), axis=-1)
    cell = cell.reshape(-1, 2).astype(np.float32)

    @jax.checkpoint
    def one_strip(strip: tuple[Array, Array, Array, Array]) -> Array:
        source, y, x, tile_mask = strip
        neighbourhoods = jnp.stack([source[:, :, i * TILE : i * TILE + side] for i in range(columns)], axis=1)
        neighbourhoods = neighbourhoods.reshape(b, columns, side * side, c)
        weights = _tent(y[..., None] - cell[None, None, None, :, 0]) * _tent(
            x[..., None] - cell[None, None, None, :, 1]
        )
        weights = (weights * tile_mask[..., None]).astype(features.dtype)
        samples = jnp.einsum("bwsk,bwkc->bwsc", weights, neighbourhoods)
        samples = samples.reshape(b, columns, TILE * TILE, 9 * c)
        return jnp.matmul(samples, kernel, preferred_element_type=jnp.float32).astype(features.dtype)

    y = tiles(offsets[..., 0]) + jnp.asarray(inner[:, 0])[None, None, None]
    x = tiles(offsets[..., 1]) + jnp.asarray(inner[:, 1])[None, None, None]
    out = jax.lax.map(one_strip, (strips, y, x, tiles(mask)))  # [rows, b, columns, TILE * TILE, o]
    out = out.reshape(rows, b, columns, TILE, TILE, -1).transpose(1, 0, 3, 2, 4, 5)
    return out.reshape(b, rows * TILE, columns * TILE, -1)[:, :h, :w]


def _banded_backward(features: Array, offsets: Array, mask: Array, kernel: Array, gradient: Array) -> tuple[Array, ...]:
    return jax.vjp(_banded_forward, features, offsets, mask, kernel)[1](gradient)


def _tent(distance: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Returns the linear interpolation weight max(0, 1 - |distance|), whose slope at 0 is -1 and at -1 is +1."""
    weight = jnp.where(distance >= 0.0, 1.0 - distance, 1.0 + distance)
    return jnp.where((distance >= -1.0) & (distance < 1.0), weight, 0.0)


# --- kernels for NVIDIA GPUs


def _kernels_forward(features: Array, offsets: Array, mask: Array, kernel: Array) -> Array:
    weights, index = _corners(offsets, mask)
    return deform_pallas.forward(features, weights.swapaxes(0, 1), index.swapaxes(0, 1), kernel)


def _kernels_backward(features: Array, offsets: Array, mask: Array, kernel: Array, gradient: Array) -> Any:
    weights, weights_vjp, index = jax.vjp(_corners, offsets, mask, has_aux=True)
    feature_gradient, weight_gradient, kernel_gradient = deform_pallas.backward(
        features, weights.swapaxes(0, 1), index.swapaxes(0, 1), kernel, gradient
    )
    return feature_gradient, *weights_vjp(weight_gradient.swapaxes(0, 1)), kernel_gradient.astype(kernel.dtype)


# --- kernels for TPUs


def _positions(offsets: Float[Array, "b h w 9 2"], mask: Float[Array, "b h w 9"]) -> Float32[Array, "b r t 3 s"]:
    """Returns what `deform_tpu.forward` is told of the samples."""
    b, h, w, _, _ = offsets.shape
    rows, columns = -(-h // TILE), -(-w // TILE)
    inner = np.stack(np.meshgrid(np.arange(TILE), np.arange(TILE), indexing="ij"), axis=-1)[:, :, None] + TAPS
    inner = jnp.asarray(inner + BAND_RADIUS + 1, jnp.float32)
    x = jnp.concatenate([offsets.astype(jnp.float32), mask.astype(jnp.float32)[..., None]], axis=-1)
    x = jnp.pad(x, ((0, 0), (0, rows * TILE - h), (0, columns * TILE - w), (0, 0), (0, 0)))
    x = x.reshape(b, rows, TILE, columns, TILE, 9, 3)
    x = x + jnp.pad(inner, ((0, 0), (0, 0), (0, 0), (0, 1)))[None, None, :, None]
    return x.transpose(0, 1, 3, 6, 5, 2, 4).reshape(b, rows, columns, 3, -1)


def _tpu_forward(features: Array, offsets: Array, mask: Array, kernel: Array) -> Array:
    return deform_tpu.forward(features, _positions(offsets, mask), kernel.reshape(9, *kernel.shape[2:]))


def _tpu_backward(features: Array, offsets: Array, mask: Array, kernel: Array, gradient: Array) -> Any:
    positions, pull = jax.vjp(_positions, offsets, mask)
    by_tap = kernel.reshape(9, *kernel.shape[2:])
    of_features, of_positions, of_kernel = deform_tpu.backward(features, positions, by_tap, gradient)
    return of_features, *pull(of_positions), of_kernel.reshape(kernel.shape).astype(kernel.dtype)


FORMS = {
    "gather": (_gather_forward, _gather_backward),
    "banded": (_banded_forward, _banded_backward),
    "pallas": (_kernels_forward, _kernels_backward),
    "tpu": (_tpu_forward, _tpu_backward),
}
