"""The losses with one keyword for every array and every setting, as tests vary them."""

import dataclasses

from detclipv2_jax.losses import alignment, contrastive, proposals
from detclipv2_jax.losses.concept_table import Captions, Concepts, Table
from detclipv2_jax.models.detclip import Regions


def _settings(kind, values):
    """Takes the fields of a dataclass of settings out of `values` and returns it."""
    return kind(**{field.name: values.pop(field.name) for field in dataclasses.fields(kind)})


def alignment_loss(embeddings, text, *, scale, bias, concept_mask, anchor_mask, labels, positive, **settings):
    return alignment.alignment_loss(
        embeddings,
        Concepts(text, scale, bias),
        concept_mask=concept_mask,
        targets=alignment.AnchorTargets(anchor_mask, positive, labels[..., None], settings.pop("verified", None)),
        settings=alignment.FocalSettings(**settings),
    )


def select_proposals(embeddings, boxes, text, scale, bias, *, centerness, objectness, anchor_mask, **rest):
    settings = _settings(proposals.SelectionSettings, rest)
    return proposals.select_proposals(
        Regions(embeddings, None, centerness, objectness),
        boxes,
        Concepts(text, scale, bias),
        anchor_mask=anchor_mask,
        table=Table(rest["concept_mask"], rest["canonical"]),
        captions=Captions(rest["caption_concepts"], rest["caption_mask"]),
        batch_captions=Captions(rest["batch_concepts"], rest["batch_concepts_mask"]),
        settings=settings,
    )


def word_region_loss(regions, text, scale, *, region_mask, region_areas, **rest):
    settings = _settings(contrastive.ContrastiveSettings, rest)
    return contrastive.word_region_loss(
        regions,
        text,
        scale,
        proposed=contrastive.Proposed(region_mask, region_areas),
        table=Table(rest["concept_mask"], rest["canonical"]),
        captions=Captions(rest["caption_concepts"], rest["caption_mask"]),
        image_mask=rest["image_mask"],
        settings=settings,
    )
