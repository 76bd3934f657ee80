"""Runs a test file as two processes of one JAX program."""

import os
import pathlib
import re
import subprocess
import sys

import portpicker

TESTS = pathlib.Path(__file__).parent


def outputs_of(script, *arguments, timeout_s):
    """Returns what both processes of `script ADDRESS PROCESS_ID ARGUMENTS…` printed, each with 4 simulated devices."""
    address = f"localhost:{portpicker.pick_unused_port()}"
    flags = re.sub(r"(--xla_force_host_platform_device_count=)\d+", r"\g<1>4", os.environ["XLA_FLAGS"])
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    environment["PYTHONPATH"] = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    processes = [
        subprocess.Popen(
            [sys.executable, script, address, str(i), *map(str, arguments)],
            cwd=TESTS.parent,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=timeout_s)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output
    return outputs
