"""Processes that are killed or interrupted leave nothing behind and hurt nobody."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from detclipv2_jax.data import scenes

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
@pytest.mark.parametrize("end", ["time.sleep(600)", "os._exit(1)", "os.abort()"])
def test_data_workers_end_with_their_parent_and_leave_no_memory(world, end):
    before = set(os.listdir("/dev/shm"))
    with start(READING.format(folder=world, end=end)) as parent:
        children = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(children) >= 3, parent.stderr.read()  # two workers and the tracker of their memory
        if "sleep" in end:
            assert set(os.listdir("/dev/shm")) - before  # batches that wait
            parent.kill()
        parent.wait(timeout=60)
        wait_for(lambda: all(map(gone, children)))
        wait_for(lambda: not {name for name in set(os.listdir("/dev/shm")) - before if name.startswith("psm_")})


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
