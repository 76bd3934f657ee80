"""Boxes with labels on a picture: one box a place, no label over another, each legible on its colour."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from jaxtyping import Float, Int
from PIL import Image, ImageDraw, ImageFont

from detclipv2_jax.colors import WHITE, Color, ink_on

Corners = tuple[float, float, float, float]  # of a label: left, top, right, bottom
NUM_WEAK = 3  # boxes drawn where none has the score asked for


class Font(Protocol):
    """Letters of one size."""

    size: int

    def getlength(self, text: str) -> float:
        """Returns the width of a line of text in px."""

    def write(self, draw: ImageDraw.ImageDraw, place: tuple[float, float], text: str, *, fill: Color) -> None:
        """Draws a line of text whose top left corner is `place`."""


class AsciiFont:
    """Letters that need no font of the machine; other scripts are spelled in ASCII."""

    def __init__(self, size: int):
        self.size, self._font = size, ImageFont.load_default(size)

    def getlength(self, text: str) -> float:
        """Returns the width of a line of text in px."""
        return self._font.getlength(in_ascii(text))

    def write(self, draw: ImageDraw.ImageDraw, place: tuple[float, float], text: str, *, fill: Color) -> None:
        """Draws a line of text whose top left corner is `place`."""
        draw.text(place, in_ascii(text), fill=fill, font=self._font)


def in_ascii(text: str) -> str:
    """Returns the text in ASCII that sounds alike; what has no such spelling is called by its number, "U+E000"."""
    from anyascii import anyascii  # here: only pictures need it

    return "".join(anyascii(letter) or ("" if _is_mark(letter) else f"U+{ord(letter):04X}") for letter in text)


def _is_mark(letter: str) -> bool:
    """Returns whether a character only changes how its neighbours are drawn."""
    return unicodedata.category(letter)[0] == "M" or is_invisible(letter)


def is_invisible(letter: str) -> bool:
    """Returns whether a character has no glyph of its own."""
    return unicodedata.category(letter) == "Cf" or 0xFE00 <= ord(letter) <= 0xFE0F


def best_places(
    boxes: Float[np.ndarray, "n 4"],
    scores: Float[np.ndarray, " n"],
    *,
    min_score: float,
    max_drawn: int,
    max_iou: float = 0.5,
) -> Int[np.ndarray, " k"]:
    """Returns the rows to draw of boxes that come best first.

    A box that overlaps a better drawn one by more than `max_iou`, of whatever word, is left out: a place is shown once,
    with its best word. Where no box has `min_score`, the best few are drawn.
    """
    good = np.flatnonzero(np.asarray(scores) >= min_score)
    most = max_drawn if len(good) else min(max_drawn, NUM_WEAK)
    kept: list[int] = []
    for i in (good if len(good) else np.arange(len(boxes))).tolist():
        if len(kept) == most:
            break
        if not np.any(_iou(boxes[i], boxes[kept]) > max_iou):
            kept.append(i)
    return np.array(kept, int)


def _iou(box: Float[np.ndarray, " 4"], others: Float[np.ndarray, "n 4"]) -> Float[np.ndarray, " n"]:
    low, high = np.maximum(box[:2], others[:, :2]), np.minimum(box[2:], others[:, 2:])
    shared = np.prod(np.maximum(high - low, 0.0), axis=1)
    areas = np.prod(box[2:] - box[:2]) + np.prod(others[:, 2:] - others[:, :2], axis=1)
    return shared / np.maximum(areas - shared, 1e-12)


def draw(
    picture: Image.Image, boxes: Float[np.ndarray, "n 4"], texts: Sequence[str], colors: Sequence[Color], *, font: Font
) -> None:
    """Draws boxes (px of the picture) with their labels on it; the first lie on top. A label "" is none."""
    size = picture.size
    brush = ImageDraw.Draw(picture)
    line = max(2, round(max(size) / 300))
    for box, color in reversed(list(zip(boxes, colors, strict=True))):
        x1, y1, x2, y2 = box
        x2, y2 = max(x2, x1 + 1), max(y2, y1 + 1)
        brush.rectangle((x1 - 1, y1 - 1, x2 + 1, y2 + 1), outline=WHITE, width=line + 2)  # a rim on any background
        brush.rectangle((x1, y1, x2, y2), outline=color, width=line)
    placed: list[tuple[Corners, np.ndarray, str, Color]] = []
    for box, text, color in zip(boxes, texts, colors, strict=True):
        line_of_text = shorten(" ".join(text.split()), font, size[0] - 8)
        label = font.getlength(line_of_text) + 6, round(font.size * 1.3) + 2
        place = place_label(box, label, size, [row[0] for row in placed]) if line_of_text else None
        if place:
            placed.append((place, box, line_of_text, color))
    for (x1, y1, x2, y2), box, _, color in placed:  # lines first: they cross no label
        near = min(max(box[0], (x1 + x2) / 2), box[2]), min(max(box[1], (y1 + y2) / 2), box[3])
        if not (x1 - 1 <= near[0] <= x2 + 1 and y1 - 1 <= near[1] <= y2 + 1):  # it stands away from its box
            brush.line((*near, (x1 + x2) / 2, (y1 + y2) / 2), fill=color, width=2)
    for place, _, text, color in placed:
        _draw_label(brush, place, text, color, font)


def _draw_label(brush: ImageDraw.ImageDraw, place: Corners, text: str, color: Color, font: Font) -> None:
    brush.rectangle(place, fill=color, outline=WHITE)
    font.write(brush, (place[0] + 3, place[1] + 1), text, fill=ink_on(color))


def shorten(text: str, font: Font, width: float) -> str:
    """Returns as much of the text as `width` px hold."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


def place_label(
    box: np.ndarray, label: tuple[float, float], size: tuple[int, int], taken: Sequence[Corners]
) -> Corners | None:
    """Returns where a label covers no other one, inside the photo: at its box or, where all is taken, near it.

    None: nowhere is room for it.
    """
    width, height = label
    x1, y1, x2, y2 = box
    places = [
        (x, y)
        for y in (y1 - height, y1, y2, y2 - height, (y1 + y2 - height) / 2)
        for x in (x1, x2 - width, (x1 + x2 - width) / 2, x2, x1 - width)
    ]
    most = np.maximum(np.array(size) - label - 1, 0)
    at_box = np.clip(np.array(places, np.float64), 0, most)
    anywhere = np.stack(np.meshgrid(*(np.append(np.arange(0, end, 6), end) for end in most)), axis=-1).reshape(-1, 2)
    gap = np.maximum(np.maximum(box[:2] - anywhere - label, anywhere - box[2:]), 0)
    nearest = anywhere[np.argsort(np.hypot(*gap.T), kind="stable")]
    for corners in (at_box, nearest):
        free = np.ones(len(corners), bool)
        for left, top, right, bottom in taken:
            x, y = corners.T
            free &= (x >= right) | (x + width <= left) | (y >= bottom) | (y + height <= top)
        if free.any():
            x, y = corners[free.argmax()].tolist()
            return x, y, x + width, y + height
    return None
