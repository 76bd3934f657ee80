"""What every data worker process does first."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading


def start(*_: int) -> None:
    """Lets a worker process end with its parent, whatever ends that, and leaves Ctrl-C to it.

    A parent that is killed says nothing; its workers would wait for ever and hold their shared memory.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def end_with_parent() -> None:
        if parent := multiprocessing.parent_process():
            parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
