"""Image-text pairs: a TSV with an image folder, or webdataset tar shards, also those of img2dataset with their parquet.

* TSV `image <tab> caption [<tab> JSON list of noun phrases]`, as `detclipv2_jax.data.sources` reads it.
* tar: files of one sample follow each other and share the name before the first dot: an image (jpg, jpeg, png, webp,
  bmp, gif, tif, tiff) and the caption in .txt or under `caption` in .json. Nothing is unpacked to disk.
* `00000.parquet` beside `00000.tar` (img2dataset): the caption where the tar has none; what was never downloaded is
  reported by its status, what was downloaded and is not in the tar is counted as dropped.

Captions are normalised, cut at a length, and get noun phrases, unless the TSV gives its own; see `phrases`. CC3M and
CC12M are read this way.
"""

from __future__ import annotations

import collections
import hashlib
import itertools
import json
import os
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from detclipv2_jax.data.checks import probe_images, resolve, unsafe_path
from detclipv2_jax.data.concepts import Vocabulary
from detclipv2_jax.data.phrases import MAX_CHARACTERS, check_pipeline, normalize, noun_phrases
from detclipv2_jax.data.schema import Kind, Record, UnusableError
from detclipv2_jax.data.sources import parse_pair
from detclipv2_jax.prepare.coco_json import describe_file
from detclipv2_jax.prepare.record_builder import Reader, RecordBuilder, Tally

_IMAGE_SUFFIXES = frozenset({"jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff"})
_MAX_FILE_BYTES = 1 << 28  # of a file in a tar
_CUT = "tar cut or damaged"
_TOGETHER = 256  # captions that are normalised and parsed together


class ImageText(RecordBuilder):
    """Images with a caption and its noun phrases."""

    name = "detclipv2_image_text"


class Pair(NamedTuple):
    """One sample as it was read."""

    name: str
    image: str | bytes
    caption: str
    phrases: list[str] | None  # None: they are still to be found


class PairReader:
    """What TSV and tar files share; a subclass says where pairs come from."""

    kind = Kind.IMAGE_TEXT
    vocabulary = Vocabulary((), ())
    num_items = 0

    def __init__(self, inputs: Iterable[Path], *, num_shards: int, pipeline: str, max_phrases: int):
        self.inputs: dict[str, dict[str, Any]] = {str(path): {"bytes": path.stat().st_size} for path in inputs}
        self.num_shards = num_shards
        self.counters: dict[str, int] = {}
        self.facts: dict[str, Any] = {"noun phrases by": pipeline or "nothing"}
        self._pipeline, self._max_phrases = pipeline, max_phrases

    def pairs(self, shard: int, tally: Tally) -> Iterator[Pair]:
        """Yields the pairs of a shard; what cannot be used is counted."""
        raise NotImplementedError

    def read(self, shard: int, tally: Tally) -> Iterator[tuple[str, Record]]:
        """Yields name and record of each pair of a shard."""
        pairs = self.pairs(shard, tally)
        while chunk := list(itertools.islice(pairs, _TOGETHER)):
            captions = normalize([pair.caption for pair in chunk])
            parsed = self._parse([caption[:MAX_CHARACTERS] for caption in captions], chunk)
            for pair, caption, phrases in zip(chunk, captions, parsed, strict=True):
                if not caption:
                    tally.dropped["empty caption"] += 1
                    continue
                if len(caption) > MAX_CHARACTERS:
                    tally.noted[f"caption cut at {MAX_CHARACTERS} characters"] += 1
                caption = caption[:MAX_CHARACTERS]
                yield (
                    pair.name,
                    Record(
                        kind=self.kind,
                        source="",
                        example_id=0,
                        image=pair.image,
                        size=(0, 0),
                        boxes=np.zeros((0, 4), np.float32),
                        concepts=(caption, *phrases),
                        box_concepts=np.zeros(0, np.int32),
                        caption=caption,
                    ),
                )

    def _parse(self, captions: list[str], pairs: list[Pair]) -> list[list[str]]:
        """Returns the phrases of each pair: its own, else those that are found in its caption."""
        wanted = [caption for caption, pair in zip(captions, pairs, strict=True) if pair.phrases is None]
        found: Iterator[list[str]] = iter([[]] * len(wanted))
        if self._pipeline and wanted:
            found = iter(noun_phrases(wanted, pipeline=self._pipeline, max_phrases=self._max_phrases))
        return [next(found) if pair.phrases is None else pair.phrases[: self._max_phrases] for pair in pairs]


class TsvReader(PairReader):
    """Lines of a TSV and their images in a folder."""

    def __init__(self, path: Path, folder: str, *, shard_size: int, **options: Any):
        self._path, self._folder, self._starts = path, os.path.realpath(folder), [0]
        at, self.num_items = 0, 0
        first: list[str] = []
        with path.open("rb") as file:
            for line in file:
                at += len(line)
                if line.strip():
                    self.num_items += 1
                    if len(first) < 64 and b"\t" in line:
                        first.append(parse_pair(line.rstrip(b"\n"))[0])
                    if self.num_items % shard_size == 0:
                        self._starts.append(at)
        if self._starts[-1] < at or not at:
            self._starts.append(at)
        super().__init__([path], num_shards=len(self._starts) - 1, **options)
        self.inputs = {str(path): describe_file(path)}
        probe_images(self._folder, (name for name in first if not unsafe_path(name)), path)

    def pairs(self, shard: int, tally: Tally) -> Iterator[Pair]:
        """Yields the pairs of the lines of a shard."""
        with self._path.open("rb") as file:
            file.seek(self._starts[shard])
            while file.tell() < self._starts[shard + 1]:
                line = file.readline().rstrip(b"\r\n")
                if not line.strip():
                    continue
                tally.seen += 1
                if b"\t" not in line:
                    tally.dropped["line without a tab"] += 1
                    continue
                name, caption, phrases, repaired = parse_pair(line)
                if unsafe_path(name):
                    tally.dropped["file name outside the folder"] += 1
                    continue
                tally.noted.update(repaired)
                try:
                    image = resolve(self._folder, name)
                except UnusableError as error:
                    tally.dropped[error.reason] += 1
                    continue
                yield Pair(name, image, caption, phrases if line.count(b"\t") > 1 else None)


class _HashingFile:
    """A file that is read once from begin to end, and the sha256 of what was read."""

    def __init__(self, file: BinaryIO):
        self._file, self.digest, self.last = file, hashlib.sha256(), b""

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self.digest.update(data)
        self.last = data[-512:] or self.last
        return data


class TarReader(PairReader):
    """Samples of webdataset tar files, one file a shard."""

    def __init__(self, paths: list[Path], **options: Any):
        super().__init__(paths, num_shards=len(paths), **options)
        self._paths = paths

    def pairs(self, shard: int, tally: Tally) -> Iterator[Pair]:
        """Yields the pairs of one tar file, read as a stream."""
        path = self._paths[shard]
        table = _read_parquet(path.with_suffix(".parquet"), tally)
        num_samples = 0
        with path.open("rb") as raw:
            hashing = _HashingFile(raw)
            for key, files in _samples(hashing, tally):
                num_samples += 1
                if pair := _to_pair(f"{path.name}/{key}", files, table.get(key, ""), tally):
                    yield pair
            while hashing.read(1 << 20):  # the end of a tar is padding that no reader needs
                pass
            if path.suffix == ".tar" and any(hashing.last) and not tally.dropped[_CUT]:
                tally.dropped[_CUT] += 1  # tarfile takes a cut between two files for the end, which is a block of zeros
                tally.seen += 1
            tally.inputs[str(path)] = {"sha256": hashing.digest.hexdigest()}
        lost = max(len(table) - num_samples, 0)
        if lost:
            tally.dropped["downloaded, but not in the tar"] += lost
        tally.seen += num_samples + lost


def _read_parquet(path: Path, tally: Tally) -> dict[str, str]:
    """Returns the caption of each downloaded sample by key; empty without a parquet."""
    if not path.is_file():
        return {}
    import pyarrow.parquet

    present = set(pyarrow.parquet.read_schema(path).names)
    rows = pyarrow.parquet.read_table(path, columns=sorted({"key", "caption", "status"} & present)).to_pylist()
    statuses = collections.Counter(row.get("status", "success") for row in rows)
    tally.noted.update({f"not downloaded: {name}": num for name, num in statuses.items() if name != "success"})
    succeeded = [row for row in rows if row.get("status", "success") == "success"]
    return {str(row.get("key")): row.get("caption") or "" for row in succeeded}


def _samples(file: Any, tally: Tally) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yields key and files by suffix of each sample of a tar; of a tar that is cut, the samples before the cut."""
    current, files = "", dict[str, bytes]()
    try:
        with tarfile.open(fileobj=file, mode="r|*") as archive:
            for member in archive:
                folder, _, base = member.name.rpartition("/")
                stem, _, suffix = base.partition(".")
                if not member.isfile() or not stem:
                    continue
                key = f"{folder}/{stem}" if folder else stem
                if key != current:
                    if files:
                        yield current, files
                    current, files = key, {}
                if member.size > _MAX_FILE_BYTES:
                    tally.noted[f"file of more than {_MAX_FILE_BYTES} bytes left out"] += 1
                    files.setdefault("", b"")  # the sample exists
                    continue
                if content := archive.extractfile(member):
                    files[suffix.lower()] = content.read()
    except (tarfile.TarError, EOFError, OSError):
        tally.dropped[_CUT] += 1
        tally.seen += 1
    if files:  # before a cut it may be whole; if not, it is counted
        yield current, files


def _to_pair(name: str, files: dict[str, bytes], caption: str, tally: Tally) -> Pair | None:
    image = next((content for suffix, content in files.items() if suffix in _IMAGE_SUFFIXES), None)
    if image is None:
        tally.dropped["sample without an image"] += 1
        return None
    text = files.get("txt")
    if text is None and "json" in files:
        try:
            content = json.loads(files["json"])
        except ValueError:
            content = None
        caption = str((content.get("caption") if isinstance(content, dict) else None) or caption)
    if text is not None:
        caption = text.decode(errors="ignore")
        if caption.encode() != text:
            tally.noted["invalid UTF-8 left out"] += 1
    if not caption.strip():
        tally.dropped["empty caption" if text is not None else "sample without a caption"] += 1
        return None
    return Pair(name, image, caption, None)


def open_reader(source: str, images: str, *, shard_size: int, pipeline: str, max_phrases: int) -> Reader:
    """Returns the reader of a TSV with its image folder, or of a folder of tar files, or of one.

    Raises:
      ValueError: there are no tar files, or no noun phrases can be found here.
    """
    if pipeline:
        check_pipeline(pipeline)
    options = {"pipeline": pipeline, "max_phrases": max_phrases}
    path = Path(source)
    if path.is_dir() or ".tar" in path.suffixes:
        tars = sorted([*path.rglob("*.tar"), *path.rglob("*.tar.gz")]) if path.is_dir() else [path]
        if not tars:
            raise ValueError(f"--input={source} has no .tar file; it must be a TSV or a folder of webdataset shards")
        return TarReader(tars, **options)
    with path.open("rb") as file:
        if file.read(64).lstrip().startswith((b"{", b"[{")):
            raise ValueError(f"--input={source} is a json; image_text takes a TSV `image <tab> caption` or tar files")
    return TsvReader(path, images, shard_size=shard_size, **options)
