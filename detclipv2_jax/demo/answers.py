"""What the page asks and gets: boxes of words and examples, phrases of a caption with their similarity, pictures.

A request is an object of the page's JSON and may hold anything: what is wrong with it is a ValueError in words for the
person who reads the page.
"""

from __future__ import annotations

import base64
import collections
import contextlib
import json
import math
import re
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

from detclipv2_jax.colors import color_of, hex_color, ink_on
from detclipv2_jax.demo import album as album_lib
from detclipv2_jax.demo.album import Album, Entry
from detclipv2_jax.inference import Found, Predictor, parse_words, vocabulary
from detclipv2_jax.inference.detector import TEXT_BATCH
from detclipv2_jax.inference.exemplars import Example
from detclipv2_jax.labels import in_ascii
from detclipv2_jax.visualize import drawing, figures

MAX_CHARS = 5000  # of words, a caption or a name
MAX_PHRASES = 8
MAX_NAMES = 20  # that examples have
MAX_WAITING_S = 120.0
MAP_SIDE_PX = 800
_NUM_KEPT = 40  # results, for pictures of them
# words that stand between the phrases of a caption
_BETWEEN = re.compile(
    r"[^\w' -]+|\b(?:a|an|the|and|or|on|in|at|with|of|to|by|behind|beside|near|under|over|above|below|from|is|are|"
    r"there|picture|photo|left|right|front|some|two|three)\b",
    re.IGNORECASE,
)


class BusyError(RuntimeError):
    """Others wait for the model already."""


class Answers:
    """Answers requests, one at a time."""

    def __init__(self, predictor: Predictor, album: Album):
        self._predictor, self.album = predictor, album
        self._lock = threading.Lock()
        self._kept: collections.OrderedDict[str, Found] = collections.OrderedDict()

    def warm_up(self) -> None:
        """Compiles what finds words: few or many, on photos of every canvas."""
        self._predictor.vocabulary([f"thing {i}" for i in range(TEXT_BATCH)])
        for height, width in self._predictor.config.eval.canvases:
            self._predictor(np.zeros((height, width, 3), np.uint8), ["thing"])

    def start(self) -> dict[str, Any]:
        """Returns what the page shows before anything was asked."""
        sizes = " or ".join(f"{height} × {width}" for height, width in self._predictor.config.eval.canvases)
        return {
            "model": f"{self._predictor.config.name}, step {self._predictor.step}, photos shown to it at {sizes} px",
            "vocabularies": list(vocabulary.NAMED),
            "photos": [about(entry) for entry in self.album.entries],
            "max_bytes": album_lib.MAX_UPLOAD_BYTES,
        }

    def upload(self, data: bytes, *, name: str) -> dict[str, Any]:
        """Returns what the page needs to know of a new photo."""
        if not data:
            raise ValueError("the file is empty")
        try:
            return about(self.album.add(data, name=name))
        except ValueError as error:
            raise ValueError(f"this cannot be used as a photo: {error}") from error

    def find(self, request: dict[str, Any]) -> dict[str, Any]:
        """Returns the boxes found on a photo as rows of COCO results, best first, and how long it took."""
        begin = time.perf_counter()
        found = self._found(request)
        entry = self.album.get(request.get("photo"))
        rows = [row | {"file_name": entry.name} for row in found.to_coco()]
        looks = {name: look_of(name) for name in found.names}
        seconds = round(time.perf_counter() - begin, 3)
        return {"rows": rows, "looks": looks, "num_names": len(found.vocabulary), "seconds": seconds}

    def picture(self, request: dict[str, Any]) -> bytes:
        """Returns the photo with the boxes of at least the score `threshold`, as a PNG."""
        threshold = request.get("threshold")
        if not isinstance(threshold, int | float) or not 0 <= threshold <= 1:
            raise ValueError("the threshold must be a number between 0 and 1")
        entry, found = self.album.get(request.get("photo")), self._found(request)
        drawn = figures.detections(
            self.album.pixels(entry.id),
            found.boxes,
            found.labels,
            found.vocabulary,
            scores=found.scores,
            min_score=threshold,
            title=entry.name,
        )
        return album_lib.encoded(Image.fromarray(drawn), "PNG")

    def align(self, request: dict[str, Any]) -> dict[str, Any]:
        """Returns the phrases of a caption, each with its best box, its similarity and a map of where it is similar.

        A phrase that the page chose itself is `phrase`; it comes first.
        """
        entry, caption = self.album.get(request.get("photo")), _text(request, "caption")
        chosen = _text(request, "phrase")
        listed = list(dict.fromkeys([*filter(None, [chosen]), *phrases_of(caption)]))[:MAX_PHRASES]
        if not listed:
            raise ValueError("type a caption of the photo, like “a red star and a blue house”")
        pixels, begin = self.album.pixels(entry.id), time.perf_counter()
        with self._turn():
            found = self._predictor.align([pixels], listed)
        shown = Image.fromarray(pixels)
        shown.thumbnail((MAP_SIDE_PX, MAP_SIDE_PX))
        small = np.asarray(shown)
        low, high = float(np.min(found.maps)), float(np.max(found.maps))  # one scale, so that maps can be compared
        rows = []
        for text, box, score, values in zip(listed, found.boxes, found.scores, found.maps, strict=True):
            picture = album_lib.encoded(Image.fromarray(drawing.heat(small, values, low=low, high=high)), "PNG")
            row = {"text": text, "box": box.round(2).tolist(), "score": round(float(score), 3)}
            map_url = f"data:image/png;base64,{base64.b64encode(picture).decode()}"
            rows.append(row | {"low": round(low, 3), "high": round(high, 3), "map": map_url, "look": look_of(text)})
        return {"phrases": rows, "seconds": round(time.perf_counter() - begin, 3)}

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        """Waits until nobody else uses the model, but not for ever."""
        if not self._lock.acquire(timeout=MAX_WAITING_S):
            raise BusyError("others are using the model; try again in a minute")
        try:
            yield
        finally:
            self._lock.release()

    def _found(self, request: dict[str, Any]) -> Found:
        """Returns what a request finds, from memory if the same was asked before."""
        entry, words, shown = self.album.get(request.get("photo")), _words(request), self._examples(request)
        if not words and not shown:
            raise ValueError("type what to look for, choose a list of names, or draw an example")
        given = {name: [(photo, list(box)) for photo, box in examples] for name, examples in shown.items()}
        key = json.dumps([entry.id, words, given])
        with self._turn():
            if key not in self._kept:
                exemplars = {
                    name: [(self.album.pixels(photo), box) for photo, box in examples]
                    for name, examples in given.items()
                }
                self._kept[key] = self._predictor([self.album.pixels(entry.id)], words, exemplars=exemplars)[0]
            self._kept.move_to_end(key)
            if len(self._kept) > _NUM_KEPT:
                self._kept.popitem(last=False)
            return self._kept[key]

    def _examples(self, request: dict[str, Any]) -> dict[str, list[Example]]:
        """Returns pairs of a photo's id and a box by their names."""
        listed = request.get("examples") or []
        form = "an example must be a name, a photo and a box of four numbers"
        if not isinstance(listed, list) or not all(isinstance(example, dict) for example in listed):
            raise ValueError(form)
        grouped: dict[str, list[Example]] = {}
        for example in listed:
            name, box, entry = _text(example, "name"), example.get("box"), self.album.get(example.get("photo"))
            numbers = isinstance(box, list) and len(box) == 4 and all(type(side) in (int, float) for side in box)
            if not name or not numbers or not all(map(math.isfinite, box)):
                raise ValueError(form)
            grouped.setdefault(name, []).append((entry.id, box))
        if len(grouped) > MAX_NAMES:
            raise ValueError(f"the examples have {len(grouped)} names; there may be {MAX_NAMES}")
        return grouped


def about(entry: Entry) -> dict[str, Any]:
    """Returns what the page knows of a photo."""
    return {"id": entry.id, "name": entry.name, "width": entry.width, "height": entry.height}


def look_of(name: str) -> dict[str, str]:
    """Returns how the page draws a name: its colour, that of letters on it, its spelling where no font has it."""
    color = color_of(name)
    return {"color": hex_color(color), "ink": hex_color(ink_on(color)), "plain": in_ascii(name)}


def phrases_of(caption: str) -> list[str]:
    """Returns what stands between a caption's articles, prepositions and punctuation, each once."""
    return list(dict.fromkeys(filter(None, (part.strip(" -'") for part in _BETWEEN.split(caption)))))


def _words(request: dict[str, Any]) -> dict[str, str]:
    words, chosen = _text(request, "words").replace("\n", ","), _text(request, "vocabulary")
    if chosen and chosen not in vocabulary.NAMED:
        raise ValueError(f"there is no list of names {chosen!r}; there are {', '.join(vocabulary.NAMED)}")
    try:
        return parse_words(words, vocabulary=chosen)
    except ValueError:  # not one word
        return {}


def _text(request: dict[str, Any], key: str) -> str:
    """Returns a text of a request, "" where it has none."""
    text = request.get(key) or ""
    if not isinstance(text, str):
        raise ValueError(f"{key} must be a text")
    if len(text) > MAX_CHARS:
        raise ValueError(f"{key}: {len(text)} characters are too many; there may be {MAX_CHARS}")
    return text.strip()
