"""A run where much is missing: no home, no standard output, no temporary space, a clock that goes back."""

import json
import math
import os
import pathlib
import re
import subprocess
import sys

import pytest

from detclipv2_jax import main

ROOT = pathlib.Path(__file__).parents[2]
SECRETS = {"AWS_SECRET_ACCESS_KEY": "sesame-one", "HF_TOKEN": "sesame-two", "WANDB_API_KEY": "sesame-three"}
CLOCK = """
import time
real, start, calls = time.time, time.time(), 0
def time_time():
    global calls
    calls += 1
    return real() - 3600 * (calls > 200)
time.time = time_time
"""
CONFIG = """
import stand_in
from micro import micro_config
stand_in.install()
def get_config():
    c = micro_config()
    c.num_steps = 4
    c.scenes.num_grounding = c.scenes.num_image_text = c.scenes.num_eval = 0
    c.checkpoint.every_steps = 2
    c.pictures_every_steps = 0
    return c
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(workdir, stderr) of a run of four steps that had to do without."""
    folder = tmp_path_factory.mktemp("poor")
    (folder / "sitecustomize.py").write_text(CLOCK)
    (folder / "config.py").write_text(CONFIG)
    full = folder / "full"
    full.mkdir()
    mounted = (
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k", "none", full], capture_output=True).returncode == 0
    )
    if mounted:
        (full / "file").write_bytes(bytes(4096))
    environment = {name: value for name, value in os.environ.items() if name not in ("HOME", "MPLCONFIGDIR")} | {
        "PYTHONPATH": os.pathsep.join(map(str, (folder, ROOT, ROOT / "tests"))),
        "XLA_FLAGS": re.sub(r"--xla_force\S*", "", os.environ["XLA_FLAGS"]),
        "TMPDIR": str(full) if mounted else str(folder / "nowhere"),
        **SECRETS,
    }
    command = f"exec {sys.executable} -m detclipv2_jax.main --config={folder}/config.py --workdir={folder}/run >&- <&-"
    try:
        done = subprocess.run(
            ["sh", "-c", command], env=environment, cwd=ROOT, stderr=subprocess.PIPE, text=True, timeout=600
        )
    finally:
        if mounted:
            subprocess.run(["umount", full], check=True)
    assert done.returncode == 0, done.stderr
    return folder / "run", done.stderr


@pytest.mark.slow
def test_no_home_no_output_no_temporary_space_and_a_clock_set_back_do_not_stop_a_run(finished):
    workdir, log = finished
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(math.isfinite(row["detection/loss"]) and row["timing/step_seconds"] > 0 for row in rows)
    assert (workdir / "checkpoints" / "4").is_dir()
    assert "step 4: " in log


@pytest.mark.slow
def test_secrets_of_the_environment_reach_no_file_and_no_log(finished):
    workdir, log = finished
    files = [path for path in workdir.rglob("*") if path.is_file()]
    assert len(files) > 10
    for secret in SECRETS.values():
        assert secret not in log
        assert not [path for path in files if secret.encode() in path.read_bytes()]


@pytest.mark.slow
def test_closed_standard_streams_are_opened():
    code = "from detclipv2_jax import main; main.open_streams(); import sys; file = open('/dev/null')\n"
    code += "print(file.fileno(), file=sys.stderr); print('x', end='')"
    done = subprocess.run(["sh", "-c", f'exec {sys.executable} -c "{code}" >&- <&-'], cwd=ROOT, stderr=subprocess.PIPE)
    assert main.open_streams
    assert int(done.stderr.split()[-1]) > 2
