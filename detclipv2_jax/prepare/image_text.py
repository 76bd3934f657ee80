"""Image-text pairs: a TSV with an image folder, or webdataset tar shards, also those of img2dataset with their parquet.

* TSV `image <tab> caption [<tab> JSON list of noun phrases]`, as `detclipv2_jax.data.sources` reads it.
* tar: files of one sample follow each other and share the name before the first dot: an image (jpg, jpeg, png, webp,
  bmp, gif, avif, tif, tiff) and the caption in .txt or, where that is empty, under `caption` in .json. A file may hold
  several archives, one after the other, and be compressed. Nothing is unpacked to disk.
* `00000.parquet` beside `00000.tar` (img2dataset): the caption where the tar has none; what was never downloaded is
  reported by its status, what was downloaded and is not in the tar is counted as dropped.

Captions are normalised, cut at a length, and get noun phrases, unless the TSV gives its own; see `phrases`. CC3M and
CC12M are read this way.
"""

from __future__ import annotations

import bz2
import collections
import gzip
import hashlib
import itertools
import json
import lzma
import os
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from detclipv2_jax import buckets, files
from detclipv2_jax.data.checks import missing_photos, resolve, unsafe_path
from detclipv2_jax.data.concepts import Vocabulary, is_visible
from detclipv2_jax.data.phrases import MAX_CHARACTERS, check_pipeline, normalize, noun_phrases
from detclipv2_jax.data.schema import Kind, Record, UnusableError
from detclipv2_jax.data.sources import is_json, parse_pair
from detclipv2_jax.prepare.box_json import describe_file
from detclipv2_jax.prepare.record_builder import Reader, RecordBuilder, Tally

_IMAGE_SUFFIXES = frozenset(suffix.removeprefix(".") for suffix in buckets.IMAGE_SUFFIXES)
_MAX_SAMPLE_BYTES = 1 << 28  # of what is read of a sample of a tar
_MAX_NAME_BYTES = 1 << 16  # of a header of a tar that holds a long name
_MAX_ZEROS = 1 << 16  # blocks between archives in a file
_MAX_EMPTY = 64  # reads at the end of a file
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
_NAME_TYPES = (
    tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE,
)  # fmt: skip
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
        pairs = self.pairs(shard, tally)
        while chunk := list(itertools.islice(pairs, _TOGETHER)):
            captions = normalize([pair.caption for pair in chunk])
            parsed = self._parse([caption[:MAX_CHARACTERS] for caption in captions], chunk)
            for pair, caption, phrases in zip(chunk, captions, parsed, strict=True):
                if not is_visible(caption):
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

    def __init__(self, path: Path, folder: str, *, shard_size: int, follow_links: bool, **options: Any):
        self._follow_links = follow_links
        self._path, self._folder, self._starts = path, os.path.realpath(folder), list[int]()
        self.num_items, end = 0, 0
        first: list[str] = []
        with path.open("rb") as file:
            for position, line in files.byte_lines(file, where=path):
                end = position + len(line)
                if line.strip():
                    if self.num_items % shard_size == 0:
                        self._starts.append(position)
                    self.num_items += 1
                    if len(first) < 64 and b"\t" in line:
                        first.append(parse_pair(line)[0])
        super().__init__([path], num_shards=len(self._starts), **options)
        self._starts.append(end)
        self.inputs = {str(path): describe_file(path)}
        first = [name for name in first if not unsafe_path(name)]
        if first and len(missing_photos(self._folder, len(first), first.__getitem__)) == len(first):
            raise ValueError(
                f"none of the first {len(first)} images of {path} exists in {folder} (the first is {first[0]}); "
                "--images must name the folder that the file names are relative to"
            )

    def pairs(self, shard: int, tally: Tally) -> Iterator[Pair]:
        start, end = self._starts[shard : shard + 2]
        with self._path.open("rb") as file:
            file.seek(start)
            for position, line in files.byte_lines(file, where=self._path):
                if start + position >= end:
                    break
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
                    image = resolve(self._folder, name, follow_links=self._follow_links)
                except UnusableError as error:
                    tally.dropped[error.reason] += 1
                    continue
                yield Pair(name, image, caption, phrases if line.count(b"\t") > 1 else None)


class _HashingFile:
    """A file that is read once from begin to end, and the sha256 of what was read."""

    def __init__(self, file: BinaryIO):
        self._file, self.digest = file, hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self.digest.update(data)
        return data


class _Ending:
    """A stream that is not read on and on after its end, as tarfile does where a header gives a size of petabytes."""

    def __init__(self, file: Any):
        self._file, self._num_empty = file, 0

    def read(self, size: int) -> bytes:
        data = self._file.read(size)
        self._num_empty += not data
        if self._num_empty > _MAX_EMPTY:
            raise EOFError("a file goes on after the end of its archive")
        return data


class _Member(tarfile.TarInfo):
    """A file of a tar; damage of an archive is an error, where tarfile takes it for the end."""

    @classmethod
    def fromtarfile(cls, tarfile_: Any) -> Any:
        """Returns the next file; tarfile's interface."""
        try:
            member = super().fromtarfile(tarfile_)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # a block of zeros: the end of an archive
            tarfile_.num_zeros += 1
            if tarfile_.num_zeros > _MAX_ZEROS:
                raise tarfile.ReadError("zeros without end") from None
            raise
        except tarfile.HeaderError as error:
            if isinstance(error, tarfile.EmptyHeaderError) and tarfile_.num_zeros:  # type: ignore[attr-defined]
                raise  # the end of the file
            raise tarfile.ReadError(f"no header of a file: {error}") from error
        tarfile_.num_zeros = 0
        return member

    def _proc_member(self, archive: tarfile.TarFile) -> Any:
        if self.type in _NAME_TYPES and self.size > _MAX_NAME_BYTES:
            raise tarfile.ReadError("a name without end")
        return super()._proc_member(archive)  # type: ignore[misc]


class _Archives(tarfile.TarFile):
    """The archives that follow each other in a stream."""

    tarinfo = _Member
    num_zeros = 0  # blocks of zeros after the last file
    members: list[tarfile.TarInfo]


def _unpacked(start: bytes, file: Any) -> Any:
    """Returns a stream of what a file holds that may be compressed by gzip (in any number of members), bzip2 or xz."""
    if start.startswith(b"\x1f\x8b"):
        return gzip.GzipFile(fileobj=file)
    if start.startswith(b"BZh"):
        return bz2.BZ2File(file)
    return lzma.LZMAFile(file) if start.startswith(b"\xfd7zXZ\0") else file


class TarReader(PairReader):
    """Samples of webdataset tar files, one file a shard."""

    def __init__(self, paths: list[Path], **options: Any):
        super().__init__(paths, num_shards=len(paths), **options)
        self._paths = paths

    def pairs(self, shard: int, tally: Tally) -> Iterator[Pair]:
        """Yields the pairs of one tar file, read as a stream."""
        path = self._paths[shard]
        stem = next(path.name.removesuffix(suffix) for suffix in TAR_SUFFIXES if path.name.endswith(suffix))
        table = _read_parquet(path.with_name(f"{stem}.parquet"), tally)
        num_samples = 0
        with path.open("rb") as raw:
            hashing = _HashingFile(raw)
            for key, contents in _samples(_unpacked(raw.peek(6), hashing), tally):
                num_samples += 1
                if pair := _to_pair(f"{path.name}/{key}", contents, table.get(key, ""), tally):
                    yield pair
            while hashing.read(1 << 20):  # what follows a cut
                pass
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

    damages = (ValueError, OSError, OverflowError, pyarrow.ArrowException)  # of other versions, types out of range
    try:
        present = set(pyarrow.parquet.read_schema(path).names)
        rows = pyarrow.parquet.read_table(path, columns=sorted({"key", "caption", "status"} & present)).to_pylist()
    except damages as error:
        raise ValueError(f"{path} is damaged: {error}; download it again, or remove it") from error
    statuses = collections.Counter(row.get("status", "success") for row in rows)
    tally.noted.update({f"not downloaded: {name}": num for name, num in statuses.items() if name != "success"})
    succeeded = [row for row in rows if row.get("status", "success") == "success"]
    captions = {str(row.get("key")): row.get("caption") for row in succeeded}
    return {key: caption if isinstance(caption, str) else "" for key, caption in captions.items()}


def _samples(file: Any, tally: Tally) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yields key and files by suffix of each sample of a tar; of a tar that is cut, the samples before the cut."""
    current, contents, num_bytes = "", dict[str, bytes](), 0
    keys = set[str]()
    stream: Any = _Ending(file)
    try:
        with _Archives.open(fileobj=stream, mode="r|", ignore_zeros=True) as archive:
            while member := archive.next():
                archive.members.clear()  # it would remember all of them
                folder, _, base = member.name.rpartition("/")
                stem, _, suffix = base.partition(".")
                suffix = suffix.lower()
                is_link = member.islnk() or member.issym()
                if not (member.isfile() or is_link) or not stem:
                    continue
                key = f"{folder}/{stem}" if folder else stem
                if key != current or suffix in contents:
                    if contents:
                        yield current, contents
                    if key in keys:
                        tally.noted["sample with the key of another"] += 1
                    keys.add(key)
                    current, contents, num_bytes = key, {}, 0
                contents.setdefault("", b"")  # the sample exists, whatever it holds
                if suffix not in _IMAGE_SUFFIXES and suffix not in ("txt", "json"):
                    continue
                if is_link:  # to a file that is behind: the archive is read as a stream
                    tally.noted["link in an archive left out"] += 1
                    continue
                num_bytes += member.size
                if num_bytes > _MAX_SAMPLE_BYTES:
                    tally.noted[f"file beyond {_MAX_SAMPLE_BYTES} bytes of a sample left out"] += 1
                elif content := archive.extractfile(member):
                    contents[suffix] = content.read()
    # ValueError, LookupError, RecursionError: of headers without sense
    except (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError, ValueError, LookupError, RecursionError):
        tally.dropped[_CUT] += 1
        tally.seen += 1
    if contents:  # before a cut it may be whole; if not, it is counted
        yield current, contents


def _captions(contents: dict[str, bytes], tally: Tally) -> Iterator[str]:
    """Yields the captions that a sample has, the first to be preferred."""
    for suffix in {"txt", "json"} & contents.keys():
        try:
            contents[suffix] = files.without_mark(contents[suffix], where="")
        except ValueError:
            tally.noted["caption in UTF-16 left out"] += 1
            contents[suffix] = b""
    text = contents.get("txt", b"")
    caption = text.decode(errors="ignore")
    if caption.encode() != text:
        tally.noted["invalid UTF-8 left out"] += 1
    yield caption
    try:
        content = json.loads(contents.get("json") or b"{}")
    except (ValueError, RecursionError):
        content = None
    value = content.get("caption") if isinstance(content, dict) else None
    if isinstance(value, str):
        yield value
    elif value is not None:
        tally.noted["caption that is no text left out"] += 1


def _to_pair(name: str, contents: dict[str, bytes], known: str, tally: Tally) -> Pair | None:
    """Returns the pair of a sample, None with its reason counted where it is none.

    `name` is without the suffix, `known` the parquet's caption.
    """
    suffix = next((suffix for suffix in contents if suffix in _IMAGE_SUFFIXES), None)
    if suffix is None:
        tally.dropped["sample without an image"] += 1
        return None
    caption = next((text for text in (*_captions(contents, tally), known) if text.strip()), "")
    if not caption:
        tally.dropped["empty caption" if "txt" in contents else "sample without a caption"] += 1
        return None
    return Pair(f"{name}.{suffix}", contents[suffix], caption, None)  # photos of other sets are known by their files


def open_reader(
    source: str, images: str, *, shard_size: int, pipeline: str, max_phrases: int, follow_links: bool = False
) -> Reader:
    """Returns the reader of a TSV with its image folder, or of a folder of tar files, or of one.

    Raises:
      ValueError: there are no tar files, or no noun phrases can be found here.
    """
    if pipeline:
        check_pipeline(pipeline)
    options = {"pipeline": pipeline, "max_phrases": max_phrases}
    path = Path(source)
    if path.is_dir() or path.name.endswith(TAR_SUFFIXES):
        tars = (
            sorted(found for found in path.rglob("*") if found.name.endswith(TAR_SUFFIXES)) if path.is_dir() else [path]
        )
        if not tars:
            raise ValueError(f"--input={source} has no .tar file; it must be a TSV or a folder of webdataset shards")
        if other := [tar for tar in tars if not tar.is_file()]:
            raise ValueError(f"--input: {other[0]} is no file, but a folder, a pipe, a device or a link to nothing")
        return TarReader(tars, **options)
    if is_json(path):
        raise ValueError(f"--input={source} is a json; image_text takes a TSV `image <tab> caption` or tar files")
    return TsvReader(path, images, shard_size=shard_size, follow_links=follow_links, **options)
