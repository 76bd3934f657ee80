"""Kernels of a Swin block's second branch, x + factor * MLP(norm(x)), for NVIDIA GPUs (Pallas, Triton).

A block of cells stays on the chip with all its channels while the hidden ones pass by. Forward, nothing but x and the
result passes through memory. Backward, one kernel computes everything again and writes the hidden values and their
gradients, which two ordinary products need for the gradients of the weights.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Float, Float32

from detclipv2_jax.models import split

PART = 32  # channels of one tile
HIDDEN = 64  # channels at a time
MAX_CHANNELS = 192  # wider blocks do not fit into registers, and compute more than they move


class Weights(NamedTuple):
    """Of the norm and of both linear layers."""

    scale: Float[Array, " c"]
    shift: Float[Array, " c"]
    kernel_in: Float[Array, "c e"]
    bias_in: Float[Array, " e"]
    kernel_out: Float[Array, "e c"]
    bias_out: Float[Array, " c"]


def fits(channels: int, hidden: int) -> bool:
    """Returns whether the kernels can hold a branch of this many channels."""
    return channels % PART == 0 and channels <= MAX_CHANNELS and hidden % HIDDEN == 0


def forward(
    x: Float[Array, "b h w c"], factor: Float32[Array, " b"], weights: Weights, *, epsilon: float, interpret=False
) -> Float[Array, "b h w c"]:
    """Returns x + factor * MLP(norm(x)) with the exact GELU; products in the type of x, sums in float32."""

    def local(rows, whole):
        x, factor = rows
        flat = x.reshape(-1, x.shape[3])
        return _call(
            _forward_kernel, [flat, factor, *whole], [(flat.shape, flat.dtype)],
            cells=x.shape[1] * x.shape[2], epsilon=epsilon, interpret=interpret, name="mlp",
        )[0].reshape(x.shape)  # fmt: skip

    return split.by_rows(local, (x, factor), _cast(weights, x.dtype))


def backward(
    x: Float[Array, "b h w c"],
    factor: Float32[Array, " b"],
    weights: Weights,
    gradient: Float[Array, "b h w c"],
    *,
    epsilon: float,
    interpret=False,
) -> tuple[Float[Array, "b h w c"], Weights]:
    """Returns the gradients to x and, in float32, to the weights."""
    channels, hidden = weights.kernel_in.shape

    def local(rows, whole):
        x, factor, gradient = rows
        flat, above = x.reshape(-1, channels), gradient.reshape(-1, channels)
        n, num_blocks = flat.shape[0], pl.cdiv(flat.shape[0], _block_rows(channels))
        sums = [((num_blocks, size), jnp.float32) for size in (channels, channels, hidden, channels)]
        x_gradient, normed, active, hidden_gradient, *sums = _call(
            _backward_kernel, [flat, above, factor, *whole],
            [(flat.shape, x.dtype), (flat.shape, x.dtype), ((n, hidden), x.dtype), ((n, hidden), x.dtype), *sums],
            cells=x.shape[1] * x.shape[2], epsilon=epsilon, interpret=interpret, name="mlp_gradient",
        )  # fmt: skip
        product = functools.partial(jnp.einsum, "nc,no->co", preferred_element_type=jnp.float32)
        scale, shift, bias_in, bias_out = (jnp.sum(x, axis=0) for x in sums)
        products = product(normed, hidden_gradient), product(active, above)
        parts = Weights(scale, shift, products[0], bias_in, products[1], bias_out)
        return x_gradient.reshape(x.shape), jax.tree.map(lambda part: part[None], parts)  # a row for each device

    x_gradient, parts = split.by_rows(local, (x, factor, gradient), _cast(weights, x.dtype))
    return x_gradient, jax.tree.map(lambda part: jnp.sum(part, axis=0), parts)


def _cast(weights: Weights, dtype: Any) -> tuple[Array, ...]:
    """Returns the weights as the products take them; those of the norm stay float32."""
    return weights.scale, weights.shift, *(x.astype(dtype) for x in weights[2:])


def _block_rows(channels: int) -> int:
    return 128 if channels <= 96 else 64  # cells


def _call(kernel, inputs, outputs, *, cells, epsilon, interpret, name):
    n, channels = inputs[0].shape
    return pl.pallas_call(
        functools.partial(kernel, cells=cells, epsilon=epsilon),
        grid=(pl.cdiv(n, _block_rows(channels)),),
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)] * len(inputs),
        out_specs=[pl.BlockSpec(memory_space=pl.ANY)] * len(outputs),
        out_shape=[jax.ShapeDtypeStruct(*output) for output in outputs],
        compiler_params=triton.CompilerParams(num_warps=8, num_stages=2),
        interpret=interpret,
        name=name,
    )(*inputs)


def _forward_kernel(x_ref, factor_ref, scale_ref, shift_ref, in_ref, bias_in_ref, out_ref, bias_out_ref, y_ref,
                    *, cells, epsilon):  # fmt: skip
    rows, parts = _Rows(x_ref), range(x_ref.shape[1] // PART)
    normed, _, _ = _norm(rows, x_ref, scale_ref, shift_ref, epsilon)

    def add(j, totals):
        hidden = pl.ds(j * HIDDEN, HIDDEN)
        active = _gelu(_hidden(normed, in_ref, bias_in_ref, hidden))[0].astype(x_ref.dtype)
        return tuple(total + _dot(active, out_ref[hidden, _part(i)]) for i, total in enumerate(totals))

    start = (jnp.zeros((rows.size, PART), jnp.float32),) * len(parts)
    totals = jax.lax.fori_loop(0, in_ref.shape[1] // HIDDEN, add, start)
    factor = rows.factor(factor_ref, cells)
    for i in parts:
        branch = totals[i] + bias_out_ref[_part(i)].astype(jnp.float32)[None, :]
        rows.write(y_ref, _part(i), rows.read(x_ref, _part(i)) + factor * branch)


def _backward_kernel(
    x_ref, gradient_ref, factor_ref, scale_ref, shift_ref, in_ref, bias_in_ref, out_ref, _,
    x_gradient_ref, normed_ref, active_ref, hidden_gradient_ref, scale_sum_ref, shift_sum_ref, in_sum_ref, out_sum_ref,
    *, cells, epsilon,
):  # fmt: skip
    rows, parts = _Rows(x_ref), range(x_ref.shape[1] // PART)
    block, dtype = pl.program_id(0), x_ref.dtype
    normed, mean, deviation = _norm(rows, x_ref, scale_ref, shift_ref, epsilon)
    factor = rows.factor(factor_ref, cells)
    branch_gradient = [(factor * rows.read(gradient_ref, _part(i))).astype(dtype) for i in parts]
    for i in parts:
        rows.write(normed_ref, _part(i), normed[i])
        out_sum_ref[block, _part(i)] = jnp.sum(branch_gradient[i].astype(jnp.float32), axis=0)

    def add(j, totals):
        hidden = pl.ds(j * HIDDEN, HIDDEN)
        active, slope = _gelu(_hidden(normed, in_ref, bias_in_ref, hidden))
        rows.write(active_ref, hidden, factor * active)
        products = (_dot(branch_gradient[i], out_ref[hidden, _part(i)], trans_b=True) for i in parts)
        hidden_gradient = functools.reduce(jnp.add, products) * slope
        in_sum_ref[block, hidden] = jnp.sum(hidden_gradient, axis=0)
        rows.write(hidden_gradient_ref, hidden, hidden_gradient)
        rounded = hidden_gradient.astype(dtype)
        return tuple(total + _dot(rounded, in_ref[_part(i), hidden], trans_b=True) for i, total in enumerate(totals))

    start = (jnp.zeros((rows.size, PART), jnp.float32),) * len(parts)
    totals = jax.lax.fori_loop(0, in_ref.shape[1] // HIDDEN, add, start)

    centred = [(rows.read(x_ref, _part(i)) - mean) * deviation for i in parts]
    scaled = []
    for i in parts:
        scale_sum_ref[block, _part(i)] = jnp.sum(totals[i] * centred[i], axis=0)
        shift_sum_ref[block, _part(i)] = jnp.sum(totals[i], axis=0)
        scaled.append(totals[i] * scale_ref[_part(i)][None, :])
    along = _mean(scaled, x_ref), _mean([a * b for a, b in zip(scaled, centred, strict=True)], x_ref)
    for i in parts:
        through_norm = deviation * (scaled[i] - along[0] - centred[i] * along[1])
        rows.write(x_gradient_ref, _part(i), rows.read(gradient_ref, _part(i)) + through_norm)


class _Rows:
    """A program's rows of arrays that have one for every cell."""

    def __init__(self, ref: Any):
        self.num_cells, channels = ref.shape
        self.size = _block_rows(channels)
        self.first = pl.program_id(0) * self.size

    def read(self, ref: Any, columns: Any) -> Float32[Array, "rows columns"]:
        place = ref.at[pl.ds(self.first, self.size), columns]
        return triton.load(place, mask=self._mask(columns.size), other=0.0).astype(jnp.float32)

    def write(self, ref: Any, columns: Any, x: Float[Array, "rows columns"]) -> None:
        place = ref.at[pl.ds(self.first, self.size), columns]
        triton.store(place, x.astype(ref.dtype), mask=self._mask(columns.size))

    def factor(self, ref: Any, cells: int) -> Float32[Array, "rows 1"]:
        """Returns the factor of every row's image, which has `cells` rows."""
        row = jnp.minimum(self.first + jnp.arange(self.size), self.num_cells - 1)
        return ref[row // cells][:, None]

    def _mask(self, columns: int) -> Array:
        return self.first + jax.lax.broadcasted_iota(jnp.int32, (self.size, columns), 0) < self.num_cells


def _part(i: int) -> Any:
    return pl.ds(i * PART, PART)


def _mean(parts: list[Array], ref: Any) -> Float32[Array, "rows 1"]:
    return functools.reduce(jnp.add, (jnp.sum(part, axis=1, keepdims=True) for part in parts)) / ref.shape[1]


def _norm(rows: _Rows, x_ref: Any, scale_ref: Any, shift_ref: Any, epsilon: float):
    """Returns (normed parts in the type of x, mean, 1 / standard deviation)."""
    x = [rows.read(x_ref, _part(i)) for i in range(x_ref.shape[1] // PART)]
    mean = _mean(x, x_ref)
    variance = jnp.maximum(_mean([part * part for part in x], x_ref) - mean * mean, 0.0)
    deviation = jax.lax.rsqrt(variance + epsilon)
    normed = [
        (part - mean) * (deviation * scale_ref[_part(i)][None, :]) + shift_ref[_part(i)][None, :]
        for i, part in enumerate(x)
    ]
    return [part.astype(x_ref.dtype) for part in normed], mean, deviation


def _hidden(normed: list[Array], in_ref: Any, bias_ref: Any, hidden: Any) -> Float32[Array, "rows e"]:
    products = (_dot(part, in_ref[_part(i), hidden]) for i, part in enumerate(normed))
    return functools.reduce(jnp.add, products) + bias_ref[hidden].astype(jnp.float32)[None, :]


def _erf(x: Float32[Array, "rows e"]) -> Float32[Array, "rows e"]:
    """Returns the error function as a quotient of polynomials (Eigen's, as XLA's), because Triton has none here."""
    x = jnp.clip(x, -4.0, 4.0)
    square = x * x

    def polynomial(first: float, *others: float) -> Array:
        return functools.reduce(lambda total, c: total * square + c, others, jnp.full_like(x, first))

    above = polynomial(
        -2.72614225801306e-10, 2.77068142495902e-08, -2.10102402082508e-06, -5.69250639462346e-05,
        -7.34990630326855e-04, -2.95459980854025e-03, -1.60960333262415e-02,
    )  # fmt: skip
    below = polynomial(
        -1.45660718464996e-05, -2.13374055278905e-04, -1.68282697438203e-03, -7.37332916720468e-03,
        -1.42647390514189e-02,
    )  # fmt: skip
    return x * above / below


def _gelu(x: Float32[Array, "rows e"]) -> tuple[Float32[Array, "rows e"], Float32[Array, "rows e"]]:
    """Returns (x times the normal distribution function of x, its slope)."""
    distribution = 0.5 + 0.5 * _erf(x * 0.5**0.5)
    return x * distribution, distribution + x * jnp.exp(-0.5 * x * x) * (2.0 * np.pi) ** -0.5


def _dot(a, b, **transposed):
    """Returns the float32 product; of float32 factors without rounding them to the GPU's short format."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return triton.dot(a, b, precision=precision, **transposed)
