"""Pieces of figures: photos with labelled boxes, text, legends, grids. All return uint8[h, w, 3]."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

import matplotlib
import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw

from detclipv2_jax import atomic, labels
from detclipv2_jax.colors import WHITE, Color
from detclipv2_jax.visualize.letters import Letters

Picture = UInt8[np.ndarray, "h w 3"]
INK, PAPER, PALE = (25, 25, 25), WHITE, (110, 110, 110)
MARGIN_PX = 12
MAX_SIDE_PX, MIN_SIDE_PX = 1600, 900  # photos are shown with their long side between these


def text_block(text: str, *, width: int, size: int, bold: bool = False, color: Color = INK) -> Picture:
    """Returns lines of text, wrapped at spaces to `width` px."""
    font = Letters(size, bold=bold)
    lines = []
    for paragraph in text.split("\n"):
        line = ""
        for word in paragraph.split(" "):
            longer = f"{line} {word}" if line else word
            if line and font.getlength(longer) > width:
                lines.append(line)
                longer = word
            line = longer
        lines.append(line)
    step = round(1.3 * size)
    image = Image.new("RGB", (width, step * len(lines) + size // 2), PAPER)
    draw = ImageDraw.Draw(image)
    for i, line in enumerate(lines):
        font.write(draw, (0, i * step), line, fill=color)
    return np.asarray(image)


def legend(entries: Sequence[tuple[Color, str]], *, width: int) -> Picture:
    """Returns coloured squares with their texts, in as many lines as needed."""
    font, size = Letters(15), 16
    places, x, y = [], 0, 0
    for color, text in entries:
        length = size + 6 + round(font.getlength(text)) + 22
        if x and x + length > width:
            x, y = 0, y + size + 10
        places.append((x, y, color, text))
        x += length
    image = Image.new("RGB", (width, y + size + 10), PAPER)
    draw = ImageDraw.Draw(image)
    for x, y, color, text in places:
        draw.rectangle((x, y + 2, x + size, y + 2 + size), fill=color, outline=INK)
        font.write(draw, (x + size + 6, y), text, fill=INK)
    return np.asarray(image)


def photo(
    image: Picture,
    boxes: Float[np.ndarray, "n 4"],
    texts: Sequence[str],
    colors: Sequence[Color],
    *,
    long_side: int | None = None,
) -> Picture:
    """Returns the photo, resized so that labels are legible, with boxes and labels; first boxes lie on top."""
    side = max(image.shape[:2])
    factor = (long_side or min(max(side, MIN_SIDE_PX), MAX_SIDE_PX)) / side
    size = (max(1, round(image.shape[1] * factor)), max(1, round(image.shape[0] * factor)))
    picture = Image.fromarray(np.ascontiguousarray(image)).resize(size, Image.Resampling.LANCZOS)
    boxes = np.asarray(boxes, np.float64).reshape(-1, 4) * np.array(
        [size[0] / image.shape[1], size[1] / image.shape[0]] * 2
    )
    labels.draw(picture, boxes, texts, colors, font=Letters(max(12, min(15, round(max(size) / 55)))))
    return np.asarray(picture)


def hatch_padding(image: Picture, extent: np.ndarray) -> Picture:
    """Returns the canvas with grey stripes where there is no photo."""
    height, width = image.shape[:2]
    y, x = np.mgrid[:height, :width]
    period = max(8, max(height, width) // 40)
    stripes = np.where((x + y) % period < period // 2, 225, 200).astype(np.uint8)
    padding = (y >= extent[0]) | (x >= extent[1])
    return np.where(padding[..., None], stripes[..., None], image)


def heat(image: Picture, similarity: Float[np.ndarray, "h w"], *, low: float, high: float) -> Picture:
    """Returns the grey photo under a map, which is dark where it is `low` and bright where it is `high`."""
    level = (similarity - low) / max(high - low, 1e-12)
    size = (image.shape[1], image.shape[0])
    level = np.asarray(Image.fromarray(level.astype(np.float32)).resize(size, Image.Resampling.BILINEAR))
    level = np.clip(level, 0, 1)[..., None]
    colors = matplotlib.colormaps["inferno"](level[..., 0])[..., :3] * 255
    gray = image.astype(np.float32).mean(axis=-1, keepdims=True)
    opacity = 0.3 + 0.4 * level
    return ((1 - opacity) * gray + opacity * colors).astype(np.uint8)


def color_bar(*, low: float, high: float, title: str, width: int) -> Picture:
    """Returns the scale of `heat`: its colours on a grey photo, with five numbers below."""
    font, height = Letters(13), 18
    bar = heat(np.full((height, width, 3), 128, np.uint8), np.linspace(low, high, width)[None], low=low, high=high)
    numbers = Image.new("RGB", (width, 20), PAPER)
    draw = ImageDraw.Draw(numbers)
    for share in (0, 0.25, 0.5, 0.75, 1):
        text, x = f"{low + share * (high - low):.2f}", share * (width - 1)
        draw.line((x, 0, x, 3), fill=INK)
        length = font.getlength(text)
        font.write(draw, (min(max(x - length / 2, 0), width - length), 3), text, fill=INK)
    heading = text_block(title, width=width, size=13)
    return np.concatenate([heading, bar, np.asarray(numbers)])


def stack(parts: Sequence[Picture]) -> Picture:
    """Returns pictures one below the other, left-aligned on white."""
    width = max(part.shape[1] for part in parts)
    padded = [np.pad(p, ((0, 6), (0, width - p.shape[1]), (0, 0)), constant_values=255) for p in parts]
    return np.concatenate(padded)


def grid(cells: Sequence[Picture], *, columns: int, bottom: bool = False) -> Picture:
    """Returns cells in rows of `columns` on white, aligned at the top of their row, or at its bottom."""
    columns = min(columns, len(cells))
    width = max(cell.shape[1] for cell in cells) + MARGIN_PX
    rows = []
    for start in range(0, len(cells), columns):
        row = cells[start : start + columns]
        height = max(cell.shape[0] for cell in row)
        image = np.full((height, width * columns - MARGIN_PX, 3), 255, np.uint8)
        for i, cell in enumerate(row):
            top = height - cell.shape[0] if bottom else 0
            image[top : top + cell.shape[0], i * width : i * width + cell.shape[1]] = cell
        rows.append(image)
    return stack(rows)


def frame(picture: Picture) -> Picture:
    return np.pad(picture, ((MARGIN_PX, MARGIN_PX), (MARGIN_PX, MARGIN_PX), (0, 0)), constant_values=255)


def save(picture: Picture, path: str | pathlib.Path | None) -> Picture:
    if path is not None:
        with atomic.whole(path) as partial:
            Image.fromarray(picture).save(partial, quality=92)  # of JPEG; other formats have none
    return picture
