"""Worker processes: they end with their parent, leave no shared memory, and Ctrl-C is left to it."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import pathlib
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker, shared_memory
from typing import Any


@contextlib.contextmanager
def starting() -> Iterator[None]:
    """Has processes that are started inside, by this thread, not get Ctrl-C: not even while they import modules."""
    _start_tracker()
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


def end_with_parent(*_: int) -> None:
    """Lets a worker process, which calls it first, end with its parent, whatever ends that, and not with Ctrl-C.

    A parent that is killed says nothing; its workers would wait for ever and hold their shared memory.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    module: Any = shared_memory
    new_name = module._make_filename

    def known_name() -> str:
        # the tracker hears of it before it is made, not after, when this process may be gone
        name = new_name()
        resource_tracker.register(name, "shared_memory")
        return name

    module._make_filename = known_name

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
