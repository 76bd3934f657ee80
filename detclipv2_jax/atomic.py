"""Files that are written whole or not at all, whatever happens meanwhile; below `buckets`, on which `files` rests."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Gives an OSError of what is inside the name of the file, which those of writing do not have."""
    try:
        yield
    except OSError as error:
        if error.errno and error.filename is None:
            error.filename = os.fspath(path)
        raise


@contextlib.contextmanager
def whole(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields where to write a file, which replaces `path` when all went well; it stays as it was after anything else,
    and where it has that content already.

    The folder is made if need be. The place is beside `path`, so that the last step is one of the file system, and
    keeps the suffix, which some writers go by.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.stem}.{os.getpid()}-{threading.get_native_id()}{path.suffix}")
    try:
        with naming(path):
            yield partial
        if not _has_content_of(path, partial):
            os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _has_content_of(path: Path, other: Path) -> bool:
    if not path.is_file() or path.stat().st_size != other.stat().st_size:
        return False
    with path.open("rb") as file, other.open("rb") as other_file:
        while (part := file.read(1 << 20)) == other_file.read(1 << 20):
            if not part:
                return True
    return False
