"""Memory of host and device over 2,000 steps of all kinds and 50 evaluations; this file is also the program."""

import json
import multiprocessing
import os
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
import test_main
from micro import micro_config

from detclipv2_jax import train

pytestmark = pytest.mark.skipif(not os.environ.get("EXHAUSTIVE"), reason="takes minutes: set EXHAUSTIVE=1")
ROOT = pathlib.Path(__file__).parents[2]
NUM_STEPS, NUM_EVALUATIONS, EVERY = 2000, 50, 20


def resident_bytes():
    """What this process and its data workers hold."""
    pids = [os.getpid(), *(child.pid for child in multiprocessing.active_children())]
    pages = [int(pathlib.Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids]
    return sum(pages) * os.sysconf("SC_PAGE_SIZE")


def program(workdir):
    """Trains, and prints (step, host bytes, device bytes) now and then."""
    finish_step = train.finish_step

    def finish(done, *arguments, **options):
        finish_step(done, *arguments, **options)
        if done % EVERY == EVERY // 2:  # not beside an evaluation
            print(json.dumps([done, resident_bytes(), sum(array.nbytes for array in jax.live_arrays())]), flush=True)

    train.finish_step = finish
    c = micro_config()
    c.epochs = 1000
    c.num_steps = NUM_STEPS
    c.model.head.deformable = False  # much to compile
    c.input.num_workers = 1
    c.eval.every_steps = NUM_STEPS // NUM_EVALUATIONS
    c.checkpoint.every_steps = 500
    c.log_every_steps = 50
    c.pictures_every_steps = 0
    test_main.start(c, workdir)


@pytest.mark.slow
def test_memory_of_host_and_device_is_flat(tmp_path):
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests"))),
        "XLA_FLAGS": re.sub(r"--xla_force\S*", "", os.environ["XLA_FLAGS"]),
    }
    done = subprocess.run([sys.executable, __file__, tmp_path / "run"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    samples = np.array([json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")], float)
    evaluations = {step for step, row in test_main.lines(tmp_path / "run").items() if "eval/AP" in row}
    assert len(evaluations) == NUM_EVALUATIONS
    # by then all is compiled, and every cache is full: of the three quarters that are left, first and last
    steps, *bytes_of = samples[samples[:, 0] > NUM_STEPS // 4].T
    assert len(steps) == NUM_STEPS * 3 // 4 // EVERY
    for name, sizes in zip(("host", "device"), bytes_of, strict=True):
        third = len(sizes) // 3
        before, after = sizes[:third].mean(), sizes[-third:].mean()
        print(f"{name}: {before / 1e6:.1f} -> {after / 1e6:.1f} MB")
        assert after / before == pytest.approx(1, abs=0.03), name


if __name__ == "__main__":
    program(pathlib.Path(sys.argv[1]))
