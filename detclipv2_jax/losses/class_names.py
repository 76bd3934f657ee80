"""Classification of images by the names of the batch's classes, in place of the contrast (paper's appendix C)."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int32

from detclipv2_jax.losses.concept_table import Captions, Table, unique_rows
from detclipv2_jax.losses.contrastive import ContrastiveSettings, Proposed
from detclipv2_jax.losses.devices import WHOLE, gather, on_each_device, total
from detclipv2_jax.losses.image_side import image_scores
from detclipv2_jax.losses.matching import LOW


@jax.named_scope("class_name_loss")
def class_name_loss(
    regions: Float[Array, "b k d"],
    text: Float32[Array, "t d"],
    scale: Float32[Array, ""],
    *,
    proposed: Proposed,
    table: Table,
    captions: Captions,
    image_mask: Bool[Array, " b"],
    settings: ContrastiveSettings,
) -> tuple[Float32[Array, ""], dict[str, Float32[Array, ""]]]:
    """Returns (loss, metrics): cross-entropy of images over the names in the table, the mean over the global batch.

    The score of image i and name c is the mean over the image's proposals of scale · f_region · f_text (k is 1 in the
    paper). The softmax of score / temperature goes over the different names of the global batch: a class that has
    several images is one column, so that equal classes are no negatives of each other. The target is
    1 - label_smoothing on the own name plus label_smoothing / C on all C. Arguments are those of
    `contrastive.word_region_loss`; the first concept of a caption is the name.

    Metrics: accuracy (images whose own name is the best; a tie is a miss), similarity (mean score of the own name) and
    num_concepts (different names).
    """
    axes, per_device = on_each_device(regions.shape[0], text.shape[0])
    valid = image_mask & jnp.any(proposed.mask, axis=1) & captions.mask[:, 0]
    arrays = (regions, text * scale, proposed.mask, table, captions.concepts[:, 0], valid)
    local = functools.partial(_local_loss, axes, settings)
    loss, metrics = per_device(local, results=WHOLE, differentiable=True)(arrays)
    unique = table.mask & (table.canonical == jnp.arange(text.shape[0], dtype=table.canonical.dtype))
    return loss, metrics | {"num_concepts": jnp.sum(unique, dtype=jnp.float32)}


def _local_loss(
    axes: tuple[str, ...],
    settings: ContrastiveSettings,
    arrays: tuple[Array, Array, Array, Table, Int32[Array, " b"], Bool[Array, " b"]],
) -> tuple[Float32[Array, ""], dict[str, Float32[Array, ""]]]:
    """Returns (loss, metrics) of the global batch from one device's images, classes and table rows."""
    regions, text, region_mask, table, classes, valid = arrays
    names = unique_rows(gather(table.canonical, axes), gather(table.mask, axes))
    used = (jnp.arange(names.order.shape[0]) < names.count)[:, None]
    scores = image_scores(
        axes, regions, text, region_mask, names.order[:, None], used, chunk_bytes=settings.chunk_bytes
    )
    logits = jnp.where(used, scores / settings.temperature, LOW)  # [names, b]
    own = jnp.take_along_axis(logits, names.slot[classes][None], axis=0)[0]
    smoothing = settings.label_smoothing * jnp.sum(jnp.where(used, logits, 0.0), axis=0) / jnp.maximum(names.count, 1)
    losses = jax.nn.logsumexp(logits, axis=0) - (1.0 - settings.label_smoothing) * own - smoothing
    num_valid = jnp.maximum(total(valid, axes), 1.0)

    def mean(x: Array) -> Array:
        return total(jnp.where(valid, x, 0.0), axes) / num_valid

    is_best = jnp.sum(logits >= own[None], axis=0) == 1
    return mean(losses), jax.lax.stop_gradient(
        {"accuracy": mean(is_best), "similarity": mean(own * settings.temperature)}
    )
