"""Runs that are killed: in a step, in the middle of a save, in an evaluation; this file is also their program.

The program imports everything once and forks a process a run, so that a run costs what it compiles.
"""

import contextlib
import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import traceback

import jax
import numpy as np
import pytest
import stand_in
import test_main
from micro import micro_config

from detclipv2_jax import train
from detclipv2_jax.eval import loop
from detclipv2_jax.runs import checkpoints
from detclipv2_jax.visualize import charts

ROOT = pathlib.Path(__file__).parents[2]
NUM_KILLS = 20 if os.environ.get("EXHAUSTIVE") else 2
PLACES = ("save", "evaluation", "step")
EVERY_STEPS = 2  # a checkpoint


def config(num_steps):
    """A run of detection alone on canvases of two sizes, evaluated every four steps and at the end."""
    c = micro_config()
    c.num_steps = num_steps
    c.detection.short_side, c.detection.num_scales = (32, 64), 2
    c.scenes.num_grounding = c.scenes.num_image_text = 0
    c.checkpoint.every_steps = EVERY_STEPS
    c.eval.every_steps = 4
    c.eval.num_pictures = c.pictures_every_steps = 0
    return c


def run(workdir, num_steps, where, step):
    """Trains; kills itself at `where` (step, save, evaluation) of `step`."""
    charts.curves = lambda *_, **__: None  # they take longer than the steps
    stand_in.install()

    def die_after(owner, name, condition):
        call = getattr(owner, name)

        def called(*arguments, **options):
            result = call(*arguments, **options)
            if condition(*arguments):
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(owner, name, called)

    if where == "step":
        die_after(train, "finish_step", lambda done, *_: done == step)
    if where == "save":  # when one of two items is complete
        die_after(checkpoints._Handler, "finalize", lambda _, folder: f"/{step}." in str(folder))
    if where == "evaluation":  # when half of the batches are predicted
        evaluated, evaluate = [], loop.Evaluator.__call__

        def evaluate_and_tell(self, params, *, step):
            evaluated.append(step)
            return evaluate(self, params, step=step)

        loop.Evaluator.__call__ = evaluate_and_tell
        die_after(loop.Parts, "add", lambda *_: evaluated[-1] == step)
    test_main.start(config(num_steps), pathlib.Path(workdir))


def program():
    """For every line `workdir num_steps where step` on stdin, forks a run and prints its exit status."""
    for line in sys.stdin:
        workdir, num_steps, where, step = line.split()
        if (child := os.fork()) == 0:
            try:
                run(workdir, int(num_steps), where, int(step))
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


class Runs:
    """Starts runs of the program."""

    def __init__(self, log):
        self.log = log
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests"))),
            "XLA_FLAGS": re.sub(r"--xla_force\S*", "", os.environ["XLA_FLAGS"]),
            "JAX_PERSISTENT_COMPILATION_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        with log.open("w") as errors:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": errors}
            self._program = subprocess.Popen([sys.executable, __file__], env=environment, text=True, **pipes)

    def __call__(self, workdir, num_steps, where="nowhere", step=0):
        """Returns the exit status of a run, -9 of one that was killed."""
        print(workdir, num_steps, where, step, file=self._program.stdin, flush=True)
        return int(self._program.stdout.readline())

    def close(self):
        self._program.stdin.close()
        self._program.wait(timeout=60)
        self._program.stdout.close()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    with contextlib.closing(Runs(tmp_path_factory.mktemp("log") / "log")) as started:
        yield started


def steps_of(workdir):
    """Returns the steps of complete checkpoints."""
    return sorted(int(path.name) for path in (workdir / "checkpoints").glob("*") if path.name.isdigit())


def flip_newest(workdir):
    """Flips a bit of the largest file of the newest checkpoint; returns its step."""
    step = steps_of(workdir)[-1]
    path = max(
        (workdir / "checkpoints" / str(step)).rglob("*"), key=lambda path: path.is_file() and path.stat().st_size
    )
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    return step


@pytest.mark.slow
def test_killed_runs_end_bit_equal_to_an_unbroken_one(runs, tmp_path):
    num_steps = 4 * NUM_KILLS
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert runs(whole, num_steps) == 0, runs.log.read_text()
    rng, done = random.Random(0), 0
    for kill in range(NUM_KILLS):
        where = PLACES[kill] if kill < len(PLACES) else rng.choice(PLACES)
        step = {"save": done + EVERY_STEPS, "evaluation": 4 * (done // 4 + 1), "step": done + rng.randint(1, 4)}[where]
        assert runs(broken, num_steps, where, min(step, num_steps)) == -signal.SIGKILL, runs.log.read_text()
        done = max(steps_of(broken), default=0)
        assert done <= step
        assert where != "save" or done < step
    damaged = flip_newest(broken)
    assert runs(broken, num_steps) == 0, runs.log.read_text()
    assert f"checkpoints/{damaged} is damaged: " in runs.log.read_text()
    assert [path.name.split("_")[0] for path in (broken / "damaged_checkpoints").iterdir()] == [str(damaged)]
    assert test_main.lines(broken) == test_main.lines(whole)
    one, other = (checkpoints.load_for_inference(workdir) for workdir in (whole, broken))
    assert one[2] == other[2] == num_steps
    jax.tree.map(np.testing.assert_array_equal, one[1], other[1])
    assert not list((broken / "checkpoints").glob("*tmp*"))
    assert len(json.loads((broken / "config.json").read_text())) > 10


if __name__ == "__main__":
    program()
