"""Files of gs:// and s3:// buckets, as files of this machine: fetched into a bounded cache, uploaded when whole.

gs://bucket/coco/train.json is <cache>/files/gs/bucket/coco/train.json: names are translated where they are given, and
the rest of the program knows paths only. A file is fetched once, and asked for again once a run whether it changed.
Photos of a folder are fetched when they are read. Where the cache is full, what was fetched first goes: photos at any
time, other files after a week.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import fnmatch
import functools
import os
import re
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from detclipv2_jax import atomic, bucket_store
from detclipv2_jax.bucket_store import BucketError, Place, names_below, place, read, write

if TYPE_CHECKING:
    from ml_collections import ConfigDict

BUILDING = "building"  # folder of an --output of `prepare`, where several machines leave their parts
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".avif", ".tif", ".tiff")
_NUM_THREADS = 8
_UNUSED_S = 7 * 24 * 3600


def root() -> str:
    """Returns the folder of the cache: DETCLIP_BUCKET_CACHE, or one in the home."""
    folder = os.environ.get("DETCLIP_BUCKET_CACHE") or os.path.expanduser("~/.cache/detclipv2_jax/buckets")
    return _real(folder)


_real = functools.cache(os.path.realpath)


def limit_bytes() -> int:
    """Returns the bytes that the cache may hold: DETCLIP_BUCKET_CACHE_GB, or 100 GB."""
    return int(float(os.environ.get("DETCLIP_BUCKET_CACHE_GB", 100)) * 1e9)


def path_of(where: Place, *, part: str = "files") -> Path:
    """Returns the path in the cache of an object or a folder."""
    return Path(root(), part, where.scheme, where.bucket, where.key)


def place_of(path: str | os.PathLike[str], *, part: str = "files") -> Place | None:
    """Returns the object or folder that a path in the cache stands for, None of a path elsewhere."""
    text, lead = os.fspath(path), f"{root()}/{part}/"
    if not isinstance(text, str) or not text.startswith(lead):
        return None
    scheme, _, rest = text[len(lead) :].partition("/")
    bucket, _, key = rest.partition("/")
    return Place(scheme, bucket, key)


def is_workdir(path: str | os.PathLike[str]) -> bool:
    """Returns whether a path is in the copy of a workdir, which each process of a run has for itself."""
    return os.fspath(path).startswith(f"{root()}/workdirs/")


def name_of(path: str | os.PathLike[str]) -> str:
    """Returns the name of a path in the cache as people gave it; of another path that path."""
    text = os.fspath(path)
    match = re.fullmatch(rf"{re.escape(root())}/(?:files|workdirs/[^/]+)/(gs|s3)/(.*)", text, re.DOTALL)
    return f"{match[1]}://{match[2]}" if match else text


# --- the cache


def _since() -> float:
    """Returns when this run began, also to the processes that it starts: what was asked for later is up to date."""
    return float(os.environ.setdefault("DETCLIP_BUCKETS_SINCE", repr(time.time())))


def _known(path: str | os.PathLike[str], where: Place) -> bytes | None:
    """Returns the version of a file of the cache, b"" of none; None if the bucket need not be asked about it."""
    since = _since()
    with contextlib.suppress(OSError):
        facts = os.stat(path)
        if facts.st_mtime >= since or os.path.isdir(path):
            return None
        number, _, version = path_of(where, part="versions").read_bytes().partition(b" ")
        return version if number == str(facts.st_ino).encode() else b""
    return b""


_begun: dict[str, Any] = {}  # by path: reads that nobody has asked for yet


def begin(paths: Iterable[str]) -> None:
    """Begins to read photos that are not up to date in the cache, several at a time, and returns at once.

    `fetch` of the same path, which must follow, waits for its content; till then that is held in memory.
    """
    for path in paths:
        where = place_of(path)
        if where and path not in _begun and path.lower().endswith(IMAGE_SUFFIXES):
            known = _known(path, where)
            if known is not None:
                _begun[path] = bucket_store.begin(where, known=known)


def fetch(path: str | os.PathLike[str]) -> bytes | None:
    """Brings a file of the cache up to date, at most once a run; returns its content if it was fetched.

    Raises: as `read`; BucketError, too, where there is no room.
    """
    where, begun = place_of(path), _begun.pop(os.fspath(path), None)
    if where is None or (known := _known(path, where)) is None:
        return None
    version = path_of(where, part="versions")
    try:
        content, current = read(where, known=known, begun=begun)
    except FileNotFoundError:
        for stale in (Path(path), version):
            stale.unlink(missing_ok=True)
        raise
    try:
        if content is None:
            os.utime(path)
            return None
        _meter(root()).add(len(content))
        with atomic.whole(path) as partial:
            partial.write_bytes(content)
        with atomic.whole(version) as partial:
            partial.write_bytes(b"%d %s" % (os.stat(path).st_ino, current))
    except FileNotFoundError:  # another process made room
        return content if content is not None else fetch(path)
    except OSError as error:
        raise BucketError(
            f"{where} cannot be kept in {root()}: {error}; DETCLIP_BUCKET_CACHE names a folder"
        ) from error
    return content


def content(path: str | os.PathLike[str]) -> bytes:
    """Returns the content of a file of the cache, which is fetched if need be; raises as `fetch`."""
    while True:
        if (data := fetch(path)) is not None:
            return data
        with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:  # it may just have made room
            return file.read()


def version_of(path: str | os.PathLike[str]) -> str:
    """Returns a text that changes when a file of the cache changes in its bucket; raises as `fetch`."""
    fetch(path)
    where = place_of(path)
    return path_of(where, part="versions").read_bytes().partition(b" ")[2].hex() if where else ""


class _Meter:
    """Keeps a cache within its bound, about: the processes of a machine clean up every 64th of it that each adds."""

    def __init__(self, folder: str):
        self._folder, self._added, self._lock = folder, limit_bytes(), threading.Lock()

    def add(self, num_bytes: int) -> None:
        """Makes room for more; BucketError if there is none."""
        with self._lock:
            self._added += num_bytes
            if self._added > limit_bytes() / 64:
                self._added = 0
                self._clean(num_bytes)

    def _clean(self, num_bytes: int) -> None:
        entries = []
        for folder, _, names in os.walk(os.path.join(self._folder, "files")):
            for name in names:
                with contextlib.suppress(OSError):
                    facts = os.stat(os.path.join(folder, name))
                    entries.append((facts.st_mtime, facts.st_size, os.path.join(folder, name)))
        total = sum(size for _, size, _ in entries) + num_bytes
        goal = limit_bytes() * 0.95
        for when, size, path in sorted(entries):
            if total <= goal:
                return
            if path.lower().endswith(IMAGE_SUFFIXES) or when < time.time() - _UNUSED_S:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)
                total -= size
        if total > limit_bytes():
            raise BucketError(
                f"files of buckets in use come to {total / 1e9:,.2f} GB, more than the {limit_bytes() / 1e9:g} "
                f"that the cache {self._folder} may hold; raise DETCLIP_BUCKET_CACHE_GB, or let DETCLIP_BUCKET_CACHE "
                "name a folder on a larger disk"
            )


_meter = functools.cache(_Meter)


def fetch_all(paths: Iterable[str | os.PathLike[str]], *, missing_ok: bool = False) -> None:
    """Brings files of the cache up to date, several at a time; raises as `fetch`, once for all."""

    def bring(path: str | os.PathLike[str]) -> None:
        with contextlib.suppress(*[FileNotFoundError] if missing_ok else []):
            fetch(path)

    with concurrent.futures.ThreadPoolExecutor(_NUM_THREADS) as pool:
        try:
            for _ in pool.map(bring, paths):
                pass
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


# --- names that people give


def here(text: str) -> str:
    """Returns the path of a file, a folder or the files of a pattern in a bucket, all fetched; another text as it is.

    Raises:
      ValueError: there is none.
      BucketError: as `fetch`.
    """
    where = place(text)
    if where is None:
        return text
    plain = re.split(r"[*?\[]", where.key, maxsplit=1)[0]
    path = path_of(where)
    with contextlib.suppress(FileNotFoundError):
        if plain == where.key and where.key and not text.endswith("/"):
            fetch(path)
            if path.is_file():
                return str(path)
    folder = where if plain == where.key else where._replace(key=plain.rpartition("/")[0])
    names = [folder.below(name) for name in names_below(folder)]
    if folder != where:
        names = [name for name in names if fnmatch.fnmatchcase(name.key, where.key.replace("**/", "*"))]
    if not names:
        raise ValueError(f"{text}: the bucket has no such object, and none below it")
    if folder == where:
        remove_others(path, {path_of(name) for name in names})
    fetch_all(map(path_of, names))
    return str(path)


def remove_others(folder: Path, kept: set[Path]) -> None:
    """Removes files below a folder of the cache that its bucket does not have any more."""
    for path in sorted(folder.rglob("*"), reverse=True):  # what is in a folder comes before it
        with contextlib.suppress(OSError):  # not empty
            if path.is_dir():
                path.rmdir()
            elif path not in kept:
                path.unlink()


def folder_here(text: str) -> str:
    """Returns the path of a folder of photos, which are fetched when they are read; another text as it is."""
    where = place(text)
    if where is None:
        return text
    path_of(where).mkdir(parents=True, exist_ok=True)
    return str(path_of(where))


def localized(config: ConfigDict) -> ConfigDict:
    """Returns a configuration with paths of this machine for what it names in buckets, which is fetched.

    Photos of the folders `images` are fetched when they are read, `init_from.checkpoint` by `runs.checkpoints`.
    """
    found = config.copy_and_resolve_references()

    def visit(section: Any, key: str) -> None:
        for name in section:
            value = section[name]
            if hasattr(value, "keys"):
                visit(value, f"{key}{name}.")
            elif f"{key}{name}" in ("init_from.checkpoint", "closing"):
                continue
            elif isinstance(value, str):
                section[name] = (folder_here if name == "images" else here)(value)
            elif isinstance(value, tuple | list):
                section[name] = type(value)(here(part) if isinstance(part, str) else part for part in value)

    visit(found, "")
    return found


@contextlib.contextmanager
def arguments_here(options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yields options of a command with paths of this machine; an --output in a bucket is uploaded when all went well.

    Left alone are words, and what the command itself fetches: --workdir, --checkpoint, --finetuned, the configuration.
    """
    found, uploads, parts = dict(options), list[tuple[Path, Any]](), list[Place]()
    with contextlib.ExitStack() as stack:
        for name, value in options.items():
            if isinstance(value, Path) and re.match("(?:gs|s3):/", str(value)):
                raise ValueError(f"--{name}={value} must be on this machine")
            many = isinstance(value, tuple | list)
            if name in ("words", "workdir", "checkpoint") or not any(map(place, value if many else [value])):
                continue
            if name == "finetuned":
                raise ValueError(f"--{name}={value} must be on this machine")
            if name == "output":
                Path(root()).mkdir(parents=True, exist_ok=True)
                made = stack.enter_context(tempfile.TemporaryDirectory(prefix="output-", dir=root()))
                uploads.append((Path(made, PurePosixPath(value).name), place(value)))
                found[name] = str(uploads[-1][0])
                if options.get("count", 1) > 1 > options["index"] + 1:  # puts parts together
                    parts += download(uploads[-1][1].below(BUILDING), uploads[-1][0] / BUILDING)
            else:
                found[name] = type(value)(map(here, value)) if many else here(value)
        yield found
        for path, where in uploads:
            print(f"uploaded to {where}: {upload(path, where)} files")
        for part in parts:
            write(part, None)


def download(where: Place, folder: Path) -> list[Place]:
    """Writes all objects below a place to a folder, which is not of the cache; returns them."""
    names = names_below(where)

    def get(name: str) -> None:
        with atomic.whole(folder / name) as partial:
            partial.write_bytes(read(where.below(name))[0] or b"")

    with concurrent.futures.ThreadPoolExecutor(_NUM_THREADS) as pool:
        list(pool.map(get, names))
    return [where.below(name) for name in names]


def upload(path: Path, where: Place) -> int:
    """Writes a file, or all files of a folder, to a bucket; returns how many.

    What was written last here, which names the rest, is deleted there first and written last.
    """
    if path.is_file():
        write(where, path.read_bytes())
        return 1
    found = sorted((path for path in path.rglob("*") if path.is_file()), key=lambda path: path.stat().st_mtime_ns)

    def put(file: Path) -> None:
        write(where.below(file.relative_to(path).as_posix()), file.read_bytes())

    if found:
        with contextlib.suppress(FileNotFoundError):
            write(where.below(found[-1].relative_to(path).as_posix()), None)
        with concurrent.futures.ThreadPoolExecutor(_NUM_THREADS) as pool:
            list(pool.map(put, found[:-1]))
        put(found[-1])
    return len(found)
