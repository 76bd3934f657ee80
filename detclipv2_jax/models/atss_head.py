"""ATSS head (Zhang et al. 2020) with region embeddings for classes and a deformable layer (paper section 3.3)."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax import Array
from jaxtyping import Float

from detclipv2_jax.models.convolution import conv_general_dilated
from detclipv2_jax.models.deform_conv import deform_conv2d

OBJECTNESS = ("none", "classification", "iou")  # an extra output
TAPS = 9  # of a 3x3 kernel
GROUP_NORM_EPSILON = 1e-5

_normal_init = nn.initializers.normal(0.01)
_conv = functools.partial(
    nn.Conv, kernel_size=(3, 3), padding=1, kernel_init=_normal_init, conv_general_dilated=conv_general_dilated
)


@struct.dataclass
class LevelOutput:
    """What the head says about the cells of one level, flattened row-major."""

    embeddings: Float[Array, "b n d"]
    box_deltas: Float[Array, "b n 4"]  # float32
    centerness: Float[Array, "b n"]  # float32 logits
    objectness: Float[Array, "b n"] | None  # float32 logits


class AtssHead(nn.Module):
    """One head for all levels: call it once a level; the parameters are shared but for the box scale.

    The classification branch starts with a modulated deformable 3x3 convolution of the level's feature whose
    offsets and masks come from the last feature of the box tower, without stop_gradient: so image-text pairs, which
    have no boxes, train the box tower too.

    objectness: "none", or an extra output of the box tower, as centerness is ("classification": is this an object?,
    "iou": how well does its box fit?; Table 2a hangs both on the regression branch).
    """

    embed_dim: int
    channels: int
    num_convs: int
    num_groups: int
    num_levels: int = 5
    deformable: bool = True
    deform_impl: str = "auto"
    objectness: str = "none"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, feature: Float[Array, "b h w c"], level: int) -> LevelOutput:
        # `level` is positional because nn.remat cannot mark a keyword static
        tower = functools.partial(Tower, self.channels, self.num_convs, self.num_groups, self.dtype)
        conv = functools.partial(_conv, dtype=self.dtype)
        box_feature = tower(name="box_tower")(feature)
        class_feature = feature
        if self.deformable:
            class_feature = DeformableLayer(
                self.channels, self.num_groups, self.deform_impl, self.dtype, name="deformable"
            )(feature, box_feature)
        class_feature = tower(name="class_tower")(class_feature)

        box_outputs = conv(4, name="box_deltas")(box_feature).astype(jnp.float32)
        centerness = conv(1, name="centerness")(box_feature).astype(jnp.float32)
        scales = self.param("level_scales", nn.initializers.ones, (self.num_levels,), jnp.float32)
        objectness = None
        if self.objectness != "none":
            objectness = _flatten(conv(1, name="objectness")(box_feature).astype(jnp.float32))[..., 0]
        return LevelOutput(
            embeddings=_flatten(conv(self.embed_dim, name="embedding")(class_feature)),
            box_deltas=_flatten(box_outputs * scales[level]),
            centerness=_flatten(centerness)[..., 0],
            objectness=objectness,
        )


class Tower(nn.Module):
    """3x3 convolutions, each with group norm and ReLU."""

    channels: int
    num_convs: int
    num_groups: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        for i in range(self.num_convs):
            x = _conv(self.channels, use_bias=False, dtype=self.dtype, name=f"conv{i}")(x)
            x = nn.relu(_group_norm(self.num_groups, self.dtype, f"norm{i}")(x))
        return x


class DeformableLayer(nn.Module):
    """DCNv2 (Zhu et al. 2019) on `feature`, steered by `guide`, then group norm and ReLU.

    Offsets and masks start at zero and one half: a plain convolution.
    """

    channels: int
    num_groups: int
    impl: str
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, feature: Float[Array, "b h w c"], guide: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        b, h, w, c = feature.shape
        zeros = nn.initializers.zeros
        steering = _conv(3 * TAPS, dtype=self.dtype, kernel_init=zeros, name="steering")(guide)
        steering = steering.astype(jnp.float32)  # positions need more than bfloat16's 8 bits
        offsets = steering[..., : 2 * TAPS].reshape(b, h, w, TAPS, 2)
        mask = jax.nn.sigmoid(steering[..., 2 * TAPS :])
        kernel = self.param("kernel", _normal_init, (3, 3, c, self.channels), jnp.float32)
        x = deform_conv2d(feature, offsets, mask, kernel.astype(self.dtype), impl=self.impl)
        return nn.relu(_group_norm(self.num_groups, self.dtype, "norm")(x))


def _group_norm(num_groups: int, dtype: Any, name: str) -> nn.GroupNorm:
    return nn.GroupNorm(num_groups, epsilon=GROUP_NORM_EPSILON, dtype=dtype, name=name)


def _flatten(x: Float[Array, "b h w c"]) -> Float[Array, "b n c"]:
    return x.reshape(x.shape[0], -1, x.shape[-1])
