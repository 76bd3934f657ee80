"""Letters of any script: a font of the machine that has them, or ASCII that sounds alike, but no empty boxes."""

from __future__ import annotations

import functools
import itertools
import pathlib
import re
import unicodedata

import matplotlib
from matplotlib import font_manager, ft2font
from PIL import ImageDraw, ImageFont, features

from detclipv2_jax.colors import Color
from detclipv2_jax.labels import in_ascii, is_invisible

Run = tuple[str, str]  # a font's file and a piece of text that it has all glyphs of


class Letters:
    """Letters of a size; what the first font lacks comes from other fonts of the machine."""

    def __init__(self, size: int, *, bold: bool = False):
        self.size, self._first = size, _own_font(bold=bold)

    def getlength(self, text: str) -> float:
        return sum(_font(file, self.size).getlength(piece) for file, piece in runs(text, self._first))

    def write(self, draw: ImageDraw.ImageDraw, place: tuple[float, float], text: str, *, fill: Color) -> None:
        x, y = place
        baseline = y + _font(self._first, self.size).getmetrics()[0]
        for file, piece in runs(text, self._first):
            font = _font(file, self.size)
            draw.text((x, baseline), piece, fill=fill, font=font, anchor="ls")
            x += font.getlength(piece)


def plain(text: str) -> str:
    """Returns the text in letters that the font of charts has."""
    first = _own_font(bold=False)
    return "".join(piece if _has(first, piece) else _spelled(piece, first) for piece in re.split(r"(\s+)", text))


def runs(text: str, first: str) -> list[Run]:
    """Returns the pieces that a line of text is drawn in, each with its font; `first` is preferred.

    A word is of one font. A word that no font has all letters of is spelled in ASCII where the first font lacks them.
    """
    pieces: list[Run] = []
    for word in re.split(r"(\s+)", text):
        if not word or word.isspace():
            pieces.append((pieces[-1][0] if pieces else first, " " * len(word)))
        elif font := next(
            (font for font in itertools.chain([first], () if word.isascii() else _machine_fonts()) if _has(font, word)),
            "",
        ):
            pieces.append((font, word))
        else:
            pieces.append((first, _spelled(word, first)))
    joined = itertools.groupby(pieces, key=lambda piece: piece[0])  # what runs from right to left, runs in one piece
    return [(file, "".join(word for _, word in words)) for file, words in joined]


def _spelled(word: str, font: str) -> str:
    return "".join(letter if _has(font, letter) else in_ascii(letter) for letter in word)


def _has(font: str, text: str) -> bool:
    """Returns whether a font has all glyphs of a text, and this machine what puts them in order."""
    if not features.check("raqm") and any(map(_is_shaped, text)):
        return False
    return all(ord(letter) in _glyphs(font) or is_invisible(letter) for letter in text)


def _is_shaped(letter: str) -> bool:
    """Returns whether a letter joins others or runs from right to left."""
    return unicodedata.bidirectional(letter) in ("R", "AL", "AN") or unicodedata.category(letter) in ("Mn", "Mc")


def _own_font(*, bold: bool) -> str:
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return str(pathlib.Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name)


@functools.cache
def _machine_fonts() -> tuple[str, ...]:
    """Returns the machine's fonts, upright ones without serifs first."""

    def order(file: str) -> tuple[bool, bool, str]:
        name = pathlib.Path(file).name.lower()
        return "regular" not in name, "sans" not in name, file

    return tuple(sorted(font_manager.findSystemFonts(), key=order))


@functools.cache
def _glyphs(file: str) -> frozenset[int]:
    """Returns the characters that a font has; none if it cannot be drawn in any size, or has boxes for all."""
    if "lastresort" in pathlib.Path(file).name.lower():
        return frozenset()
    try:
        ImageFont.truetype(file, 12)
        return frozenset(ft2font.FT2Font(file).get_charmap())
    except (OSError, RuntimeError):
        return frozenset()


@functools.cache
def _font(file: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(file, size)
