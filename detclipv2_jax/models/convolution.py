"""3x3 convolutions of many channels: on CPUs the gradient of their kernel is one product of matrices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Float32

from detclipv2_jax.models import split

MIN_CHANNELS = 128  # in and out
STRIDES, PADDING = (1, 1), ((1, 1), (1, 1))


def conv_general_dilated(
    x: Float[Array, "b h w c"],
    kernel: Float[Array, "kh kw c o"],
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    **options: Any,
) -> Float[Array, "b h2 w2 o"]:
    """Returns what `jax.lax.conv_general_dilated` does, for `flax.linen.Conv` without dilation or groups."""
    same = (tuple(strides), tuple(map(tuple, padding))) == (STRIDES, PADDING)
    large = kernel.shape[:2] == (3, 3) and min(kernel.shape[2:]) >= MIN_CHANNELS
    if same and large and x.dtype == jnp.float32 and split.on_cpus():
        return _conv3x3(x, kernel)
    return jax.lax.conv_general_dilated(x, kernel, strides, padding, **options)


def _plain(x: Array, kernel: Array) -> Array:
    return jax.lax.conv_general_dilated(x, kernel, STRIDES, PADDING, dimension_numbers=("NHWC", "HWIO", "NHWC"))


@jax.custom_vjp
def _conv3x3(x: Float32[Array, "b h w c"], kernel: Float32[Array, "3 3 c o"]) -> Float32[Array, "b h w o"]:
    return _plain(x, kernel)


def _gradients(operands: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, kernel = operands
    (x_gradient,) = jax.vjp(lambda x: _plain(x, kernel), x)[1](gradient)
    width, channels = x.shape[2:]
    # three columns beside each other meet three rows beside each other: all nine taps at once
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    columns = jnp.concatenate([padded[:, :, j : j + width] for j in range(3)], axis=-1)
    rows = jnp.concatenate([jnp.pad(gradient, ((0, 0), (i, 2 - i), (0, 0), (0, 0))) for i in range(3)], axis=-1)
    taps = columns.reshape(-1, 3 * channels).T @ rows.reshape(-1, 3 * gradient.shape[3])
    return x_gradient, taps.reshape(3, channels, 3, gradient.shape[3]).transpose(2, 0, 1, 3)


_conv3x3.defvjp(lambda x, kernel: (_conv3x3(x, kernel), (x, kernel)), _gradients)
