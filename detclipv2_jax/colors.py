"""Colours: Okabe and Ito's for series, which colour-blind readers can tell apart, and one for every name."""

from __future__ import annotations

import colorsys
import re
import zlib

Color = tuple[int, int, int]
BLACK: Color = (0, 0, 0)
WHITE: Color = (255, 255, 255)
PALETTE: tuple[Color, ...] = (
    (0, 114, 178),
    (230, 159, 0),
    (0, 158, 115),
    (204, 121, 167),
    (213, 94, 0),
    (86, 180, 233),
    (240, 228, 66),
)
_HUES = (0, 18, 32, 46, 58, 85, 140, 168, 187, 210, 238, 272, 300, 330, 360)  # degrees; each step looks as large


def nth_color(index: int) -> Color:
    """Returns the colour of a series; after the palette's end it comes again, darker."""
    cycle, place = divmod(index, len(PALETTE))
    red, green, blue = (round(channel * 0.6 ** (cycle % 3)) for channel in PALETTE[place])
    return red, green, blue


def color_of(name: str) -> Color:
    """Returns the colour of a name, which depends on nothing else: it is the same in every picture.

    "Sea_star", "sea star" and "sea star, an animal" have one colour.
    """
    key = re.sub(r"[\s_-]+", "", name.partition(",")[0] or name).casefold()
    number = zlib.crc32(key.encode(errors="replace"))
    step, part = divmod(number % (100 * (len(_HUES) - 1)), 100)
    hue = _HUES[step] + (_HUES[step + 1] - _HUES[step]) * part / 100
    lightness = (0.35, 0.5, 0.65)[(number >> 16) % 3]
    red, green, blue = (round(255 * channel) for channel in colorsys.hls_to_rgb(hue / 360, lightness, 0.85))
    return red, green, blue


def ink_on(color: Color) -> Color:
    """Returns black or white, whichever is easier to read on a colour: WCAG's contrast is 4.5 or more on every one."""
    return WHITE if luminance(color) < 0.179 else BLACK  # at 0.179 both have the same contrast


def luminance(color: Color) -> float:
    """Returns the relative luminance of a colour in [0, 1], WCAG 2's."""
    shares = [channel / 255 for channel in color]
    linear = [share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def hex_color(color: Color) -> str:
    """Returns a colour as matplotlib and web pages take it."""
    return "#{:02x}{:02x}{:02x}".format(*color)
