"""What an evaluation writes: detections in COCO's results format, scores with protocol, parts to continue from."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import pathlib
import re
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from detclipv2_jax import atomic, files
from detclipv2_jax.data.truth import Truth

# scores that a run may go by
MONITORS = tuple(f"{lead}AP{kind}" for lead in ("", "fixed_") for kind in ("", "50", "75", *"smlrcf"))
PART_ROWS = 1 << 16
PART_SECONDS = 60  # a killed evaluation loses at most about this much
LEFT_SECONDS = 7 * 24 * 3600  # an evaluation that goes on writes every minute
_PART = re.compile(r"(\d{6,})-(\d{6,})\.rows")
_NUM_DIGEST_BYTES = 32


@dataclasses.dataclass(frozen=True)
class Rows:
    """Detections of many images, one a row, best first within an image."""

    image_ids: Int[np.ndarray, " n"]
    category_ids: Int[np.ndarray, " n"]
    boxes: Float[np.ndarray, "n 4"]  # xyxy in pixels of the original image
    scores: Float[np.ndarray, " n"]

    @classmethod
    def concatenate(cls, parts: Iterable[Rows]) -> Rows:
        """Returns all rows in order of their image id, so that batch size and number of processes do not show."""
        none = cls(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros((0, 4), np.float32), np.zeros(0, np.float32))
        columns = zip(*(dataclasses.astuple(part) for part in [none, *parts]), strict=True)
        image_ids, *others = (np.concatenate(column) for column in columns)
        order = np.argsort(image_ids, kind="stable")
        return cls(image_ids[order], *(column[order] for column in others))

    def xywh(self) -> Float[np.ndarray, "n 4"]:
        """Returns the boxes as they are written and scored: x, y, width, height, rounded to 1/1000 px."""
        boxes = self.boxes.astype(np.float64)
        return np.round(np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1), 3)

    def parts(self, truth: Truth | None = None) -> Iterator[list[dict[str, Any]]]:
        """Yields `to_coco` of some rows after the other: as Python objects they need ten times the memory."""
        for start in range(0, max(len(self.scores), 1), PART_ROWS):
            columns = (getattr(self, field.name)[start : start + PART_ROWS] for field in dataclasses.fields(self))
            yield Rows(*columns).to_coco(truth)

    def to_coco(self, truth: Truth | None = None) -> list[dict[str, Any]]:
        """Returns COCO results, scores in float32's shortest form; with a truth, ids are positions in it."""
        ids = self.image_ids.tolist(), self.category_ids.tolist()
        if truth:
            names = truth.image_ids.ids, truth.category_ids.ids
            ids = [names[0][i] for i in ids[0]], [names[1][i] for i in ids[1]]
        columns = (*ids, self.xywh().tolist(), self.scores)
        return [
            {"image_id": image_id, "category_id": category_id, "bbox": box, "score": float(str(score))}
            for image_id, category_id, box, score in zip(*columns, strict=True)
        ]


class Parts:
    """What a running evaluation has found so far, on disk, so that a killed one continues.

    The folder's name holds a hash of everything the detections depend on: another evaluation does not find it. A file
    begins with the hash of its rows: where it was changed, its batches are predicted again.
    """

    def __init__(self, folder: pathlib.Path, *, fingerprint: Mapping[str, Any]):
        digest = hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()
        self._folder = folder / f".partial_{digest[:16]}"
        self._pending: list[Rows] = []
        self.done, self._parts = self._read()  # batches whose rows are known
        self._written, self._written_at = self.done, time.monotonic()

    def _read(self) -> tuple[int, list[Rows]]:
        done, parts = 0, []
        for path in sorted(self._folder.glob("*.rows")):
            match = _PART.fullmatch(path.name)
            if not match or int(match[1]) != done:
                continue
            rows = _unpacked(path)
            if rows is None:
                break  # its batches are predicted again
            parts.append(rows)
            done = int(match[2])
        return done, parts

    def add(self, rows: Rows) -> None:
        """Takes the rows of the next batch; now and then, those taken so far are put on disk."""
        self._pending.append(rows)
        self.done += 1
        if time.monotonic() - self._written_at > PART_SECONDS:
            self.write()

    def write(self) -> None:
        """Puts the rows taken since the last call on disk."""
        if self.done == self._written:
            return
        rows = Rows.concatenate(self._pending)
        with atomic.whole(self._folder / f"{self._written:06d}-{self.done:06d}.rows") as partial:
            partial.write_bytes(_packed(rows, batches=(self._written, self.done)))
        self._parts.append(rows)
        self._pending, self._written, self._written_at = [], self.done, time.monotonic()

    def all_rows(self) -> Rows:
        """Returns the rows of all batches."""
        return Rows.concatenate([*self._parts, *self._pending])

    def remove(self) -> None:
        """Deletes what is on disk: the evaluation is done. What others left there for `LEFT_SECONDS` goes, too."""
        shutil.rmtree(self._folder, ignore_errors=True)
        for folder in self._folder.parent.glob(".partial_*"):
            with contextlib.suppress(OSError):
                if time.time() - folder.stat().st_mtime > LEFT_SECONDS:
                    shutil.rmtree(folder, ignore_errors=True)


def _packed(rows: Rows, *, batches: tuple[int, int]) -> bytes:
    """Returns the content of a file with the rows of some batches, led by its hash."""
    buffer = io.BytesIO()
    np.savez(buffer, batches=np.array(batches), **dataclasses.asdict(rows))
    return hashlib.sha256(buffer.getbuffer()).digest() + buffer.getvalue()


def _unpacked(path: pathlib.Path) -> Rows | None:
    """Returns the rows of a file, None if it is not as it was written."""
    try:
        data = files.read_bytes(path)
        digest, data = data[:_NUM_DIGEST_BYTES], data[_NUM_DIGEST_BYTES:]
        if hashlib.sha256(data).digest() != digest:
            return None
        columns = files.read_arrays(path, ("batches", *(field.name for field in dataclasses.fields(Rows))), data=data)
        batches = columns.pop("batches").tolist()
        return Rows(**columns) if path.name == "{:06d}-{:06d}.rows".format(*batches) else None
    except (LookupError, OSError, TypeError, ValueError):  # written by something else
        return None


def write_detections(folder: pathlib.Path, *, name: str, detections: Rows, truth: Truth | None = None) -> pathlib.Path:
    """Writes `<name>_detections.json`, see `Rows.to_coco`; returns its path."""
    path = folder / f"{name}_detections.json"
    files.write_text(path, _json_list(detections.parts(truth)))
    return path


def write_scores(
    folder: pathlib.Path, *, name: str, scores: Mapping[str, float], protocol: Mapping[str, Any]
) -> pathlib.Path:
    """Writes `<name>_scores.json`: scores and "protocol", which names the detections; returns its path."""
    path = folder / f"{name}_scores.json"
    files.write_json(path, {**scores, "protocol": {**protocol, "detections": f"{name}_detections.json"}}, indent=2)
    return path


def _json_list(parts: Iterable[list[Any]]) -> Iterator[str]:
    """Yields the text of one JSON list whose entries come in parts."""
    for i, part in enumerate(parts):
        yield (", " if i else "[") + json.dumps(part)[1:-1]
    yield "]\n"
