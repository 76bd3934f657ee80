"""Runs the tests of faults in copies of the repository, each in a process forked from one that has imported it all."""

from __future__ import annotations

import contextlib
import functools
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from tests.mutations.fault import Fault

DIED, SURVIVED = "died", "survived"
LATE, BROKEN = "late", "broken"  # the tests did not end in time, could not run
_VERDICTS = {0: SURVIVED, 1: DIED, 2: DIED}  # of pytest's exit codes; 2: the package could not be imported


class Verdict(NamedTuple):
    """What became of a fault."""

    state: str
    what: str  # the test that failed, or the end of the output
    seconds: float


class _Task(NamedTuple):
    index: int
    copy: pathlib.Path
    text: str  # of the file without the fault
    started: float


def warm(package: str, tests: pathlib.Path) -> None:
    """Imports what the package and pytest import, in the environment of the tests, but leaves the package out."""
    import importlib
    import pkgutil

    import pytest

    del pytest  # in sys.modules from here on
    sys.path.insert(0, str(tests))
    importlib.import_module("conftest")  # sets the environment, then imports jax
    for module in pkgutil.walk_packages(importlib.import_module(package).__path__, f"{package}."):
        if not module.name.endswith(("__main__", "saved_model", "record_builder")) and ".prepare" not in module.name:
            importlib.import_module(module.name)
    sys.path.remove(str(tests))
    roots = {tests.parent, tests}
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if name.split(".")[0] == package or (file and pathlib.Path(file).parent in roots):
            del sys.modules[name]


def run(
    faults: Sequence[Fault],
    *,
    root: pathlib.Path,
    folder: pathlib.Path,
    jobs: int,
    limits_s: Sequence[float],
) -> Iterator[tuple[int, Verdict]]:
    """Yields (index, verdict) of faults as they come; the working tree is never changed.

    1. Copy the repository's files once a job.
    2. Write the mutated file into a free copy and fork; the child runs pytest there up to the first failure.
    3. Put the file back when the child is done or its time is over.
    """
    # 1
    free = [_copy(root, folder / f"copy{i}") for i in range(jobs)]
    waiting = list(range(len(faults)))[::-1]
    tasks: dict[int, _Task] = {}
    while waiting or tasks:
        # 2
        while waiting and free:
            index, copy = waiting.pop(), free.pop()
            fault = faults[index]
            text = (copy / fault.file).read_text(encoding="utf-8")  # not the repository's, which may change meanwhile
            _write(copy / fault.file, text.replace(fault.original, fault.mutated))
            pid = _fork(functools.partial(_test, fault.tests, copy), copy)
            tasks[pid] = _Task(index, copy, text, time.monotonic())
        # 3
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            time.sleep(0.05)
            late = [p for p, task in tasks.items() if time.monotonic() - task.started > limits_s[task.index]]
            for process in late:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process, signal.SIGKILL)
            continue
        task = tasks.pop(pid)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)  # what the tests left behind
        fault = faults[task.index]
        _write(task.copy / fault.file, task.text)
        free.append(task.copy)
        yield task.index, _verdict(status, task, limits_s[task.index])


def _verdict(status: int, task: _Task, limit_s: float) -> Verdict:
    seconds = round(time.monotonic() - task.started, 1)
    output = (task.copy / "output.txt").read_text(encoding="utf-8", errors="replace")
    if seconds > limit_s:
        return Verdict(LATE, f"no end within {limit_s:.0f} s", seconds)
    state = _VERDICTS.get(os.waitstatus_to_exitcode(status), BROKEN)
    if state == BROKEN:
        return Verdict(BROKEN, output[-2000:], seconds)
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", output, re.MULTILINE)
    return Verdict(state, failed[0] if failed else "", seconds)


def _copy(root: pathlib.Path, target: pathlib.Path) -> pathlib.Path:
    """Returns a folder with the files that git knows or would add."""
    shutil.rmtree(target, ignore_errors=True)
    listed = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in filter(None, subprocess.run(listed, check=True, capture_output=True, text=True).stdout.split("\0")):
        if (root / name).is_file():  # not one that is deleted but not yet committed
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, target / name)
    return target


_num_written = 0


def _write(path: pathlib.Path, text: str) -> None:
    """Writes a source with a time of its own: Python takes byte code of the same second and size for that of a file."""
    global _num_written
    _num_written += 1
    path.write_text(text, encoding="utf-8")
    os.utime(path, (1_000_000_000 + _num_written, 1_000_000_000 + _num_written))


def _fork(action: Callable[[], int], copy: pathlib.Path) -> int:
    """Returns the id of a child that leads a process group and ends with what the action returns."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        os.setsid()
        with open(copy / "output.txt", "w") as output:
            for stream in (1, 2):
                os.dup2(output.fileno(), stream)
        code = action()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _test(tests: Sequence[str], copy: pathlib.Path) -> int:
    import pytest

    os.chdir(copy)
    os.environ["PYTHONPATH"] = str(copy)  # of the processes that tests start
    sys.path[:0] = [str(copy)]
    return int(pytest.main(["-x", "-q", "-n", "0", "-p", "no:cacheprovider", "--no-header", "--assert=plain", *tests]))
