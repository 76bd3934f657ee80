"""Ctrl-C in commands that are processes of their own: one line and status 130, wherever it comes."""

import contextlib
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import planted
import portpicker
import pytest

from detclipv2_jax import __main__ as detclip
from detclipv2_jax import config_json

ROOT = pathlib.Path(__file__).parents[2]
WAIT = "lambda *_, **__: print('at work', file=sys.stderr, flush=True) or time.sleep(600)"
# as `python -m MODULE`, after a part of it was exchanged
PROGRAM = """
import runpy, subprocess, sys, time
if __name__ == "__main__":
    sys.argv = {argv!r}
    {before}
    runpy.run_module("detclipv2_jax.{module}", run_name="__main__", alter_sys=True)
"""


def start(module, argv, *, before="pass", **variables):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])} | variables
    code = PROGRAM.format(module=module, argv=[module, *map(str, argv)], before=before)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment, **pipes)


def interrupted(processes, *, times=1, limit_s=200, apart_s=1):
    """Returns status and stderr of processes that get Ctrl-C as from a terminal, when all of them are at work."""
    said = [[] for _ in processes]
    timers = [threading.Timer(limit_s, process.kill) for process in processes]
    for timer in timers:
        timer.start()
    for process, lines in zip(processes, said, strict=True):
        for line in process.stderr:
            lines.append(line)
            if "at work" in line:
                break
    for _ in range(times):
        for process in processes:
            os.killpg(process.pid, signal.SIGINT)
        time.sleep(apart_s)  # two that wait at once are one
    for process, lines in zip(processes, said, strict=True):
        lines += process.stderr
        process.wait(timeout=limit_s)
    for timer in timers:
        timer.cancel()
    return [(process.returncode, "".join(lines)) for process, lines in zip(processes, said, strict=True)]


def ends_with_a_line(outcome, line="stopped by Ctrl-C"):
    status, said = outcome
    assert status == 130, said
    assert "Traceback" not in said
    assert said.strip().splitlines()[-1].startswith(line), said
    assert said.count("stopped by") == 1


COMMANDS = {
    "eval.coco": ("detclipv2_jax.eval.detections", "find", ["--annotations={t}", "--detections={d}"]),
    "eval.lvis": ("detclipv2_jax.eval.detections", "read", ["--annotations={t}", "--detections={d}"]),
    "eval.names": ("detclipv2_jax.eval.detections", "find", ["--annotations={t}", "--detections={d}"]),
    "eval.grounding": (
        "detclipv2_jax.inference", "Predictor.from_checkpoint",
        ["--checkpoint={folder}", "--annotations={g}", "--images={folder}/pothole/test"],
    ),
    "eval.odinw": ("detclipv2_jax.eval.loop", "Checkpoint.load", ["--checkpoint={folder}", "--data={folder}"]),
    "prepare": ("detclipv2_jax.data.scenes", "write", ["scenes", "--output={folder}/out"]),
    "visualize": (
        "detclipv2_jax.data.transforms", "read",
        ["detections", "--annotations={t}", "--detections={d}", "--images={folder}/pothole/test",
         "--output={folder}/out"],
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("module", COMMANDS)
def test_commands(tmp_path, module):
    made = planted.write_dataset(tmp_path / "pothole" / "test", num_images=3)
    for path in (made.parent / "images").iterdir():
        path.rename(made.parent / path.name)
    made = made.rename(made.with_name("annotations.json"))
    content = json.loads(made.read_text())
    rows = [
        {key: row[key] for key in ("image_id", "category_id", "bbox")} | {"score": 0.5}
        for row in content["annotations"]
    ]
    (tmp_path / "d.json").write_text(json.dumps(rows))
    for image, row in zip(content["images"], content["annotations"], strict=False):
        image["caption"], row["tokens_positive"], row["image_id"] = "a red thing", [[2, 5]], image["id"]
    content["annotations"] = content["annotations"][:3]
    (tmp_path / "g.json").write_text(json.dumps(content))
    (tmp_path / "config.json").write_text(config_json.to_json(planted.make()[0]))
    where, part, argv = COMMANDS[module]
    places = {"t": made, "d": tmp_path / "d.json", "g": tmp_path / "g.json", "folder": tmp_path}
    before = f"import {where} as exchanged; exchanged.{part} = {WAIT}"
    with start(module, [text.format(**places) for text in argv], before=before) as process:
        ends_with_a_line(interrupted([process])[0])


# an import that takes long, and whose exceptions somebody catches
IMPORTED = """
import sys, time
print("at work", file=sys.stderr, flush=True)
try:
    time.sleep(600)
except BaseException:
    time.sleep(600)
"""


@pytest.fixture(scope="module")
def slow_import(tmp_path_factory):
    folder = tmp_path_factory.mktemp("imports")
    (folder / "absl.py").write_text(IMPORTED)
    (folder / "detclip").write_text("from detclipv2_jax.__main__ import main\nmain()\n")
    return folder


MODULES = sorted({module for module, _ in detclip.COMMANDS.values()})


@pytest.mark.parametrize("command", [*MODULES, "-m detclipv2_jax eval.coco", "detclip predict"])
def test_ctrl_c_while_a_command_imports(slow_import, command):
    first, _, name = command.rpartition(" ")
    argv = {"": ["-m", f"detclipv2_jax.{name}"], "detclip": [slow_import / "detclip", name]}.get(first, command.split())
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(slow_import), str(ROOT)])}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    with subprocess.Popen([sys.executable, *argv], cwd=slow_import, env=environment, **pipes) as process:
        ends_with_a_line(interrupted([process], limit_s=60, apart_s=0)[0])


def test_a_program_that_imports_the_package_keeps_its_ctrl_c():
    code = "import signal, detclipv2_jax; assert signal.getsignal(signal.SIGINT) is signal.default_int_handler"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.slow
def test_claims_stop_their_runs(tmp_path):
    before = (
        "import pathlib; from detclipv2_jax.claims import __main__ as claims; popen = subprocess.Popen; "
        f"note = lambda process: pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(process.pid)) and process; "
        "subprocess.Popen = lambda *_, **__: ("
        "note(popen(['sleep', '600'])), print('at work', file=sys.stderr, flush=True))[0]"
    )
    argv = [f"--results={tmp_path}/results", f"--work={tmp_path}/work", f"--output={tmp_path}/out", "--jobs=1"]
    with start("claims", argv, before=before) as process:
        ends_with_a_line(interrupted([process])[0])
    status = pathlib.Path("/proc", (tmp_path / "pid").read_text(), "stat")
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it is gone, or only waits for init to take note
        assert status.read_text().rpartition(")")[2].split()[0] == "Z"


BLOCKED = """
import hashlib, signal, sys
from detclipv2_jax import commands
def main():
    {handler}
    print("at work", file=sys.stderr, flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 1 << 30)  # minutes without Python
sys.exit(commands.run(main))
"""


@pytest.mark.parametrize(
    ("handler", "times", "line"),
    [
        ("pass", 1, "stopped by Ctrl-C"),
        ("pass", 2, "stopped by Ctrl-C"),  # on a busy machine the first one may have ended it
        ("signal.signal(signal.SIGINT, lambda *_: None)", 2, "stopped by Ctrl-C at once"),
    ],
)
def test_a_command_whose_main_thread_does_not_hear_of_it(handler, times, line):
    options = {"cwd": ROOT, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    with subprocess.Popen([sys.executable, "-c", BLOCKED.format(handler=handler)], **options) as process:
        started = time.monotonic()
        ends_with_a_line(interrupted([process], times=times)[0], line)
        assert time.monotonic() - started < 60


# a run whose next program takes long to compile
COMPILING = """
import stand_in
from detclipv2_jax import train
stand_in.install()
make = train.compile_ahead
def compile_ahead(*arguments, **options):
    ahead = make(*arguments, **options)
    ahead._thread.submit(WAIT)
    return ahead
train.compile_ahead = compile_ahead
""".replace("WAIT", WAIT)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_saves_its_step_and_leaves_the_compiler(tmp_path, number):
    (tmp_path / "config.py").write_text("from micro import micro_config as get_config\n")
    argv = [f"--config={tmp_path / 'config.py'}", f"--workdir={tmp_path / 'run'}", "--preempted_status=75"]
    with start("main", argv, before=f"exec({COMPILING!r})") as process:
        limit = threading.Timer(200, process.kill)
        limit.start()
        said = []
        for line in process.stderr:
            said.append(line)
            if "at work" in line:
                break
        process.send_signal(number)
        said += process.stderr
        assert process.wait(timeout=200) == {signal.SIGINT: 130, signal.SIGTERM: 75}[number], "".join(said)
        limit.cancel()
    (stopped,) = [line for line in said if "which is saved" in line]
    assert (tmp_path / "run" / "preempted").read_text().strip() in stopped
    assert (tmp_path / "run" / "checkpoints" / re.search(r"after step (\d+)", stopped)[1]).is_dir()


SIGTERM_TO_ITSELF = """
import os, signal, sys, time
sys.argv = {argv}
import detclipv2_jax
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(1)
print("went on as process", os.getpid())
"""


@pytest.mark.parametrize(
    ("argv", "first", "status"),
    [
        (["detclip"], True, 128 + signal.SIGTERM),
        (["detclip"], False, -signal.SIGTERM),
        (["notebook"], True, 0),  # a program that imports us keeps what the kernel does
    ],
)
def test_sigterm_ends_a_command_that_is_the_first_process_of_a_container(argv, first, status):
    alone = ["unshare", "--map-root-user", "--pid", "--fork"]
    if first and (not shutil.which("unshare") or subprocess.run([*alone, "true"], capture_output=True).returncode):
        pytest.skip("needs unshare and namespaces of its own")
    code = SIGTERM_TO_ITSELF.format(argv=argv)
    ran = subprocess.run([*alone * first, sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == status, ran.stderr
    assert ran.stdout == "went on as process 1\n" * (status == 0)


@pytest.mark.slow
@pytest.mark.parametrize("at_barrier", [0, 1])
def test_an_evaluation_by_two_processes(tmp_path, at_barrier):
    made = planted.write_dataset(tmp_path / "set", num_images=4)
    config = planted.make()[0]
    config.eval.annotations, config.eval.images = str(made), str(made.parent / "images")
    config.eval.batch_size = 2
    for kind in ("eval", "detection", "grounding", "image_text"):
        config.scenes[f"num_{kind}"] = 0
    (tmp_path / "config.json").write_text(config_json.to_json(config))
    (tmp_path / "config.py").write_text(
        "import pathlib\nfrom detclipv2_jax import config_json\ndef get_config():\n"
        f"    return config_json.from_json(pathlib.Path({str(tmp_path / 'config.json')!r}).read_text())\n"
    )
    # one process waits in Python, the other at a barrier, where Python does not hear of the signal
    before = (
        "import jax, planted; from detclipv2_jax.runs import checkpoints, processes; "
        "from detclipv2_jax.eval import loop; "
        "checkpoints.load_for_inference = lambda _: (*planted.make()[::2], 1); "
        "loop.Evaluator.__call__ = lambda *_, **__: print('at work', file=sys.stderr, flush=True) or "
        "(processes.barrier('never', timeout_s=600) if jax.process_index() == BARRIER else time.sleep(600))"
    ).replace("BARRIER", str(at_barrier))
    argv = ["--mode=eval", f"--config={tmp_path}/config.py", f"--workdir={tmp_path}", "--distributed=on"]
    (tmp_path / "checkpoints").mkdir()
    address = f"localhost:{portpicker.pick_unused_port()}"
    variables = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2", "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    with contextlib.ExitStack() as stack:
        started = [start("main", argv, before=before, JAX_PROCESS_ID=str(i), **variables) for i in range(2)]
        for outcome in interrupted([stack.enter_context(process) for process in started]):
            ends_with_a_line(outcome)


TRAINING = """
import stand_in
from cases.test_runs import small_config
stand_in.install()
def get_config():
    c = small_config()
    c.num_steps, c.checkpoint.every_steps, c.log_every_steps = 10000, 10000, 1
    c.input.num_workers = 0
    return c
"""


@pytest.mark.slow
def test_a_training_by_two_processes(tmp_path):
    (tmp_path / "config.py").write_text(TRAINING)
    # the step after which one process is at work, and all get the signal, is not the one after which they stop
    before = (
        "from detclipv2_jax import train; finish = train.finish_step; "
        "train.finish_step = lambda done, *a, **o: finish(done, *a, **o) or "
        "(done == 2 and print('at work', file=sys.stderr, flush=True))"
    )
    argv = [f"--config={tmp_path}/config.py", f"--workdir={tmp_path}/run", "--distributed=on"]
    address = f"localhost:{portpicker.pick_unused_port()}"
    variables = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2", "JAX_PLATFORMS": "cpu"}
    flags = re.sub(r"--xla_force\S*", "", os.environ["XLA_FLAGS"])
    with contextlib.ExitStack() as stack:
        started = [
            stack.enter_context(start("main", argv, before=before, JAX_PROCESS_ID=str(i), XLA_FLAGS=flags, **variables))
            for i in range(2)
        ]
        outcomes = interrupted(started)
    (saved,) = (path.name for path in (tmp_path / "run" / "checkpoints").iterdir() if path.name.isdigit())
    for status, said in outcomes:
        assert status == 130, said
        assert "Traceback" not in said
        assert f"stopped by Ctrl-C after step {saved}, which is saved" in said.strip().splitlines()[-1]
