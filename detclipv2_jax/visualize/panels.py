"""Pictures with marks over a photo, drawn by matplotlib: targets of the detector, samples of the deformable layer."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from detclipv2_jax.colors import hex_color, nth_color
from detclipv2_jax.data import tokenizer
from detclipv2_jax.data.schema import Batch
from detclipv2_jax.geometry import anchors, atss
from detclipv2_jax.visualize import charts, drawing


def targets(
    batch: Batch, *, top_k: int = 9, max_images: int = 4, path: str | pathlib.Path | None = None
) -> drawing.Picture:
    """Returns what the detector is asked to find: each box, and in its colour the anchors that ATSS gives it."""
    texts = tokenizer.decode(batch.concept_tokens)
    num_images, (height, width) = min(max_images, len(batch.image)), batch.image.shape[1:3]
    grid = anchors.grid((height, width))
    strides = np.repeat(anchors.STRIDES, grid.levels)
    centers = (grid.boxes[:, :2] + grid.boxes[:, 2:]) / 2
    figure, panels = _panels(num_images, height / width)
    for i, axes in enumerate(panels):
        mask = batch.box_mask[i]
        found = atss.assign(grid.boxes, grid.levels, batch.boxes[i], mask, top_k=top_k)
        positive, box_of = np.asarray(found.positive), np.asarray(found.box_index)
        axes.imshow(drawing.hatch_padding(batch.image[i], batch.extent[i]), extent=(0, width, height, 0))
        for n in np.flatnonzero(mask):
            matched, color = positive & (box_of == n), hex_color(nth_color(int(n)))
            _outline(axes, batch.boxes[i, n], color, f"{texts[batch.box_concepts[i, n]]}: {matched.sum()}")
            axes.scatter(*centers[matched].T, s=3 * strides[matched], color=color, edgecolors="white", linewidths=0.8)
        axes.set_title(f"{mask.sum()} boxes, {positive.sum()} of {len(positive)} anchors", fontsize=11)
    note = "dot: centre of an anchor that learns the box of its colour; larger: coarser level; number: anchors of a box"
    figure.supxlabel(note, fontsize=10)
    return charts.render(figure, path)


def sampling(
    image: drawing.Picture,
    phrases: Sequence[str],
    boxes: Float[np.ndarray, "m 4"],
    *,
    regular: Float[np.ndarray, "m 9 2"],
    points: Float[np.ndarray, "m 9 2"],
    weights: Float[np.ndarray, "m 9"],
    strides: Float[np.ndarray, " m"],
    path: str | pathlib.Path | None = None,
) -> drawing.Picture:
    """Returns where the deformable layer samples for one region of every phrase; `regions.draw_sampling` makes it.

    Args:
      regular: (x, y) that a plain 3×3 convolution would sample, in pixels of the photo.
      points: (x, y) that are sampled.
      weights: of the samples, in [0, 1].
      strides: of the regions' levels, in pixels of the canvas.
    """
    height, width, _ = image.shape
    figure, panels = _panels(len(phrases), height / width)
    for i, (axes, phrase) in enumerate(zip(panels, phrases, strict=True)):
        color = hex_color(nth_color(i))
        axes.imshow(image, extent=(0, width, height, 0))
        _outline(axes, boxes[i], color, "")
        axes.plot(*np.stack([regular[i], points[i]]).transpose(2, 0, 1), color="white", linewidth=1.2)
        axes.scatter(*regular[i].T, s=16, marker="s", facecolors="none", edgecolors="white", linewidths=1.2)
        axes.scatter(*points[i].T, s=20 + 120 * weights[i], color=color, edgecolors="black", linewidths=0.8)
        axes.set_title(f"{phrase}\nlevel of stride {strides[i]:.0f} px", fontsize=11)
    note = "square: what a plain convolution would sample; dot: what the deformable layer samples, larger: more weight"
    figure.supxlabel(note, fontsize=10)
    return charts.render(figure, path)


def _panels(num: int, aspect: float) -> tuple[Figure, list[Any]]:
    """Returns a figure of `num` panels without axes, four in a row, each `aspect` times as high as it is wide."""
    columns = min(num, 4)
    rows = math.ceil(num / columns)
    figure = Figure(figsize=(4.2 * columns, (4.2 * aspect + 0.5) * rows + 0.6), dpi=100, layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in panels:
        axes.set_axis_off()
    return figure, panels[:num]


def _outline(axes: Axes, box: np.ndarray, color: str, text: str) -> None:
    x1, y1, x2, y2 = box
    for line, edge in ((4, "white"), (2, color)):  # a rim on any background
        axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=edge, linewidth=line))
    if text:
        face = {"facecolor": "white", "edgecolor": color, "pad": 1.5, "alpha": 0.85}
        axes.text(x1, y1, text, fontsize=9, verticalalignment="bottom", bbox=face, clip_on=True)
