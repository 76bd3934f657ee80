"""The launch scripts: clean, and as dry runs they print commands that exist."""

import fnmatch
import inspect
import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import tomllib

import pytest
import yaml

from detclipv2_jax import main

ROOT = pathlib.Path(__file__).parents[1]
VARIABLES = {
    "PROJECT": "project", "REPOSITORY": "https://example.org/code.git", "BUCKET": "gs://bucket", "IMAGE": "image:1",
}  # fmt: skip
HOSTILE = (
    "a b", " #c: it's", "$(touch PWNED) `touch PWNED`; touch PWNED && x | y > z", """q"u'o * {a: b} $HOME $$ é \\n\\""",
    "a=b &\n\r\t\x01\x7f\x85\u2028%s %(x)s 😀 ", "\n'", '"\n\n',
)  # fmt: skip
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
    assert ".uv/bin/uv venv -q --python 3.12 .venv" in steps[1]  # not the image's Python
    assert "mount -t nfs" not in steps[1]
    assert "--workdir=gs://bucket/runs/detclip" in steps[2]
    assert "gs://bucket/runs/detclip/logs/" in steps[2]
    for path in ("tpu_pod.sh", "gke.sh"):
        with pytest.raises(subprocess.CalledProcessError) as error:
            dry_run(path, "run", BUCKET="")
        assert "must say where all hosts can write" in error.value.stderr


def test_a_process_that_is_left_over_is_found_and_not_the_shell_that_ends_it():
    (pattern,) = re.findall(r"^program='(.*)'$", (ROOT / "launch" / "tpu_pod.sh").read_text(), re.M)
    assert re.search(pattern, ".venv/bin/python -m detclipv2_jax.main --distributed=on")
    _, _, command = dry_run("tpu_pod.sh", "run").rpartition("--command=")
    assert not re.search(pattern, f"bash -c {command}")


def test_gke_gets_one_pod_a_host_of_one_slice():
    output = dry_run("gke.sh", "--config.name=it's", NUM_HOSTS="4", TOPOLOGY="4x4", CLAIM="share", BUCKET="")
    applied = yaml.safe_load(output)
    assert applied["metadata"]["annotations"] == {
        "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
    }
    (job,) = applied["spec"]["replicatedJobs"]
    job = job["template"]["spec"]
    assert job["parallelism"] == job["completions"] == 4
    pod = job["template"]["spec"]
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "4x4"
    (container,) = pod["containers"]
    assert container["command"] == ["python", "-m", "detclipv2_jax.main"]
    assert container["args"][-1] == "--config.name=it's"
    assert container["args"][3] == "--workdir=/share/runs/detclip"
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    pod = yaml.safe_load(dry_run("gke.sh"))["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert "volumes" not in pod
    assert pod["containers"][0]["args"][3] == "--workdir=gs://bucket/runs/detclip"


def test_gke_starts_again_after_preemptions_and_seldom_after_errors():
    policy = yaml.safe_load(dry_run("gke.sh"))["spec"]
    job = policy["replicatedJobs"][0]["template"]["spec"]
    assert policy["failurePolicy"]["maxRestarts"] <= 5
    (rule,) = policy["failurePolicy"]["rules"]
    assert rule["action"] == "RestartJobSetAndIgnoreMaxRestarts"
    assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]  # and that is only what follows
    saved, taken = job["podFailurePolicy"]["rules"]
    assert {saved["action"], taken["action"]} == {"FailJob"}
    (status,) = saved["onExitCodes"]["values"]
    assert f"--preempted_status={status}" in job["template"]["spec"]["containers"][0]["args"]
    assert taken["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    assert job["backoffLimit"] == 0


def test_the_image_holds_what_its_container_runs():
    lines = (ROOT / "Dockerfile").read_text()
    extras = set(re.findall(r"--build-arg EXTRA=(\w+)", lines)) | set(re.findall(r"ARG EXTRA=(\w+)", lines))
    asked = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert extras == {"tpu", "cuda13"} <= asked["optional-dependencies"].keys()
    assert 'pip install --no-cache-dir --editable ".[$EXTRA]"' in lines
    assert json.loads(re.search(r"^ENTRYPOINT (.*)$", lines, re.M)[1])[1:] == ["-m", "detclipv2_jax"]
    output = dry_run("gke.sh", BUILD="1")
    build, push = (line for line in output.splitlines() if line.startswith("# "))
    assert build.split()[1:] == ["docker", "build", "--build-arg", "EXTRA=tpu", "--tag", "image:1", f"{ROOT}/launch/.."]
    assert push.split()[1:] == ["docker", "push", "image:1"]
    container = yaml.safe_load(output)["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"][
        "containers"
    ]
    assert f"WORKDIR {container[0]['workingDir']}\nCOPY . .\n" in lines
    ignored = (ROOT / ".dockerignore").read_text().split()
    for pattern in (ROOT / ".gitignore").read_text().split():  # what work leaves at the top stays out
        covered = (fnmatch.fnmatch(pattern.strip("/"), ours.removeprefix("**").lstrip("/")) for ours in ignored)
        assert pattern[0] == "!" or any(covered), pattern
    assert not {"configs", "detclipv2_jax", "pyproject.toml", "README.md", "setup.py"} & set(ignored)


SKY = ROOT / "launch" / "skypilot.yaml"


@pytest.mark.parametrize("part", ["setup", "run"])
def test_the_scripts_of_skypilot_are_clean(part, tmp_path):
    task = yaml.safe_load(SKY.read_text())
    (tmp_path / "script.sh").write_text("#!/usr/bin/env bash\n" + task[part])
    test_scripts_are_clean(tmp_path / "script.sh")


def of_skypilot(tmp_path, **variables):
    """Returns what the `run` of the task does on the second of two machines; a stub stands for the program."""
    task = yaml.safe_load(SKY.read_text())
    program = tmp_path / ".venv" / "bin" / "python"
    program.parent.mkdir(parents=True, exist_ok=True)
    program.write_text(
        f"#!{sys.executable} -S\nimport json, os, sys\n"
        'print(json.dumps([sys.argv[1:], {x: os.environ[x] for x in os.environ if x.startswith("JAX_")}]))\n'
        "sys.exit(75)\n"
    )
    program.chmod(0o755)
    environment = os.environ | task["envs"] | {
        "SKYPILOT_NODE_RANK": "1", "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NUM_NODES": "2",
    } | variables  # fmt: skip
    return subprocess.run(["bash", "-c", task["run"]], cwd=tmp_path, env=environment, capture_output=True, text=True)


def test_skypilot_runs_one_process_a_machine_and_starts_it_again_when_it_was_preempted(tmp_path):
    task = yaml.safe_load(SKY.read_text())
    assert task["resources"]["job_recovery"] == {"max_restarts_on_errors": 0, "recover_on_exit_codes": [75]}
    done = of_skypilot(tmp_path, WORKDIR="s3://b/it's here", FLAGS="--config.seed=1  --mode=eval")
    assert done.returncode == 75, done.stderr
    arguments, variables = json.loads(done.stdout)
    assert variables.items() >= {
        "JAX_COORDINATOR_ADDRESS": "10.0.0.1:12355", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1",
    }.items()  # fmt: skip
    assert arguments[:2] == ["-m", "detclipv2_jax.main"]
    assert arguments[2:] == [
        "--distributed=on", "--preempted_status=75", "--config=configs/swin_t.py", "--workdir=s3://b/it's here",
        "--config.seed=1", "--mode=eval",
    ]  # fmt: skip


@pytest.mark.parametrize("value", HOSTILE)
def test_skypilot_gets_every_variable_as_it_is(tmp_path, value):
    flags = [f"--config.name={value}", value, "*", ""]
    done = of_skypilot(tmp_path, CONFIG=value, WORKDIR=value, FLAGS=shlex.join(flags))
    assert done.returncode == 75, done.stderr
    assert json.loads(done.stdout)[0][4:] == [f"--config={value}", f"--workdir={value}", *flags]
    assert not list(tmp_path.rglob("PWNED"))
    assert json.loads(of_skypilot(tmp_path, WORKDIR="", FLAGS=" \n").stdout)[0][6:] == []
    done = of_skypilot(tmp_path, WORKDIR=value, FLAGS="it's")
    assert (done.returncode, done.stdout) == (1, "")
    assert "No closing quotation" in done.stderr


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


# notes what it was given, then does what REPLIES says: [program, a word of its arguments, status, output], used once
STUB = """#!{python} -S
import json, os, sys
name, given = os.path.basename(sys.argv[0]), " ".join(sys.argv[1:])
with open(os.environ["CALLS"], "a") as file:
    print(json.dumps(sys.argv), file=file)
with open(os.environ["REPLIES"]) as file:
    replies = json.load(file)
for i, (program, word, status, output) in enumerate(replies):
    if program == name and word in given:
        with open(os.environ["REPLIES"], "w") as file:
            json.dump(replies[:i] + replies[i + 1:], file)
        if output.startswith("touch "):
            open(output[6:], "w").close()
        else:
            print(output)
        sys.exit(status)
if name == "gcloud" and "ssh" in sys.argv:
    command = next(x for x in sys.argv if x.startswith("--command=")).partition("=")[2]
    sys.exit(os.spawnlp(os.P_WAIT, "bash", "bash", "-c", command))
if name == "srun":
    sys.exit(os.spawnvp(os.P_WAIT, sys.argv[3], sys.argv[3:]))
if name == "git" and "clone" in sys.argv:
    os.mkdir(sys.argv[-1])
if name == "gcloud" and "describe" in sys.argv:
    print("ACTIVE")
if name == "python3" or (name == "uv" and "venv" in sys.argv):
    for program in {{"python3": [".uv/bin/pip", ".uv/bin/uv"], "uv": [".venv/bin/python"]}}[name]:
        os.makedirs(os.path.dirname(program), exist_ok=True)
        with open(sys.argv[0]) as file, open(program, "w") as copy:
            copy.write(file.read())
        os.chmod(program, 0o755)
sys.exit(name in ("pkill", "pgrep"))  # nothing is left over
"""
PROGRAMS = ("gcloud", "srun", "scontrol", "git", "sudo", "python3", "pkill", "pgrep", "ln", "sleep")


def start(tmp_path, script, *arguments, replies=(), **variables):
    """Returns (what a script ended with, the commands that it ran); stubs stand for all programs."""
    stubs, home = tmp_path / "stubs", tmp_path / "home"
    places = [*(stubs / name for name in PROGRAMS), home / "detclipv2_jax" / ".venv" / "bin" / "python"]
    for path in places:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(STUB.format(python=sys.executable))
        path.chmod(0o755)
    (tmp_path / "replies").write_text(json.dumps(replies))
    (tmp_path / "calls").write_text("")
    environment = os.environ | VARIABLES | {"XLA_FLAGS": "", "CALLS": str(tmp_path / "calls")} | variables
    environment |= {"PATH": f"{stubs}:{os.environ['PATH']}", "REPLIES": str(tmp_path / "replies")}
    done = subprocess.run(
        ["bash", ROOT / "launch" / script, *arguments], env=environment, cwd=home, capture_output=True, text=True,
        timeout=60,
    )  # fmt: skip
    assert not list(tmp_path.rglob("PWNED"))
    return done, [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]


def real_run(tmp_path, script, *arguments, **variables):
    """The commands that a script runs, its own programs replaced by ones that note what they were given."""
    done, calls = start(tmp_path, script, *arguments, **variables)
    assert done.returncode == 0, done.stderr
    return calls


def of_gcloud(calls):
    """Returns what was done with the machines, in order."""
    return [call[4] if call[3] == "queued-resources" else "ssh" for call in calls if call[1:3] == ["compute", "tpus"]]


ABSENT = ["gcloud", "describe", 1, "ERROR: (gcloud.compute.tpus) NOT_FOUND: Resource not found"]
THERE = ["gcloud", "describe", 0, "ACTIVE"]
LOGIN = ["gcloud", "describe", 1, "ERROR: Reauthentication failed. Please run: gcloud auth login"]
RUN = "detclipv2_jax.main --distributed"  # the command that starts the run


def test_machines_are_asked_for_waited_for_and_kept(tmp_path):
    waiting = ["gcloud", "describe", 0, "WAITING_FOR_RESOURCES"]
    done, calls = start(tmp_path, "tpu_pod.sh", "keep", replies=[ABSENT, waiting, THERE])
    assert done.returncode == 0, done.stderr
    # is a run going on, install, run
    assert of_gcloud(calls) == ["describe", "create", "describe", "describe", "ssh", "ssh", "ssh"]


def test_keep_beside_a_healthy_run_changes_nothing(tmp_path):
    done, calls = start(tmp_path, "tpu_pod.sh", "keep", replies=[THERE, ["pgrep", "detclipv2_jax", 0, "4711"]])
    assert done.returncode == 3
    assert "a run goes on on detclip, and nothing was changed" in done.stderr
    assert of_gcloud(calls) == ["describe", "ssh"]
    assert not [call for call in calls if call[0].endswith(("pkill", "git", "main"))]


def test_machines_that_are_there_are_used(tmp_path):
    done, calls = start(tmp_path, "tpu_pod.sh", "create", replies=[THERE])
    assert (done.returncode, of_gcloud(calls)) == (0, ["describe"])
    done, calls = start(tmp_path, "tpu_pod.sh", "keep", replies=[THERE])
    assert (done.returncode, of_gcloud(calls)) == (0, ["describe", "ssh", "ssh", "ssh"])


@pytest.mark.parametrize("command", ["create", "keep"])
def test_a_login_that_expired_ends_the_script_and_deletes_nothing(tmp_path, command):
    done, calls = start(tmp_path, "tpu_pod.sh", command, replies=[LOGIN] * 9)
    assert done.returncode > 0
    assert "has its login expired (gcloud auth login)?" in done.stderr
    assert "Reauthentication failed" in done.stderr
    assert of_gcloud(calls) == ["describe"] * 5


def test_a_login_that_expires_during_the_run_deletes_nothing(tmp_path):
    replies = [THERE, ["gcloud", RUN, 255, ""], *[LOGIN] * 9]
    done, calls = start(tmp_path, "tpu_pod.sh", "keep", replies=replies)
    assert done.returncode == 1
    assert "delete" not in of_gcloud(calls)


def test_keep_uses_machines_again_then_fresh_ones_and_gives_up_where_the_run_fails_again_and_again(tmp_path):
    done, calls = start(tmp_path, "tpu_pod.sh", "keep", replies=[[*THERE], *[["gcloud", RUN, 1, ""], THERE, THERE] * 3])
    assert done.returncode == 1
    assert "the run fails again and again; see gs://bucket/runs/detclip/logs" in done.stderr
    steps = of_gcloud(calls)
    assert sum(RUN in " ".join(call) for call in calls if call[0].endswith("gcloud")) == 3
    assert steps.count("delete") == 1
    assert steps.index("delete") > 5  # not after the first failure


def test_machines_that_were_taken_are_replaced(tmp_path):
    taken = ["gcloud", "describe", 0, "SUSPENDED"]
    replies = [THERE, ["gcloud", RUN, 255, ""], taken, ABSENT, THERE]
    done, calls = start(tmp_path, "tpu_pod.sh", "keep", replies=replies)
    assert done.returncode == 0, done.stderr
    assert of_gcloud(calls)[4:] == ["describe", "delete", "describe", "create", "describe", "ssh", "ssh"]


@pytest.mark.parametrize(
    ("status", "word", "again"),
    [(75, False, True), (143, True, True), (137, True, True), (1, False, False), (137, False, False), (0, True, False)],
)
def test_slurm_queues_a_run_that_has_saved_up_again_whatever_its_status(tmp_path, status, word, again):
    (tmp_path / "preempted").write_text("of an earlier run")
    said = f"touch {tmp_path}/preempted" if word else ""
    variables = {"WORKDIR": str(tmp_path), "SLURM_JOB_ID": "17", "PYTHON": "python"}
    done, calls = start(tmp_path, "slurm.sh", replies=[["srun", "main", status, said]], **variables)
    assert done.returncode == status
    asked = [call[1:] for call in calls if call[0].endswith("scontrol")]
    assert asked == [["requeue", "17"]] * again
    assert (tmp_path / "preempted").exists() == word


@pytest.mark.parametrize("value", HOSTILE)
def test_a_tpu_host_gets_every_variable_as_it_is(tmp_path, value):
    names = {"NAME": value, "CONFIG": value, "WORKDIR": f"runs/{value}", "PROJECT": value, "ZONE": value}
    calls = real_run(tmp_path, "tpu_pod.sh", "run", f"--config.name={value}", value, **names)
    assert [f"--project={value}", f"--zone={value}"] == calls[0][-2:]
    assert calls[0][5] == value
    (python,) = (call for call in calls if call[0].endswith("python"))
    assert python[5:] == [f"--config={value}", f"--workdir=runs/{value}", f"--config.name={value}", value]
    assert list((tmp_path / "home" / "detclipv2_jax" / "runs" / value / "logs").glob("*.log"))
    (copy,) = (
        call for call in real_run(tmp_path, "tpu_pod.sh", "run", BUCKET=value + "://", NAME=value) if "cp" in call
    )
    assert copy[-1] == f"{value}:///runs/{value}/logs/"
    asked = {"NAME": value, "ACCELERATOR": value, "RUNTIME": value, "PROJECT": value, "ZONE": value}
    _, calls = start(tmp_path, "tpu_pod.sh", "create", replies=[ABSENT], **asked)
    options = {f"--node-id={value}", f"--accelerator-type={value}", f"--runtime-version={value}", f"--zone={value}"}
    assert options | {value, "--spot"} < {*calls[1]}
    (deleted,) = real_run(tmp_path, "tpu_pod.sh", "delete", **asked)
    assert deleted[4:6] == ["delete", value]
    (tmp_path / "again").mkdir()
    versions = {"SHARE": value, "PYTHON_VERSION": value}
    calls = real_run(tmp_path / "again", "tpu_pod.sh", "install", REPOSITORY=value, REVISION=value, **versions)
    assert [call[-2] for call in calls if call[0].endswith("uv")] == [value, "-e"]
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
    calls = real_run(tmp_path, "slurm.sh", CODE=os.path.relpath(tmp_path / value, tmp_path / "home"), PYTHON="./python")
    assert calls[-1][0] == "./python"
    calls = real_run(tmp_path, "local_multiprocess.sh", value, PYTHON=str(python), PROGRAM=value, NUM_PROCESSES="1")
    assert calls[-1] == [str(python), "-m", value, value]
    names = ("NAME", "IMAGE", "ACCELERATOR", "TOPOLOGY", "CLAIM", "ACCOUNT", "CONFIG", "WORKDIR")
    applied = yaml.safe_load(dry_run("gke.sh", value, **dict.fromkeys(names, value)))
    assert applied["metadata"]["name"] == value
    bucket = yaml.safe_load(dry_run("gke.sh", BUCKET=value, NAME=value))["spec"]["replicatedJobs"][0]["template"][
        "spec"
    ]
    (container,) = bucket["template"]["spec"]["containers"]
    assert container["args"][3].replace("$$", "$") == f"--workdir={value}/runs/{value}"
    pod = applied["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert set(pod["nodeSelector"].values()) == {value}
    assert pod["containers"][0]["image"] == pod["serviceAccountName"] == value
    expected = [text.replace("$", "$$") for text in (f"--config={value}", f"--workdir={value}", value)]
    assert pod["containers"][0]["args"][2:] == expected
    assert pod["volumes"][0]["persistentVolumeClaim"] == {"claimName": value}


@pytest.mark.parametrize("value", ["4\n# x", "a[$(touch PWNED)]", "010", "4 --x", "-1", "1e3"])
@pytest.mark.parametrize(
    ("script", "name"),
    [
        ("gke.sh", "NUM_HOSTS"), ("gke.sh", "CHIPS_PER_HOST"), ("gke.sh", "MAX_RESTARTS"),
        ("local_multiprocess.sh", "NUM_PROCESSES"), ("local_multiprocess.sh", "DEVICES_PER_PROCESS"),
        ("local_multiprocess.sh", "PORT"),
    ],
)  # fmt: skip
def test_what_must_be_a_number_is_one(tmp_path, script, name, value):
    done, calls = start(tmp_path, script, DRY_RUN="1", **{name: value})
    assert (done.returncode, done.stdout, calls) == (2, "", [])
    assert f"error: {name} is '{value}'; it takes a number" in done.stderr
