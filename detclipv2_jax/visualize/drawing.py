"""Pieces of figures: photos with labelled boxes, text, legends, grids. All return uint8[h, w, 3]."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

import matplotlib
import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw

from detclipv2_jax import files
from detclipv2_jax.colors import Color
from detclipv2_jax.visualize.letters import Letters

Picture = UInt8[np.ndarray, "h w 3"]
INK, PAPER, PALE = (25, 25, 25), (255, 255, 255), (110, 110, 110)
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
    draw = ImageDraw.Draw(picture)
    line = max(2, round(max(size) / 300))
    boxes = np.asarray(boxes, np.float64).reshape(-1, 4) * np.array(
        [size[0] / image.shape[1], size[1] / image.shape[0]] * 2
    )
    for box, color in reversed(list(zip(boxes, colors, strict=True))):
        x1, y1, x2, y2 = box
        x2, y2 = max(x2, x1 + 1), max(y2, y1 + 1)
        draw.rectangle((x1 - 1, y1 - 1, x2 + 1, y2 + 1), outline=PAPER, width=line + 2)  # a rim on any background
        draw.rectangle((x1, y1, x2, y2), outline=color, width=line)
    font = Letters(max(12, min(15, round(max(size) / 55))))
    taken: list[tuple[float, float, float, float]] = []
    for box, text, color in zip(boxes, texts, colors, strict=True):
        line_of_text = _shorten(" ".join(text.split()), font, size[0] - 8)
        place = place_label(box, _label_size(line_of_text, font), size, taken) if line_of_text else None
        if place:
            taken.append(place)
            _draw_label(draw, place, line_of_text, box, color, font)
    return np.asarray(picture)


def _draw_label(
    draw: ImageDraw.ImageDraw, place: Sequence[float], text: str, box: np.ndarray, color: Color, font: Letters
) -> None:
    x1, y1, x2, y2 = place
    near = min(max(box[0], (x1 + x2) / 2), box[2]), min(max(box[1], (y1 + y2) / 2), box[3])
    if not (x1 - 1 <= near[0] <= x2 + 1 and y1 - 1 <= near[1] <= y2 + 1):  # a label that stands away from its box
        draw.line((*near, (x1 + x2) / 2, (y1 + y2) / 2), fill=color, width=2)
    dark = 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2] < 140
    draw.rectangle((x1, y1, x2, y2), fill=color, outline=PAPER)
    font.write(draw, (x1 + 3, y1 + 1), text, fill=PAPER if dark else INK)


def _shorten(text: str, font: Letters, width: float) -> str:
    """Returns as much of the text as `width` px hold."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


def _label_size(text: str, font: Letters) -> tuple[float, float]:
    return font.getlength(text) + 6, round(font.size * 1.3) + 2


def place_label(
    box: np.ndarray, label: tuple[float, float], size: tuple[int, int], taken: Sequence[tuple[float, ...]]
) -> tuple[float, float, float, float] | None:
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
        with files.whole(path) as partial:
            Image.fromarray(picture).save(partial, quality=92)  # of JPEG; other formats have none
    return picture
