"""Pictures of the generated world: coloured, textured shapes on natural-looking ground."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np
from jaxtyping import Float32, UInt8

from detclipv2_jax.data.shapes import BASE_SHAPES, BODY, BODY_ALTERNATE, DARK, NOVEL_SHAPES, outlines

COLORS = {
    "red": (214, 39, 40),
    "orange": (255, 140, 20),
    "yellow": (250, 220, 50),
    "green": (40, 160, 60),
    "blue": (40, 90, 220),
    "purple": (130, 60, 170),
    "pink": (255, 140, 190),
    "brown": (125, 75, 40),
    "black": (35, 35, 40),
    "white": (245, 245, 240),
}
TEXTURES = ("plain", "striped", "dotted", "checkered")
# ground: colours at the top and at the bottom, noise cells over the image (rows, columns), noise strength
_GROUNDS = {
    "grass": ((120, 150, 90), (80, 120, 60), (20, 64), 28),
    "sand": ((215, 195, 150), (190, 165, 120), (24, 24), 16),
    "water": ((110, 160, 185), (60, 110, 150), (48, 10), 22),
    "snow": ((225, 232, 240), (200, 208, 220), (8, 8), 12),
    "stone": ((150, 148, 145), (115, 113, 112), (28, 28), 24),
    "wood": ((165, 125, 85), (140, 100, 65), (56, 5), 22),
    "sky": ((140, 185, 225), (200, 220, 235), (5, 7), 22),
}
_SUPERSAMPLING = 2


class Thing(NamedTuple):
    """One object of a scene; lengths as shares of the image's side."""

    shape: str
    color: str
    texture: str
    center: tuple[float, float]  # (x, y)
    radius: float
    angle_degrees: float

    @property
    def name(self) -> str:
        """The category, like "red star"."""
        return f"{self.color} {self.shape}"

    @property
    def held_out(self) -> bool:
        """Whether training never shows this colour, shape and texture together."""
        return _held_out(self.shape, self.color, self.texture)


class Scene(NamedTuple):
    """A picture and what is in it."""

    image: UInt8[np.ndarray, "size size 3"]
    things: tuple[Thing, ...]
    boxes: Float32[np.ndarray, "n 4"]
    ground: str


def _held_out(shape: str, color: str, texture: str) -> bool:
    if shape in NOVEL_SHAPES:
        return False
    return (BASE_SHAPES.index(shape) + list(COLORS).index(color) + TEXTURES.index(texture)) % 8 == 0


@functools.cache
def _shades(color: str) -> UInt8[np.ndarray, "5 4"]:
    """Returns the RGBA palette of a colour: transparent, body, alternate of the texture, dark, light."""
    rgb = np.array(COLORS[color], float)
    light = rgb + 0.62 * (255 - rgb)
    is_light = rgb.mean() > 190
    alternate = rgb * 0.72 if is_light else rgb + 0.42 * (255 - rgb)
    rows = [np.zeros(3), rgb, alternate, rgb * 0.45, rgb * 0.8 if color == "white" else light]
    return np.concatenate([np.array(rows), [[0], [255], [255], [255], [255]]], axis=1).astype(np.uint8)


def _pattern(texture: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Returns where the texture shows its alternate colour; u, v are coordinates in the object's frame."""
    # the offset keeps coordinates positive, so that truncation rounds down
    columns = u * np.float32(3.2 if texture == "striped" else 2.6) + 8
    if texture == "striped":
        return columns.astype(np.uint8) & 1 == 0
    rows = v * np.float32(2.6) + 8
    if texture == "dotted":
        across, down = columns - columns.astype(np.uint8) - 0.5, rows - rows.astype(np.uint8) - 0.5
        return across * across + down * down < 0.09
    return (columns.astype(np.uint8) + rows.astype(np.uint8)) & 1 == 0


def _paint(image: np.ndarray, thing: Thing) -> Float32[np.ndarray, " 4"]:
    """Paints an object into a float32 image; returns its xyxy box, clipped to the image."""
    size_px = image.shape[0]
    center, radius = np.array(thing.center) * size_px, thing.radius * size_px
    low = np.maximum(np.floor(center - 1.45 * radius), 0).astype(int)
    high = np.minimum(np.ceil(center + 1.45 * radius), size_px).astype(int)
    width, height = (high - low) * _SUPERSAMPLING
    angle = np.radians(thing.angle_degrees)
    rotation = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    entries = np.zeros((height, width), np.uint8)
    fraction_bits = 4
    for entry, polygon in outlines()[thing.shape]:
        points = (polygon @ rotation * radius + center - low) * _SUPERSAMPLING - 0.5
        points = np.round(points * (1 << fraction_bits)).astype(np.int32)
        cv2.fillPoly(entries, [points], entry, shift=fraction_bits)
    ys, xs = np.flatnonzero(entries.any(axis=1)), np.flatnonzero(entries.any(axis=0))
    box = np.array([xs[0], ys[0], xs[-1] + 1, ys[-1] + 1], np.float32) / _SUPERSAMPLING + np.tile(low, 2)
    is_body = entries == BODY
    if thing.texture != "plain":
        x = (((np.arange(width) + 0.5) / _SUPERSAMPLING + low[0] - center[0]) / radius).astype(np.float32)[None, :]
        y = (((np.arange(height) + 0.5) / _SUPERSAMPLING + low[1] - center[1]) / radius).astype(np.float32)[:, None]
        cosine, sine = np.float32(np.cos(angle)), np.float32(np.sin(angle))
        u, v = x * cosine + y * sine, y * cosine - x * sine
        np.copyto(entries, BODY_ALTERNATE, where=is_body & _pattern(thing.texture, u, v))
    # a dark rim keeps a shape visible on ground of its own colour
    inside = cv2.erode(entries, np.ones((3, 3), np.uint8)) > 0
    np.copyto(entries, DARK, where=(entries > 0) & ~inside)
    pixels = _shades(thing.color).view(np.uint32)[:, 0][entries]  # one gather of four bytes a pixel
    colored = pixels.view(np.uint8).reshape(height, width, 4)
    patch = cv2.resize(colored, tuple(high - low), interpolation=cv2.INTER_AREA)
    view = image[low[1] : high[1], low[0] : high[0]]
    view *= 1.0 - patch[..., 3:].astype(np.float32) / 255.0
    view += cv2.cvtColor(patch, cv2.COLOR_RGBA2RGB)
    return box.astype(np.float32)


@functools.cache
def _plain_ground(name: str, size_px: int) -> np.ndarray:
    top, bottom = _GROUNDS[name][:2]
    ramp = np.linspace(0, 1, size_px, dtype=np.float32)[:, None, None]
    return np.repeat(np.array(top, np.float32) * (1 - ramp) + np.array(bottom, np.float32) * ramp, size_px, axis=1)


def _ground(rng: np.random.Generator, name: str, size_px: int) -> np.ndarray:
    *_, cells, strength = _GROUNDS[name]
    image = _plain_ground(name, size_px).copy()
    for rows, columns in (cells, (5, 5)):
        noise = rng.normal(0, strength, (rows, columns)).astype(np.float32)
        # a last axis in memory: sums with one that is only a view are slow
        image += cv2.merge([cv2.resize(noise, (size_px, size_px), interpolation=cv2.INTER_CUBIC)] * 3)
    return image


def draw(
    rng: np.random.Generator,
    *,
    shapes: Sequence[str],
    size_px: int,
    training: bool,
    distinct: bool,
    alone: bool = False,
) -> Scene:
    """Returns one scene.

    Args:
      rng: source of everything.
      shapes: what may appear, equally likely.
      size_px: height and width.
      training: leave out the held-out combinations.
      distinct: no name appears twice.
      alone: there is one object.
    """
    ground = str(rng.choice(list(_GROUNDS)))
    image = _ground(rng, ground, size_px)
    max_things = min(max(size_px // 32, 4), 8)
    smallest, largest = (0.16, 0.28) if max_things == 4 else (0.08, 0.2)
    things: list[Thing] = []
    for _ in range(1 if alone else rng.integers(1, max_things + 1)):
        for _ in range(20):
            radius = float(rng.uniform(smallest, largest))
            x, y = rng.uniform(0.85 * radius, 1 - 0.85 * radius, 2).tolist()
            thing = Thing(
                shape=shapes[int(rng.integers(len(shapes)))],
                color=list(COLORS)[rng.integers(len(COLORS))],
                texture=TEXTURES[rng.integers(len(TEXTURES))],
                center=(x, y),
                radius=radius,
                angle_degrees=float(rng.uniform(-30, 30)),
            )
            # neighbours may cover each other's rims, not more
            is_free = all(np.hypot(x - t.center[0], y - t.center[1]) > 0.78 * (radius + t.radius) for t in things)
            is_new = not distinct or all(thing.name != t.name for t in things)
            if is_free and is_new and not (training and thing.held_out):
                things.append(thing)
                break
    boxes = np.array([_paint(image, thing) for thing in things], np.float32).reshape(-1, 4)
    # light from one side, then the camera's noise
    slope = rng.uniform(-0.15, 0.15, 2)
    across = np.linspace(-1, 1, size_px, dtype=np.float32)
    image *= cv2.merge([rng.uniform(0.8, 1.12) + slope[0] * across[:, None] + slope[1] * across[None, :]] * 3)
    image += rng.standard_normal(image.shape, np.float32) * np.float32(rng.uniform(0, 6))
    return Scene(np.clip(image, 0, 255).astype(np.uint8), tuple(things), boxes, ground)
