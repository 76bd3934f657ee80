"""Processes that are killed or interrupted leave nothing behind and hurt nobody."""

import contextlib
import gc
import os
import pathlib
import signal
import subprocess
import sys
import time

import planted
import pytest
from micro import micro_config

from detclipv2_jax import commands
from detclipv2_jax.claims import __main__ as claims
from detclipv2_jax.data import scenes, workers
from detclipv2_jax.inference import Predictor
from detclipv2_jax.predict import __main__ as predict
from detclipv2_jax.prepare import __main__ as prepare

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    scenes.write(folder, num_detection=64, num_grounding=0, num_image_text=64, num_eval=0, size_px=64)
    return folder


def start(code, **options):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment, **pipes, **options)


def gone(pid):
    """Whether a process has ended; a zombie, whose parent does not ask for it, has."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def memory():
    """Returns the names of the shared memory of this machine; what other processes hold for long was there before."""
    names = {name for name in os.listdir("/dev/shm") if name.startswith(("psm_", "sem."))}
    return {name for name in names if not name.endswith(".lock")}  # those of other tests come and stay


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


READING = """
import os, pathlib, sys, time
from micro import micro_config
from detclipv2_jax.data.streams import train_streams
if __name__ == "__main__":
    config = micro_config()
    config.image_text.pairs, config.image_text.images = "{folder}/pairs.tsv", "{folder}"
    config.image_text.canvases, config.image_text.batch_size = ((256, 256),), 16  # 3 MB a batch
    config.input.num_workers, config.input.prefetch_batches = 2, 4
    batches = train_streams(config)[-1].iterate()
    next(batches)
    time.sleep(1)
    children = [pid for file in pathlib.Path("/proc/self/task").glob("*/children") for pid in file.read_text().split()]
    print(*children, flush=True)
    {end}
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("end", "kill"),
    [
        ("for _ in batches: pass", os.kill), ("for _ in batches: pass", os.killpg), ("os._exit(1)", None),
        ("os.abort()", None),
    ],
)  # fmt: skip
def test_data_workers_end_with_their_parent_and_leave_no_memory(world, end, kill):
    code = READING.format(folder=world, end=f"{end}\n    {'time.sleep(600)' if kill else 'pass'}")
    before = memory()
    with start(code, start_new_session=True) as parent:
        children = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(children) >= 3, parent.stderr.read()  # two workers and the tracker of their memory
        if kill:
            time.sleep(0.3)
            assert {name[:4] for name in memory() - before} == {"psm_", "sem."}  # batches that wait, and queues
            kill(parent.pid, signal.SIGKILL)
        parent.wait(timeout=60)
        wait_for(lambda: all(map(gone, children)))
        left = memory() - before
        wait_for(lambda: not left & memory())


SHARING = """
import time
from multiprocessing import resource_tracker, shared_memory
from detclipv2_jax.data import workers
with workers.starting():
    pass
workers._name_memory()
memory = shared_memory.SharedMemory(create=True, size=100)
print(memory.name, resource_tracker._resource_tracker._pid, flush=True)
{end}
memory.close()
memory.unlink()
"""


@pytest.mark.parametrize("killed", ["nothing", "run", "all of it at once"])
def test_memory_that_nobody_could_remove_goes_when_another_run_starts(killed):
    with start(SHARING.format(end="pass" if killed == "nothing" else "time.sleep(600)")) as run:
        name, tracker = run.stdout.readline().split()
        left = {name, f"{name.rpartition('_')[0]}.lock"}
        if killed != "nothing":
            with workers.starting():  # another run meanwhile hurts nothing
                assert left <= set(os.listdir("/dev/shm"))
            if killed != "run":
                os.kill(int(tracker), signal.SIGKILL)
                wait_for(lambda: gone(int(tracker)))
            run.kill()
        run.wait(timeout=60)
        assert killed != "nothing" or not run.stderr.read()
    if killed == "all of it at once":
        assert left <= set(os.listdir("/dev/shm"))
        with workers.starting():
            pass
        assert not left & set(os.listdir("/dev/shm"))
    wait_for(lambda: not left & set(os.listdir("/dev/shm")))


BUILDING = """
import pathlib, sys, time
from detclipv2_jax.prepare import __main__ as prepare, record_builder
if __name__ == "__main__":
    checked = record_builder.checked
    def slow(record):
        print("at work", flush=True)
        time.sleep({seconds})
        return checked(record)
    record_builder.checked = slow
    try:
        report = prepare.run(
            "coco_json", input="{folder}/detection.json", images="{folder}", output="{output}", workers=1
        )
        print(report["examples"])
    except ValueError as error:
        sys.exit("error: %s" % error)
"""


def test_a_second_build_into_one_folder_is_refused_and_hurts_nothing(world, tmp_path):
    output = tmp_path / "built"
    with start(BUILDING.format(folder=world, output=output, seconds=0.05)) as first:
        assert first.stdout.readline() == "at work\n"
        parts = sorted(output.rglob("*"))
        assert any(".part" in path.name for path in parts)
        with start(BUILDING.format(folder=world, output=output, seconds=0)) as second:
            out, message = second.communicate(timeout=60)
        assert second.returncode == 1
        assert (
            message.strip()
            .splitlines()[-1]
            .startswith(f"error: another process builds in {output} (process {first.pid} on ")
        )
        assert not out
        assert sorted(output.rglob("*")) == parts
        assert first.communicate(timeout=120)[0].splitlines()[-1] == "64"
    files = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    assert not any("building" in str(path) for path in files)
    with start(BUILDING.format(folder=world, output=output, seconds=0)) as again:
        assert again.communicate(timeout=60)[0].splitlines()[-1] == "64"
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == files


def test_a_build_that_was_killed_goes_on(world, tmp_path):
    output = tmp_path / "built"
    with start(BUILDING.format(folder=world, output=output, seconds=0.05)) as first:
        assert first.stdout.readline() == "at work\n"
        first.send_signal(signal.SIGKILL)
    with start(BUILDING.format(folder=world, output=output, seconds=0)) as again:
        assert again.communicate(timeout=60)[0].splitlines()[-1] == "64"


def commands_that_write(world, folder):
    """Returns by name the folder that is locked, the name in it, and the command."""
    pairs = {"input": str(world / "pairs.tsv"), "images": str(world), "pipeline": ""}
    config = micro_config()
    config.detection.annotations, config.detection.images = str(world / "detection.json"), str(world)
    out = str(folder / "out")
    looks = {"checkpoint": "run", "score_threshold": 0.0, "max_bad_share": 1.0}
    boxes = {"input": config.detection.annotations, "images": str(world)}
    predicts = {"checkpoint": "run", "images": f"{world}/images/detection/00000[01].jpg", "words": "red"}
    return {
        "scenes": ("out", "", lambda: prepare.scenes(output=out, num_examples=2, size_px=64)),
        "inspect": ("out", "", lambda: prepare.inspect(output=out, config=config, num_examples=8)),
        "dictionary": (".", "out", lambda: prepare.dictionary(output=out, input=(config.detection.annotations,))),
        "pseudo_boxes": ("out", "", lambda: prepare.pseudo_boxes(output=out, **pairs, **looks)),
        "filter": (
            "out_filter", "",
            lambda: prepare.run("image_text", output=out, **pairs, filter="run", max_misfit=0.99, workers=1),
        ),
        "coco_json": ("out", "", lambda: prepare.run("coco_json", output=out, **boxes, workers=1)),
        "predict": ("out", "", lambda: predict.run(output=out, **predicts)),
        "claims": ("work", "", lambda: claims._run_table("", results=folder, work=folder / "work", jobs=1)),
    }  # fmt: skip


HOLDING = """
import pathlib, sys
from detclipv2_jax import files
with files.only_writer(pathlib.Path({folder!r}), {name!r}):
    print("in", flush=True)
    sys.stdin.read()
"""


def state_of(folder):
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("command", ["scenes", "inspect", "dictionary", "pseudo_boxes", "filter", "predict", "claims"])
def test_a_second_command_that_writes_to_a_place_is_refused_and_a_repeated_one_changes_nothing(
    world, tmp_path, monkeypatch, command
):
    model = Predictor(*planted.make())
    monkeypatch.setattr(Predictor, "from_checkpoint", lambda *_, **__: model)
    monkeypatch.setattr(claims, "pending_runs", lambda *_: [("all", 0)])
    monkeypatch.setattr(claims, "all_results", lambda _: {})
    folder, name, run = commands_that_write(world, tmp_path)[command]
    folder = tmp_path / folder
    with start(HOLDING.format(folder=str(folder), name=name), stdin=subprocess.PIPE) as other:
        assert other.stdout.readline() == "in\n"
        before = state_of(tmp_path)
        with pytest.raises(ValueError, match=f"another process writes to .*process {other.pid} on"):
            run()
        assert state_of(tmp_path) == before
        other.stdin.close()
    assert not state_of(tmp_path)
    if command == "claims":
        return
    run()
    before = state_of(tmp_path)
    assert before
    assert not any(path.name.endswith("lock") for path in before)
    run()
    assert state_of(tmp_path) == before


@pytest.mark.parametrize("free", [0, 8192])
@pytest.mark.parametrize(
    "command", ["scenes", "inspect", "dictionary", "pseudo_boxes", "filter", "coco_json", "predict"]
)
def test_a_disk_that_is_full_at_the_first_write_is_one_line(world, small_disk, monkeypatch, capsys, command, free):
    model = Predictor(*planted.make())
    monkeypatch.setattr(Predictor, "from_checkpoint", lambda *_, **__: model)
    with contextlib.suppress(OSError), (small_disk / "filler").open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
    os.truncate(small_disk / "filler", (small_disk / "filler").stat().st_size - free)
    _, _, run = commands_that_write(world, small_disk)[command]
    capsys.readouterr()
    if commands.run(lambda: run() and None, arguments=[]):
        said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
        assert said[0].endswith("; make room there, or write elsewhere")
        assert "No space left on device" in said[0]
        assert len(said) == 1
    else:
        assert free  # it needs no more
    gc.collect()  # nothing there is open when the disk goes
