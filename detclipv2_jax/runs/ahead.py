"""Programs compiled on a thread of their own while the ones before them run."""

from __future__ import annotations

import concurrent.futures
import contextlib
from collections.abc import Callable, Hashable, Mapping

from absl import logging


class Ahead:
    """Compiles programs one after the other, in the order given, until `close`.

    A compiled program is kept by JAX, so that the call of the jitted function finds it. What fails to compile fails
    again in that call, where its error belongs.
    """

    def __init__(self, programs: Mapping[Hashable, Callable[[], object]]):
        self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="compile")
        self._compiled = {key: self._thread.submit(program) for key, program in programs.items()}
        self._waited = set[Hashable]()

    def wait(self, key: Hashable, *, what: str) -> None:
        """Returns when the program of a key is compiled, or has failed to; at once where there is none.

        The log says so of `what` is compiled now, or by the first call of a program that is not compiled here.
        """
        running = self._compiled.pop(key, None)
        if key not in self._waited and not (running and running.done()):
            logging.info("compiling %s", what)
        self._waited.add(key)
        if running:
            with contextlib.suppress(Exception):
                running.result()

    def close(self) -> None:
        """Ends the thread, after the program that it is at."""
        self._thread.shutdown(cancel_futures=True)
