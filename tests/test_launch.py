"""The launch scripts: clean, and as dry runs they print commands that exist."""

import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
import yaml
from absl import flags

from detclipv2_jax import main

ROOT = pathlib.Path(__file__).parents[1]
VARIABLES = {
    "PROJECT": "project", "REPOSITORY": "https://example.org/code.git", "SHARE": "10.0.0.2:/share", "IMAGE": "image:1",
}  # fmt: skip
SCRIPTS = sorted((ROOT / "launch").glob("*.sh"))


def dry_run(name, *arguments, **variables):
    environment = os.environ | VARIABLES | {"DRY_RUN": "1", "XLA_FLAGS": ""} | variables
    command = ["bash", ROOT / "launch" / name, *arguments]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_clean(script):
    places = [str(pathlib.Path(sys.executable).parent), os.environ["PATH"]]
    shellcheck = shutil.which("shellcheck", path=os.pathsep.join(places))
    assert shellcheck, "pip install -e '.[test]' brings it"
    found = subprocess.run([shellcheck, script], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("tpu_pod.sh", ("run",)),
        ("tpu_pod.sh", ("keep",)),
        ("slurm.sh", ()),
        ("gke.sh", ()),
        ("local_multiprocess.sh", ()),
    ],
)
def test_dry_runs_start_the_program_with_flags_that_it_has(name, arguments):
    given = [] if name != "local_multiprocess.sh" else ["--config=configs/demo.py"]
    output = dry_run(name, *arguments, *given, "--config.seed=1")
    assert "python" in output
    assert "detclipv2_jax.main" in output
    _, _, command = output.rpartition("detclipv2_jax.main")
    found = dict(re.findall(r"--([\w.]+)=([^\s'|]*)", command))
    assert found["config.seed"] == "1"
    assert (ROOT / found["config"]).is_file()
    unknown = {flag for flag in found if not flag.startswith("config.")} - set(flags.FLAGS) - {"project", "zone"}
    assert not unknown
    if name != "local_multiprocess.sh":
        assert found["distributed"] == "on"
        assert main.flags.FLAGS["preempted_status"].default == 0 != int(found["preempted_status"])


def test_tpu_pods_are_created_installed_and_run_on_all_hosts_in_this_order():
    steps = dry_run("tpu_pod.sh", "keep").splitlines()
    assert [re.search(r"tpus ([\w-]+ \w+)", step)[1] for step in steps] == [
        "queued-resources create", "tpu-vm ssh", "tpu-vm ssh",
    ]  # fmt: skip
    assert all("--project=project --zone=us-west4-a" in step for step in steps)
    assert all("--worker=all" in step for step in steps[1:])
    assert "git clone -q https://example.org/code.git" in steps[1]


def test_gke_gets_one_pod_a_host():
    applied = yaml.safe_load(dry_run("gke.sh", "--config.name=it's", NUM_HOSTS="4", TOPOLOGY="4x4"))
    (job,) = applied["spec"]["replicatedJobs"]
    job = job["template"]["spec"]
    assert job["parallelism"] == job["completions"] == 4
    pod = job["template"]["spec"]
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "4x4"
    (container,) = pod["containers"]
    assert container["command"] == ["python", "-m", "detclipv2_jax.main"]
    assert container["args"][-1] == "--config.name=it's"
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


def test_local_processes_get_their_numbers_and_one_address():
    lines = dry_run("local_multiprocess.sh", NUM_PROCESSES="3", PORT="1234").splitlines()
    assert sorted(re.search(r"JAX_PROCESS_ID=(\d)", line)[1] for line in lines) == ["0", "1", "2"]
    assert all("JAX_COORDINATOR_ADDRESS=localhost:1234 JAX_NUM_PROCESSES=3" in line for line in lines)


def test_an_error_of_one_local_process_is_that_of_the_script(tmp_path):
    program = tmp_path / "fails_in_one.py"
    program.write_text("import os, sys; sys.exit(7 * int(os.environ['JAX_PROCESS_ID']))")
    environment = {"PROGRAM": program.stem, "PYTHON": sys.executable, "PYTHONPATH": str(tmp_path), "DRY_RUN": ""}
    script = ROOT / "launch" / "local_multiprocess.sh"
    assert subprocess.run([script], env=os.environ | environment).returncode == 7
