"""Runs whose workdir is in a bucket: killed while they bring files there; this file is also their program."""

import concurrent.futures
import contextlib
import itertools
import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback

import bucket_servers
import building
import jax
import numpy as np
import portpicker
import pytest
import stand_in
from bucket_servers import url
from micro import micro_config

from detclipv2_jax import bucket_store, buckets, session
from detclipv2_jax.bucket_store import BucketError, place
from detclipv2_jax.data import scenes
from detclipv2_jax.runs import checkpoints, remote
from detclipv2_jax.runs.workdir import WorkdirError

ROOT = pathlib.Path(__file__).parents[2]
EXHAUSTIVE = bool(os.environ.get("EXHAUSTIVE"))
NUM_KILLS = 20 if EXHAUSTIVE else 1
EVERY_STEPS = 2
pytestmark = pytest.mark.skipif(not bucket_servers.ARE_THERE, reason="needs moto and gcp-storage-emulator")


def config(num_steps, data):
    """A run of detection alone, whose parameters are split over its processes; with `data`, evaluated on it."""
    c = micro_config()
    c.num_steps = num_steps
    c.scenes.num_grounding = c.scenes.num_image_text = c.scenes.num_eval = 0
    if data != "-":
        c.scenes.num_detection = c.eval.num_pictures = 0
        c.detection.data, c.eval.annotations, c.eval.images = (f"{data}/built",), f"{data}/eval.json", data
    c.mesh.fsdp = int(os.environ.get("JAX_NUM_PROCESSES", 1))
    c.checkpoint.every_steps = EVERY_STEPS
    c.pictures_every_steps = 0
    return c


def run(workdir, num_steps, kill, data):
    """Trains; kills itself before file number `kill` goes to the bucket, or so many seconds after its start."""
    stand_in.install()
    remote.PUSH_S, remote.BEAT_S, remote.LEASE_S = 0.05, 0.5, 3.0
    puts, put = [], remote.Remote._put

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    def put_or_die(self, name, facts):
        puts.append(name)
        if kill.isdigit() and len(puts) == int(kill):
            die()
        put(self, name, facts)

    remote.Remote._put = put_or_die
    if "." in kill:
        threading.Timer(float(kill), die).start()
    return session.run(
        config(num_steps, data), workdir, training=True, distributed="auto", replayed=None, changed_data=False,
        preempted_status=75,
    )  # fmt: skip


def program():
    """For every line `workdir num_steps kill data` on stdin, forks a run and prints its exit status."""
    for line in sys.stdin:
        workdir, num_steps, kill, data = line.split()
        if (child := os.fork()) == 0:
            try:
                status = run(workdir, int(num_steps), kill, data)
                if jax.process_count() > 1:  # as Python does at its end: the others would miss a sign of life
                    jax.distributed.shutdown()
                os._exit(status)
            except SystemExit as error:
                print(error, file=sys.stderr, flush=True)
            except BaseException:
                traceback.print_exc()
            os._exit(1)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


class Runs:
    """Starts runs of the program, each as one process or several."""

    def __init__(self, folder, server, *, num_processes):
        self.log, self.num_processes, self.programs = folder / "log", num_processes, []
        environment = os.environ | server.environment() | {
            "DETCLIP_BUCKET_CACHE": str(folder / "cache"),
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]),
            "XLA_FLAGS": re.sub(r"--xla_force\S*", "", os.environ["XLA_FLAGS"]), "JAX_PLATFORMS": "cpu",
            "JAX_PERSISTENT_COMPILATION_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }  # fmt: skip
        if num_processes > 1:
            address = f"localhost:{portpicker.pick_unused_port()}"
            environment |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(num_processes)}
        for i in range(num_processes):
            with self.log.open("a") as errors:
                pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": errors}
                environment["JAX_PROCESS_ID"] = str(i)
                self.programs.append(subprocess.Popen([sys.executable, __file__], env=environment, text=True, **pipes))

    def __call__(self, workdir, num_steps, kill="never", *, killed=0, data="-"):
        """Returns the exit status of process number `killed`, -9 of one that was killed."""
        for i, process in enumerate(self.programs):
            print(workdir, num_steps, kill if i == killed else "never", data, file=process.stdin, flush=True)
        statuses = []
        for process in self.programs:
            while not (line := process.stdout.readline().strip()).lstrip("-").isdigit():
                assert process.poll() is None, self.log.read_text()
            statuses.append(int(line))
        with self.log.open("a") as log:
            print(workdir, kill, f"of process {killed} ended with", statuses, file=log)
        return statuses[killed]

    def close(self):
        for process in self.programs:
            process.stdin.close()
            process.kill()
            process.wait(timeout=60)
            process.stdout.close()


@pytest.fixture(scope="module")
def server():
    with bucket_servers.served("gs") as started:
        yield started


@pytest.fixture
def bucket(server, tmp_path, monkeypatch):
    for name, value in (("PUSH_S", 0.05), ("BEAT_S", 0.1), ("LEASE_S", 0.6)):
        monkeypatch.setattr(remote, name, value)
    with bucket_servers.asked(server, tmp_path / "reader", monkeypatch):
        yield "gs"


def lines(workdir):
    """Returns the metrics of a workdir in a bucket by step, without what depends on the clock."""
    found = {}
    for line in bucket_store.read(place(workdir).below("metrics.jsonl"))[0].splitlines():
        row = json.loads(line)
        found.setdefault(row["step"], {}).update({k: v for k, v in row.items() if not k.startswith("timing/")})
    return found


def read_as_others_do(workdir):
    """Returns the step that a reader finds, whatever a killed run left; None where there is none yet."""
    try:
        _, params, step = checkpoints.load_for_inference(workdir)
    except ValueError as error:
        if not re.search("is no workdir|has no checkpoints", str(error)):
            raise
        return None
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(params))
    return step


def watched(runs, workdir, *arguments, killed):
    """Returns the exit status of a run and the steps that readers found, meanwhile and when it was over."""
    seen = []

    def look():
        os.environ["DETCLIP_BUCKETS_SINCE"] = repr(time.time())
        seen.append(read_as_others_do(workdir))

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        running = pool.submit(runs, workdir, *arguments, killed=killed)
        over = False
        while not over:
            over = bool(concurrent.futures.wait([running], timeout=2).done)
            look()
    return running.result(), seen


class Kills:
    """When the next run is killed, of files that go to the bucket or seconds, and which process: early and late ones.

    How long a run takes depends on what else this machine does: the bounds follow what was seen.
    """

    def __init__(self, num_processes, *, num_files, seconds):
        self.rng, self.num_processes, self.bounds = random.Random(0), num_processes, {"files": num_files, "s": seconds}

    def next(self, i):
        self.unit = "s" if self.num_processes > 1 and i % 2 else "files"
        moment = self.rng.uniform(0.4, 1.0) * self.bounds[self.unit]
        return (f"{moment:.2f}", i // 2 % self.num_processes) if self.unit == "s" else (str(round(moment) + 1), 0)

    def learn(self, *, ended, went_on):
        self.bounds[self.unit] *= 0.85 if ended else 1.0 if went_on else 1.2


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", [1, pytest.param(2, marks=pytest.mark.skipif(
    not EXHAUSTIVE, reason="takes minutes: set EXHAUSTIVE=1"
))])  # fmt: skip
def test_killed_runs_end_equal_to_an_unbroken_one(server, bucket, tmp_path, num_processes):
    num_steps = 6 if num_processes == 1 else 8
    whole, *broken = (url(bucket, f"{name}-{num_processes}") for name in ("whole", "broken-0"))
    with contextlib.closing(Runs(tmp_path, server, num_processes=num_processes)) as runs:
        for name in (
            (whole, url(bucket, f"timed-{num_processes}")) if EXHAUSTIVE else (whole,)
        ):  # the first one compiles
            server.requests.clear()
            start = time.monotonic()
            assert runs(name, num_steps) == 0, runs.log.read_text()
        num_files = sum(method == "POST" and "lock" not in path for method, path in server.requests)
        kills = Kills(num_processes, num_files=num_files, seconds=time.monotonic() - start)
        num_killed, before, went_on = 0, None, []
        for i in itertools.count():
            kill, killed = kills.next(i)
            status, seen = watched(runs, broken[-1], num_steps, kill, killed=killed)
            # 75: of a lock that was not renewed in time; processes that get no time here are such a case, too
            assert status in (0, -9, 75), runs.log.read_text()
            assert set(seen) <= {None, *range(0, num_steps + 1, EVERY_STEPS)}
            num_killed, step = num_killed + (status == -9), seen[-1]
            went_on += [step] * (status == -9 and step != before)
            print(f"kill {num_killed} of {NUM_KILLS}: {kill} of process {killed}: {status}, steps {seen}", flush=True)
            kills.learn(ended=status == 0, went_on=step != before)
            if num_killed == NUM_KILLS:
                break
            before = None if status == 0 else step
            if status == 0:  # it came to its end before: the next one is broken
                broken.append(url(bucket, f"broken-{len(broken)}-{num_processes}"))
        assert runs(broken[-1], num_steps) == 0, runs.log.read_text()
    assert "Exception in thread" not in runs.log.read_text()
    assert NUM_KILLS == 1 or len(went_on) > NUM_KILLS / 4, went_on  # after checkpoints that were new, not only before
    one = checkpoints.load_for_inference(whole)
    for workdir in broken:
        assert lines(workdir) == lines(whole)
        other = checkpoints.load_for_inference(workdir)
        assert one[2] == other[2] == num_steps
        jax.tree.map(np.testing.assert_array_equal, one[1], other[1])
        assert not {"lock", "data/scenes.json"} & set(bucket_store.names_below(place(workdir)))
    assert not list((tmp_path / "cache" / "workdirs" / "0" / "gs").rglob("*.json"))  # the copy goes with the run


@pytest.mark.slow
@pytest.mark.skipif(not EXHAUSTIVE, reason="takes half a minute: set EXHAUSTIVE=1")
def test_a_run_on_data_of_a_bucket_is_one_on_files_also_when_killed(server, bucket, tmp_path):
    folder, num_steps = tmp_path / "data", 4
    scenes.write(folder, num_detection=24, num_grounding=0, num_image_text=0, num_eval=8, size_px=64)
    options = {"input": str(folder / "detection.json"), "images": str(folder), "shard_size": 8}
    building.build("coco_json", output=str(folder / "built"), **options)
    data, here, there = (url(bucket, name) for name in ("data", "on-files", "on-bucket"))
    buckets.upload(folder, place(data))
    with contextlib.closing(Runs(tmp_path, server, num_processes=1)) as runs:
        assert runs(here, num_steps, data=str(folder)) == 0, runs.log.read_text()
        assert runs(there, num_steps, "20", data=data) == -9, runs.log.read_text()
        assert runs(there, num_steps, data=data) == 0, runs.log.read_text()
    assert lines(there) == lines(here)
    assert "eval/AP" in lines(there)[num_steps]
    names = [name for name in bucket_store.names_below(place(here)) if name.endswith("_detections.json")]
    assert names
    for name in names:
        assert bucket_store.read(place(here).below(name))[0] == bucket_store.read(place(there).below(name))[0]


def lease(bucket, name, token="a"):
    return remote.Lease(place(url(bucket, f"{name}/lock")), token=token)


def test_one_run_has_the_lock(bucket):
    first, second = lease(bucket, "one"), lease(bucket, "one", "b")
    first.take(own="")
    with (
        remote._every(remote.BEAT_S, first.renew),
        pytest.raises(WorkdirError, match=r"another run trains in gs.*process \d"),
    ):
        second.take(own="")
    second.take(own="")  # no sign of life any more
    assert not first.renew()
    assert second.held()
    first.release()
    assert second.renew()  # the lock of another stays
    third = lease(bucket, "one", "c")
    start = time.monotonic()
    third.take(own="b")  # the process that had it is dead: this machine's lock says so
    assert time.monotonic() - start < remote.LEASE_S / 2
    third.release()
    lease(bucket, "one").take(own="")


def copies(bucket, name):
    """Returns a workdir in a bucket, and its copy of this process."""
    where = place(url(bucket, name))
    opened = remote.Remote(where, process=0, training=True)
    opened.pull(arrays=True)
    return where, opened


def test_what_names_others_comes_last_and_goes_first(bucket, server):
    where, opened = copies(bucket, "order")
    step = opened.folder / "checkpoints" / "2" / "params"
    step.mkdir(parents=True)
    for path in (step / "a", step / "b", step.parent / remote.LAST_OF_STEP, opened.folder / "best.json"):
        path.write_text("{}")
    (opened.folder / "metrics.jsonl").write_text('{"step": 1}\n{"st')
    (opened.folder / ".half.json").write_text("1")
    (opened.folder / "checkpoints" / "4.orbax-checkpoint-tmp").mkdir()
    (opened.folder / "checkpoints" / "4.orbax-checkpoint-tmp" / "a").write_text("1")
    order = []
    server.fault = lambda method, path: order.append((method, path)) or ""
    opened.push()
    written = [re.split("[/&?=]|%2F", path)[-1] for method, path in order if method == "POST"]
    names = [next(n for n in ("best", "METADATA", "a", "b", "metrics") if n in p) for _, p in order if _ == "POST"]
    assert names[-2:] == ["METADATA", "best"], written
    assert bucket_store.read(where.below("metrics.jsonl"))[0] == b'{"step": 1}\n'
    assert len(bucket_store.names_below(where)) == 5
    order.clear()
    opened.push()
    assert not order  # nothing changed
    for path in (step / "a", step / "b", step.parent / remote.LAST_OF_STEP):
        path.unlink()
    opened.push()
    assert "METADATA" in next(path for method, path in order if method == "DELETE")
    assert remote.complete_steps(bucket_store.names_below(where)) == []


def test_a_folder_that_goes_while_the_copy_is_listed_stops_nothing(bucket, monkeypatch):
    where, opened = copies(bucket, "goes")
    going = opened.folder / "checkpoints" / "4.orbax-checkpoint-tmp" / "params"
    going.mkdir(parents=True)
    (opened.folder / "config.json").write_text("{}")
    scandir, asked = os.scandir, []

    def scan(path):
        asked.append(path)
        if pathlib.Path(path) == going.parent:
            going.parent.rename(going.parent.with_name("4"))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", scan)
    opened.push()
    assert str(going.parent) in map(str, asked)
    assert bucket_store.names_below(where) == ["config.json"]
    (opened.folder / "metrics.jsonl").write_text("{}\n")

    def refused(path):
        raise PermissionError(path)

    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(PermissionError):  # what cannot be listed is not removed there
        opened.push()
    monkeypatch.setattr(os, "scandir", scandir)
    shutil.rmtree(opened.folder)
    with pytest.raises(WorkdirError, match="was removed; the bucket keeps what it has"):
        opened.push()
    assert bucket_store.names_below(where) == ["config.json"]


@pytest.mark.parametrize(("error", "num_signals"), [(OSError("full"), 0), (BucketError("slow"), 0), (KeyError("x"), 1)])
def test_what_goes_wrong_once_is_done_again_and_a_fault_stops_the_run(monkeypatch, error, num_signals):
    signals, done, again = [], [], threading.Event()
    monkeypatch.setattr(remote.os, "kill", lambda *given: signals.append(given))

    def work():
        done.append(1)
        if len(done) == 1:
            raise error
        again.set()

    with remote._every(0.01, work):
        assert again.wait(timeout=0.5 if num_signals else 30) == (not num_signals)
    assert len(signals) == num_signals


def test_a_checkpoint_that_is_not_whole_is_not_read(bucket):
    where, opened = copies(bucket, "half")
    bucket_store.write(where.below("checkpoints/2/params/a"), b"1")
    bucket_store.write(where.below("config.json"), b"{}")
    opened.pull(arrays=True)
    assert sorted(path.name for path in opened.folder.rglob("*")) == ["config.json"]
    assert opened.unchanged()
    bucket_store.write(where.below("config.json"), b"[]")
    assert not opened.unchanged()
    (opened.folder / "config.json").write_text("[1]")
    with pytest.raises(WorkdirError, match=r"another run wrote config\.json"):
        opened.push()


def test_a_run_that_lost_its_lock_writes_nothing(bucket, monkeypatch):
    where, opened = copies(bucket, "lost")
    signals = []
    monkeypatch.setattr(remote.os, "kill", lambda *given: signals.append(given))

    def lose():
        with remote.kept(opened, training=True):
            bucket_store.write(where.below("lock"), b"other")
            opened.lease._renewed -= remote.LEASE_S
            (opened.folder / "config.json").write_text("{}")
            time.sleep(3 * remote.BEAT_S)

    with pytest.raises(WorkdirError, match="another run has taken its lock"):
        lose()
    assert set(signals) == {(os.getpid(), signal.SIGTERM)}  # it stops as if preempted
    assert bucket_store.names_below(where) == ["lock"]


def test_a_bucket_that_takes_nothing_ends_the_run_with_its_name(bucket, server):
    _, opened = copies(bucket, "forbidden")

    def end():
        with remote.kept(opened, training=False):
            (opened.folder / "config.json").write_text("{}")
            server.fault = lambda method, path: "403"

    with pytest.raises(BucketError, match=r"forbidden/config\.json cannot be written: PERMISSION_DENIED"):
        end()
    assert buckets.is_workdir(opened.folder)


if __name__ == "__main__":
    program()
