"""Pieces of figures: photos with labelled boxes, text, legends, grids. All return uint8[h, w, 3]."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

import matplotlib
import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont

Picture = UInt8[np.ndarray, "h w 3"]
Color = tuple[int, int, int]
PALETTE: tuple[Color, ...] = (
    (0, 114, 178),
    (230, 159, 0),
    (0, 158, 115),
    (204, 121, 167),
    (213, 94, 0),
    (86, 180, 233),
    (240, 228, 66),
)
INK, PAPER, PALE = (25, 25, 25), (255, 255, 255), (110, 110, 110)
MARGIN_PX = 12
MAX_SIDE_PX, MIN_SIDE_PX = 1600, 900  # photos are shown with their long side between these


def nth_color(index: int) -> Color:
    """Returns a colour; after the palette's end it comes again, darker."""
    cycle, place = divmod(index, len(PALETTE))
    red, green, blue = (round(channel * 0.6 ** (cycle % 3)) for channel in PALETTE[place])
    return red, green, blue


def colors_of(labels: np.ndarray) -> dict[int, Color]:
    """Returns a colour for every label that occurs, in order of occurrence."""
    return {int(label): nth_color(i) for i, label in enumerate(dict.fromkeys(int(label) for label in labels))}


def _font(size: int, *, bold: bool = False) -> ImageFont.FreeTypeFont:
    folder = pathlib.Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    return ImageFont.truetype(folder / ("DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"), size)


def text_block(text: str, *, width: int, size: int, bold: bool = False, color: Color = INK) -> Picture:
    """Returns lines of text, wrapped at spaces to `width` px."""
    font = _font(size, bold=bold)
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
        draw.text((0, i * step), line, fill=color, font=font)
    return np.asarray(image)


def legend(entries: Sequence[tuple[Color, str]], *, width: int) -> Picture:
    """Returns coloured squares with their texts, in as many lines as needed."""
    font, size = _font(15), 16
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
        draw.text((x + size + 6, y), text, fill=INK, font=font)
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
    font = _font(max(12, min(15, round(max(size) / 55))))
    taken: list[tuple[float, float, float, float]] = []
    for box, text, color in zip(boxes, texts, colors, strict=True):
        if text:
            text = _shorten(text, font, size[0] - 8)
            place = place_label(box, _label_size(text, font), size, taken)
            taken.append(place)
            dark = 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2] < 140
            draw.rectangle(place, fill=color, outline=PAPER)
            draw.text((place[0] + 3, place[1] + 1), text, fill=PAPER if dark else INK, font=font)
    return np.asarray(picture)


def _shorten(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """Returns as much of the text as `width` px hold."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


def _label_size(text: str, font: ImageFont.FreeTypeFont) -> tuple[float, float]:
    return font.getlength(text) + 6, round(font.size * 1.3) + 2


def place_label(
    box: np.ndarray, label: tuple[float, float], size: tuple[int, int], taken: Sequence[tuple[float, ...]]
) -> tuple[float, float, float, float]:
    """Returns where a label goes: at its box, inside the photo, where it covers the least of other labels."""
    width, height = label
    x1, y1, x2, y2 = box
    places = [
        (x, y)
        for y in (y1 - height, y1, y2, y2 - height, (y1 + y2 - height) / 2, y1 - 2 * height, y2 + height)
        for x in (x1, x2 - width, (x1 + x2 - width) / 2, x2, x1 - width)
    ]

    def inside(place: tuple[float, float]) -> tuple[float, float, float, float]:
        x = min(max(place[0], 0), max(size[0] - width - 1, 0))
        y = min(max(place[1], 0), max(size[1] - height - 1, 0))
        return x, y, x + width, y + height

    def covered(place: tuple[float, float, float, float]) -> float:
        return sum(
            max(0, min(place[2], other[2]) - max(place[0], other[0]))
            * max(0, min(place[3], other[3]) - max(place[1], other[1]))
            for other in taken
        )

    return min(map(inside, places), key=covered)  # the first of equals


def hatch_padding(image: Picture, extent: np.ndarray) -> Picture:
    """Returns the canvas with grey stripes where there is no photo."""
    height, width = image.shape[:2]
    y, x = np.mgrid[:height, :width]
    period = max(8, max(height, width) // 40)
    stripes = np.where((x + y) % period < period // 2, 225, 200).astype(np.uint8)
    padding = (y >= extent[0]) | (x >= extent[1])
    return np.where(padding[..., None], stripes[..., None], image)


def heat(image: Picture, similarity: Float[np.ndarray, "h w"]) -> Picture:
    """Returns the grey photo under a map from its lowest (dark) to its highest value (bright)."""
    low, high = float(np.min(similarity)), float(np.max(similarity))
    level = (similarity - low) / max(high - low, 1e-12)
    size = (image.shape[1], image.shape[0])
    level = np.asarray(Image.fromarray(level.astype(np.float32)).resize(size, Image.Resampling.BILINEAR))
    level = np.clip(level, 0, 1)[..., None]
    colors = matplotlib.colormaps["inferno"](level[..., 0])[..., :3] * 255
    gray = image.astype(np.float32).mean(axis=-1, keepdims=True)
    opacity = 0.3 + 0.4 * level
    return ((1 - opacity) * gray + opacity * colors).astype(np.uint8)


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
        path = pathlib.Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(path, quality=92)  # of JPEG; other formats have none
    return picture
