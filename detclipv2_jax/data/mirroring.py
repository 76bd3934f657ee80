"""Which texts are wrong beside a mirrored photo: those that speak of left and right."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

_ENGLISH = (
    r"(?:no|top|bottom|upper|lower|front|rear|back|turns?|keep|go|bear|merge|fork|ramp|swing|rotate|facing|pointing|"
    r"arrow|curve|bend|lane|exit|slight|sharp|straight|(?:up|down)(?!right))?"
    r"(?:left|right)"
    r"(?:most|wards?|bound|side|u?turn|arrow|facing|pointing|curve|bend|lane|exit|only|to(?:left|right)|foot|leg|arm|eye|"
    r"ear|shoe|glove|door|wheel|mirror|wing|[ -]?hand(?:ed|er|ers|side|traffic)?)?",
    r"(?:anti|counter)?[ -]?clock[ -]?wise",
    r"c?cw",
)
_SIGNS = "[←→↖-↝↞↠↢-↤↦↩-↬↰-↷↺-⇄⇆⇇⇉⇋⇌⇍⇏⇐⇒⇖-⇠⇢⇤⇥⇦⇨⟲⟳⟵⟶➔-➾⬅⬈⬉⬊⬋⮌⮎👈👉]"  # arrows, which are names of road signs
_HUMP = re.compile(r"(?<=[a-z])(?=[A-Z])")  # of "turnLeft"


def pattern(words: Sequence[str], *, english: bool) -> re.Pattern[str] | None:
    """Returns what finds any of some words in a text, with `english` English ones too; None without words."""
    alternatives = [_whole(r"[\s_-]+".join(map(re.escape, _plain(word).split()))) for word in words]
    if english:
        alternatives += [*map(_bounded, _ENGLISH), _SIGNS]
    return re.compile("|".join(alternatives), re.IGNORECASE) if alternatives else None


def _whole(word: str) -> str:
    """Returns the pattern of a word; where letters have no upper case, words may stand without spaces between them."""
    return _bounded(word) if word.lower() != word.upper() else word


def _bounded(word: str) -> str:
    return rf"(?<![^\W\d_]){word}(?![^\W\d_])"  # neither after a letter nor before one; "_" and digits may be there


def speaks_of_sides(texts: Sequence[str], found: re.Pattern[str] | None) -> bool:
    """Returns whether one of the texts has a word that mirroring makes wrong."""
    return found is not None and any(found.search(_HUMP.sub(" ", _plain(text))) for text in texts)


def _plain(text: str) -> str:
    """Returns a text with one form for each letter, wide ones and accents written apart too."""
    return text if text.isascii() else unicodedata.normalize("NFKC", text)
