"""Programs compiled on a thread of their own while the ones before them run."""

from __future__ import annotations

import concurrent.futures
import contextlib
import threading
from collections.abc import Callable, Hashable, Mapping

from absl import logging

_THREAD = "compile"


class Ahead:
    """Compiles programs one after the other, in the order given, until `close`.

    The first at once, the others from the second `wait` on, so that they do not hold up the first step.

    A compiled program is kept by JAX, so that the call of the jitted function finds it. What fails to compile fails
    again in that call, where its error belongs.
    """

    def __init__(self, programs: Mapping[Hashable, Callable[[], object]]):
        self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix=_THREAD)
        self._later, self._compiled = dict(programs), dict[Hashable, concurrent.futures.Future[object]]()
        self._waited = set[Hashable]()
        self._start(list(programs)[:1])

    def _start(self, keys: list[Hashable]) -> None:
        self._compiled |= {key: self._thread.submit(self._later.pop(key)) for key in keys}

    def ready(self, key: Hashable) -> bool:
        """Returns whether the program of a key was waited for, or is compiled."""
        return key in self._waited or (key in self._compiled and self._compiled[key].done())

    def wait(self, key: Hashable, *, what: str) -> None:
        """Returns when the program of a key is compiled, or has failed to; at once where there is none.

        The log says so of `what` is compiled now, or by the first call of a program that is not compiled here.
        """
        if self._waited or key in self._later:
            self._start(list(self._later))
        if not self.ready(key):
            logging.info("compiling %s", what)
        running = self._compiled.pop(key, None)
        self._waited.add(key)
        if running:
            with contextlib.suppress(Exception):
                running.result()

    def close(self, *, wait: bool = True) -> None:
        """Ends the thread after the program that it is at, for which Python waits before it ends if not here."""
        self._thread.shutdown(wait=wait, cancel_futures=True)


def is_compiling() -> bool:
    """Returns whether a thread may still be at a program, so that only `commands.leave` ends the process at once."""
    return any(thread.name.startswith(f"{_THREAD}_") for thread in threading.enumerate())
