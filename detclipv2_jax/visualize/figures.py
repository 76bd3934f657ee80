"""Figures: detections on a photo, a training batch, word-region alignment; they do not load matplotlib's charts.

Every function takes arrays, returns the picture as uint8[h, w, 3] and writes it to `path` if one is given. A name has
one colour in all pictures; every box also carries its word, since some colours are alike.
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from detclipv2_jax import labels as labels_lib
from detclipv2_jax.colors import color_of
from detclipv2_jax.data import tokenizer
from detclipv2_jax.data.schema import Batch, Kind
from detclipv2_jax.visualize import drawing


def detections(
    image: drawing.Picture,
    boxes: Float[np.ndarray, "n 4"],
    labels: Int[np.ndarray, " n"],
    names: Sequence[str],
    *,
    scores: Float[np.ndarray, " n"] | None = None,
    min_score: float = 0.0,
    max_drawn: int = 20,
    max_iou: float = 0.5,
    truth: tuple[Float[np.ndarray, "m 4"], Int[np.ndarray, " m"]] | None = None,
    title: str = "",
    path: str | pathlib.Path | None = None,
) -> drawing.Picture:
    """Returns the photo with its boxes, each with word and score, and a legend of colours.

    Args:
      boxes: xyxy in its pixels, best first if they have scores.
      min_score: boxes below are not drawn, unless all are: then the best few are, and the heading says so.
      max_iou: with scores, a box that overlaps a better drawn one by more, of whatever word, is not drawn: a place is
        shown once, with its best word. 1.0 draws them all.
      truth: annotated boxes and labels, drawn on a second copy of the photo at the left.
    """
    shown = np.arange(len(boxes))[:max_drawn]
    if scores is not None:
        shown = labels_lib.best_places(boxes, scores, min_score=min_score, max_drawn=max_drawn, max_iou=max_iou)
    present = np.concatenate([labels[shown]] + ([] if truth is None else [truth[1]])).astype(int)
    colors = {label: color_of(names[label]) for label in dict.fromkeys(present.tolist())}
    note = _count_note(num_shown=len(shown), num_boxes=len(boxes), scores=scores, min_score=min_score)

    def panel(boxes: np.ndarray, labels: np.ndarray, scores: np.ndarray | None, heading: str) -> drawing.Picture:
        texts = [
            names[label] if scores is None else f"{names[label]} {scores[i]:.2f}" for i, label in enumerate(labels)
        ]
        photo = drawing.photo(image, boxes, texts, [colors[label] for label in labels])
        return drawing.stack([drawing.text_block(heading, width=photo.shape[1], size=15), photo]) if heading else photo

    found = panel(boxes[shown], labels[shown], None if scores is None else np.asarray(scores)[shown], note)
    panels = [found] if truth is None else [panel(*truth, None, f"annotated: {len(truth[0])}"), found]
    body = drawing.grid(panels, columns=len(panels))
    counts = {label: int(np.sum(labels[shown] == label)) for label in colors}
    entries = [(colors[label], f"{names[label]}" + (f" × {n}" if n > 1 else "")) for label, n in counts.items()]
    parts = [drawing.text_block(title, width=body.shape[1], size=18, bold=True)] if title else []
    parts += [body] + ([drawing.legend(entries, width=body.shape[1])] if entries else [])
    return drawing.save(drawing.frame(drawing.stack(parts)), path)


def training_batch(
    batch: Batch, *, kind: Kind, max_images: int = 8, path: str | pathlib.Path | None = None
) -> drawing.Picture:
    """Returns a contact sheet of what a step is trained on.

    Every canvas is shown whole: the photo, its padding hatched, its boxes with their concepts, or for image-text
    pairs the caption and its phrases below. The last lines list the concepts of the table that belong to no image.
    Texts are decoded from the tokens: what is shown is what the text tower gets.
    """
    texts = tokenizer.decode(batch.concept_tokens)
    _, height, width, _ = batch.image.shape
    shown_width = 460 if width >= height else 320
    cells = []
    for i in range(min(max_images, len(batch.image))):
        rows = batch.box_concepts[i][batch.box_mask[i]]
        photo = drawing.photo(
            drawing.hatch_padding(batch.image[i], batch.extent[i]),
            batch.boxes[i][batch.box_mask[i]],
            [texts[row] for row in rows],
            [color_of(texts[row]) for row in rows],
            long_side=max(shown_width, round(shown_width * height / width)),
        )
        size, extent = ("×".join(map(str, sides)) for sides in (batch.original_size[i], batch.extent[i]))
        lines = [f"example {batch.example_id[i]}: {size} px as {extent}"]
        if kind == Kind.IMAGE_TEXT:
            caption, *phrases = (texts[row] for row in batch.caption_concepts[i][batch.caption_mask[i]])
            lines += [f"“{caption}”", *(f"· {phrase}" for phrase in phrases)]
        else:
            lines.append(f"{len(rows)} boxes, {len(set(rows.tolist()))} concepts")
        cells.append(drawing.stack([photo, drawing.text_block("\n".join(lines), width=photo.shape[1], size=13)]))
    body = drawing.grid(cells, columns=max(1, 1440 // shown_width))

    used = np.union1d(batch.box_concepts[batch.box_mask], batch.caption_concepts[batch.caption_mask])
    others = [texts[row] for row in np.setdiff1d(np.flatnonzero(batch.concept_mask), used)]
    footer = f"{int(batch.concept_mask.sum())} concepts in the table: {len(used)} of images, {len(others)} negatives"
    footer += f"\nnegatives: {' | '.join(others[:60])}{' | …' if len(others) > 60 else ''}" if others else ""
    title = f"{kind.value}: {len(cells)} of {len(batch.image)} images on {height}×{width} canvases (hatched: padding)"
    masks = {"images": batch.image_mask, "boxes": batch.box_mask, "concepts": batch.concept_mask}
    masks["captions and phrases"] = batch.caption_mask
    filled = [f"{mask.sum()} of {mask.size} {name}" for name, mask in masks.items() if mask.size]
    title += f"; of the padded arrays hold data: {', '.join(filled)}"
    top = drawing.text_block(title, width=body.shape[1], size=18, bold=True)
    bottom = drawing.text_block(footer, width=body.shape[1], size=13, color=drawing.PALE)
    return drawing.save(drawing.frame(drawing.stack([top, body, bottom])), path)


def alignment(
    image: drawing.Picture,
    phrases: Sequence[str],
    boxes: Float[np.ndarray, "m 4"],
    *,
    scores: Float[np.ndarray, " m"],
    ranks: Int[np.ndarray, " m"],
    num_images: int,
    maps: Float[np.ndarray, "m h w"],
    caption: str = "",
    title: str = "",
    path: str | pathlib.Path | None = None,
) -> drawing.Picture:
    """Returns the paper's Figure 1 for one photo: the best region of every phrase, and where each phrase is similar.

    `alignment.draw` makes it from a checkpoint, images and phrases; `Predictor.align` computes the arrays.

    Args:
      scores: similarity of phrase and best region, the contrastive loss's s.
      ranks: place of this photo in a batch ordered by best score for the phrase, from 1.
      maps: similarity over the photo (any resolution; it is stretched over the whole photo).
    """
    height, width, _ = image.shape
    shown_width = 440 if width >= height else 320
    long_side = max(shown_width, round(shown_width * height / width))
    colors = [color_of(phrase) for phrase in phrases]
    low, high = float(np.min(maps)), float(np.max(maps))
    numbered = [f"{i} {phrase}" for i, phrase in enumerate(phrases, start=1)]

    def cell(heading: str, picture: drawing.Picture) -> drawing.Picture:
        return drawing.stack([drawing.text_block(heading, width=picture.shape[1], size=14), picture])

    cells = [cell("best region of every phrase", drawing.photo(image, boxes, numbered, colors, long_side=long_side))]
    for i, name in enumerate(numbered):
        heading = f"{name}\nscore {scores[i]:.2f}" + (f", rank {ranks[i]} of {num_images}" if num_images > 1 else "")
        heat = drawing.heat(image, maps[i], low=low, high=high)
        cells.append(cell(heading, drawing.photo(heat, boxes[i : i + 1], [""], [colors[i]], long_side=long_side)))
    body = drawing.grid(cells, columns=max(1, 1440 // shown_width), bottom=True)
    headings = [(title, False), (f"“{caption}”" if caption else "", True)]
    parts = [drawing.text_block(text, width=body.shape[1], size=18, bold=bold) for text, bold in headings if text]
    scale = "similarity of phrase and place, one scale for all maps"
    bar = drawing.color_bar(low=low, high=high, title=scale, width=min(body.shape[1], 440))
    footer = "score: similarity of the phrase and its best region"
    footer += f"; rank: place of the photo among {num_images}, 1 is best" if num_images > 1 else ""
    parts += [body, bar, drawing.text_block(footer, width=body.shape[1], size=13, color=drawing.PALE)]
    return drawing.save(drawing.frame(drawing.stack(parts)), path)


def _count_note(*, num_shown: int, num_boxes: int, scores: np.ndarray | None, min_score: float) -> str:
    if scores is None:
        return ""
    if num_boxes == 0:
        return "nothing found"
    if np.max(scores) < min_score:
        return f"nothing scored {min_score:.2f} or more; the best {num_shown} of {num_boxes}"
    return f"found: the best {num_shown} of {num_boxes}" if num_shown < num_boxes else f"found: {num_boxes}"
