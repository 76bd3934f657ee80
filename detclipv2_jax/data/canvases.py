"""Which canvas a photo is put on, and the sizes in which batches have it.

Photos of about one shape share a canvas, and so a stream. With `config.*.num_scales` a canvas has several sizes; each
batch is on one of them, which its photos fill, so that nothing is padded but the difference of shapes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from absl import logging

from detclipv2_jax.data import transforms
from detclipv2_jax.data.batches import pixels_of
from detclipv2_jax.data.schema import UnusableError
from detclipv2_jax.data.sources import Source

Canvas = tuple[int, int]  # (height, width) px
STRIDE = 32  # of the backbone


def sizes(canvas: Canvas, *, short_side: tuple[int, int], num_scales: int) -> tuple[Canvas, ...]:
    """Returns the sizes of a canvas, the largest first, evenly over the range of the short side; with 0 scales itself.

    Sides are multiples of the backbone's stride.
    """
    if not num_scales:
        return ((canvas[0], canvas[1]),)
    factors = np.linspace(1.0, short_side[0] / short_side[1], num_scales).tolist()
    return tuple((_rounded(canvas[0] * factor), _rounded(canvas[1] * factor)) for factor in factors)


def _rounded(side: float) -> int:
    return max(round(side / STRIDE), 1) * STRIDE


def assign(sources: Sequence[Source], canvases: Sequence[Canvas]) -> list[np.ndarray]:
    """Returns for each canvas the positions, in the concatenated sources, of the images that belong on it.

    That is where an image is largest; where it is as large on several, the smallest of them, or else the first.
    """
    if len(canvases) == 1:
        return [np.arange(sum(map(len, sources)), dtype=np.int32)]
    for source in sources:
        fill_sizes(source)
    images = np.maximum(np.concatenate([source.sizes for source in sources]), 1)
    fits = np.stack([(np.array(canvas)[None] / images).min(axis=1) for canvas in canvases])
    areas = np.broadcast_to(np.prod(canvases, axis=1)[:, None], fits.shape)
    best = np.lexsort((areas, -fits), axis=0)[0]
    return [np.flatnonzero(best == i).astype(np.int32) for i in range(len(canvases))]


def fill_sizes(source: Source) -> None:
    """Reads the sizes that a source does not know from the headers of its images."""
    unknown = np.flatnonzero((source.sizes == 0).any(axis=1))
    if len(unknown):
        logging.info("%s: reading the sizes of %d images, by which they find their canvas", source.name, len(unknown))
    for index in unknown.tolist():
        try:
            pixels = pixels_of(source[index])
            if isinstance(pixels, bytes):
                source.sizes[index] = transforms.read_header(pixels).displayed_size
            else:
                source.sizes[index] = pixels.shape[:2]
        except (UnusableError, OSError):
            continue  # it is reported when it is read
