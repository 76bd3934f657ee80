"""CLIP's text transformer (Radford et al. 2021): one sentence embedding a concept. Or a table, for a closed vocabulary.

Compared with open_clip and transformers: causal, pre-norm, QuickGELU, the feature at [EOS].
"""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from detclipv2_jax.models.repeat import repeat

VOCABULARY_SIZE = 49_408
MLP_RATIO = 4
LAYER_NORM_EPSILON = 1e-5


class TextEncoder(nn.Module):
    """Embeds token rows; `embed_dim` is the size of the joint space, `width` that of the transformer."""

    width: int
    num_layers: int
    num_heads: int
    context_length: int
    embed_dim: int
    remat: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens: Int[Array, "t l"], *, every_token: bool = False) -> Float[Array, "t *l d"]:
        """Returns float32 embeddings, not normalised: the projected feature at [EOS], the largest id of a row.

        Of `every_token` the feature is projected if that is asked for. Rows may be shorter than `context_length`, not
        longer.
        """
        length = tokens.shape[1]
        if length > self.context_length:
            raise ValueError(
                f"tokens have {length} positions, the text encoder {self.context_length}: tokenize with "
                "max_length=config.model.text.context_length"
            )
        normal = nn.initializers.normal
        # looked up in float32: [SOS], [EOS] and padding have the gradients of thousands of rows, which a bfloat16 sum
        # loses; and an H200 took 44 ms for it instead of 0.8 (6,912 rows of 16)
        x = nn.Embed(
            VOCABULARY_SIZE, self.width, dtype=jnp.float32, embedding_init=normal(0.02), name="token_embedding"
        )(tokens).astype(self.dtype)
        position = self.param("position_embedding", normal(0.01), (self.context_length, self.width), jnp.float32)
        x = x + position[None, :length].astype(self.dtype)
        block = TextBlock(self.num_heads, self.num_layers, self.dtype, parent=None)
        x = repeat(self, [block], [f"block{i}" for i in range(self.num_layers)], x, remat=self.remat)
        if not every_token:  # every position but [EOS] is unused: pick it before the norm and the projection
            x = jnp.take_along_axis(x, jnp.argmax(tokens, axis=-1)[:, None, None], axis=1)[:, 0]
        x = nn.LayerNorm(LAYER_NORM_EPSILON, dtype=self.dtype, name="norm")(x)
        x = nn.Dense(
            self.embed_dim, use_bias=False, dtype=self.dtype, kernel_init=normal(self.width**-0.5), name="projection"
        )(x)
        return x.astype(jnp.float32)


class TextBlock(nn.Module):
    """Causal self-attention, then an MLP; both pre-norm residual branches. Initial values as in CLIP."""

    num_heads: int
    num_layers: int  # of the whole encoder: output projections start smaller the deeper it is
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "t l w"]) -> Float[Array, "t l w"]:
        t, length, width = x.shape
        normal = nn.initializers.normal
        dense = functools.partial(nn.Dense, dtype=self.dtype)
        norm = functools.partial(nn.LayerNorm, LAYER_NORM_EPSILON, dtype=self.dtype)
        output_std = (width * 2 * self.num_layers) ** -0.5

        y = dense(3 * width, kernel_init=normal(width**-0.5), name="qkv")(norm(name="norm1")(x))
        query, key, value = jnp.moveaxis(y.reshape(t, length, 3, self.num_heads, width // self.num_heads), 2, 0)
        query = query * query.shape[-1] ** -0.5
        logits = jnp.einsum("tqhd,tkhd->thqk", query, key, preferred_element_type=jnp.float32)
        causal = jnp.tril(jnp.ones((length, length), bool))
        weights = jax.nn.softmax(jnp.where(causal[None, None], logits, -jnp.inf), axis=-1).astype(self.dtype)
        y = jnp.einsum("thqk,tkhd->tqhd", weights, value).reshape(x.shape)
        x = x + dense(width, kernel_init=normal(output_std), name="projection")(y)

        y = dense(MLP_RATIO * width, kernel_init=normal((2 * width) ** -0.5), name="mlp_in")(norm(name="norm2")(x))
        y = y * jax.nn.sigmoid(1.702 * y)  # QuickGELU
        return x + dense(width, kernel_init=normal(output_std), name="mlp_out")(y)


class ClassTable(nn.Module):
    """A closed vocabulary: a learned embedding for each of some names, the classification layer of usual detectors."""

    classes: tuple[tuple[int, ...], ...]  # the tokens of each
    embed_dim: int

    @nn.compact
    def __call__(self, tokens: Int[Array, "t l"]) -> Float[Array, "t d"]:
        """Returns float32 embeddings, not normalised: the row of the class that has these tokens, zeros for others."""
        normal = nn.initializers.normal(self.embed_dim**-0.5)
        table = self.param("classes", normal, (len(self.classes), self.embed_dim), jnp.float32)
        same = jnp.all(tokens[:, None] == np.array(self.classes, np.int32)[None], axis=-1)
        return jnp.where(jnp.any(same, axis=1)[:, None], table[jnp.argmax(same, axis=1)], 0.0)
