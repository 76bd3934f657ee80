"""Which texts are wrong beside a mirrored photo: those that speak of left and right."""

from __future__ import annotations

import re
from collections.abc import Sequence

_ENGLISH = (
    r"(?:top|bottom|upper|lower|front|rear|back|turn|keep)?(?:left|right)"
    r"(?:most|wards?|side|turn|arrow|[ -]?hand(?:ed|er|ers|side)?)?",
    r"(?:anti|counter)?[ -]?clock[ -]?wise",
    r"ccw",
)
_HUMP = re.compile(r"(?<=[a-z])(?=[A-Z])")  # of "turnLeft"


def pattern(words: Sequence[str], *, english: bool) -> re.Pattern[str] | None:
    """Returns what finds any of some words in a text, with `english` English ones too; None without words."""
    alternatives = [_whole(re.escape(word.strip())) for word in words]
    if english:
        alternatives += [_bounded(word) for word in _ENGLISH]
    return re.compile("|".join(alternatives), re.IGNORECASE) if alternatives else None


def _whole(word: str) -> str:
    """Returns the pattern of a word; where letters have no upper case, words may stand without spaces between them."""
    return _bounded(word) if word.lower() != word.upper() else word


def _bounded(word: str) -> str:
    return rf"(?<![^\W\d_]){word}(?![^\W\d_])"  # neither after a letter nor before one; "_" and digits may be there


def speaks_of_sides(texts: Sequence[str], found: re.Pattern[str] | None) -> bool:
    """Returns whether one of the texts has a word that mirroring makes wrong."""
    return found is not None and any(found.search(_HUMP.sub(" ", text)) for text in texts)
