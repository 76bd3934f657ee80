"""Word-region contrastive loss on image-text pairs (paper section 3.2, Eq. 2-5).

Proposals are chosen by `proposals.select_proposals`; `matching` computes similarities in chunks.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int32

from detclipv2_jax.losses.concept_table import Captions, Table, unique_rows
from detclipv2_jax.losses.devices import WHOLE, gather, on_each_device, reduce_scatter, total
from detclipv2_jax.losses.image_side import image_scores
from detclipv2_jax.losses.matching import LOW, Settings, caption_scores

if TYPE_CHECKING:
    from ml_collections import ConfigDict

MATCHINGS = ("max_size", "one_to_one", "one_to_many")
INTERACTIONS = ("phrases", "tokens")  # of captions with regions, see docs/decisions.md
SIDES = ("text_to_image", "image_to_text", "bilateral")


@dataclasses.dataclass(frozen=True)
class ContrastiveSettings:
    """Of the word-region contrastive loss; hashable, because it is static.

    Matching one_to_one takes the best proposal of each concept, one_to_many all, weighted by a softmax of s /
    matching_temperature (Eq. 4), max_size the largest proposal with the caption, the first one among equals.
    """

    matching: str  # of MATCHINGS
    side: str  # of SIDES
    temperature: float  # of the InfoNCE
    label_smoothing: float
    matching_temperature: float  # tau_t of one_to_many
    chunk_bytes: int  # a device; bounds the similarities held at once

    def __post_init__(self) -> None:
        for name, value, allowed in (("matching", self.matching, MATCHINGS), ("side", self.side, SIDES)):
            if value not in allowed:
                raise ValueError(f"{name}={value!r} is unknown; allowed are {', '.join(allowed)}")
        if not 0.0 <= self.label_smoothing < 1.0:
            raise ValueError(f"label_smoothing={self.label_smoothing} must be in [0, 1)")
        for name in ("temperature", "matching_temperature"):
            if getattr(self, name) <= 0.0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")


def settings_of(config: ConfigDict) -> ContrastiveSettings:
    """Returns the settings of `config.loss`, whose keys have the names of the fields."""
    return ContrastiveSettings(**{field.name: config[field.name] for field in dataclasses.fields(ContrastiveSettings)})


class Proposed(NamedTuple):
    """Which places of `regions` hold proposals, and how large their boxes are."""

    mask: Bool[Array, "b k"]  # an image without any makes no pair
    areas: Float32[Array, "b k"] | None  # in any unit; only max_size needs them


@jax.named_scope("contrastive_loss")
def word_region_loss(
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
    """Returns (loss, metrics): InfoNCE between images and captions, the mean over the pairs of the global batch.

    The similarity of image i and caption j is s(i, j) = mean over the concepts of caption j of the best similarity
    scale · f_region · f_text among the proposals of image i (a bias would cancel in the softmax).

    text_to_image: each caption is classified over all images by a softmax of s / temperature; the target is
    1 - label_smoothing on its own image plus label_smoothing / B on all B. image_to_text: each image is classified
    over all captions, with the similarity from its side: the mean over its proposals of the best similarity to a
    concept of the caption. bilateral: the mean of both.

    Arrays are global, rows of all of them split over all axes of the mesh of `jax.set_mesh`, in order; without a
    mesh everything is on one device. Over the network go the concept embeddings in the dtype of `regions`, ids, a
    few numbers for each caption and the float32 gradient of the concept embeddings; never a matrix of images ×
    concepts or images × captions.

    A pure function of the embeddings, which makes gradient accumulation exact: embed all images in chunks, keep
    `regions` of all chunks and `text`, take `jax.value_and_grad` of this function with respect to (regions, text,
    scale) once, then embed every chunk again and pull its rows of the gradient back with `jax.vjp`.

    Args:
      regions: embeddings of the proposals. Their dtype is that of the products; sums are float32.
      text: L2-normalised concept embeddings.
      scale: of the logits; learnable.
      proposed: which of `regions` are proposals.
      table: which rows of `text` are concepts.
      captions: of the images. One without any concept makes no pair.
      image_mask: False for padding, which never counts.
      settings: of the loss.

    Metrics, all float32: accuracy (captions whose own image is the best; a tie is a miss), rank (mean place of the
    own image, from 1), similarity (mean s of pairs), chosen_by_own and chosen_by_others (share of an image's
    proposals that are the best of a concept of its own caption, of any other concept of the table), num_concepts
    (distinct ones in the table).
    """
    if settings.matching == "max_size" and proposed.areas is None:
        raise ValueError("matching='max_size' needs proposed.areas")
    axes, per_device = on_each_device(regions.shape[0], text.shape[0])
    # the scale in float32 before any cast; a negative one turns the choice of the maximum as it should
    arrays = _Arrays(regions, text * scale, proposed, table, captions, image_mask)
    local = functools.partial(_local_loss, axes, settings)
    loss, metrics = per_device(local, results=WHOLE, differentiable=True)(arrays)
    unique = table.mask & (table.canonical == jnp.arange(text.shape[0], dtype=table.canonical.dtype))
    return loss, metrics | {"num_concepts": jnp.sum(unique, dtype=jnp.float32)}


class _Arrays(NamedTuple):
    """What one device has of the arguments of `word_region_loss`."""

    regions: Float[Array, "b k d"]
    text: Float32[Array, "t d"]  # scaled
    proposed: Proposed
    table: Table
    captions: Captions
    image_mask: Bool[Array, " b"]


def _local_loss(
    axes: tuple[str, ...], settings: ContrastiveSettings, arrays: _Arrays
) -> tuple[Float32[Array, ""], dict[str, Float32[Array, ""]]]:
    """Returns (loss, metrics) of the global batch from one device's images, captions and table rows.

    1. number the distinct concepts; 2. score own images with all captions; 3. softmax over images and captions.
    """
    regions, region_mask, caption_mask = arrays.regions, arrays.proposed.mask, arrays.captions.mask
    num_proposals = jnp.sum(region_mask, axis=1)
    if settings.matching == "max_size" and (areas := arrays.proposed.areas) is not None:
        largest = jnp.argmax(jnp.where(region_mask, areas, -1.0), axis=1)
        regions = jnp.take_along_axis(regions, largest[:, None, None], axis=1)
        region_mask = jnp.any(region_mask, axis=1, keepdims=True)
        caption_mask = caption_mask & (jnp.arange(caption_mask.shape[1]) == 0)[None]

    unique = unique_rows(gather(arrays.table.canonical, axes), gather(arrays.table.mask, axes))
    own_slots = unique.slot[arrays.captions.concepts]
    captions_mask = gather(caption_mask, axes)
    weights = captions_mask / jnp.maximum(jnp.sum(captions_mask, axis=1, keepdims=True, dtype=jnp.float32), 1.0)
    how = Settings(axes, settings.matching, settings.matching_temperature, settings.chunk_bytes)
    scores, chosen, votes = caption_scores(
        how, regions, arrays.text, region_mask, unique, gather(own_slots, axes), weights
    )  # [B, b]: captions of all devices, images of this one

    valid = arrays.image_mask & jnp.any(region_mask, axis=1) & jnp.any(caption_mask, axis=1)
    side_scores = None
    if settings.side != "text_to_image":
        rows = gather(unique.order[own_slots], axes)
        side_scores = image_scores(
            axes, regions, arrays.text, region_mask, rows, captions_mask, chunk_bytes=settings.chunk_bytes
        )
    loss, metrics = _info_nce(scores, side_scores, valid, axes, settings=settings)
    own_chosen = chosen[own_slots, jnp.arange(own_slots.shape[0])[:, None]]
    hits = _num_chosen(own_chosen, votes, own_slots, caption_mask)
    num_valid = jnp.maximum(total(valid, axes), 1.0)
    for name, num_hits in zip(("chosen_by_own", "chosen_by_others"), hits, strict=True):
        share = num_hits / jnp.maximum(num_proposals, 1)
        metrics[name] = total(jnp.where(valid, share, 0.0), axes) / num_valid
    return loss, metrics


def _info_nce(
    scores: Float32[Array, "B b"],
    side_scores: Float32[Array, "B b"] | None,
    valid: Bool[Array, " b"],
    axes: tuple[str, ...],
    *,
    settings: ContrastiveSettings,
) -> tuple[Float32[Array, ""], dict[str, Float32[Array, ""]]]:
    """Returns (loss, metrics) from the scores of all captions with this device's images; only [B] vectors are sent.

    `side_scores` are those from the images' side, which classify images over captions.
    """
    b = valid.shape[0]
    first = jax.lax.axis_index(axes) * b if axes else 0  # this device's first row among all captions
    own_rows = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=first, slice_size=b)
    pairs = gather(valid, axes)[:, None] & valid[None]
    num_valid = jnp.maximum(total(valid, axes), 1.0)

    def scaled(scores: Array) -> tuple[Array, Array]:  # and of the pairs themselves
        logits = jnp.where(pairs, scores / settings.temperature, LOW)
        return logits, jnp.diagonal(own_rows(logits))

    def over_images(logits: Array) -> Array:  # for this device's captions
        peak = jax.lax.stop_gradient(jnp.max(logits, axis=1))
        peak = jax.lax.pmax(peak, axes) if axes else peak
        sums = reduce_scatter(jnp.sum(jnp.exp(logits - peak[:, None]), axis=1), axes)
        return jnp.log(sums) + own_rows(peak)

    def over_captions(logits: Array) -> Array:  # for this device's images
        return jax.nn.logsumexp(logits, axis=0)

    def cross_entropy(normalizer: Array, logits: Array, own: Array) -> Array:
        likelihood = normalizer - (1.0 - settings.label_smoothing) * own
        smoothing = jnp.where(pairs, logits, 0.0) * (settings.label_smoothing / num_valid)
        return (total(jnp.where(valid, likelihood, 0.0), axes) - total(smoothing, axes)) / num_valid

    logits, own = scaled(scores)
    losses = []
    if settings.side != "image_to_text":
        losses.append(cross_entropy(over_images(logits), logits, own))
    if side_scores is not None:
        side_logits, side_own = scaled(side_scores)
        losses.append(cross_entropy(over_captions(side_logits), side_logits, side_own))
    loss = losses[0] if len(losses) == 1 else 0.5 * (losses[0] + losses[1])

    logits, own = jax.lax.stop_gradient((logits, own))
    rank = reduce_scatter(jnp.sum(logits >= gather(own, axes)[:, None], axis=1, dtype=jnp.float32), axes)
    means = {"accuracy": rank == 1.0, "rank": rank, "similarity": own * settings.temperature}
    return loss, {name: total(jnp.where(valid, x, 0.0), axes) / num_valid for name, x in means.items()}


def _num_chosen(
    chosen: Int32[Array, "b m"], votes: Int32[Array, "b k"], slots: Int32[Array, "b m"], mask: Bool[Array, "b m"]
) -> tuple[Int32[Array, " b"], Int32[Array, " b"]]:
    """Returns how many proposals of each image are the best of a concept (of its own caption, of any other concept).

    `chosen` are the choices of the image's caption, whose concepts are `slots`; `votes` counts those of all concepts.
    """
    m, k = slots.shape[1], votes.shape[1]
    earlier = (jnp.arange(m)[:, None] > jnp.arange(m)[None])[None] & mask[:, None, :]
    repeated = jnp.any((slots[:, :, None] == slots[:, None, :]) & earlier, axis=2)
    is_choice = (chosen[:, :, None] == jnp.arange(k)[None, None]) & (mask & ~repeated)[:, :, None]
    own_votes = jnp.sum(is_choice, axis=1, dtype=votes.dtype)
    return jnp.sum(own_votes > 0, axis=1), jnp.sum(votes > own_votes, axis=1)
