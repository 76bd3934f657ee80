"""The launch scripts: clean, and as dry runs they print commands that exist."""

import inspect
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
import yaml

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
    found = dict(re.findall(r"--([\w.]+)=([^\s'\"|]*)", command))
    assert found["config.seed"] == "1"
    assert (ROOT / found["config"]).is_file()
    options = inspect.signature(main.main).parameters
    unknown = {flag for flag in found if not flag.startswith("config.")} - set(options) - {"project", "zone"}
    assert not unknown
    if name != "local_multiprocess.sh":
        assert found["distributed"] == "on"
        assert options["preempted_status"].default == 0 != int(found["preempted_status"])


def test_tpu_pods_are_created_installed_and_run_on_all_hosts_in_this_order():
    steps = dry_run("tpu_pod.sh", "keep").splitlines()
    assert [re.search(r"tpus ([\w-]+ \w+)", step)[1] for step in steps] == [
        "queued-resources create", "tpu-vm ssh", "tpu-vm ssh",
    ]  # fmt: skip
    assert all("--project=project --zone=us-west4-a" in step for step in steps)
    assert all("--worker=all" in step for step in steps[1:])
    assert "git clone -q -- https://example.org/code.git" in steps[1]


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


HOSTILE = (
    "a b", " #c: it's", "$(touch PWNED) `touch PWNED`; touch PWNED && x | y > z", """q"u'o * {a: b} $HOME $$ é \\n\\""",
)  # fmt: skip
STUB = """#!{python} -S
import json, os, shutil, sys
with open(os.environ["CALLS"], "a") as file:
    print(json.dumps(sys.argv), file=file)
if os.path.basename(sys.argv[0]) == "gcloud" and "ssh" in sys.argv:
    command = next(x for x in sys.argv if x.startswith("--command=")).partition("=")[2]
    sys.exit(os.spawnlp(os.P_WAIT, "bash", "bash", "-c", command))
if os.path.basename(sys.argv[0]) == "srun":
    sys.exit(os.spawnvp(os.P_WAIT, sys.argv[3], sys.argv[3:]))
if os.path.basename(sys.argv[0]) == "git" and "clone" in sys.argv:
    os.mkdir(sys.argv[-1])
if os.path.basename(sys.argv[0]) == "python3":
    os.makedirs(".venv/bin")
    shutil.copy(sys.argv[0], ".venv/bin/pip")
"""


def real_run(tmp_path, script, *arguments, **variables):
    """The commands that a script runs, its own programs replaced by ones that note what they were given."""
    stubs, home = tmp_path / "stubs", tmp_path / "home"
    places = [
        *(stubs / name for name in ("gcloud", "srun", "scontrol", "git", "sudo", "python3", "pkill", "ln", "sleep"))
    ]
    places.append(home / "detclipv2_jax" / ".venv" / "bin" / "python")
    for path in places:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(STUB.format(python=sys.executable))
        path.chmod(0o755)
    environment = os.environ | VARIABLES | {"XLA_FLAGS": "", "CALLS": str(tmp_path / "calls")} | variables
    environment["PATH"] = f"{stubs}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", ROOT / "launch" / script, *arguments], env=environment, cwd=home, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.rglob("PWNED"))
    return [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]


@pytest.mark.parametrize("value", HOSTILE)
def test_a_tpu_host_gets_every_variable_as_it_is(tmp_path, value):
    names = {"NAME": value, "CONFIG": value, "WORKDIR": f"runs/{value}", "PROJECT": value, "ZONE": value}
    calls = real_run(tmp_path, "tpu_pod.sh", "run", f"--config.name={value}", value, **names)
    assert [f"--project={value}", f"--zone={value}"] == calls[0][-2:]
    assert calls[0][5] == value
    (python,) = (call for call in calls if call[0].endswith("python"))
    assert python[5:] == [f"--config={value}", f"--workdir=runs/{value}", f"--config.name={value}", value]
    assert list((tmp_path / "home" / "detclipv2_jax" / "runs" / value / "logs").glob("*.log"))
    calls = real_run(tmp_path, "tpu_pod.sh", "install", REPOSITORY=value, REVISION=value, SHARE=value)
    assert ["mount", "-t", "nfs", value, "/mnt/share"] in [call[1:] for call in calls]
    assert [call[1:] for call in calls if "git" in call[0]] == [
        ["clone", "-q", "--", value, "detclipv2_jax"],
        ["checkout", "-q", value],
    ]


@pytest.mark.parametrize("value", HOSTILE)
def test_slurm_local_processes_and_gke_get_every_variable_as_it_is(tmp_path, value):
    python = tmp_path / value / "python"
    python.parent.mkdir()
    python.write_text(STUB.format(python=sys.executable))
    python.chmod(0o755)
    variables = {"CODE": str(tmp_path / value), "PYTHON": str(python), "CONFIG": value, "WORKDIR": value}
    calls = real_run(tmp_path, "slurm.sh", f"--config.name={value}", value, **variables)
    own = [f"--config={value}", f"--workdir={value}", f"--config.name={value}", value]
    assert calls[-1][0] == str(python)
    assert calls[-1][5:] == own
    calls = real_run(tmp_path, "local_multiprocess.sh", value, PYTHON=str(python), PROGRAM=value, NUM_PROCESSES="1")
    assert calls[-1] == [str(python), "-m", value, value]
    names = ("NAME", "IMAGE", "ACCELERATOR", "TOPOLOGY", "CLAIM", "CONFIG", "WORKDIR")
    applied = yaml.safe_load(dry_run("gke.sh", value, **dict.fromkeys(names, value)))
    assert applied["metadata"]["name"] == value
    pod = applied["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert set(pod["nodeSelector"].values()) == {value}
    assert pod["containers"][0]["image"] == value
    expected = [text.replace("$", "$$") for text in (f"--config={value}", f"--workdir={value}", value)]
    assert pod["containers"][0]["args"][2:] == expected
    assert pod["volumes"][0]["persistentVolumeClaim"] == {"claimName": value}


def test_what_must_be_a_number_is_one():
    with pytest.raises(subprocess.CalledProcessError) as error:
        dry_run("gke.sh", NUM_HOSTS="4\n# x")
    assert error.value.returncode == 2
    assert "NUM_HOSTS is '4\n# x'; it takes a number" in error.value.stderr
