"""Checks of files that annotations name: they exist, stay in their folder, and not too many are unusable."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import os
import re
import stat
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, ParamSpec, TypeVar

import numpy as np
from absl import logging

from detclipv2_jax import bucket_store, buckets, files
from detclipv2_jax.data.catalog import dictionary_command
from detclipv2_jax.data.schema import DataError, UnusableError

_FEW_FILES = 64  # are asked for one by one
_NUM_NAMED_FILES = 1000  # in a message
_NUM_PARTS, _NUM_SAMPLED = 32, 1000  # beginnings of names, which a bucket lists at once; names to choose them by
_NO_DICTIONARY = re.compile(  # as `missing_paths` says it, with one key or several
    r"^(config\.[\w., ]*\.dictionary): (the file .* does not exist; make it with\n    .*)\n?", re.MULTILINE
)
_WRONG_FOLDER = " (`images` must name the folder that the file names are relative to)"
_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def documented(read: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Returns a reader (its first argument is a path) that raises DataError for files of another form than documented.

    Checking the type of every value of a large json would take longer than reading it.
    """

    @functools.wraps(read)
    def checked(*arguments: _Arguments.args, **options: _Arguments.kwargs) -> _Result:
        try:
            with files.collector_paused():
                return read(*arguments, **options)
        except (
            AttributeError,
            EOFError,
            LookupError,
            OverflowError,
            RecursionError,
            TypeError,
            zipfile.BadZipFile,
        ) as error:
            raise DataError(
                f"{arguments[0]} does not have the documented form ({type(error).__name__}: {error})"
            ) from error

    return checked


def check_share(share: float) -> None:
    """Raises a ValueError unless a share is one, from 0 to 1: of NaN nothing would be too much."""
    if not 0 <= share <= 1:
        raise ValueError(f"max_bad_share is {share}; allowed: 0 to 1")


def refuse_above_share(bad: dict[str, int], total: int, share: float, *, what: str, where: str | Path) -> None:
    """Raises a DataError with the worst reasons if more than a share of what was read cannot be used."""
    check_share(share)
    num_bad = sum(bad.values())
    if num_bad > share * total:
        worst = ", ".join(f"{count} {reason}" for reason, count in sorted(bad.items(), key=lambda item: -item[1])[:5])
        raise DataError(
            f"{where}: {num_bad} of {total} {what} cannot be used ({worst}); "
            f"max_bad_share allows {share:.2%}: repair the data or raise it"
        )


def unsafe_path(name: str) -> bool:
    """Returns whether a file name of an annotation would leave its folder."""
    path = PurePosixPath(name.replace("\\", "/"))
    return not name or path.is_absolute() or ".." in path.parts or "\0" in name


def resolve(folder: str, name: str, *, follow_links: bool = False) -> str:
    """Returns the path of an image inside a folder; `folder` is absolute and free of symbolic links.

    Raises:
      UnusableError: a symbolic link leads out of the folder, and `follow_links` does not allow it.
    """
    path = folder
    for part in PurePosixPath(name).parts:
        path = f"{path}/{part}"
        if not follow_links and os.path.islink(path):
            # rare; resolving every path from the root would cost as much as reading its header
            whole = os.path.realpath(os.path.join(folder, name))
            if not whole.startswith(folder + os.sep):
                raise UnusableError("link out of the image folder: follow_links allows them")
            return whole
    return path


def missing_paths(paths: dict[str, tuple[str, str]]) -> list[str]:
    """Returns a message for each (path, "file" or "folder") that does not exist, by config key."""
    problems = []
    for key, (path, what) in paths.items():
        if not path:
            problems.append(f"{key} is empty; it must name a {what}")
        elif not (Path(path).is_file() if what == "file" else Path(path).is_dir()):
            build = f"; make it with\n    {dictionary_command(path)}" if key.endswith(".dictionary") else ""
            problems.append(f"{key}: the {what} {path} does not exist{build}")
    return problems


def dictionary_once(problems: Sequence[str]) -> list[str]:
    """Returns messages in which a missing dictionary stands once, led by all the keys that name it."""
    keys: dict[str, list[str]] = {}
    for key, message in itertools.chain.from_iterable(map(_NO_DICTIONARY.findall, problems)):
        keys.setdefault(message, []).append(key)

    def said(match: re.Match[str]) -> str:
        named = keys.pop(match[2], [])
        return f"{', '.join(named)}: {match[2]}\n" if named else ""

    once = [_NO_DICTIONARY.sub(said, problem).rstrip("\n") for problem in problems]
    return [problem for problem in once if problem]


def _named(paths: list[str]) -> str:
    """Returns paths, each on a line; of very many the first, and which file has all of them."""
    lines = [files.printable(buckets.name_of(path)) for path in paths]
    if len(lines) > _NUM_NAMED_FILES:
        try:
            options: Any = {"prefix": "photos-", "suffix": ".txt", "encoding": "utf-8", "delete": False}
            with tempfile.NamedTemporaryFile("w", **options) as file:
                file.writelines(f"{line}\n" for line in lines)
            rest = f"all of them are in {file.name}"
        except OSError as error:
            rest = f"no list of them could be written: {error}"
        lines[_NUM_NAMED_FILES:] = [f"and {len(lines) - _NUM_NAMED_FILES} more; {rest}"]
    return "\n  ".join(lines)


def photo_facts(paths: Iterable[str], *, where: str | Path, folder: str = "") -> str:
    """Returns a digest of the names, sizes and times of photos, which changes when a photo is exchanged.

    With a `folder`, that of all photos, they may not be links out of it.

    Raises:
      DataError: photos are missing, empty or such links; says how many, and names all of them.
    """
    paths = list(paths)
    buckets.fetch_all(filter(buckets.place_of, paths), missing_ok=True)
    digest, missing, empty, linked, total = hashlib.sha256(), [], [], [], 0
    for path in paths:
        total += 1
        try:
            version = buckets.version_of(path)
            facts = os.stat(path)
        except (OSError, ValueError):
            facts = None
        if facts is None or not stat.S_ISREG(facts.st_mode):
            missing.append(path)
            continue
        if not facts.st_size:
            empty.append(path)
        try:
            resolve(folder, path[len(folder) + 1 :], follow_links=not folder)
        except UnusableError:
            linked.append(path)
        version = version or str(facts.st_mtime_ns)
        digest.update(f"{os.path.basename(path)}\0{facts.st_size}\0{version}\n".encode(errors="replace"))
    wrong = _WRONG_FOLDER * (len(missing) == total)
    problems = {f"do not exist{wrong}": missing, "are empty": empty}
    problems["are links out of the image folder, which follow_links allows"] = linked
    if missing or empty or linked:
        # all of them, each on a line: what is repaired one by one is started in vain as often
        named = (f"{len(bad)} of {total} photos {what}:\n  {_named(bad)}" for what, bad in problems.items() if bad)
        raise DataError(f"{where}: " + "\n".join(named))
    return digest.hexdigest()


def _files_in(folder: str, below: Iterable[str]) -> Iterator[str]:
    """Yields the names of regular files in some folders `below` a folder ("" is itself), links left out."""
    for head in below:
        with contextlib.suppress(OSError), os.scandir(os.path.join(folder, head)) as entries:
            for entry in entries:
                if entry.is_file(follow_symlinks=False):
                    yield f"{head}/{entry.name}" if head else entry.name


def _unlisted(folder: str, num: int, name_of: Callable[[int], str]) -> tuple[list[int], bool]:
    """Returns which of `num` files a listing of their folders does not have, and whether each is to be asked for.

    One listing takes a fraction of the time of asking for every file. Names are compared by their hashes: millions of
    texts would take a gigabyte.
    """
    if num <= _FEW_FILES:
        return [*range(num)], True
    place, heads = buckets.place_of(folder), set[str]()

    def noted(name: str) -> int:
        heads.add(name.rpartition("/")[0])
        return hash(name)

    wanted = np.fromiter((noted(name_of(i)) for i in range(num)), np.int64, num)
    found: Iterable[str] = _files_in(folder, heads)
    if place:
        some, length = [name_of(i) for i in range(0, num, -(-num // _NUM_SAMPLED))], 0
        while length < len(some[0]) and len({name[: length + 1] for name in some}) <= _NUM_PARTS:
            length += 1
        try:
            found = bucket_store.names_that_begin(place, {name_of(i)[:length] for i in range(num)})
        except bucket_store.BucketError as error:  # who may read need not be allowed to list
            logging.warning("only the first %d photos are looked for: %s", _FEW_FILES, error)
            return [*range(_FEW_FILES)], True
    listed = np.fromiter(map(hash, found), np.int64)
    return np.flatnonzero(~np.isin(wanted, listed)).tolist(), place is None


def missing_photos(folder: str, num: int, name_of: Callable[[int], str]) -> list[str]:
    """Returns the paths of those of `num` photos that a folder does not have.

    Args:
      folder: absolute, also of a bucket.
      num: of photos.
      name_of: returns the name of one, relative to the folder.
    """
    indices, ask = _unlisted(folder, num, name_of)
    paths = [f"{folder}/{name_of(i)}" for i in indices]
    if ask:
        buckets.fetch_all(filter(buckets.place_of, paths), missing_ok=True)
        paths = [path for path in paths if not os.path.isfile(path)]
    return paths


def check_photos(
    folder: str, num: int, name_of: Callable[[int], str], *, where: str | Path, max_bad_share: float
) -> None:
    """Raises a DataError that names all photos which are missing, if they are more than a share; else the log does.

    Arguments as for `missing_photos`; `where` is what names them.
    """
    check_share(max_bad_share)
    missing = missing_photos(folder, num, name_of)
    if not missing:
        return
    hint = _WRONG_FOLDER if len(missing) == num else f"; max_bad_share allows {max_bad_share:.2%}"
    message = f"{where}: {len(missing)} of {num} photos do not exist{hint}:\n  {_named(missing)}"
    if len(missing) > max_bad_share * num:
        raise DataError(message)
    logging.warning("%s", message)
