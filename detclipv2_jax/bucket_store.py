"""Objects of gs:// and s3:// buckets: read, written on condition, listed.

TensorStore, which checkpoints rest on, speaks to the servers, with the credentials that their own tools use, and tries
again for a minute what fails. AWS_ENDPOINT_URL names another server of S3's kind.
"""

from __future__ import annotations

import concurrent.futures
import errno
import functools
import itertools
import os
import re
from collections.abc import Callable, Collection
from pathlib import PurePosixPath
from typing import Any, NamedTuple

_DRIVERS = {"gs": "gcs", "s3": "s3"}  # of TensorStore
_NUM_AT_ONCE = 32  # requests; a bucket of TensorStore's sends no more
_RETRIES = {"max_retries": 8, "initial_delay": "500ms", "max_delay": "16s"}
# a server that sends nothing for so long is asked again
_PATIENCE = {"CONNECT_TIMEOUT_SECONDS": "20", "LOW_SPEED_LIMIT_BYTES": "1", "LOW_SPEED_TIME_SECONDS": "30"}
_HINTS = {
    "PERMISSION_DENIED": "look at its permissions and at the credentials of this machine",
    "UNAUTHENTICATED": "give this machine credentials: `gcloud auth application-default login`, AWS_PROFILE …",
    "NOT_FOUND": "is there such a bucket?",
}


class BucketError(RuntimeError):
    """A bucket cannot be read or written, or what is read has no room; the message says what to do."""


class Place(NamedTuple):
    """An object of a bucket, or what all objects below it have in common."""

    scheme: str
    bucket: str
    key: str  # without "/" at its ends

    def __str__(self) -> str:
        return f"{self.scheme}://{self.bucket}/{self.key}"

    def below(self, name: str) -> Place:
        """Returns the place of an object by its name in this folder."""
        return self._replace(key=f"{self.key}/{name}".strip("/"))


def place(text: object) -> Place | None:
    """Returns what a gs:// or s3:// name means, None for anything else; ValueError for one without a bucket."""
    match = re.fullmatch(r"(gs|s3)://([^/]*)(.*)", text, re.DOTALL) if isinstance(text, str) else None
    if match is None:
        return None
    scheme, bucket, key = match.groups()
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]+[a-z0-9]", bucket) or not _is_safe(key.strip("/") or "x"):
        raise ValueError(f"{text!r} names no bucket and path; e.g. {scheme}://bucket/folder/file")
    return Place(scheme, bucket, key.strip("/"))


def _is_safe(key: str) -> bool:
    """Returns whether a key, which may be a stranger's, is a path that stays in its folder."""
    return "\0" not in key and str(PurePosixPath(key)) == key and not {"", ".", ".."} & set(key.split("/"))


@functools.cache
def _opened(scheme: str, bucket: str, endpoint: str) -> Any:
    """Returns TensorStore's view of a whole bucket."""
    for name, value in _PATIENCE.items():
        os.environ.setdefault(f"TENSORSTORE_CURL_{name}", value)
    import tensorstore  # here: only where a bucket is named

    driver = _DRIVERS[scheme]
    spec = {"driver": driver, "bucket": bucket}
    if scheme == "s3" and endpoint:
        spec |= {"endpoint": endpoint, "aws_region": os.environ.get("AWS_REGION", "us-east-1")}
    context = tensorstore.Context({f"{driver}_request_retries": _RETRIES})
    return tensorstore.KvStore.open(spec, context=context).result()


def _store(where: Place) -> Any:
    return _opened(where.scheme, where.bucket, os.environ.get("AWS_ENDPOINT_URL", ""))


def _ask(where: Place, doing: str, question: Callable[[Any], Any]) -> Any:
    """Returns the answer of a bucket; BucketError that names it, TensorStore's reason and what helps."""
    try:
        return question(_store(where)).result()
    except Exception as error:  # ValueError of every kind, and others
        reason = str(error).strip().partition("\n")[0][:300]
        hint = next((f"; {hint}" for status, hint in _HINTS.items() if status in reason), "")
        raise BucketError(f"{where} cannot be {doing}: {reason}{hint}") from error


def begin(where: Place, *, known: bytes = b"") -> Any:
    """Begins to read an object and returns what `read` takes; 32 of a bucket are read at once, the others wait."""
    return _store(where).read(where.key, if_not_equal=known or None)


def read(where: Place, *, known: bytes = b"", begun: Any = None) -> tuple[bytes | None, bytes]:
    """Returns (content, version) of an object; the content is None where its version is the `known` one.

    Args:
      where: the object.
      known: a version.
      begun: what `begin` returned, if it was called for the object.

    Raises:
      FileNotFoundError: there is no such object.
      BucketError: the bucket does not answer, or does not let us.
    """
    found = _ask(where, "read", lambda store: begun or store.read(where.key, if_not_equal=known or None))
    if found.state == "missing":
        end = where.key + "\0"  # an object that is gone is one thing, a bucket another
        _ask(where, "read", lambda store: store.list(_range(where.key, end)))
        raise FileNotFoundError(errno.ENOENT, "there is no such object", str(where))
    return found.value if found.state == "value" else None, found.stamp.generation


def write(where: Place, content: bytes | None, *, known: bytes | None = None) -> bytes | None:
    """Writes an object, or deletes it (None); returns its new version.

    With a version `known`, or b"" for none, only if it still is that one; returns None if it is not. A write whose
    answer was lost and that was done again counts as done.
    """
    given = None if known is None else known or _NO_OBJECT
    stamp = _ask(where, "written", lambda store: store.write(where.key, content, if_equal=given))
    if known is None or stamp.generation:
        return stamp.generation
    try:
        found, version = read(where)
    except FileNotFoundError:
        found, version = None, b""
    return version if found == content else None


_NO_OBJECT = b"\x02"  # TensorStore's version of an object that is not there


def _range(first: str, end: str) -> Any:
    import tensorstore

    return tensorstore.KvStore.KeyRange(first, end)


def names_below(folder: Place) -> list[str]:
    """Returns the names of all objects below a folder, without those that would be no file in it."""
    return sorted(names_that_begin(folder, [""]))


def names_that_begin(folder: Place, beginnings: Collection[str]) -> list[str]:
    """Returns the names of objects below a folder that begin like one of some texts, which are listed at once.

    An answer holds a thousand names at most, and the next thousand can be asked for only then.
    """
    lead = f"{folder.key}/" if folder.key else ""
    keys = [f"{lead}{beginning}".encode(errors="replace").decode() for beginning in beginnings]
    with concurrent.futures.ThreadPoolExecutor(_NUM_AT_ONCE) as pool:
        return [*itertools.chain.from_iterable(pool.map(lambda key: _listed(folder, key), keys))]


def _listed(folder: Place, beginning: str) -> list[str]:
    """Returns the names relative to a folder of the objects whose keys begin like that."""
    lead = f"{folder.key}/" if folder.key else ""
    end = beginning[:-1] + chr(min(ord(beginning[-1]) + 1, 0x10FFFF)) if beginning else ""
    keys = _ask(folder, "listed", lambda store: store.list(_range(beginning, end)))
    return [*filter(_is_safe, (key.decode(errors="replace")[len(lead) :] for key in keys))]
