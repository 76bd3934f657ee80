"""DetCLIPv2 open-vocabulary detection pre-training in JAX/Flax."""

import os
import signal
import sys

__version__ = "0.1.0"


def stop(*_: object) -> None:
    """Ends a command at once with one line and status 130: Ctrl-C while it imports, before `commands` looks after it.

    Not by an exception, which would be a traceback through whatever is imported, or be caught there.
    """
    os.write(2, b"stopped by Ctrl-C\n")
    os._exit(128 + signal.SIGINT)


def terminate(*_: object) -> None:
    """Ends a command at once with status 143, which SIGTERM alone does not do to the first process of a container.

    There the kernel drops what has no handler, and `docker stop` would wait in vain until it kills.
    """
    os._exit(128 + signal.SIGTERM)


def _is_command() -> bool:
    """Returns whether this process is `python -m detclipv2_jax…` or `detclip`, and not a program that imports us."""
    program = os.path.basename((getattr(sys, "argv", None) or [""])[0])  # "-m" until the module is found
    modules = (argument.partition(".")[0] for argument in sys.orig_argv[1:])
    return program == "detclip" or (program == "-m" and __name__ in modules)


if _is_command() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, stop)
if _is_command() and os.getpid() == 1 and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
    signal.signal(signal.SIGTERM, terminate)
