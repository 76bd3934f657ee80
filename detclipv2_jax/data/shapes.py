"""Outlines of the drawn shapes of the generated world."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

BASE_SHAPES = (
    *("circle", "square", "triangle", "star", "cross", "arrow", "house", "tree"),
    *("fish", "cup", "flag", "car", "umbrella", "ladder", "bell", "butterfly"),
)
NOVEL_SHAPES = ("heart", "key", "moon", "boat", "mushroom", "crown", "flower", "hammer")
BODY, BODY_ALTERNATE, DARK, LIGHT = 1, 2, 3, 4  # palette entries; 0 is transparent
Outline = list[tuple[int, np.ndarray]]  # (palette entry, polygon) in painting order; x right, y down, within [-1, 1]


def _ellipse(x: float, y: float, rx: float, ry: float, start: float = 0, end: float = 360) -> np.ndarray:
    """Returns points of an arc; 0 degrees is right, 90 down."""
    t = np.radians(np.linspace(start, end, 28))
    return np.stack([x + rx * np.cos(t), y + ry * np.sin(t)], axis=1)


def _box(left: float, top: float, right: float, bottom: float) -> np.ndarray:
    return np.array([(left, top), (right, top), (right, bottom), (left, bottom)])


def _petals(num: int, distance: float, rx: float, ry: float) -> list[np.ndarray]:
    """Returns ellipses around the centre, their first axis pointing outwards."""
    petals = []
    for angle in 2 * np.pi * np.arange(num) / num:
        rotation = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
        petals.append(_ellipse(distance, 0, rx, ry) @ rotation)
    return petals


def _parts(entry: int, polygons: Sequence[ArrayLike]) -> Outline:
    return [(entry, np.asarray(polygon, float)) for polygon in polygons]


def _body(*polygons: ArrayLike) -> Outline:
    return _parts(BODY, polygons)


def _dark(*polygons: ArrayLike) -> Outline:
    return _parts(DARK, polygons)


def _light(*polygons: ArrayLike) -> Outline:
    return _parts(LIGHT, polygons)


def _hole(*polygons: ArrayLike) -> Outline:
    return _parts(0, polygons)


@functools.cache
def outlines() -> dict[str, Outline]:
    """Returns the outline of each shape."""
    return _of_base_shapes() | _of_novel_shapes()


def _of_base_shapes() -> dict[str, Outline]:
    spokes = np.pi * np.arange(10) / 5 - np.pi / 2
    star = np.stack([np.cos(spokes), np.sin(spokes)], 1) * np.where(np.arange(10) % 2, 0.42, 1.0)[:, None]
    wave = np.linspace(0, 1, 12)
    top = np.stack([-0.68 + 1.6 * wave, -0.85 + 0.12 * np.sin(6 * wave)], 1)
    flag = np.concatenate([top, top[::-1] + np.array([[0.0, 0.95]])])
    bell = [(-0.9, 0.6), (-0.65, 0.35), (-0.55, -0.3), (-0.35, -0.7), (0.0, -0.85)]
    scallops = [_ellipse(x, 0.0, 0.32, 0.14) for x in (-0.64, 0.0, 0.64)]
    return {
        "circle": _body(_ellipse(0, 0, 0.9, 0.9)),
        "square": _body(_box(-0.8, -0.8, 0.8, 0.8)),
        "triangle": _body([(0, -0.95), (0.95, 0.75), (-0.95, 0.75)]),
        "star": _body(star),
        "cross": _body(_box(-0.3, -0.95, 0.3, 0.95), _box(-0.95, -0.3, 0.95, 0.3)),
        "arrow": _body(
            [(-0.95, -0.28), (0.1, -0.28), (0.1, -0.75), (0.98, 0), (0.1, 0.75), (0.1, 0.28), (-0.95, 0.28)]
        ),
        "house": _body(_box(-0.7, -0.15, 0.7, 0.95))
        + _dark([(-0.98, -0.1), (0, -0.95), (0.98, -0.1)], _box(-0.05, 0.35, 0.35, 0.95))
        + _light(_box(-0.5, 0.15, -0.2, 0.5)),
        "tree": _dark(_box(-0.16, 0.5, 0.16, 0.98))
        + _body(*([(0, y - 0.65), (w, y), (-w, y)] for y, w in ((0.6, 0.8), (0.2, 0.65), (-0.3, 0.48)))),
        "fish": _body([(0.4, 0), (0.98, -0.55), (0.85, 0), (0.98, 0.55)], _ellipse(-0.2, 0, 0.78, 0.48))
        + _dark([(-0.25, -0.1), (0.1, 0.05), (-0.25, 0.2)])
        + _light(_ellipse(-0.62, -0.12, 0.14, 0.14))
        + _dark(_ellipse(-0.64, -0.12, 0.07, 0.07)),
        "cup": _body(_ellipse(0.45, -0.05, 0.48, 0.42))
        + _hole(_ellipse(0.45, -0.05, 0.27, 0.23))
        + _body([(-0.85, -0.7), (0.5, -0.7), (0.32, 0.8), (-0.67, 0.8)])
        + _dark(_ellipse(-0.175, -0.7, 0.675, 0.14)),
        "flag": _body(flag) + _dark(_box(-0.86, -0.95, -0.68, 0.98)),
        "car": _body([(-0.62, 0.02), (-0.35, -0.5), (0.4, -0.5), (0.68, 0.02)], _box(-0.98, 0.0, 0.98, 0.42))
        + _light([(-0.42, 0.0), (-0.24, -0.36), (0.0, -0.36), (0.0, 0.0)])
        + _light([(0.1, 0.0), (0.1, -0.36), (0.32, -0.36), (0.48, 0.0)])
        + _dark(_ellipse(-0.52, 0.42, 0.25, 0.25), _ellipse(0.52, 0.42, 0.25, 0.25))
        + _light(_ellipse(-0.52, 0.42, 0.1, 0.1), _ellipse(0.52, 0.42, 0.1, 0.1)),
        "umbrella": _body(_ellipse(0, 0.0, 0.96, 0.92, 180, 360))
        + _hole(*scallops)
        + _dark(_box(-0.06, -0.1, 0.06, 0.8), _ellipse(0.18, 0.78, 0.24, 0.2, 0, 180))
        + _hole(_ellipse(0.18, 0.76, 0.12, 0.09, 0, 180)),
        "ladder": _body(_box(-0.55, -0.95, -0.35, 0.95), _box(0.35, -0.95, 0.55, 0.95))
        + _body(*(_box(-0.4, y, 0.4, y + 0.15) for y in (-0.75, -0.32, 0.11, 0.54))),
        "bell": _dark(_ellipse(0, 0.65, 0.2, 0.24), _ellipse(0, -0.82, 0.14, 0.14))
        + _body([*bell, *((-x, y) for x, y in bell[::-1])]),
        "butterfly": _body(*(_ellipse(s * 0.5, -0.38, 0.46, 0.5) for s in (-1, 1)))
        + _body(*(_ellipse(s * 0.4, 0.45, 0.34, 0.4) for s in (-1, 1)))
        + _dark(_ellipse(0, 0.05, 0.11, 0.72))
        + _dark(*([(0, -0.55), (s * 0.32, -0.98), (s * 0.4, -0.9)] for s in (-1, 1))),
    }


def _of_novel_shapes() -> dict[str, Outline]:
    t = np.linspace(0, 2 * np.pi, 40)
    heart = np.stack(
        [16 * np.sin(t) ** 3, -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))], 1
    )
    return {
        "heart": _body(heart / 17.0),
        "key": _body(_ellipse(-0.52, 0, 0.46, 0.46), _box(-0.15, -0.12, 0.98, 0.12))
        + _hole(_ellipse(-0.52, 0, 0.22, 0.22))
        + _body(_box(0.78, 0, 0.98, 0.5), _box(0.45, 0, 0.63, 0.38)),
        "moon": _body(_ellipse(0, 0, 0.95, 0.95)) + _hole(_ellipse(0.42, -0.12, 0.78, 0.78)),
        "boat": _body([(-0.95, 0.3), (0.95, 0.3), (0.6, 0.85), (-0.6, 0.85)])
        + _dark(_box(-0.06, -0.95, 0.06, 0.3))
        + _light([(0.1, -0.9), (0.8, 0.18), (0.1, 0.18)])
        + _body([(-0.1, -0.75), (-0.1, 0.18), (-0.68, 0.18)]),
        "mushroom": _light([(-0.28, 0.0), (0.28, 0.0), (0.38, 0.9), (-0.38, 0.9)])
        + _body(_ellipse(0, 0.1, 0.95, 0.95, 180, 360))
        + _light(*(_ellipse(x, y, r, r) for x, y, r in ((-0.48, -0.25, 0.16), (0.05, -0.5, 0.18), (0.5, -0.18, 0.14)))),
        "crown": _body(
            [(-0.8, 0.7), (-0.95, -0.5), (-0.45, 0.05), (0, -0.75), (0.45, 0.05), (0.95, -0.5), (0.8, 0.7)],
            *(_ellipse(x, y, 0.12, 0.12) for x, y in ((-0.88, -0.55), (0, -0.82), (0.88, -0.55))),
        )
        + _light(*(_ellipse(x, 0.42, 0.12, 0.12) for x in (-0.4, 0.0, 0.4))),
        "flower": _body(*_petals(6, 0.58, 0.38, 0.28)) + _light(_ellipse(0, 0, 0.3, 0.3)),
        "hammer": _dark(_box(-0.12, -0.5, 0.12, 0.98))
        + _body(_box(-0.62, -0.9, 0.5, -0.38), [(0.5, -0.8), (0.9, -0.8), (0.98, -0.4), (0.5, -0.48)]),
    }
