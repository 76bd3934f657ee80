"""Trains or evaluates DetCLIPv2: `python -m detclipv2_jax.main --config=FILE [--workdir=DIR] [--config.key=value …]`.

Run the same command on every host. A run continues from the newest checkpoint of its workdir.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import sys
from typing import Literal

from absl import logging
from ml_collections import ConfigDict

from detclipv2_jax import commands
from detclipv2_jax.chips import has_device

# of malloc.h: arenas (threads that allocate by turns use one memory), mappings, and free bytes that are given back
M_ARENA_MAX, M_MMAP_MAX, M_TRIM_THRESHOLD = -8, -4, -1
COMPILED = "/jax/core/compile/backend_compile_duration"  # JAX's event of a program compiled, or loaded from the cache


def main(
    *,
    config: ConfigDict,
    workdir: str = "",
    mode: Literal["train", "eval"] = "train",
    distributed: Literal["auto", "off", "on"] = "auto",
    replay: int | None = None,
    changed_data: bool = False,
    preempted_status: int = 0,
) -> int:
    """Trains or evaluates; returns the exit status.

    Args:
      config: configuration, e.g. configs/demo.py or configs/swin_t.py:full; --config.key=value replaces its values
      workdir: where checkpoints, metrics and pictures go, also gs://… or s3://…; default: runs/<config name>
      mode: train (and evaluate), or evaluate the newest checkpoint of --workdir or of config.init_from.checkpoint
      distributed: several processes: on, off, or auto (on where a TPU pod, Slurm or the JAX_COORDINATOR_ADDRESS
        variable says so)
      replay: runs this step of the workdir's run again, from the newest checkpoint before it, and prints its loss
        terms, gradient norms and examples; writes nothing
      changed_data: go on with a run whose annotation files or built folders are not those it began with
      preempted_status: exit status of a run that SIGTERM stopped; not 0 where a scheduler shall start it again
    """
    if replay is not None and replay < 1:
        raise ValueError(f"--replay={replay} must be a step, 1 or more")
    # orbax logs every file that it touches
    logging.get_absl_handler().addFilter(lambda record: record.levelno > 20 or "orbax" not in record.pathname)
    logging.set_verbosity(logging.INFO)
    logging.set_stderrthreshold(logging.INFO)
    from detclipv2_jax import session

    give_back_after_compiling()
    return session.run(
        config,
        workdir or f"runs/{config.name}",
        training=mode == "train",
        distributed=distributed,
        replayed=replay,
        changed_data=changed_data,
        preempted_status=preempted_status,
    )


def open_streams() -> None:
    """Opens standard streams that are closed; else the next file gets their number, and with it what C++ prints."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r+"))  # noqa: SIM115  (for as long as the program runs)
    handler = logging.get_absl_handler().python_handler
    handler.stream = handler.stream or sys.stderr


def keep_memory() -> None:
    """Lets the C library keep what one step frees for the next, where CPUs compute.

    Else it gives large arrays back to the kernel, which clears their pages again for the next step: 40% of the CPU time
    of configs/demo.py's steps. Other threads must come later, for a thread keeps the memory that it began with.
    Variables of the user's, such as MALLOC_ARENA_MAX, go first.
    """
    if has_device() or any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return
    with contextlib.suppress(OSError, AttributeError):  # another system, another library
        for parameter, value in ((M_ARENA_MAX, 1), (M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1)):
            ctypes.CDLL(None).mallopt(parameter, value)


@functools.cache  # once a process
def give_back_after_compiling() -> None:
    """Lets the C library give the kernel what is free once a program is compiled.

    Compiling a step takes GB in small pieces, among which the step's own arrays find no room.
    """
    import jax

    def after(event: str, duration_secs: float, **_: object) -> None:
        if event == COMPILED and duration_secs > 0.1:
            with contextlib.suppress(OSError, AttributeError):  # another system, another library
                ctypes.CDLL(None).malloc_trim(0)

    jax.monitoring.register_event_duration_secs_listener(after)


def cli() -> int:
    open_streams()
    keep_memory()
    return commands.run(main, about=__doc__)


if __name__ == "__main__":
    sys.exit(cli())
