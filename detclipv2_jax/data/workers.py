"""Worker processes: they end with their parent, leave no shared memory, and Ctrl-C is left to it.

Where all of a run is killed at once, as a cgroup is, nobody is left to remove its shared memory; the next run on the
machine does. The names of a run's memory begin with that of a file which it holds locked as long as it lives.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import json
import multiprocessing
import os
import pathlib
import secrets
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker, shared_memory
from typing import Any

_MEMORY = pathlib.Path("/dev/shm")  # where Linux keeps shared memory, a file each
_LEAD = "psm_detclip"
_OWNER = "DETCLIP_SHARED_MEMORY"  # tells workers how the names of their run's memory begin
_locks: list[int] = []  # file descriptors, one at most


@contextlib.contextmanager
def starting() -> Iterator[None]:
    """Has processes that are started inside, by this thread, not get Ctrl-C: not even while they import modules."""
    _start_tracker()
    with contextlib.suppress(OSError):  # there is no such folder, or others own it
        _remove_left()
        if not _locks:
            _own_memory()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_tracker() -> None:
    """Starts Python's tracker, which removes the shared memory of processes that are gone, unless there is one.

    In a session of its own: as Python starts it, what kills a process group kills it too.
    """
    tracker: Any = resource_tracker._resource_tracker
    if sys.platform != "linux" or getattr(tracker, "_fd", 0) is not None:
        return
    read, write = os.pipe()
    os.set_inheritable(read, True)
    code = f"from multiprocessing.resource_tracker import main; main({read})"
    tracker._pid = os.posix_spawn(sys.executable, [sys.executable, "-c", code], os.environ, setsid=True)
    tracker._fd = write
    os.close(read)


def _own_memory() -> None:
    """Gives the shared memory of this process and its workers names of their own, as long as it lives."""
    owner = f"{_LEAD}{secrets.token_hex(8)}"
    resource_tracker.register(f"/{owner}.lock", "shared_memory")  # it removes the file where this process cannot
    lock = os.open(_MEMORY / f"{owner}.lock", os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
    fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    _locks.append(lock)
    os.environ[_OWNER] = owner
    process = os.getpid()

    def leave() -> None:
        if os.getpid() == process:
            (_MEMORY / f"{owner}.lock").unlink(missing_ok=True)
            resource_tracker.unregister(f"/{owner}.lock", "shared_memory")

    atexit.register(leave)


def _remove_left() -> None:
    """Removes the shared memory of runs that are gone with all their processes."""
    for path in _MEMORY.glob(f"{_LEAD}*.lock"):
        with contextlib.suppress(OSError), path.open("rb") as file:  # it is held, another user's, or just removed
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for segment in _MEMORY.glob(f"{path.stem}_*"):
                segment.unlink(missing_ok=True)
            path.unlink()


def end_with_parent(*_: int) -> None:
    """Lets a worker process, which calls it first, end with its parent, whatever ends that, and not with Ctrl-C.

    A parent that is killed says nothing; its workers would wait for ever and hold their shared memory.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _name_memory()

    def wait() -> None:
        if parent := multiprocessing.parent_process():
            parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


@contextlib.contextmanager
def beside(function: Callable[..., object], *arguments: Any, **options: Any) -> Iterator[None]:
    """Has another process call a module's function meanwhile, with values that JSON knows.

    If that fails, the function is called here in the end, so that what is wrong is raised.
    """
    code = (
        f"import json, sys; from {function.__module__} import {function.__name__} as function; "
        "arguments, options = json.loads(sys.argv[1]); function(*arguments, **options)"
    )
    paths = [str(pathlib.Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, "-P", "-c", code, json.dumps([arguments, options])]
    silent: Any = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
    with subprocess.Popen(command, env=environment, **silent) as process:
        try:
            yield
            failed = process.wait() != 0
        finally:
            process.kill()
    if failed:
        function(*arguments, **options)


def _name_memory() -> None:
    """Has the shared memory of this process get names of its run, of which the tracker knows."""
    module: Any = shared_memory
    new_name = module._make_filename

    def known_name() -> str:
        # the tracker hears of it before it is made, not after, when this process may be gone
        owner = os.environ.get(_OWNER)
        name = f"/{owner}_{secrets.token_hex(8)}" if owner else new_name()
        resource_tracker.register(name, "shared_memory")
        return name

    module._make_filename = known_name
