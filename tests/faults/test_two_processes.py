"""Two processes: equal to one process, preempted, killed; this file is also their program.

With EXHAUSTIVE=1 each has 4 devices and the model; else one device and a stand-in for it, and the single process 8.
"""

import contextlib
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import portpicker
import pytest
import stand_in
import test_main
from micro import micro_config

from detclipv2_jax import train
from detclipv2_jax.data import scenes
from detclipv2_jax.runs import checkpoints, processes, sharding
from detclipv2_jax.runs.optimizer import param_name

EXHAUSTIVE = bool(os.environ.get("EXHAUSTIVE"))
exhaustive = pytest.mark.skipif(not EXHAUSTIVE, reason="takes minutes: set EXHAUSTIVE=1")
DEVICES = 4 if EXHAUSTIVE else 1  # a process
ROOT = pathlib.Path(__file__).parents[2]
NUM_STEPS = 6
PREEMPTED_FROM = 1  # SIGTERM comes when this step is done; the processes agree on a later one
KILLED_AT = 5
PARTS = ("detection", "grounding", "image_text", "eval")


def config(folder, *, evaluated=False, fsdp=2 * DEVICES):
    """A run on the scenes in `folder`; its parameters are split over both processes."""
    c = micro_config()
    c.num_steps = NUM_STEPS
    c.model.head.deformable = False  # much to compile, and nothing of it crosses devices
    c.mesh.fsdp = fsdp
    c.checkpoint.every_steps = 3
    c.pictures_every_steps = 0
    c.optimizer.warmup_steps = 2
    for kind in PARTS:
        c.scenes[f"num_{kind}"] = 0
    c.detection.annotations, c.detection.images = str(folder / "detection.json"), str(folder)
    c.grounding.annotations, c.grounding.images = str(folder / "grounding.json"), str(folder)
    c.image_text.pairs, c.image_text.images = str(folder / "pairs.tsv"), str(folder)
    if evaluated:
        c.eval.annotations, c.eval.images = str(folder / "eval.json"), str(folder)
    return c


def main(folder):
    """Two runs: unbroken; stopped by SIGTERM to process 1, started again, and ended by SIGKILL to process 1."""
    if not EXHAUSTIVE:
        stand_in.install()
    processes.HEARTBEAT_TIMEOUT_S = 10
    processes.join("auto", timeout_s=300)
    scattered = sorted(jax.devices(), key=lambda device: device.id % DEVICES)
    mesh = sharding.make_mesh(devices=scattered)
    print(f"processes of the mesh {[device.process_index for device in mesh.devices.flat]}", flush=True)
    with test_main.shared_steps():
        test_main.start(config(folder, evaluated=True), folder / "unbroken")
        with process_1_gets(signal.SIGTERM, at=PREEMPTED_FROM):
            try:
                test_main.start(config(folder), folder / "broken")
            except train.Preempted as stop:
                print(f"process {jax.process_index()}: {stop}", flush=True)
        with process_1_gets(signal.SIGKILL, at=KILLED_AT):
            test_main.start(config(folder), folder / "broken")


@contextlib.contextmanager
def process_1_gets(number, *, at):
    """Process 1 gets a signal when step `at` is done, and is slow from then on, as the others will notice."""
    finish_step = train.finish_step

    def finish(done, *arguments, **options):
        finish_step(done, *arguments, **options)
        if jax.process_index() == 1 and done >= at:
            if done == at:
                os.kill(os.getpid(), number)
            time.sleep(1.5)  # the notice of a signal takes up to a second to everybody

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "finish_step", finish)
        yield


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """Returns (folder of the runs, exit status, output) of the program, started by the script for local processes."""
    folder = tmp_path_factory.mktemp("runs")
    scenes.write(folder, num_detection=24, num_grounding=24, num_image_text=24, num_eval=12, size_px=64)
    environment = os.environ | {
        "PROGRAM": "test_two_processes",
        "PYTHON": sys.executable,
        "DEVICES_PER_PROCESS": str(DEVICES),
        "PORT": str(portpicker.pick_unused_port()),
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests", pathlib.Path(__file__).parent))),
        "XLA_FLAGS": re.sub(r"--xla_force\S*", "", os.environ["XLA_FLAGS"]),
    }
    command = [ROOT / "launch" / "local_multiprocess.sh", folder]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    return folder, done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module", autouse=True)
def _steps_are_compiled_once():
    with test_main.shared_steps(), contextlib.nullcontext() if EXHAUSTIVE else stand_in.installed():
        yield


def assert_close(ours, theirs, *, steps, tolerance):
    """Asserts that two runs have the same metrics, each after its own number of processes or devices."""
    for step in steps:
        assert ours[step].keys() == theirs[step].keys(), step
        for name, value in theirs[step].items():
            assert ours[step][name] == pytest.approx(value, rel=tolerance, abs=tolerance), (step, name)


def scores(workdir):
    """Returns the scores of all detections of the last evaluation, the best first."""
    found = json.loads((workdir / "eval" / f"step_{NUM_STEPS:08d}_detections.json").read_text())
    assert len(found) > 100
    return sorted((detection["score"] for detection in found), reverse=True)


def moments(workdir):
    """Returns Adam's first moments after the last step, the gradients' running means, by name."""
    opened = checkpoints.Checkpoints(workdir)
    stored = opened.restore_params(NUM_STEPS, "optimizer")
    opened.close()
    flat = {param_name(path): value for path, value in jax.tree_util.tree_leaves_with_path(stored)}
    return {name: value for name, value in flat.items() if "/mu/" in name}


@pytest.mark.slow
def test_two_processes_equal_one(ended, tmp_path):
    folder, _, output = ended
    assert output.count(f"processes of the mesh {[0] * DEVICES + [1] * DEVICES}") == 2, output
    test_main.start(config(folder, evaluated=True), tmp_path / "one")
    one, two = (test_main.lines(workdir) for workdir in (tmp_path / "one", folder / "unbroken"))
    # losses, gradient norms, numbers of de-duplicated concepts and of what was cut, scores
    kinds = {name.split("/")[0] for row in one.values() for name in row if "/" in name}
    assert kinds == set(PARTS)
    assert_close(two, one, steps=range(1, NUM_STEPS + 1), tolerance=1e-5)
    ours, theirs = (scores(workdir) for workdir in (folder / "unbroken", tmp_path / "one"))
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    ours, theirs = moments(folder / "unbroken"), moments(tmp_path / "one")
    assert len(ours) > (50 if EXHAUSTIVE else 6)
    for name, value in theirs.items():
        np.testing.assert_allclose(ours[name], value, rtol=1e-5, atol=1e-5 * np.abs(value).max(), err_msg=name)


@pytest.mark.slow
def test_both_save_the_same_step_when_one_is_preempted_and_go_on_bit_for_bit(ended):
    folder, _, output = ended
    stops = re.findall(r"process (\d): stopped by SIGTERM after step (\d)", output)
    assert sorted(stops) == [("0", stops[0][1]), ("1", stops[0][1])], output
    last = int(stops[0][1])
    assert PREEMPTED_FROM < last < KILLED_AT
    unbroken, broken = (test_main.lines(folder / name) for name in ("unbroken", "broken"))
    assert all(broken[step] == unbroken[step] for step in range(1, KILLED_AT + 1))


@pytest.mark.slow
def test_the_others_end_and_name_the_process_that_was_killed(ended):
    _, status, output = ended
    assert status != 0
    # by a barrier, or by the coordinator, whichever notices first
    assert re.search(r"waited at 'step \d', in vain: process 1 \(|tasks are unhealthy[^\n]*\n1\n", output), output


@exhaustive
@pytest.mark.slow
def test_half_the_devices_in_one_process_go_on_with_the_losses_of_the_unbroken_run(ended, monkeypatch):
    unbroken, broken = (ended[0] / name for name in ("unbroken", "broken"))
    opened = checkpoints.Checkpoints(broken)
    start = opened.latest_step()
    opened.close()
    assert PREEMPTED_FROM < start < KILLED_AT
    make_mesh = sharding.make_mesh
    monkeypatch.setattr(sharding, "make_mesh", lambda **options: make_mesh(**options, devices=jax.devices()[:4]))
    test_main.start(config(ended[0], fsdp=1), broken)
    expected = test_main.lines(unbroken)
    expected[NUM_STEPS] = {name: x for name, x in expected[NUM_STEPS].items() if not name.startswith("eval/")}
    assert_close(test_main.lines(broken), expected, steps=range(start + 1, NUM_STEPS + 1), tolerance=1e-4)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
