"""Ctrl-C ends a command with one line and status 130."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn, ParamSpec, TypeVar

STATUS = 128 + signal.SIGINT  # what shells give a command that the signal ended
_Arguments, _Result = ParamSpec("_Arguments"), TypeVar("_Result")


def end(message: str) -> NoReturn:
    """Ends the process with one line; neither threads nor worker processes are waited for."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, OSError, ValueError):
            stream.flush()
    with contextlib.suppress(OSError):
        os.write(2, f"{message}\n".encode())
    os._exit(STATUS)


def in_one_line(main: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Returns the main function of a command, which Ctrl-C ends with a line instead of a traceback."""

    @functools.wraps(main)
    def run(*arguments: _Arguments.args, **options: _Arguments.kwargs) -> _Result:
        # a process beside the workers removes what an interrupted command leaves of them, and would warn of it
        given = os.environ.get("PYTHONWARNINGS")
        os.environ["PYTHONWARNINGS"] = ",".join(filter(None, (given, "ignore:resource_tracker")))
        try:
            return main(*arguments, **options)
        except KeyboardInterrupt:
            end("stopped by Ctrl-C")

    return run
