"""What was found so far, on disk, so that a killed command goes on: a line a photo, after one of what is looked for."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from detclipv2_jax import atomic, files
from detclipv2_jax.inference import Found

_COLUMNS = 6  # x1, y1, x2, y2, score, label


class Record:
    """Photos and what was found on them; iterates over those of `paths` that are known, in their order.

    A photo whose size or time has changed is not known. A line that a kill left unfinished, or that is damaged, is
    dropped with all after it.
    """

    def __init__(
        self, path: pathlib.Path, *, searched: Mapping[str, Any], paths: Sequence[pathlib.Path], names: tuple[str, ...]
    ):
        """Opens or begins the file `path`.

        Args:
          path: of the file.
          searched: all that results depend on, as json has it.
          paths: of the photos.
          names: of the labels.

        Raises:
          ValueError: the file holds what was found by another search, or another process writes to its folder.
        """
        self._path, self._paths, self._names = path, paths, names
        self._offsets: dict[str, int] = {}
        self._lock = contextlib.ExitStack()
        self._lock.enter_context(files.only_writer(path.parent))
        with atomic.naming(path), path.open("a+b") as file:
            file.seek(0)
            first = file.readline()
            if not first.endswith(b"\n"):
                file.truncate(0)
                file.write(_line(searched))
                return
            self._check(first, searched)
            end, facts = len(first), {str(path): _facts(path) for path in paths}
            for line in file:
                if not _is_whole(line):
                    break
                row = json.loads(line)
                if row["facts"] == facts.get(row["photo"]):
                    self._offsets[row["photo"]] = end
                end += len(line)
            file.truncate(end)

    def _check(self, line: bytes, searched: Mapping[str, Any]) -> None:
        try:
            before = json.loads(line)
            other = [key for key, value in json.loads(json.dumps(searched)).items() if before[key] != value]
        except (KeyError, TypeError, ValueError):
            other = ["content"]
        if other:
            raise ValueError(
                f"{self._path} holds what a command with other {', '.join(other)} found until it was stopped; repeat "
                "that command, delete the file, or choose another --output"
            )

    def __contains__(self, path: object) -> bool:
        return str(path) in self._offsets

    def add(self, path: pathlib.Path, found: Found) -> None:
        """Puts what was found on a photo on disk."""
        table = np.concatenate([found.boxes.reshape(-1, 4), found.scores[:, None], found.labels[:, None]], axis=1)
        rows = base64.b64encode(np.ascontiguousarray(table, "<f4").tobytes()).decode()  # labels too are exact
        with atomic.naming(self._path), self._path.open("ab") as file:
            offset = file.tell()
            file.write(_line({"photo": str(path), "facts": _facts(path), "size": found.size, "rows": rows}))
        self._offsets[str(path)] = offset

    def __iter__(self) -> Iterator[tuple[pathlib.Path, Found]]:
        return ((path, self._read(path)) for path in self._paths if path in self)

    def __len__(self) -> int:
        return sum(path in self for path in self._paths)

    def _read(self, path: pathlib.Path) -> Found:
        with self._path.open("rb") as file:
            file.seek(self._offsets[str(path)])
            row = json.loads(file.readline())
        table = np.frombuffer(base64.b64decode(row["rows"]), "<f4").reshape(-1, _COLUMNS)
        height, width = row["size"]
        return Found(table[:, :4], table[:, 4], table[:, 5].astype(np.int32), self._names, (height, width))

    def remove(self) -> None:
        """Deletes the file: all results are written."""
        self._path.unlink(missing_ok=True)
        self._lock.close()


def _line(row: Mapping[str, Any]) -> bytes:
    return json.dumps(row).encode() + b"\n"


def _is_whole(line: bytes) -> bool:
    """Returns whether a line is a row of what was found on a photo, to its last box."""
    try:
        row = json.loads(line)
        num_bytes = len(base64.b64decode(row["rows"], validate=True))
        whole = isinstance(row["photo"], str) and [isinstance(side, int) for side in row["size"]] == [True] * 2
        return whole and "facts" in row and num_bytes % (4 * _COLUMNS) == 0 and line.endswith(b"\n")
    except (KeyError, TypeError, ValueError):
        return False


def _facts(path: pathlib.Path) -> list[int]:
    try:
        known = os.stat(path)
    except OSError:
        return []
    return [known.st_size, known.st_mtime_ns]
