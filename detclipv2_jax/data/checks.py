"""Checks of files that annotations name: they exist, stay in their folder, and not too many are unusable."""

from __future__ import annotations

import functools
import hashlib
import itertools
import os
import stat
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath
from typing import ParamSpec, TypeVar

from detclipv2_jax import buckets
from detclipv2_jax.data.schema import DataError, UnusableError

_NUM_PROBED_FILES = 64
_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def documented(read: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Returns a reader (its first argument is a path) that raises DataError for files of another form than documented.

    Checking the type of every value of a large json would take longer than reading it.
    """

    @functools.wraps(read)
    def checked(*arguments: _Arguments.args, **options: _Arguments.kwargs) -> _Result:
        try:
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
            build = f"; python -m detclipv2_jax.prepare dictionary --input=… --output={path} builds one"
            problems.append(f"{key}: the {what} {path} does not exist{build * key.endswith('.dictionary')}")
    return problems


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
    wrong = " (`images` must name the folder that the file names are relative to)" * (len(missing) == total)
    problems = {f"do not exist{wrong}": missing, "are empty": empty}
    problems["are links out of the image folder, which follow_links allows"] = linked
    if missing or empty or linked:
        # all of them, each on a line: what is repaired one by one is started in vain as often
        named = ("\n  ".join([f"{len(bad)} of {total} photos {what}:", *bad]) for what, bad in problems.items() if bad)
        raise DataError(f"{where}: " + "\n".join(named))
    return digest.hexdigest()


def _exists(path: str) -> bool:
    try:
        buckets.fetch(path)
    except FileNotFoundError:
        return False
    return os.path.isfile(path)


def probe_images(folder: str, names: Iterable[str], path: str | Path) -> None:
    """Raises if not one of the first images exists: then the folder is wrong, not a few files."""
    names = list(itertools.islice(names, _NUM_PROBED_FILES))
    if names and not any(_exists(os.path.join(folder, name)) for name in names):
        raise ValueError(
            f"none of the first {len(names)} images of {path} exists in {folder} (the first is {names[0]}); "
            "the key `images` must name the folder that the file names are relative to"
        )
