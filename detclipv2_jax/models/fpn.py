"""Feature pyramid (Lin et al. 2017) with two extra levels, as ATSS uses it in mmdetection."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from detclipv2_jax.models.convolution import conv_general_dilated

_uniform_init = nn.initializers.xavier_uniform()


class FPN(nn.Module):
    """P3-P7 with equal channels from C3-C5: lateral 1x1, sums top-down, 3x3; then P6 and P7 by 3x3 of stride 2."""

    channels: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, features: list[Float[Array, "b h w c"]]) -> list[Float[Array, "b h w c"]]:
        """Returns five maps, finest first; each has half the cells of the one before, rounded up."""
        conv = functools.partial(
            nn.Conv,
            self.channels,
            dtype=self.dtype,
            kernel_init=_uniform_init,
            conv_general_dilated=conv_general_dilated,
        )
        levels = [conv((1, 1), name=f"lateral{level}")(x) for level, x in enumerate(features, start=3)]
        for i in reversed(range(len(levels) - 1)):
            levels[i] = levels[i] + _upsample(levels[i + 1], levels[i].shape[1:3])
        levels = [conv((3, 3), padding=1, name=f"output{level}")(x) for level, x in enumerate(levels, start=3)]
        for level in (6, 7):
            levels.append(conv((3, 3), strides=2, padding=1, name=f"output{level}")(levels[-1]))
        return levels


def _upsample(x: Float[Array, "b h w c"], size: tuple[int, ...]) -> Float[Array, "b h2 w2 c"]:
    """Returns nearest-neighbour 2x upsampling cut to `size`.

    For sizes n -> 2n and n -> 2n - 1 this is the same as interpolation to that size.
    """
    return jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)[:, : size[0], : size[1]]
