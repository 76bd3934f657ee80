"""The photos of the page: those of one folder, and the newest uploads, which are kept in memory."""

from __future__ import annotations

import collections
import dataclasses
import functools
import io
import os
import pathlib
import threading
from collections.abc import Iterator

import numpy as np
from absl import logging
from jaxtyping import UInt8
from PIL import Image

from detclipv2_jax import buckets
from detclipv2_jax.data import transforms
from detclipv2_jax.files import printable, read_bytes

MAX_LISTED = 60  # photos of a folder
MAX_UPLOADS = 20  # older ones are forgotten
MAX_UPLOAD_BYTES = 20_000_000
MAX_PIXELS = 33_000_000  # of a photo, 100 MB as RGB
LONG_SIDES = {"photo": 1600, "thumb": 160}  # px of what the browser gets


class UnknownPhotoError(ValueError):
    """No photo has that id."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """A photo that the page shows."""

    id: str
    name: str
    width: int  # px, as displayed
    height: int
    content: pathlib.Path | bytes = dataclasses.field(repr=False)


class Album:
    """Photos by their ids; a path never comes from a browser."""

    def __init__(self, folder: str | pathlib.Path | None):
        self._entries: dict[str, Entry] = {}
        self._uploads: collections.deque[str] = collections.deque()
        self._num_uploads, self._lock = 0, threading.Lock()
        self._decoded = functools.lru_cache(maxsize=4)(_decoded)
        for path in _images_of(folder) if folder else ():
            if len(self._entries) == MAX_LISTED:
                logging.warning("%s: the page shows the first %d photos", folder, MAX_LISTED)
                break
            try:
                entry = _entry(f"p{len(self._entries)}", path.name, read_bytes(path), path)
                self._entries[entry.id] = entry
            except (OSError, ValueError) as error:
                logging.warning("left out: %s: %s", printable(path), error)

    @property
    def entries(self) -> list[Entry]:
        """Returns all photos: those of the folder, then uploads."""
        with self._lock:
            return list(self._entries.values())

    def get(self, photo_id: object) -> Entry:
        """Returns the photo of an id; UnknownPhotoError if there is none."""
        with self._lock:
            entry = self._entries.get(photo_id) if isinstance(photo_id, str) else None
        if entry is None:
            raise UnknownPhotoError("there is no such photo any more; choose another, or upload it again")
        return entry

    def add(self, data: bytes, *, name: str) -> Entry:
        """Returns the entry of an uploaded photo; ValueError if it is no image or too large."""
        if len(data) > MAX_UPLOAD_BYTES:
            raise ValueError(f"the file has more than {MAX_UPLOAD_BYTES // 1_000_000} MB; choose a smaller one")
        with self._lock:
            self._num_uploads += 1
            entry = _entry(f"u{self._num_uploads}", name, data, data)
        self._decoded(entry)  # an error comes now, not when the photo is looked at
        with self._lock:
            self._entries[entry.id] = entry
            self._uploads.append(entry.id)
            if len(self._uploads) > MAX_UPLOADS:
                del self._entries[self._uploads.popleft()]
        return entry

    def pixels(self, photo_id: object) -> UInt8[np.ndarray, "h w 3"]:
        """Returns a photo as displayed."""
        return self._decoded(self.get(photo_id))

    def jpeg(self, photo_id: object, *, long_side: int) -> bytes:
        """Returns a photo for the browser, reduced to `long_side` px at most, without what cameras write beside it."""
        picture = Image.fromarray(self.pixels(photo_id))
        picture.thumbnail((long_side, long_side))
        return encoded(picture, "JPEG")


def encoded(picture: Image.Image, kind: str) -> bytes:
    """Returns the file of a picture, JPEG or PNG."""
    out = io.BytesIO()
    picture.save(out, kind, quality=90)  # of JPEG; PNG has none
    return out.getvalue()


def _images_of(folder: str | pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields the images of a folder and its sub-folders whose files lie in it: no link leads out."""
    inside = pathlib.Path(folder).resolve()
    if not inside.is_dir():
        raise ValueError(f"--photos: {folder} is no folder")
    for place, folders, names in os.walk(inside):
        folders.sort()
        for name in sorted(names):
            path = pathlib.Path(place, name)
            if path.suffix.lower() in buckets.IMAGE_SUFFIXES and path.resolve().is_relative_to(inside):
                yield path


def _entry(photo_id: str, name: str, data: bytes, content: pathlib.Path | bytes) -> Entry:
    height, width = transforms.read_header(data).displayed_size
    if height * width > MAX_PIXELS:
        raise ValueError(
            f"the photo has {height * width / 1e6:.0f} million pixels; at most {MAX_PIXELS // 10**6} can be"
        )
    return Entry(photo_id, printable(name)[:80], width, height, content)


def _decoded(entry: Entry) -> np.ndarray:
    data = entry.content if isinstance(entry.content, bytes) else read_bytes(entry.content)
    pixels = transforms.decode_photo(data).pixels
    if pixels.shape[:2] != (entry.height, entry.width):
        raise ValueError(f"the photo {entry.name} has changed; start the page anew")
    return pixels
