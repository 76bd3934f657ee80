"""Pictures of word-region alignment (the paper's Figure 1): best regions of phrases, and where they are similar."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from detclipv2_jax.data import tokenizer, transforms
from detclipv2_jax.data.schema import Batch
from detclipv2_jax.inference import Detector, Predictor
from detclipv2_jax.visualize import drawing, figures


def draw(
    predictor: Predictor,
    images: Sequence[Any],
    phrases: Sequence[str],
    *,
    index: int = 0,
    caption: str = "",
    path: str | pathlib.Path | None = None,
) -> drawing.Picture:
    """Returns the picture of one photo's best regions: boxes, scores, ranks and similarity maps of its phrases."""
    found = predictor.align(images, phrases, index=index)
    photo = images[index] if isinstance(images[index], np.ndarray) else transforms.read(images[index]).pixels
    return figures.alignment(
        photo,
        phrases,
        np.asarray(found.boxes),
        scores=np.asarray(found.scores),
        ranks=np.asarray(found.ranks),
        num_images=len(images),
        maps=np.asarray(found.maps),
        caption=caption,
        title="" if isinstance(images[index], np.ndarray) else pathlib.Path(images[index]).name,
        path=path,
    )


def draw_batch(
    detector: Detector, params: Any, batch: Batch, *, num_pictures: int, folder: str | pathlib.Path, name: str
) -> None:
    """Draws the first photos of an image-text batch with the best region of each of their phrases.

    Ranks are among all images of the global batch. All processes take part; process 0 writes `<name>_<i>.jpg`.
    """
    num_pictures = min(num_pictures, len(batch.image))
    tokens = batch.concept_tokens[batch.caption_concepts[:num_pictures]]  # [p, m, l]
    if jax.process_count() > 1:  # all processes must ask for the same phrases
        tokens = np.asarray(multihost_utils.broadcast_one_to_all(tokens))
    phrases = detector.encode_tokens(params, tokens.reshape(-1, tokens.shape[-1]))
    phrases = phrases.reshape(*tokens.shape[:2], -1)
    photos = detector.to_global(batch)
    found = detector.align(params, photos, phrases, np.arange(num_pictures, dtype=np.int32))
    if jax.process_index() != 0:
        return
    found = jax.tree.map(np.asarray, found)
    for i in range(num_pictures):
        mask, (height, width) = batch.caption_mask[i], batch.extent[i]
        caption, *rest = tokenizer.decode(tokens[i][mask])
        aligned = jax.tree.map(lambda array, i=i, mask=mask: array[i][mask], found)
        figures.alignment(
            batch.image[i, :height, :width],
            ["the whole caption", *rest],
            aligned.boxes * batch.scale[i][[1, 0, 1, 0]],  # shown at canvas size
            scores=aligned.scores,
            ranks=aligned.ranks,
            num_images=photos.image.shape[0],
            maps=aligned.photo_maps(batch.extent[i]),
            caption=caption,
            title=f"example {batch.example_id[i]}",
            path=pathlib.Path(folder) / f"{name}_{i}.jpg",
        )
