"""Damaged checkpoints, full and read-only disks, and two runs in one workdir, on real files."""

import contextlib
import errno
import json
import logging
import os
import pathlib
import re
import resource
import shutil
import signal
import subprocess
import sys
import types

import jax
import numpy as np
import pytest

from detclipv2_jax import files
from detclipv2_jax.runs import checkpoints, workdir
from detclipv2_jax.runs.state import TrainState

ROOT = pathlib.Path(__file__).parents[2]
ITEMS = ("params", "optimizer")


def state_of(step):
    """A state of 80 kB that tells its step."""
    rng = np.random.default_rng(step)
    params = {name: jax.numpy.asarray(rng.normal(size=(size, 10)), "float32") for name, size in (("a", 2000), ("b", 3))}
    return TrainState(step=jax.numpy.int32(step), params=params, opt_state={"mu": params["b"]}, ema=None)


def abstract(state):
    """Shapes and shardings of a state on one device."""
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), state)


@contextlib.contextmanager
def opened(folder, **options):
    with contextlib.closing(checkpoints.Checkpoints(folder, **options)) as manager:
        yield manager


def assert_restores(folder, step):
    """The checkpoint of a step is what was saved."""
    with opened(folder) as manager:
        restored = manager.restore(abstract(state_of(step)), step=step)
    jax.tree.map(np.testing.assert_array_equal, restored, state_of(step))


@pytest.fixture
def saved(tmp_path):
    """A workdir with the checkpoints of steps 1 and 2."""
    with opened(tmp_path, keep=5) as manager:
        for step in (1, 2):
            manager.save(step, state_of(step))
    return tmp_path


def truncate(path):
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def flip(path, at=0.5):
    """Flips one bit."""
    data = bytearray(path.read_bytes())
    data[int(at * (len(data) - 1))] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [truncate, flip, pathlib.Path.unlink])
def test_a_damaged_checkpoint_is_named_kept_aside_and_the_one_before_is_used(saved, damage, caplog):
    folder = saved / "checkpoints" / "2"
    files = [folder / item / name for item in ITEMS for name in json.loads((folder / item / "sha256.json").read_text())]
    assert len(files) > 10
    largest = max(files, key=lambda path: path.stat().st_size)
    assert largest.stat().st_size > 50_000  # the arrays
    for path in [*files, *(folder / item / "sha256.json" for item in ITEMS)]:
        content = path.read_bytes()
        damage(path)
        with opened(saved) as manager, caplog.at_level(logging.ERROR, logger="absl"):
            assert manager.intact_step(ITEMS) == 1, path
        assert f"checkpoint {folder} is damaged: " in caplog.text
        assert path.relative_to(folder).parts[0] in caplog.records[-1].getMessage()
        path.write_bytes(content)
    with opened(saved) as manager:
        assert manager.intact_step(ITEMS) == 2  # every file is as it was again
    damage(largest)
    with opened(saved, keep=5) as manager:
        assert manager.intact_step(ITEMS, set_aside=True) == 1
        manager.save(2, state_of(2))
    assert_restores(saved, 2)
    (aside,) = (saved / "damaged_checkpoints").iterdir()
    assert aside.name.startswith("2_")
    assert (aside / "optimizer" / "sha256.json").is_file()


def test_a_run_does_not_start_anew_where_every_checkpoint_is_damaged(saved):
    for path in (saved / "checkpoints").glob("*/params/sha256.json"):
        path.unlink()
    for step in "12":
        assert (saved / "checkpoints" / step).is_dir()
    with opened(saved) as manager, pytest.raises(ValueError, match=r"2 is damaged[\s\S]*1 is damaged[\s\S]*none|move "):
        manager.intact_step(ITEMS, set_aside=True)
    assert not (saved / "damaged_checkpoints").exists()


def test_what_a_kill_left_of_a_checkpoint_is_cleaned_away_by_the_next_run_and_by_no_reader(saved):
    left = saved / "checkpoints" / "3.orbax-checkpoint-tmp" / "params"
    left.mkdir(parents=True)
    with opened(saved) as manager:
        assert manager.intact_step(ITEMS) == 2
    assert left.is_dir()  # it may be that of a run that goes on
    with opened(saved, keep=5) as manager:
        assert manager.intact_step(ITEMS) == 2
        manager.save(3, state_of(3))
    assert not left.parent.exists()
    assert_restores(saved, 3)


def test_a_full_disk_ends_with_the_space_that_is_needed_and_leaves_the_last_checkpoint(small_disk):
    with opened(small_disk, keep=5) as manager:
        manager.save(1, state_of(1))
        manager.wait()
        filler = small_disk / "filler"
        filler.write_bytes(bytes(shutil.disk_usage(small_disk).free - 50_000))
        with pytest.raises(workdir.WorkdirError, match=r"checkpoint of step 2: it needs 0\.08 MB, .* 0\.0\d MB left\."):
            manager.save(2, state_of(2))
        filler.unlink()
        manager.save(2, state_of(2))
    assert_restores(small_disk, 1)
    assert_restores(small_disk, 2)


def save_with_small_files(folder):
    """Saves step 3 where no file may exceed 40 kB: met where a full disk would be, in the middle of the arrays."""
    state = state_of(3)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, resource.RLIM_INFINITY))
    with opened(folder, keep=5) as manager:
        manager.save(3, state)


def test_a_disk_that_is_full_in_the_middle_of_a_save_leaves_the_last_checkpoint(saved):
    # in a process of its own: the limit would hold for pytest's files too, and TensorStore's other failed writes
    # complain whenever they are collected
    code = f"from tests.faults import test_workdirs\ntest_workdirs.save_with_small_files({str(saved)!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert re.search(r"WorkdirError: .*heckpoint of .*0\.08 MB.*File too large.*untouched", done.stderr), done.stderr
    with opened(saved) as manager:
        assert manager.intact_step(ITEMS) == 2
    assert_restores(saved, 2)


def test_a_read_only_workdir_is_refused_before_anything_is_done(small_disk):
    with workdir.only_run(small_disk / "run"):
        pass
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    for folder in (small_disk / "run", small_disk / "new"):
        with (
            pytest.raises(workdir.WorkdirError, match=r"nothing can be written to the workdir .*Read-only.*--workdir"),
            workdir.only_run(folder),
        ):
            pass


def test_what_is_said_of_a_disk_that_takes_no_more(tmp_path, monkeypatch):
    usage = types.SimpleNamespace(free=1000)
    monkeypatch.setattr(workdir.shutil, "disk_usage", lambda folder: usage)
    with workdir.room(tmp_path, 1000):  # just enough
        pass
    with pytest.raises(workdir.WorkdirError) as told, workdir.room(tmp_path, 1001, what="a file"):
        pass
    assert str(told.value).startswith(f"no room for a file: it needs 0.00 MB, and {tmp_path} has 0.00 MB left. What")
    usage.free = 1_234_000_000
    with pytest.raises(workdir.WorkdirError, match=r"needs 2,500\.00 MB, and .* has 1,234\.00 MB left\. What"):
        workdir.room(tmp_path, 2_500_000_000).__enter__()
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
        reason = os.strerror(number)
        with (
            pytest.raises(workdir.WorkdirError, match=rf"this run: {tmp_path} .* left \({reason}\)\."),
            workdir.room(tmp_path),
        ):
            raise RuntimeError(f"of a library: {reason}")
    told = workdir.WorkdirError("told before, by whom the disk was full: No space left on device")
    with pytest.raises(workdir.WorkdirError) as found, workdir.room(tmp_path):
        raise told
    assert found.value is told
    with pytest.raises(PermissionError), workdir.room(tmp_path):
        raise PermissionError(errno.EACCES, "not allowed")


def test_a_run_leaves_no_lock_in_its_workdir(tmp_path):
    folder = tmp_path / "runs" / "of today"
    for _ in range(2):
        with workdir.only_run(folder):
            assert [path.name for path in folder.iterdir()] == ["lock"]
        assert list(folder.iterdir()) == []


def test_a_folder_that_was_removed_is_named(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()

    def fails(context):
        with context:
            shutil.rmtree(folder)
            raise ValueError("no such file")

    for context in (workdir.room(folder), workdir.only_run(folder)):
        with pytest.raises(workdir.WorkdirError, match="run was removed while this run was using it"):
            fails(context)
    with pytest.raises(ValueError, match="another cause"), workdir.only_run(folder):
        raise ValueError("another cause")


def test_text_files_are_there_whole_or_as_they_were(tmp_path):
    path = tmp_path / "config.json"
    files.write_text(path, ["old"])

    def pieces():
        yield "new"
        raise OSError("no more")

    with pytest.raises(OSError, match="no more"):
        files.write_text(path, pieces())
    assert path.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_second_run_in_a_workdir_is_refused_until_the_first_is_gone(tmp_path):
    code = (
        "import pathlib, sys, time\nfrom detclipv2_jax.runs import workdir\n"
        f"with workdir.only_run(pathlib.Path({str(tmp_path)!r})): print('in', flush=True), time.sleep(60)"
    )

    def run():
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, text=True, **pipes)

    with run() as first:
        assert first.stdout.readline() == "in\n"
        with run() as second:
            _, message = second.communicate(timeout=60)
        assert second.returncode == 1
        assert f"another run trains in {tmp_path} (process {first.pid} on " in message
        first.send_signal(signal.SIGKILL)
    with workdir.only_run(tmp_path):  # the lock went with its process
        pass
