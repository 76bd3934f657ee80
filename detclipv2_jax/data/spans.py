"""Phrases of captions, which grounding jsons give as spans of characters (`tokens_positive`)."""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Sequence
from typing import Any

from detclipv2_jax.data.concepts import key

NOT_IN_CAPTION = "box whose spans are not in the caption"
WITHIN_A_WORD = "box whose spans begin within a word"
OTHER_UNITS = "box whose spans seem to count bytes or UTF-16, not characters"

_MAX_SPANS = 100  # of a box; each takes as long as the phrase is
_AROUND = " \t\n.,;:"  # what does not belong to a phrase
_BEGINNING = re.compile(  # of a noun phrase, of which there is one at most
    r"(?:an?|the|this|that|these|those|some|another|each|every|his|her|its|their|my|our|your|he|she|it|they|him|them)\b",
    re.IGNORECASE,
)
_LINKING = re.compile(  # after it the phrase goes on: "the man in … the red hat"
    r"(?:^|\s)(?:of|in|on|at|with|by|to|from|for|near|behind|under|over|and|or|all|both|half)$", re.IGNORECASE
)
_COUNTING = re.compile(  # "two dogs, one brown"; a number alone is a label: "player … 12"
    r"(?:one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|both|several|many|few|\d+(?=\s+\D))\b",
    re.IGNORECASE,
)
_SEPARATOR = re.compile(r"(?:[,/&]|\b(?:and|or))\s*$", re.IGNORECASE)  # right before a span: "kid and children"
_QUALITIES = (
    r"(?:black|white|gr[ae]y|red|orange|yellow|green|blue|purple|pink|brown|tan|beige|gold|silver|dark|light|bright|big"
    r"|large|small|little|tall|short|long|thin|young|old|older|new|wooden|metal|shiny|fluffy|furry|pretty|\w{4,}ed)"
)
_WITHOUT_NOUN = re.compile(  # a phrase that has to go on: "a black, white dog"
    rf"(?:(?:an?|the|these|those|my|our|your|his|its|their)\b\s*)?(?:{_QUALITIES}\b[\s,]*(?:and\s+)?)*", re.IGNORECASE
)
_MODIFYING = re.compile(  # the phrase before: "a man, in a hat"
    rf"(?:(?:of|in|on|at|with|by|to|from|for|near|behind|under|over|who|which|while|not|wearing|holding|sitting"
    rf"|standing|looking|walking|facing|smiling|riding)\b.*|(?:left|right|{_QUALITIES})$)",
    re.IGNORECASE,
)
_END_OF_SENTENCE = re.compile(r"[.!?;]")


def phrases_of(caption: str, spans: Any) -> tuple[str, ...]:
    """Returns the different phrases of [start, end) character spans, in their order; none where they cover no word.

    The spans of one phrase are joined without what stands between them: "a red … car". A span begins another phrase
    where it has a determiner ("a man … the man"), repeats the noun ("young man … man") or is in another sentence. Where
    the phrase before has a noun, a number ("two dogs, one") or a comma or "and" right before it begins one, too.
    """
    phrases: list[str] = []
    end = 0
    for start, stop in _joined(spans):
        text = caption[start:stop].rstrip(_AROUND)
        if words := " ".join(text.strip(_AROUND).split()):
            if phrases and not _is_another(words, phrases[-1], caption[end:start]):
                words = f"{phrases.pop()} {words}"
            phrases.append(words)
            end = start + len(text)
    says_something = (any(unicodedata.category(letter)[0] in "LNS" for letter in phrase) for phrase in phrases)
    return tuple(dict.fromkeys(phrase for phrase, says in zip(phrases, says_something, strict=True) if says))


def _is_another(words: str, phrase: str, between: str) -> bool:
    if _END_OF_SENTENCE.search(between):
        return True
    if _LINKING.search(phrase):
        return False
    if _BEGINNING.match(words) or key(words).split()[-1:] == key(phrase).split()[-1:]:
        return True
    if _WITHOUT_NOUN.fullmatch(phrase):
        return False
    return bool(_COUNTING.match(words) or (_SEPARATOR.search(between) and not _MODIFYING.match(words)))


def phrase_of(caption: str, spans: Any) -> str:
    """Returns the first of the phrases of spans; "" where they cover no word."""
    return next(iter(phrases_of(caption, spans)), "")


def span_of(caption: str, phrase: str, *, taken: Sequence[tuple[int, int]] = ()) -> tuple[int, int] | None:
    """Returns where whole words of a caption are a phrase, in whatever case; None where they are not.

    That is the first place that overlaps none of the spans that are `taken`; where there is none, the first place.
    """
    found = [match.span() for match in re.finditer(re.escape(phrase), caption, re.IGNORECASE)]
    whole = [
        (start, end)
        for start, end in found
        if start < end
        and not (start > 0 and _goes_on(caption, start))
        and not (end < len(caption) and _goes_on(caption, end))
    ]
    free = (span for span in whole if all(span[1] <= start or end <= span[0] for start, end in taken))
    return next(free, whole[0] if whole else None)


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
    if any(int(start) < 0 for start, _ in spans):
        odd.append("span that begins before the caption")
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
    """Returns spans in their order, those that overlap as one, without empty ones; [] if too many or no pairs."""
    try:
        pairs = sorted((max(int(start), 0), int(end)) for start, end in itertools.islice(spans, _MAX_SPANS + 1))
    except (OverflowError, TypeError, ValueError):
        return []
    if len(pairs) > _MAX_SPANS:
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
