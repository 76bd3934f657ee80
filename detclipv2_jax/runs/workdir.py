"""The folder of a run: one run at a time in it, and room for its files."""

from __future__ import annotations

import contextlib
import pathlib
import shutil
from collections.abc import Iterator
from typing import TYPE_CHECKING

from detclipv2_jax import files

if TYPE_CHECKING:
    from ml_collections import ConfigDict


class WorkdirError(RuntimeError):
    """A workdir cannot take a run or what it writes; the message says why and what to do."""


def read_config(workdir: str | pathlib.Path) -> ConfigDict:
    """Returns the configuration of a run or an export; ValueError if `workdir` holds none."""
    from detclipv2_jax import config_json  # here: its values can be had without ml_collections

    path = pathlib.Path(workdir) / "config.json"
    if not path.is_file():
        raise ValueError(
            f"{workdir} is no workdir: it has no config.json; give the --workdir of a training run, or the folder of "
            "an export"
        )
    return config_json.from_json(files.decode(files.read_bytes(path), where=path), where=str(path))


@contextlib.contextmanager
def only_run(workdir: pathlib.Path) -> Iterator[None]:
    """Keeps other runs out of a workdir, which is made if need be; the system forgets the lock of a killed process.

    The lock is <workdir>/lock, which goes with the run; see `files.locked`.

    Raises:
      WorkdirError: another process trains there, or nothing can be written there.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        stack = contextlib.ExitStack()
        stack.enter_context(files.locked(workdir / "lock"))
        stack.callback((workdir / "lock").unlink, missing_ok=True)  # a run that is done leaves what it found
    except files.LockedError as error:
        raise WorkdirError(f"another run trains in {workdir} ({error}); stop it, or give another --workdir") from None
    except OSError as error:
        raise WorkdirError(
            f"nothing can be written to the workdir {workdir}: {error}; give another --workdir"
        ) from error
    with stack:
        try:
            yield
        except Exception as error:
            if not (workdir / "lock").exists():
                raise gone(workdir) from error
            raise


@contextlib.contextmanager
def room(folder: pathlib.Path, needed: int = 0, *, what: str = "this run") -> Iterator[None]:
    """Checks for `needed` bytes on the disk of a folder, and explains errors inside that say that it takes no more.

    Raises:
      WorkdirError: there is no room for `what`, or the folder is gone.
    """

    def free() -> int:
        try:
            return shutil.disk_usage(folder).free
        except OSError as error:
            raise gone(folder) from error

    def full(why: str) -> WorkdirError:
        need = f"it needs {needed / 1e6:,.2f} MB, and " if needed else ""
        return WorkdirError(
            f"no room for {what}: {need}{folder} has {free() / 1e6:,.2f} MB left{why}. What was saved is untouched; "
            "make room and start the same command again"
        )

    if free() < needed:
        raise full("")
    try:
        yield
    except Exception as error:  # tensorstore has kinds of its own
        if isinstance(error, WorkdirError):
            raise
        if not folder.is_dir():
            raise gone(folder) from error
        if not (reason := files.no_room(error)):
            raise
        raise full(f" ({reason})") from error


def gone(path: pathlib.Path) -> WorkdirError:
    """Returns the error that a file or folder of a run was removed while it was running."""
    return WorkdirError(f"{path} was removed while this run was using it; nothing can be written there any more")
