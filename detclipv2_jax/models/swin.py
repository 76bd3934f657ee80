"""Swin Transformer backbone (Liu et al. 2021) for images of any size.

Compared with timm, torchvision and transformers. Where they differ: an input that is no multiple of the patch,
of the window or of 2 (merging) is padded with zeros at the bottom right (all three; torchvision drops the rest of
a patch); features are padded before they are shifted (torchvision, transformers; timm shifts first); an axis
covered by one window is not shifted (all three), and a window larger than the feature map is padded, not shrunk
(torchvision; the others change the size of their parameters). Outputs have a layer norm each, as in detectors.
"""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float, Int

from detclipv2_jax.models.repeat import repeat
from detclipv2_jax.models.window_attention import window_attention, windows_of

PATCH = 4  # px
MLP_RATIO = 4
LAYER_NORM_EPSILON = 1e-5
ATTENTION = "window_attention"  # name of its result, for who recomputes the rest

_dense_init = nn.initializers.truncated_normal(0.02)


def _patch_bias_init(key: Array, shape: tuple[int, ...], dtype: Any) -> Float[Array, " c"]:
    """Returns PyTorch's default for convolutions, which the reference keeps.

    With zeros, patches of padding would be zero vectors, and every layer norm multiplies the gradient of such a vector
    by 1 / sqrt(epsilon): a fresh model's gradient then has a norm of 1e15.
    """
    bound = (PATCH * PATCH * 3) ** -0.5
    return jax.random.uniform(key, shape, dtype, -bound, bound)


class Swin(nn.Module):
    """Features of stages 2-4 at strides 8, 16 and 32, each after a layer norm of its own (`norm2` ... `norm4`)."""

    embed_dim: int
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]
    window_size: int
    drop_path_rate: float = 0.0
    attention_impl: str = "auto"  # of `window_attention`
    remat: bool = False
    kept: tuple[str, ...] = ()  # values that are not computed again, of `ATTENTION`
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, image: Float[Array, "b h w 3"], *, train: bool) -> list[Float[Array, "b h w c"]]:
        """Returns the three feature maps, finest first: ceil(size / stride) cells and 2, 4, 8 x embed_dim channels.

        With `train` and a drop path rate, rng "dropout" is used.
        """
        rates = np.split(
            np.linspace(0.0, self.drop_path_rate, sum(self.depths), dtype=np.float32), np.cumsum(self.depths)[:-1]
        )
        x = _pad_to_multiple(jnp.asarray(image, self.dtype), PATCH)
        x = nn.Conv(
            self.embed_dim,
            (PATCH, PATCH),
            (PATCH, PATCH),
            padding="VALID",
            bias_init=_patch_bias_init,
            dtype=self.dtype,
            name="patch_embedding",
        )(x)
        x = _layer_norm(self.dtype, "patch_norm")(x)
        features = []
        for stage, (depth, heads) in enumerate(zip(self.depths, self.num_heads, strict=True), start=1):
            if stage > 1:
                x = PatchMerging(dtype=self.dtype, name=f"stage{stage}_merging")(x)
            blocks = [
                SwinBlock(
                    num_heads=heads,
                    window_size=self.window_size,
                    shift=shift,
                    drops_paths=self.drop_path_rate > 0.0,
                    attention_impl=self.attention_impl,
                    dtype=self.dtype,
                    parent=None,
                )
                for shift in (0, self.window_size // 2)[:depth]
            ]
            names = [f"stage{stage}_block{block}" for block in range(depth)]
            with jax.named_scope(f"stage{stage}"):
                repeated = functools.partial(repeat, remat=self.remat, kept=self.kept, static=(train,))
                x = repeated(self, blocks, names, x, [rates[stage - 1]])
            if stage > 1:
                features.append(_layer_norm(self.dtype, f"norm{stage}")(x))
        return features


class PatchMerging(nn.Module):
    """Halves both sides (rounding up) and doubles the channels: 2x2 cells stacked, normed, projected."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 2c"]:
        x = _pad_to_multiple(x, 2)
        b, h, w, c = x.shape
        # channel order of the reference: (0, 0), (1, 0), (0, 1), (1, 1) as (row, column)
        x = x.reshape(b, h // 2, 2, w // 2, 2, c).transpose(0, 1, 3, 4, 2, 5).reshape(b, h // 2, w // 2, 4 * c)
        x = _layer_norm(self.dtype, "norm")(x)
        return Dense(2 * c, use_bias=False, dtype=self.dtype, name="reduction")(x)


class SwinBlock(nn.Module):
    """Attention within (shifted) windows, then an MLP; both pre-norm residual branches with stochastic depth."""

    num_heads: int
    window_size: int
    shift: int
    drops_paths: bool
    attention_impl: str = "auto"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], drop_rate: Float[Array, ""], train: bool) -> Float[Array, "b h w c"]:
        channels = x.shape[-1]
        dense = functools.partial(Dense, dtype=self.dtype)
        y = WindowAttention(
            self.num_heads, self.window_size, self.shift, self.attention_impl, self.dtype, name="attention"
        )(_layer_norm(self.dtype, "norm1")(x))
        x = x + self._drop_path(y, drop_rate, train)
        y = dense(MLP_RATIO * channels, name="mlp_in")(_layer_norm(self.dtype, "norm2")(x))
        y = dense(channels, name="mlp_out")(gelu(y))
        return x + self._drop_path(y, drop_rate, train)

    def _drop_path(
        self, branch: Float[Array, "b h w c"], rate: Float[Array, ""], train: bool
    ) -> Float[Array, "b h w c"]:
        """Returns the branch, in training left out for a random part of the images and scaled up for the others."""
        if not train or not self.drops_paths:
            return branch
        keep_prob = 1.0 - rate
        keep = jax.random.bernoulli(self.make_rng("dropout"), keep_prob, (branch.shape[0], 1, 1, 1))
        return jnp.where(keep, branch / keep_prob, 0.0).astype(branch.dtype)


class WindowAttention(nn.Module):
    """Multi-head self-attention within windows, with a learned bias for every relative position in a window."""

    num_heads: int
    window_size: int
    shift: int
    impl: str
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        _, h, w, c = x.shape
        window, heads = self.window_size, self.num_heads
        table = self.param("relative_position_table", _dense_init, ((2 * window - 1) ** 2, heads), jnp.float32)
        bias = table[_relative_position_index(window).reshape(-1)].reshape(window**2, window**2, heads)

        x = _pad_to_multiple(x, window)
        windows = windows_of(x.shape, size=window, shift=self.shift, heads=heads, impl=self.impl)
        qkv = Dense(3 * c, dtype=self.dtype, name="qkv")(windows.split(x))
        x = checkpoint_name(window_attention(qkv, bias.transpose(2, 0, 1), windows), ATTENTION)
        x = windows.join(Dense(c, dtype=self.dtype, name="projection")(x))
        return x[:, :h, :w]


class Dense(nn.Module):
    """A linear layer on the last axis, computed on a matrix: XLA then needs no transposed copies for its gradient."""

    features: int
    use_bias: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*batch c"]) -> Float[Array, "*batch o"]:
        kernel = self.param("kernel", _dense_init, (x.shape[-1], self.features), jnp.float32)
        y = _matmul(jnp.asarray(x, self.dtype).reshape(-1, x.shape[-1]), kernel.astype(self.dtype))
        if self.use_bias:
            y += self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32).astype(self.dtype)[None]
        return y.reshape(*x.shape[:-1], self.features)


@jax.custom_vjp
def _matmul(x: Float[Array, "n c"], kernel: Float[Array, "c o"]) -> Float[Array, "n o"]:
    """Returns x @ kernel; a tall gradient of the kernel is computed lying, which is a third faster on CPUs."""
    return x @ kernel


def _matmul_gradient(operands: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, kernel = operands
    tall = kernel.shape[0] > kernel.shape[1]
    return gradient @ kernel.T, (gradient.T @ x).T if tall else x.T @ gradient


_matmul.defvjp(lambda x, kernel: (x @ kernel, (x, kernel)), _matmul_gradient)


@jax.custom_jvp
def gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Returns x times the normal distribution function of x, exactly; the gradient needs x alone."""
    return x * (0.5 + 0.5 * jax.lax.erf(x * 0.5**0.5))


@gelu.defjvp
def _gelu_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (x,), (tangent,) = primals, tangents
    density = jnp.exp(-0.5 * x * x) * (2.0 * np.pi) ** -0.5
    return gelu(x), tangent * (0.5 + 0.5 * jax.lax.erf(x * 0.5**0.5) + x * density)


def _relative_position_index(window: int) -> Int[np.ndarray, "q k"]:
    """Returns the row of the table for every pair of positions in a window, in the reference's order."""
    position = np.stack(np.meshgrid(np.arange(window), np.arange(window), indexing="ij"), axis=-1).reshape(-1, 2)
    relative = position[:, None] - position[None, :] + window - 1
    return relative[..., 0] * (2 * window - 1) + relative[..., 1]


def _pad_to_multiple(x: Float[Array, "b h w c"], multiple: int) -> Float[Array, "b h2 w2 c"]:
    bottom, right = -x.shape[1] % multiple, -x.shape[2] % multiple
    return jnp.pad(x, ((0, 0), (0, bottom), (0, right), (0, 0))) if bottom or right else x


def _layer_norm(dtype: Any, name: str) -> nn.LayerNorm:
    return nn.LayerNorm(epsilon=LAYER_NORM_EPSILON, dtype=dtype, name=name)
