"""The processes of a run: how they join, wait for each other with a time limit, and stop together.

All processes take the same branches and the same number of steps. Where one may be late, `barrier` stands before the
collective operations, which would wait for it forever without a word.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
import signal
import socket
from collections.abc import Callable, Iterator
from typing import Any

import jax
from absl import logging
from jax._src import distributed  # the public API has no barrier with a time limit
from jax.experimental import multihost_utils

from detclipv2_jax import commands

HEARTBEAT_TIMEOUT_S = 100  # jax's default; a process that is gone is noticed without any barrier


class MissingProcessError(RuntimeError):
    """A process of the run did not come in time; the message names it and its host."""


def join(mode: str, *, timeout_s: int) -> None:
    """Joins the processes of a run; nothing may have asked for devices before.

    Args:
      mode: on, off, or auto: on where a TPU pod, Slurm or the variable JAX_COORDINATOR_ADDRESS says that there are
        several. On TPU VMs, Slurm and GKE jax finds the others; by hand JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
        JAX_PROCESS_ID say it.
      timeout_s: how long to wait for the others, now and when the run ends.

    Raises:
      ValueError: there are several processes, but they were told not to join, or where they meet is not known.
    """
    variables = ("JAX_COORDINATOR_ADDRESS", "COORDINATOR_ADDRESS")
    address = next((os.environ[name] for name in variables if os.environ.get(name)), None)
    hosts = os.environ.get("TPU_PROCESS_ADDRESSES") or os.environ.get("TPU_WORKER_HOSTNAMES", "")
    cluster = int(os.environ.get("SLURM_NTASKS", 1)) > 1 or "," in hosts
    if mode == "on" or (mode == "auto" and (address or cluster)):
        numbers: dict[str, Any] = {}
        if "JAX_NUM_PROCESSES" in os.environ:
            numbers = {
                "num_processes": int(os.environ["JAX_NUM_PROCESSES"]), "process_id": int(os.environ["JAX_PROCESS_ID"])
            }  # fmt: skip
        with _registration_within(timeout_s):
            jax.distributed.initialize(
                coordinator_address=address,
                initialization_timeout=timeout_s + 30,  # to hear from the coordinator who is missing
                heartbeat_timeout_seconds=min(HEARTBEAT_TIMEOUT_S, timeout_s),
                shutdown_timeout_seconds=timeout_s,
                **numbers,
            )
        if jax.process_index() == 0:  # jax ends the others, with pages of its own, when the coordinator is gone
            commands.end_last()
        _client().key_value_set(f"host of process {jax.process_index()}", socket.gethostname())
    elif jax.process_count() > 1:  # a TPU pod's hosts know of each other without having joined
        raise ValueError(
            f"this is one of {jax.process_count()} processes, but they did not join with --distributed={mode}; "
            "give --distributed=on"
        )
    logging.info("process %d of %d on %s", jax.process_index(), jax.process_count(), socket.gethostname())


@contextlib.contextmanager
def _registration_within(timeout_s: int) -> Iterator[None]:
    """Lets the coordinator say after `timeout_s` who is missing; jax would have it wait for an hour, in silence."""
    library: Any = distributed._jax
    make = library.get_distributed_runtime_service
    library.get_distributed_runtime_service = functools.partial(make, cluster_register_timeout=timeout_s)
    try:
        yield
    finally:
        library.get_distributed_runtime_service = make


def _client() -> Any:
    """Returns the connection to the coordinator, which is process 0; None if the processes did not join."""
    return distributed.global_state.client


def barrier(name: str, *, timeout_s: int, note: str = "") -> None:
    """Returns when all processes are at the barrier `name`; `note` is for the message.

    Raises:
      MissingProcessError: some did not come within `timeout_s`, or are gone.
    """
    client = _client()
    if client is None:
        return
    try:
        client.wait_at_barrier(
            name, timeout_s * 1000
        )  # names are used again: new ones would fill the coordinator's memory
    except jax.errors.JaxRuntimeError as error:
        raise MissingProcessError(f"waited at {f'{name} {note}'.strip()!r}, in vain: {_missing(str(error))}") from error


def _missing(message: str) -> str:
    """Returns which processes a failed barrier waited for, by number and host, from the coordinator's message."""
    _, _, late = message.partition("timed out task names:")  # then one a line; of a dead one "Task 1 heartbeat timeout"
    numbers = sorted(
        set(map(int, re.findall(r"(\d+)$", late, re.MULTILINE) or re.findall(r"[Tt]ask:? (\d+)", message)))
    )
    if not numbers:
        return message

    def host(number: int) -> str:
        try:
            return _client().key_value_try_get(f"host of process {number}")
        except jax.errors.JaxRuntimeError:
            return "it never came"

    names = ", ".join(f"process {number} ({host(number)})" for number in numbers)
    return f"{names} did not come in time or is gone; its log says why. {message.splitlines()[0]}"


def check_same(value: str, *, what: str, timeout_s: int) -> None:
    """Checks that all processes have the same `value`.

    Raises:
      ValueError: this process's value is not that of process 0.
      MissingProcessError: a process did not come in time.
    """
    client = _client()
    if client is None:
        return
    digest = hashlib.sha256(value.encode()).hexdigest()
    if jax.process_index() == 0:
        client.key_value_set(what, digest, allow_overwrite=True)
    barrier(what, timeout_s=timeout_s)
    if client.key_value_try_get(what) != digest:
        raise ValueError(
            f"the {what} of process {jax.process_index()} ({socket.gethostname()}) differs from that of process 0; "
            "start the same command with the same files on every host"
        )


@contextlib.contextmanager
def stop_signal() -> Iterator[Callable[[int], int]]:
    """Yields the function that returns after each step the signal that asks to save and stop, 0 where there is none.

    SIGTERM or Ctrl-C came to any of the processes; to the others it is SIGTERM. A second Ctrl-C ends its process at
    once. It must be asked after every step, by all processes, and answers at the same step on all of them.
    """
    alone, received = _client() is None, list[int]()

    def remember(number: int, _: Any) -> None:
        if number == signal.SIGINT:
            if number in received:
                commands.end("stopped by Ctrl-C at once; the steps after the last checkpoint are lost", at_once=True)
            os.write(2, b"\nCtrl-C: saving after this step; once more to stop at once\n")
            if not alone:
                os.kill(os.getpid(), signal.SIGTERM)  # jax, which took that over, tells the others
        received.append(number)

    numbers = [signal.SIGTERM] if alone else []
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # a shell has its background jobs ignore it
        numbers.append(signal.SIGINT)
    previous = {number: signal.signal(number, remember) for number in numbers}
    try:
        if alone:
            yield lambda _: received[0] if received else 0
        else:
            reached = multihost_utils.reached_preemption_sync_point
            yield lambda step: (received or [signal.SIGTERM])[0] if reached(step) else 0
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
