"""Files, also of buckets: text as people write it, file names from data, what is a file at all, locks."""

from __future__ import annotations

import codecs
import contextlib
import errno
import fcntl
import gc
import hashlib
import io
import json
import os
import re
import socket
import stat
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from absl import logging

from detclipv2_jax import atomic, buckets

_OTHER_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32", codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}  # fmt: skip
_MAX_LINE_BYTES = 1 << 26  # a longer line is no text
_MAX_NAME_BYTES = 120  # file systems take 255; suffixes, step numbers and partial files need room
_UNSAFE = re.compile(r"[^\w .,()+=@-]|^[ .-]|[ .]$")
# names that Windows keeps for devices, with any suffix
_RESERVED = re.compile(r"(?:con|prn|aux|nul|com\d|lpt\d)(?:\..*)?", re.IGNORECASE)


_ELSEWHERE = re.compile(r"(?!(?:gs|s3)://)(?:[A-Za-z][A-Za-z0-9+.-]*://|(?:gs|s3):/)")


# of an error that says that the disk takes no more; EFBIG: a limit on the size of files
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


class NotRegularError(OSError):
    """A path names a folder, a pipe, a socket or a device, where a file is needed."""


class LockedError(RuntimeError):
    """Another process holds a lock; the message is what it wrote of itself."""


def no_room(error: BaseException) -> str:
    """Returns why a disk takes no more, where an error, which may be of a library, says so; "" otherwise."""
    return next((text for text in map(os.strerror, _NO_ROOM) if text in str(error)), "")


def check_here(place: str, *, where: str) -> None:
    """Raises a ValueError for hf://, https://, gs:/ and the like, which would become a folder of that name here."""
    if _ELSEWHERE.match(place):
        raise ValueError(
            f"{where}={place} is neither on this machine nor in a bucket (gs://, s3://), where files can be read and "
            "written; copy what you need, and name the copy"
        )


def check_empty(folder: Path) -> None:
    """Raises a ValueError where a folder to be written, --output, holds something already."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"--output: {folder} holds something already; give a new folder")


def read_bytes(path: str | os.PathLike[str], *, num: int = -1) -> bytes:
    """Returns the content of a regular file, or its first bytes.

    A pipe or device, which may give nothing or have no end, is not opened.

    Raises:
      NotRegularError: the path names something else.
      OSError: as `open`.
      buckets.BucketError: a file of a bucket cannot be fetched.
    """
    if buckets.place_of(path):
        return buckets.content(path)
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise NotRegularError(f"{os.fspath(path)} is not a regular file")
    with open(path, "rb") as file:
        return file.read(num)


def sha256(path: str | os.PathLike[str]) -> str:
    """Returns the hex SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def beginning(path: str | os.PathLike[str]) -> bytes:
    """Returns the first 4 KiB of a text file; errors as `read_bytes` and `without_mark`."""
    return without_mark(read_bytes(path, num=4096), where=path)


def without_mark(data: bytes, *, where: str | os.PathLike[str]) -> bytes:
    """Returns the text of a file, or its beginning, without a UTF-8 byte order mark.

    Raises:
      ValueError: it is UTF-16 or UTF-32, with a byte order mark or without.
    """
    encoding = next((name for mark, name in _OTHER_MARKS.items() if data.startswith(mark)), "")
    if not encoding and 4 * data[:256].count(0) > len(data[:256]):
        encoding = "UTF-16 or UTF-32"
    if encoding:
        raise ValueError(f"{os.fspath(where)} is {encoding}; save it as UTF-8")
    return data.removeprefix(codecs.BOM_UTF8)


def decode(data: bytes, *, where: str | os.PathLike[str]) -> str:
    """Returns the text of a file without a byte order mark; ValueError if it is not UTF-8."""
    try:
        return without_mark(data, where=where).decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{os.fspath(where)} is not UTF-8: byte {data[error.start]:#x} at position {error.start}; save it as UTF-8"
        ) from None


def read_lines(path: str | os.PathLike[str]) -> list[str]:
    """Returns the lines of a UTF-8 file, which end with LF, CRLF or CR; ValueError as `decode`."""
    lines = io.StringIO(decode(read_bytes(path), where=path), newline=None).read().split("\n")
    return [line.removeprefix("\ufeff") for line in lines]  # of files that were joined


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """Holds the garbage collector, which looks through all objects that reading a json or tracing a program makes.

    That is a fifth of the time of the one and a quarter of the other's, and next to nothing of it is garbage.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def read_json(
    path: str | os.PathLike[str],
    *,
    object_hook: Callable[[dict[str, Any]], Any] | None = None,
    object_pairs_hook: Callable[[list[tuple[str, Any]]], Any] | None = None,
) -> Any:
    """Returns the content of a json file; ValueError, which names the file, where it is none. Hooks as of `json`."""
    return parse_json(
        decode(read_bytes(path), where=path), where=path, object_hook=object_hook, object_pairs_hook=object_pairs_hook
    )


def parse_json(text: str, *, where: str | os.PathLike[str], **hooks: Any) -> Any:
    """Returns the content of the text of the json file `where`; as `read_json`."""
    try:
        return json.loads(text, **hooks)
    except (ValueError, RecursionError) as error:  # ValueError: also of a number with thousands of digits
        raise ValueError(f"{os.fspath(where)} is no valid json: {error}") from None


def read_json_lines(path: str | os.PathLike[str]) -> tuple[list[dict[str, Any]], int]:
    """Returns the json objects of a file, one a line, and the number of lines that are none."""
    rows, num_other = list[dict[str, Any]](), 0
    for line in filter(None, read_bytes(path).split(b"\n")):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict):
            rows.append(row)
        else:
            num_other += 1
    return rows, num_other


def read_arrays(
    path: str | os.PathLike[str], names: Iterable[str], *, data: bytes | None = None
) -> dict[str, np.ndarray]:
    """Returns some arrays of a file that `np.savez` wrote, or of its content `data`.

    Raises:
      ValueError: it cannot be read or is another file. Neither are objects read, which run code, nor compressed arrays,
        which may have any size.
      OSError: it cannot be opened.
    """
    with io.BytesIO(read_bytes(path) if data is None else data) as file:
        try:
            with np.load(file, allow_pickle=False) as stored:
                if any(entry.compress_type for entry in stored.zip.infolist()):
                    raise ValueError("its arrays are compressed")
                return {name: stored[name] for name in names}
        except Exception as error:  # of zip, its compressions, NumPy's headers, memory: there are many
            raise ValueError(f"{os.fspath(path)} cannot be read ({type(error).__name__}: {error})") from error


def byte_lines(file: BinaryIO, *, where: str | os.PathLike[str]) -> Iterator[tuple[int, bytes]]:
    """Yields (position, line without its end) of a text file; a line ends with LF, CRLF or CR.

    Raises:
      ValueError: the file is UTF-16 or UTF-32, or a line has no end.
    """
    rest = file.read(1 << 20)
    text = without_mark(rest, where=where)
    position, rest = len(rest) - len(text), text
    while rest:
        more = file.read(1 << 20)
        lines = rest.splitlines(keepends=True)
        rest = lines.pop() + more if more else b""  # the last may go on; CRLF may be cut in two
        if len(rest) > _MAX_LINE_BYTES:
            raise ValueError(f"{os.fspath(where)} has a line of more than {_MAX_LINE_BYTES >> 20} MiB; it is no text")
        for line in lines:
            text = line.removeprefix(codecs.BOM_UTF8)  # of files that were joined
            yield position + len(line) - len(text), text.rstrip(b"\r\n")
            position += len(line)


def safe_name(name: object) -> str:
    """Returns a file name for whatever data call a thing: one part of a path, of 120 bytes at most.

    A name that is one already stays as it is. Of another the characters that are letters, digits or harmless stay, and
    a hash of the whole follows, so that different names do not become one.
    """
    text = str(name)
    safe = _UNSAFE.sub("_", unicodedata.normalize("NFC", text))
    if _RESERVED.fullmatch(safe) or not safe:
        safe = f"_{safe}"
    if safe == text and len(safe.encode()) <= _MAX_NAME_BYTES:
        return safe
    digest = hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:12]
    short = safe.encode()[: _MAX_NAME_BYTES - len(digest) - 1].decode(errors="ignore").rstrip(" .")
    return f"{short}-{digest}"


def safe_names(names: Iterable[object]) -> list[str]:
    """Returns a different `safe_name` for each thing; also where a file system takes "A" and "a" for one name."""
    last: dict[str, int] = {}  # the number that was given last to a name
    safe = []
    for given in names:
        stem = name = safe_name(given)
        while name.casefold() in last:
            last[stem.casefold()] += 1
            name = f"{stem}_{last[stem.casefold()]}"
        last[name.casefold()] = 1
        safe.append(name)
    return safe


def printable(name: object) -> str:
    """Returns a name for a line of a log: as it is, or escaped where it holds line ends or bytes that are no text."""
    text = str(name)
    return text if text.isprintable() else ascii(text)  # half of a surrogate pair is not printable either


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds the lock of a file, which is made if need be; the system forgets the lock of a killed process.

    It is a POSIX lock: child processes do not inherit it, and NFS has it between hosts. Where the file system has no
    locks, the log says that nobody is kept out.

    Raises:
      LockedError: another process holds it.
      OSError: the file cannot be made.
    """
    with path.open("a+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            raise LockedError(file.read().strip() or "it does not say which process it is") from None
        except OSError as error:
            logging.warning("%s cannot be locked (%s): another process there would not be noticed", path, error)
        if not (path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())):
            raise LockedError("it has just ended")  # and removed the file
        try:
            file.truncate(0)
            os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        except OSError as error:  # the lock holds without it
            logging.warning("%s: %s", path, error)
        yield


@contextlib.contextmanager
def only_writer(folder: Path, name: str = "") -> Iterator[None]:
    """Keeps other processes from writing to a folder, which is made if need be, or to what is called `name` there.

    Raises:
      ValueError: another process writes there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f".{name}.lock"
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(path))
        except LockedError as error:
            raise ValueError(
                f"another process writes to {folder / name} ({error}); wait for it, or choose another place"
            ) from None
        stack.callback(path.unlink, missing_ok=True)
        yield


def write_text(path: str | os.PathLike[str], pieces: Iterable[str]) -> None:
    """Writes a text file from its pieces, see `atomic.whole`."""
    # half of a surrogate pair, as in file names that are not UTF-8, becomes \\udcff, which JSON reads as the same
    with atomic.whole(path) as partial, partial.open("w", encoding="utf-8", errors="backslashreplace") as file:
        file.writelines(pieces)


def write_json(path: str | os.PathLike[str], content: Any, *, indent: int | None = None) -> None:
    """Writes a JSON file, see `atomic.whole`."""
    write_text(path, [json.dumps(content, indent=indent, ensure_ascii=False), "\n"])
