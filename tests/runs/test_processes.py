"""What one process can say about the others; two of them run in tests/faults."""

import os
import pathlib
import signal
import subprocess
import sys

import jax
import portpicker
import pytest

from detclipv2_jax.runs import processes


class Coordinator:
    """Stands for the connection to process 0: a barrier that fails with a message, and two hosts."""

    def __init__(self, message):
        self._message = message

    def wait_at_barrier(self, name, timeout_ms):
        raise jax.errors.JaxRuntimeError(self._message)

    def key_value_try_get(self, key):
        hosts = {"host of process 1": "host-b", "host of process 12": "host-m"}
        if key not in hosts:
            raise jax.errors.JaxRuntimeError("NOT_FOUND")
        return hosts[key]


LATE = """DEADLINE_EXCEEDED: Barrier timed out. Id: step::11. Please look at the task logs.
# of tasks that reached the barrier: 1/4.
The first task at the barrier: 0. Some timed out task names:
{}

RPC: /xla.coordination.CoordinationService/Barrier [type.googleapis.com/tensorflow.CoordinationServiceError='']"""
GONE = "INTERNAL: Barrier failed because: task is set to ERROR: UNAVAILABLE: Task 1 heartbeat timeout. Id: step::11"


@pytest.mark.parametrize(
    ("message", "named"),
    [
        (LATE.format("1"), "process 1 (host-b) did"),
        (LATE.format("12\n8\n1"), "process 1 (host-b), process 8 (it never came), process 12 (host-m) did"),
        (LATE.format("/job:jax_worker/replica:0/task:12"), "process 12 (host-m) did"),
        (GONE, "process 1 (host-b) did"),
        ("UNAVAILABLE: Socket closed", "UNAVAILABLE: Socket closed"),
    ],
)
def test_a_barrier_names_who_is_missing(monkeypatch, message, named):
    monkeypatch.setattr(processes, "_client", lambda: Coordinator(message))
    with pytest.raises(processes.MissingProcessError) as error:
        processes.barrier("step", note="7", timeout_s=1)
    assert f"waited at 'step 7', in vain: {named}" in str(error.value)


def test_a_single_process_waits_for_nobody():
    processes.barrier("step", timeout_s=1)
    processes.check_same("a", what="configuration", timeout_s=1)


def test_the_stop_signal_of_a_single_process_is_remembered_and_given_back():
    before = signal.getsignal(signal.SIGTERM)
    with processes.stop_signal() as stopping:
        assert not stopping(1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stopping(2)
    assert signal.getsignal(signal.SIGTERM) is before
    with processes.stop_signal() as stopping:
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), number)
        assert stopping(1) == signal.SIGINT  # the first
    interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with processes.stop_signal():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN  # a job in the background
    finally:
        signal.signal(signal.SIGINT, interrupt)


def test_a_second_ctrl_c_ends_a_process_at_once(monkeypatch, capfd):
    ended = []
    monkeypatch.setattr(processes.commands, "end", lambda message, *, at_once: ended.append((message, at_once)))
    with processes.stop_signal() as stopping:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert not ended
        assert "Ctrl-C: saving after this step" in capfd.readouterr().err
        os.kill(os.getpid(), signal.SIGINT)
        assert stopping(1) == signal.SIGTERM
    ((message, at_once),) = ended
    assert at_once
    assert "the steps after the last checkpoint are lost" in message


def test_several_processes_stop_at_the_step_that_jax_agrees_on(monkeypatch):
    asked, told = [], []
    monkeypatch.setattr(processes, "_client", lambda: Client({}))
    agreed = processes.multihost_utils
    monkeypatch.setattr(agreed, "reached_preemption_sync_point", lambda step: asked.append(step) or step == 5)
    term = signal.signal(signal.SIGTERM, lambda *_: told.append("jax"))
    try:
        with processes.stop_signal() as stopping:
            assert [stopping(step) for step in (4, 5)] == [0, signal.SIGTERM]  # it came to another process
            os.kill(os.getpid(), signal.SIGINT)
            assert told == ["jax"]  # which tells the others
            assert [stopping(step) for step in (4, 5)] == [0, signal.SIGINT]
    finally:
        signal.signal(signal.SIGTERM, term)
    assert asked == [4, 5] * 2


def test_joining_is_left_alone_where_nothing_says_that_there_are_several(monkeypatch):
    joined = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **options: joined.append(options))
    for name in ("JAX_COORDINATOR_ADDRESS", "COORDINATOR_ADDRESS", "SLURM_NTASKS", "TPU_WORKER_HOSTNAMES"):
        monkeypatch.delenv(name, raising=False)
    processes.join("auto", timeout_s=1)
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "somewhere:1")
    processes.join("off", timeout_s=1)
    assert not joined
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match=r"one of 2 processes.*give --distributed=on"):
        processes.join("off", timeout_s=1)


@pytest.mark.parametrize(
    "variables",
    [
        {"JAX_COORDINATOR_ADDRESS": "host:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"},
        {"COORDINATOR_ADDRESS": "host:2"},
        {"SLURM_NTASKS": "8"},
        {"TPU_PROCESS_ADDRESSES": "a:1,b:1", "TPU_WORKER_HOSTNAMES": "a"},
        {"TPU_WORKER_HOSTNAMES": "a,b"},
    ],
)
def test_joining_is_automatic_where_variables_say_so(monkeypatch, variables):
    joined, library = [], processes.distributed._jax
    monkeypatch.setattr(library, "get_distributed_runtime_service", lambda **options: joined.append(options))
    service = library.get_distributed_runtime_service

    def initialize(**options):
        library.get_distributed_runtime_service()
        joined.append(options)

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    monkeypatch.setattr(processes, "_client", lambda: Client({}))
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    processes.join("auto", timeout_s=60)
    registration, options = joined
    assert registration == {"cluster_register_timeout": 60}
    assert library.get_distributed_runtime_service is service  # as before
    address = variables.get("JAX_COORDINATOR_ADDRESS") or variables.get("COORDINATOR_ADDRESS")
    assert options["coordinator_address"] == address
    assert options["heartbeat_timeout_seconds"] == options["shutdown_timeout_seconds"] == 60
    assert options["initialization_timeout"] == 90
    assert options.get("process_id") == (1 if "JAX_PROCESS_ID" in variables else None)


class Client:
    """Holds values for all processes."""

    def __init__(self, values):
        self.values = values

    def key_value_set(self, key, value, allow_overwrite=False):
        assert allow_overwrite or key not in self.values
        self.values[key] = value

    def key_value_try_get(self, key):
        return self.values[key]

    def wait_at_barrier(self, name, timeout_ms):
        self.waited = name, timeout_ms


def test_another_configuration_on_one_host_is_an_error(monkeypatch):
    client = Client({})
    monkeypatch.setattr(processes, "_client", lambda: client)
    for value in ("z", "a"):  # of a run before in the same processes
        processes.check_same(value, what="configuration", timeout_s=7)
    assert client.waited == ("configuration", 7000)
    monkeypatch.setattr(jax, "process_index", lambda: 3)
    processes.check_same("a", what="configuration", timeout_s=1)
    with pytest.raises(ValueError, match=r"configuration of process 3 .* differs from that of process 0"):
        processes.check_same("b", what="configuration", timeout_s=1)


@pytest.mark.slow
def test_a_process_that_never_came_is_named():
    address = f"localhost:{portpicker.pick_unused_port()}"
    environment = os.environ | {
        "JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "3", "JAX_PROCESS_ID": "0",
    }  # fmt: skip
    alone = subprocess.run(
        [sys.executable, "-c", "from detclipv2_jax.runs import processes; processes.join('auto', timeout_s=2)"],
        cwd=pathlib.Path(__file__).parents[2],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert alone.returncode != 0
    names = alone.stderr.partition("timed out task names:\n")[2].splitlines()
    assert sorted(names[:2]) == ["1", "2"], alone.stderr
