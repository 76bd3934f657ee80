"""Worker processes: they end with their parent, and Ctrl-C is left to it."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def starting() -> Iterator[None]:
    """Has processes that are started inside, by this thread, not get Ctrl-C: not even while they import modules."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_with_parent(*_: int) -> None:
    """Lets a worker process, which calls it first, end with its parent, whatever ends that, and not with Ctrl-C.

    A parent that is killed says nothing; its workers would wait for ever and hold their shared memory.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def wait() -> None:
        if parent := multiprocessing.parent_process():
            parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
