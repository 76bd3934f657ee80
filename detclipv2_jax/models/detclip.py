"""The whole detector: image -> region embeddings and boxes, text -> concept embeddings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array
from jaxtyping import Float, Int, UInt8

from detclipv2_jax.models.atss_head import AtssHead, LevelOutput
from detclipv2_jax.models.fpn import FPN
from detclipv2_jax.models.swin import ATTENTION, Swin
from detclipv2_jax.models.text_encoder import ClassTable, TextEncoder

if TYPE_CHECKING:
    from ml_collections import ConfigDict

IMAGE_MEAN = np.array((123.675, 116.28, 103.53), np.float32)  # ImageNet, RGB, 0-255
IMAGE_STD = np.array((58.395, 57.12, 57.375), np.float32)
DTYPES = ("float32", "bfloat16")
REMATS = ("none", "blocks_but_attention", "blocks", "heads", "all")
NORM_EPSILON = 1e-6  # shortest length that is still normalised to 1


@struct.dataclass
class Regions:
    """What the image side says about every anchor, in the order of `geometry.anchors.grid`."""

    embeddings: Float[Array, "b a d"]  # compute type
    box_deltas: Float[Array, "b a 4"]  # float32, for geometry.boxes.decode_deltas
    centerness: Float[Array, "b a"]  # float32 logits
    objectness: Float[Array, "b a"] | None  # float32 logits of the extra head, if there is one


class DetCLIP(nn.Module):
    """DetCLIPv2 (paper section 3): the two towers meet only in the logits scale * f_region . f_text + bias."""

    swin: dict[str, Any]  # fields of the modules of those names
    head: dict[str, Any]
    text: dict[str, Any]
    embed_dim: int
    # none | blocks (Swin and text) | blocks_but_attention (that of windows is kept: less to compute again) | heads (a
    # level of the head) | all (blocks, heads and the pyramid)
    remat: str
    normalize_regions: bool
    logit_scale: float  # initial values
    logit_bias: float
    dtype: Any = jnp.float32
    class_tokens: tuple[tuple[int, ...], ...] = ()  # a table of these texts in place of the text tower

    def setup(self) -> None:
        blocks = self.remat in ("blocks_but_attention", "blocks", "all")
        heads = self.remat in ("heads", "all")
        head_class = nn.remat(AtssHead, static_argnums=(2,)) if heads else AtssHead
        fpn_class = nn.remat(FPN) if self.remat == "all" else FPN
        kept = (ATTENTION,) * (self.remat == "blocks_but_attention")
        self.image_backbone = Swin(**self.swin, remat=blocks, kept=kept, dtype=self.dtype, name="swin")
        self.pyramid = fpn_class(self.head["channels"], dtype=self.dtype, name="fpn")
        self.region_head = head_class(**self.head, embed_dim=self.embed_dim, dtype=self.dtype, name="head")
        self.text_encoder: Any
        if self.class_tokens:
            self.text_encoder = ClassTable(self.class_tokens, self.embed_dim)
        else:
            text = {key: value for key, value in self.text.items() if key != "classes"}
            self.text_encoder = TextEncoder(**text, embed_dim=self.embed_dim, remat=blocks, dtype=self.dtype)
        constant = nn.initializers.constant
        self.scale = self.param("logit_scale", constant(self.logit_scale), (), jnp.float32)
        self.bias = self.param("logit_bias", constant(self.logit_bias), (), jnp.float32)

    def __call__(
        self, image: UInt8[Array, "b h w 3"], extent: Int[Array, "b 2"], tokens: Int[Array, "t l"], *, train: bool
    ) -> tuple[LevelOutput, Float[Array, "t d"]]:
        """Uses every parameter, for `init`: levels share those of the head, so one of them is enough."""
        levels = self.pyramid(self.image_backbone(_normalize_image(image, extent, self.dtype), train=train))
        return self.region_head(levels[-1], 0), self.encode_text(tokens)

    def encode_image(self, image: UInt8[Array, "b h w 3"], extent: Int[Array, "b 2"], *, train: bool) -> Regions:
        """Returns the regions of RGB images whose valid part is the top left `extent` (height, width) px.

        The rest counts as zero after normalisation, whatever it holds. With `train` and stochastic depth the rng
        "dropout" is needed.
        """
        levels = self.pyramid(self.image_backbone(_normalize_image(image, extent, self.dtype), train=train))
        outputs = [self.region_head(feature, level) for level, feature in enumerate(levels)]
        merged = jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), *outputs)
        embeddings = merged.embeddings
        if self.normalize_regions:
            embeddings = l2_normalize(embeddings).astype(self.dtype)
        return Regions(embeddings, merged.box_deltas, merged.centerness, merged.objectness)

    def encode_text(self, tokens: Int[Array, "t l"]) -> Float[Array, "t d"]:
        """Returns L2-normalised float32 concept embeddings."""
        return l2_normalize(self.text_encoder(tokens))

    def encode_tokens(self, tokens: Int[Array, "t l"]) -> Float[Array, "t l d"]:
        """Returns L2-normalised float32 embeddings of every token; that of [EOS] is the concept's."""
        return l2_normalize(self.text_encoder(tokens, every_token=True))

    def logit_parameters(self) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """Returns (scale, bias) of the logits, stored as they are (not as a logarithm)."""
        return self.scale, self.bias


def from_config(config: ConfigDict, *, class_tokens: Int[np.ndarray, "c l"] | None = None) -> DetCLIP:
    """Returns the model of `config.model`; `class_tokens` are those of `config.text.classes`, if there are any.

    Raises:
      ValueError: there is not one row of tokens a class.
    """
    rows, num = () if class_tokens is None else tuple(map(tuple, class_tokens.tolist())), len(config.text.classes)
    if len(rows) != num:
        raise ValueError(f"{len(rows)} rows of tokens for {num} classes; runs.state.make_model has them")
    return DetCLIP(
        swin=dict(config.swin),
        head=dict(config.head),
        text=dict(config.text),
        embed_dim=config.embed_dim,
        remat=config.remat,
        normalize_regions=config.logit.normalize_regions,
        logit_scale=config.logit.scale,
        logit_bias=config.logit.bias,
        dtype=jnp.dtype(config.dtype),
        class_tokens=rows,
    )


def l2_normalize(x: Float[Array, "... d"]) -> Float[Array, "... d"]:
    """Returns float32 vectors of length 1; a zero vector stays zero, with a finite gradient."""
    x = x.astype(jnp.float32)
    squared = jnp.sum(x * x, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(squared, NORM_EPSILON**2))


def _normalize_image(image: UInt8[Array, "b h w 3"], extent: Int[Array, "b 2"], dtype: Any) -> Float[Array, "b h w 3"]:
    _, height, width, _ = image.shape
    rows = jnp.arange(height)[None] < extent[:, :1]
    columns = jnp.arange(width)[None] < extent[:, 1:]
    valid = rows[:, :, None, None] & columns[:, None, :, None]
    x = (image.astype(jnp.float32) - IMAGE_MEAN[None, None, None]) / IMAGE_STD[None, None, None]
    return jnp.where(valid, x, 0.0).astype(dtype)
