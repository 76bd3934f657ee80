"""Phrases of captions, which grounding jsons give as spans of characters (`tokens_positive`)."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Any

NOT_IN_CAPTION = "box whose spans are not in the caption"
WITHIN_A_WORD = "box whose spans begin within a word"
OTHER_UNITS = "box whose spans seem to count bytes or UTF-16, not characters"


def phrase_of(caption: str, spans: Any) -> str:
    """Returns the text of [start, end) character spans, in their order in the caption; "" where they cover no word."""
    parts = (caption[start:end].strip(" \t\n.,;:") for start, end in _joined(spans))
    phrase = " ".join(" ".join(part for part in parts if part).split())
    return phrase if any(unicodedata.category(character)[0] in "LNS" for character in phrase) else ""


def problem_of(caption: str, spans: Any) -> str:
    """Returns why spans give no phrase, "" if they do.

    Where they count bytes or UTF-16, those after the first wide character begin too late: within a word, at a space.
    """
    if not phrase_of(caption, spans):
        return NOT_IN_CAPTION
    for start, end in _joined(spans):
        within = 0 < start < len(caption) and _goes_on(caption, start)
        if not caption[:start].isascii() and (within or caption[start : start + 1].isspace() or end > len(caption)):
            return OTHER_UNITS
        if within:
            return WITHIN_A_WORD
    return ""


def oddities_of(caption: str, spans: Any) -> Sequence[str]:
    """Returns what is odd in spans that give a phrase all the same."""
    joined = _joined(spans)
    odd = []
    if any(end > len(caption) for _, end in joined):
        odd.append("span that ends after the caption")
    if any(end < len(caption) and _goes_on(caption, end) for _, end in joined):
        odd.append("span that ends within a word")
    if len(joined) < len(spans):
        odd.append("spans that overlap or cover nothing")
    if any(type(x) is not int for span in spans for x in span):
        odd.append("span that is not two whole numbers")
    return odd


def _joined(spans: Any) -> list[tuple[int, int]]:
    """Returns spans in their order, those that overlap as one, without empty ones; [] if they are no pairs."""
    try:
        pairs = sorted((max(int(start), 0), int(end)) for start, end in spans)
    except (OverflowError, TypeError, ValueError):
        return []
    joined: list[tuple[int, int]] = []
    for start, end in pairs:
        if joined and start < joined[-1][1] and end > start:
            joined[-1] = joined[-1][0], max(end, joined[-1][1])
        elif end > start:
            joined.append((start, end))
    return joined


def _goes_on(text: str, position: int) -> bool:
    """Returns whether a word goes on at a position; scripts without upper case may write words without spaces."""
    return all(character.lower() != character.upper() for character in text[position - 1 : position + 1])
