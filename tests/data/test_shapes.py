"""Outlines of the drawn shapes: how far each reaches, and how much of its square each colour fills."""

import numpy as np
import pytest
from PIL import Image, ImageDraw

from detclipv2_jax.data import shapes

# x1, y1, x2, y2 and centre x, y, in half sides from the middle; shares of the square: body, dark, light
FILLED = {
    "circle": (-0.89, -0.9, 0.9, 0.9, -0.0, -0.0, 0.631, 0.0, 0.0),
    "square": (-0.8, -0.8, 0.8, 0.8, 0.0, 0.0, 0.642, 0.0, 0.0),
    "triangle": (-0.95, -0.95, 0.95, 0.75, 0.0, 0.18, 0.405, 0.0, 0.0),
    "star": (-0.95, -1.0, 0.95, 0.81, -0.0, -0.0, 0.309, 0.0, 0.0),
    "cross": (-0.95, -0.95, 0.95, 0.95, 0.0, 0.0, 0.482, 0.0, 0.0),
    "arrow": (-0.95, -0.75, 0.98, 0.75, 0.01, 0.0, 0.313, 0.0, 0.0),
    "house": (-0.98, -0.95, 0.98, 0.95, 0.0, 0.13, 0.281, 0.27, 0.027),
    "tree": (-0.8, -0.95, 0.8, 0.98, 0.0, 0.1, 0.29, 0.031, 0.0),
    "fish": (-0.98, -0.55, 0.98, 0.55, -0.04, -0.0, 0.319, 0.017, 0.011),
    "cup": (-0.85, -0.84, 0.93, 0.8, -0.08, -0.05, 0.46, 0.074, 0.0),
    "flag": (-0.86, -0.97, 0.92, 0.98, -0.05, -0.3, 0.38, 0.088, 0.0),
    "car": (-0.98, -0.5, 0.98, 0.67, 0.01, 0.1, 0.227, 0.082, 0.073),
    "umbrella": (-0.96, -0.92, 0.96, 0.98, 0.01, -0.33, 0.294, 0.043, 0.0),
    "ladder": (-0.55, -0.95, 0.55, 0.95, 0.0, -0.01, 0.298, 0.0, 0.0),
    "bell": (-0.9, -0.96, 0.9, 0.89, -0.0, 0.02, 0.396, 0.031, 0.0),
    "butterfly": (-0.96, -0.98, 0.96, 0.85, -0.0, -0.08, 0.553, 0.077, 0.0),
    "heart": (-0.94, -0.7, 0.94, 0.99, -0.0, -0.05, 0.486, 0.0, 0.0),
    "key": (-0.98, -0.46, 0.98, 0.5, -0.06, 0.04, 0.222, 0.0, 0.0),
    "moon": (-0.94, -0.95, 0.74, 0.95, -0.38, 0.11, 0.316, 0.0, 0.0),
    "boat": (-0.95, -0.95, 0.95, 0.85, 0.03, 0.19, 0.282, 0.038, 0.095),
    "mushroom": (-0.95, -0.85, 0.95, 0.9, -0.0, -0.08, 0.293, 0.0, 0.196),
    "crown": (-1.0, -0.94, 1.0, 0.7, -0.0, 0.12, 0.423, 0.0, 0.034),
    "flower": (-0.96, -0.86, 0.96, 0.86, -0.0, -0.0, 0.461, 0.0, 0.07),
    "hammer": (-0.62, -0.9, 0.98, 0.98, 0.07, -0.35, 0.186, 0.082, 0.0),
}


def painted(shape):
    """Returns the palette entries [1000, 1000] of a shape, painted by Pillow."""
    image = Image.new("L", (1000, 1000))
    for entry, polygon in shapes.outlines()[shape]:
        ImageDraw.Draw(image).polygon([tuple(point) for point in 500 + 500 * polygon], fill=entry)
    return np.asarray(image)


def test_every_shape_has_its_outline():
    assert [*shapes.BASE_SHAPES, *shapes.NOVEL_SHAPES] == [*FILLED] == [*shapes.outlines()]


@pytest.mark.parametrize("shape", FILLED)
def test_outlines(shape):
    *expected, body, dark, light = FILLED[shape]
    entries = painted(shape)
    columns, rows = (np.flatnonzero(entries.any(axis=axis)) for axis in (0, 1))
    centre = [places.mean() for places in entries.nonzero()[::-1]]
    found = (np.array([columns[0], rows[0], columns[-1], rows[-1], *centre]) - 500) / 500
    np.testing.assert_allclose(found, expected, atol=0.008)
    shares = [(entries == entry).mean() for entry in (shapes.BODY, shapes.DARK, shapes.LIGHT)]
    np.testing.assert_allclose(shares, [body, dark, light], atol=0.0015)
    assert set(np.unique(entries)) <= {0, shapes.BODY, shapes.DARK, shapes.LIGHT}
