"""The workdir in a bucket: what goes there and back, in which order, and who holds it; the bucket is one of memory."""

import contextlib
import itertools
import json
import os
import pathlib
import signal
import threading

import pytest

from detclipv2_jax import bucket_store, buckets, files
from detclipv2_jax.bucket_store import BucketError, place
from detclipv2_jax.runs import remote
from detclipv2_jax.runs.workdir import WorkdirError

WHERE = place("gs://bucket/run")


class Bucket:
    """Objects by name, with versions; `done` is what was written (name, content) and removed (name, None)."""

    def __init__(self):
        self.objects, self.done, self.numbers, self.lock = {}, [], itertools.count(1), threading.Lock()

    def put(self, name, content):
        self.objects[name] = content.encode(), b"%d" % next(self.numbers)

    def texts(self):
        return {name: content.decode() for name, (content, _) in self.objects.items() if name != "lock"}

    def name_of(self, where):
        return where.key.removeprefix("run/")

    def names_below(self, folder):
        lead = "" if folder == WHERE else f"{self.name_of(folder)}/"
        return sorted(name.removeprefix(lead) for name in self.objects if name.startswith(lead))

    def read(self, where, *, known=b""):
        with self.lock:
            content, version = self.objects.get(self.name_of(where), (None, b""))
        if not version:
            raise FileNotFoundError(where)
        return (None if version == known else content), version

    def write(self, where, content, *, known=None):
        name = self.name_of(where)
        with self.lock:
            _, version = self.objects.get(name, (None, b""))
            if known is not None and known != version:
                return None
            self.done.append((name, content))
            if content is None:
                self.objects.pop(name, None)
                return b"gone"
            self.objects[name] = content, b"%d" % next(self.numbers)
            return self.objects[name][1]


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    monkeypatch.setenv("DETCLIP_BUCKET_CACHE", str(tmp_path))
    made = Bucket()
    for name in ("names_below", "read", "write"):
        monkeypatch.setattr(bucket_store, name, getattr(made, name))
    monkeypatch.setattr(bucket_store, "_ask", lambda *_: pytest.fail("a real bucket is asked"))
    return made


@pytest.fixture
def clock(monkeypatch):
    """A clock that sleeping alone moves: [seconds]."""
    now = [1000.0]

    def sleep(seconds):
        now[0] += seconds

    monkeypatch.setattr(remote.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(remote.time, "sleep", sleep)
    return now


def test_checkpoints_count_when_their_last_file_is_there():
    names = [f"checkpoints/{step}/{name}" for step in (20, 3) for name in ("params/a", remote.LAST_OF_STEP)]
    others = ["checkpoints/4/params/a", f"checkpoints/5/params/{remote.LAST_OF_STEP}", f"eval/6/{remote.LAST_OF_STEP}"]
    assert remote.complete_steps([*names, *others]) == [3, 20]


def test_what_a_run_that_goes_on_reads():
    steps = [2, 30]
    for name, arrays, is_needed in (
        ("config.json", False, True),
        ("data.json", False, True),
        ("best.json", False, True),
        ("metrics.jsonl", False, True),
        ("preempted", False, True),
        ("eval/step_2_scores.json", False, True),
        ("forgetting/step_2_scores.json", False, True),
        ("eval/step_2_detections.json", True, False),
        ("pictures/a.jpg", True, False),
        ("lock", True, False),
        ("checkpoints/2/params/a", True, True),
        ("checkpoints/2/params/a", False, False),
        ("checkpoints/30/_CHECKPOINT_METADATA", False, True),
        ("checkpoints/3/_CHECKPOINT_METADATA", True, False),
    ):
        assert remote._is_needed(name, steps, arrays=arrays) == is_needed, name


def test_what_is_brought_to_the_bucket():
    for name, is_whole in (
        ("config.json", True),
        ("eval/a.json", True),
        ("pictures/data/a.jpg", True),
        ("data/scenes.json", False),
        ("lock", False),
        ("eval/.half.json", False),
        ("checkpoints/4.orbax-checkpoint-tmp/params/a", False),
        ("checkpoints/4/params.orbax-checkpoint-tmp/a", False),
        ("checkpoints/4/params/a", True),
    ):
        assert remote._is_whole(name) == is_whole, name


def test_the_best_step_counts_where_it_is_whole(tmp_path):
    path = tmp_path / "best.json"
    assert remote._best_step(path, [], []) == -1
    assert remote._best_step(path, [], [2, 9]) == 9
    for text, step in (('{"step": 2}', 2), ('{"step": 5}', 9), ("[]", 9), ("{", 9), ('{"step": null}', 9), ("{}", 9)):
        path.write_text(text)
        assert remote._best_step(path, ["best.json"], [2, 9]) == step, text
        assert remote._best_step(path, [], [2, 9]) == 9  # a file of an earlier time


def test_weights_of_the_best_step_are_fetched(bucket, monkeypatch, tmp_path):
    fetched = []

    def fetch_all(paths):
        for path in paths:
            name = str(path.relative_to(buckets.path_of(WHERE)))
            fetched.append(name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(bucket.objects[name][0])

    monkeypatch.setattr(buckets, "fetch_all", fetch_all)
    monkeypatch.setattr(buckets, "content", pathlib.Path.read_bytes)
    assert remote.here("runs/a") == pathlib.Path("runs/a")
    for step in (2, 3):
        for name in ("params/a", "ema/a", "optimizer/a", remote.LAST_OF_STEP):
            bucket.put(f"checkpoints/{step}/{name}", "1")
    for name, text in (("config.json", "{}"), ("best.json", '{"step": 2}'), ("metrics.jsonl", "")):
        bucket.put(name, text)
    old = buckets.path_of(WHERE) / "checkpoints" / "1" / "params"
    old.mkdir(parents=True)
    (old / "a").touch()
    assert remote.here(str(WHERE)) == buckets.path_of(WHERE)
    weights = [f"checkpoints/2/{name}" for name in (remote.LAST_OF_STEP, "ema/a", "params/a")]
    assert fetched == ["config.json", "best.json", *weights]
    assert not old.exists()  # the bucket has it no more
    bucket.objects = {name: found for name, found in bucket.objects.items() if "/" not in name}
    bucket.put("pictures/a.jpg", "1")
    fetched.clear()
    remote.here(str(WHERE))  # an export
    assert fetched == ["config.json", "best.json", "best.json", "config.json", "metrics.jsonl"]


def test_a_checkpoint_that_goes_while_it_is_fetched_is_looked_for_again(bucket, monkeypatch):
    tries = []

    def fetch_all(paths):
        tries.append([*paths])
        if len(tries) < fails:
            raise FileNotFoundError

    monkeypatch.setattr(buckets, "fetch_all", fetch_all)
    fails = 5
    remote.here(str(WHERE))
    tries.clear()
    fails = 6
    with pytest.raises(FileNotFoundError):
        remote.here(str(WHERE))


def opened():
    """Returns the workdir with a copy of what the bucket holds."""
    found = remote.Remote(WHERE, process=0, training=True)
    found.pull(arrays=True)
    return found


def test_a_copy_has_what_is_needed_and_brings_back_what_changed(bucket):
    for name in ("config.json", "pictures/a.jpg", "checkpoints/2/params/a", "checkpoints/2/_CHECKPOINT_METADATA"):
        bucket.put(name, name)
    workdir = opened()
    assert workdir.folder == buckets.path_of(WHERE, part="workdirs/0")
    copied = {str(path.relative_to(workdir.folder)) for path in workdir.folder.rglob("*") if path.is_file()}
    assert copied == set(bucket.objects) - {"pictures/a.jpg"}
    workdir.push()
    assert bucket.done == []
    (workdir.folder / "config.json").write_text("longer than before")
    (workdir.folder / "eval").mkdir()
    (workdir.folder / "eval" / "a").write_text("new")
    workdir.push()
    assert sorted(bucket.done) == [("config.json", b"longer than before"), ("eval/a", b"new")]
    bucket.done.clear()
    workdir.push()
    assert bucket.done == []
    assert "pictures/a.jpg" in bucket.objects  # it was not read, so it is not removed
    workdir.pull(arrays=False)
    assert not (workdir.folder / "checkpoints" / "2" / "params").exists()
    assert (workdir.folder / "checkpoints" / "2" / remote.LAST_OF_STEP).exists()
    reader = remote.Remote(WHERE, process=0, training=False)
    assert reader.folder not in (workdir.folder, remote.Remote(WHERE, process=0, training=False).folder)


def test_what_names_others_comes_last_and_goes_first(bucket):
    workdir = opened()
    step = workdir.folder / "checkpoints" / "2"
    (step / "params").mkdir(parents=True)
    for path in (step / "params" / "b", step / remote.LAST_OF_STEP, workdir.folder / "best.json"):
        path.write_text("{}")
    (workdir.folder / "metrics.jsonl").write_text('{"step": 1}\n{"st')
    (workdir.folder / "empty").touch()
    workdir.push()
    names = [name for name, _ in bucket.done]
    assert sorted(names[:3]) == ["checkpoints/2/params/b", "empty", "metrics.jsonl"]
    assert names[3:] == [f"checkpoints/2/{remote.LAST_OF_STEP}", "best.json"]
    assert dict(bucket.done)["metrics.jsonl"] == b'{"step": 1}\n'
    bucket.done.clear()
    for path in (step / "params" / "b", step / remote.LAST_OF_STEP):
        path.unlink()
    workdir.push()
    assert bucket.done == [(f"checkpoints/2/{name}", None) for name in (remote.LAST_OF_STEP, "params/b")]
    bucket.done.clear()
    workdir.push()
    assert bucket.done == []
    (step / "params" / "b").write_text("again")  # what was removed may be written anew
    workdir.push()
    assert bucket.done == [("checkpoints/2/params/b", b"again")]


def test_half_a_first_line_is_not_brought_there(bucket):
    workdir = opened()
    (workdir.folder / "metrics.jsonl").write_text('{"st')
    workdir.push()
    assert bucket.done == []


def test_others_who_change_a_workdir_are_noticed(bucket):
    bucket.put("config.json", "{}")
    workdir = opened()
    assert workdir.unchanged()
    for name, text in (("config.json", "{}"), ("best.json", "{}")):  # another version, another file
        workdir = opened()
        bucket.put(name, text)
        assert not workdir.unchanged()
    workdir = opened()
    del bucket.objects["best.json"]
    assert not workdir.unchanged()
    (workdir.folder / "config.json").write_text("[1]")
    bucket.put("config.json", "[2]")
    with pytest.raises(WorkdirError, match=r"another run wrote config\.json"):
        workdir.push()
    assert bucket.texts() == {"config.json": "[2]"}


def test_a_file_that_goes_while_it_is_asked_for_is_a_change(bucket, monkeypatch):
    bucket.put("config.json", "{}")
    workdir = opened()

    def gone(where, *, known):
        raise FileNotFoundError(where)

    monkeypatch.setattr(bucket_store, "read", gone)
    assert not workdir.unchanged()


def test_what_cannot_be_listed_is_not_removed_there(bucket, monkeypatch):
    bucket.put("config.json", "{}")
    workdir = opened()

    def refused(path):
        raise PermissionError(path)

    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(PermissionError):
        workdir.push()
    assert bucket.done == []


def test_a_copy_that_is_gone_removes_nothing(bucket):
    bucket.put("config.json", "{}")
    workdir = opened()
    (workdir.folder / "config.json").unlink()
    with pytest.raises(WorkdirError, match="was removed; the bucket keeps what it has"):
        workdir.push()
    assert bucket.done == []


def test_a_bucket_that_changes_all_the_time_is_an_error(bucket, monkeypatch):
    bucket.put("config.json", "{}")
    read, left = bucket.read, [4]

    def goes(where, **options):
        left[0] -= 1
        if left[0] >= 0:
            raise FileNotFoundError
        return read(where, **options)

    monkeypatch.setattr(bucket_store, "read", goes)
    opened()  # the fifth time it holds still
    left[0] = 5
    with pytest.raises(BucketError, match=r"gs://bucket/run changes while it is read"):
        opened()


def lease(token):
    return remote.Lease(WHERE.below("lock"), token=token)


def test_a_lock_is_taken_where_nobody_gives_a_sign_of_life(bucket, clock):
    first = lease("a")
    first.take(own="")
    assert clock == [1000.0]  # at once
    holder = json.loads(bucket.objects["lock"][0])
    assert (holder["token"], holder["number"]) == ("a", 1)
    assert f"process {os.getpid()} on " in holder["run"]
    second = lease("b")
    second.take(own="")
    assert remote.LEASE_S <= clock[0] - 1000.0 <= remote.LEASE_S + remote.BEAT_S
    assert not first.renew()
    assert second.renew()
    clock[0] = 5000.0
    lease("c").take(own="b")  # of a process of this machine that is dead
    assert clock == [5000.0]
    bucket.put("lock", "[]")
    lease("d").take(own="b")
    assert clock[0] >= 5000.0 + remote.LEASE_S


def test_a_lock_that_is_renewed_is_another_s(bucket, clock, monkeypatch):
    first = lease("a")
    first.take(own="")
    sleep = remote.time.sleep
    monkeypatch.setattr(remote.time, "sleep", lambda seconds: (sleep(seconds), clock[0] > 1030 and first.renew()))
    with pytest.raises(WorkdirError, match=r"another run trains in gs://bucket/run/lock \(process \d+ on .*--workdir"):
        lease("b").take(own="")
    assert clock[0] < 1000 + remote.LEASE_S


def test_a_lock_is_asked_for_again_before_it_may_be_another_s(bucket, clock):
    held = lease("a")
    held.take(own="")
    version = bucket.objects["lock"]
    clock[0] += remote.LEASE_S / 2 - 0.1
    assert held.held()
    assert bucket.objects["lock"] == version
    clock[0] += 0.1
    assert held.held()
    assert bucket.objects["lock"] != version
    bucket.put("lock", "{}")
    assert held.held()  # it was its own a moment ago
    clock[0] += remote.LEASE_S / 2
    assert not held.held()
    held.release()
    assert "lock" in bucket.objects  # of another
    held = lease("b")
    held.take(own="")
    held.release()
    assert "lock" not in bucket.objects


def test_a_lock_is_held_from_when_its_writing_began(bucket, clock, monkeypatch):
    def slowly(*where, **options):
        version = bucket.write(*where, **options)
        clock[0] += remote.LEASE_S / 2
        return version

    held = lease("a")
    monkeypatch.setattr(bucket_store, "write", slowly)
    held.take(own="")
    monkeypatch.setattr(bucket_store, "write", bucket.write)
    version = bucket.objects["lock"]
    assert held.held()
    assert bucket.objects["lock"] != version  # the answer came so late that it was asked for again


def test_a_run_that_lost_its_lock_writes_nothing(bucket, clock):
    bucket.put("config.json", "{}")
    workdir = opened()
    workdir.lease = lease("a")
    workdir.lease.take(own="")
    bucket.put("lock", "{}")
    clock[0] += remote.LEASE_S
    bucket.done.clear()
    (workdir.folder / "new").touch()
    with pytest.raises(WorkdirError, match="another run has taken its lock"):
        workdir.push()
    with pytest.raises(WorkdirError, match="another run has taken its lock"):
        workdir._remove("config.json")
    assert bucket.done == []


def test_a_workdir_in_a_bucket_is_a_copy_that_goes_with_the_run(bucket, monkeypatch):
    with remote.opened("runs/a", training=True) as (folder, found):
        assert (folder, found) == (pathlib.Path("runs/a"), None)
    bucket.put("checkpoints/2/params/a", "1")
    bucket.put("checkpoints/2/_CHECKPOINT_METADATA", "1")
    for training, process, has_arrays in ((True, 0, True), (True, 1, False), (False, 1, True)):
        monkeypatch.setattr(remote.jax, "process_index", lambda process=process: process)
        with remote.opened(str(WHERE), training=training) as (folder, found):
            assert folder == found.folder
            assert (folder / "checkpoints/2/params/a").exists() == has_arrays
        assert not folder.exists()

    def taken(path):
        assert path == folder.parent / ".run.lock"
        raise files.LockedError("process 7")

    folder = buckets.path_of(WHERE, part="workdirs/0")
    monkeypatch.setattr(remote.jax, "process_index", lambda: 0)
    monkeypatch.setattr(files, "locked", taken)
    with (
        pytest.raises(WorkdirError, match=r"another run trains in gs://bucket/run \(process 7\)"),
        remote.opened(str(WHERE), training=True),
    ):
        pass


def test_a_run_holds_the_lock_and_brings_all_there_when_it_ends(bucket):
    bucket.put("config.json", "{}")
    workdir = opened()
    with remote.kept(workdir, training=True):
        assert "lock" in bucket.objects
        (workdir.folder / "new").touch()
    assert bucket.texts() == {"config.json": "{}", "new": ""}
    assert "lock" not in bucket.objects
    assert [path.name for path in workdir.folder.parent.iterdir()] == [workdir.folder.name]  # no token
    with remote.kept(workdir, training=False):  # an evaluation
        assert "lock" not in bucket.objects
        (workdir.folder / "scores").touch()
    assert "scores" in bucket.objects
    workdir = opened()
    bucket.put("config.json", "[]")
    with pytest.raises(WorkdirError, match="was changed while this run started"), remote.kept(workdir, training=True):
        pass


def test_a_run_takes_over_from_one_of_this_machine_that_was_killed(bucket, clock):
    workdir = opened()
    killed = lease("token of the killed")
    killed.take(own="")
    workdir.folder.with_name(f".{workdir.folder.name}.token").write_text("token of the killed")
    with remote.kept(workdir, training=True):
        assert clock == [1000.0]
        assert not killed.renew()


def test_while_a_run_goes_on_its_lock_is_renewed_and_its_files_are_brought_there(bucket, monkeypatch):
    monkeypatch.setattr(remote, "BEAT_S", 0.001)
    monkeypatch.setattr(remote, "PUSH_S", 0.001)
    workdir, waiting = opened(), threading.Event()
    with remote.kept(workdir, training=True):
        (workdir.folder / "new").touch()
        for _ in range(10_000):
            if "new" in bucket.objects and json.loads(bucket.objects["lock"][0])["number"] > 2:
                break
            waiting.wait(0.001)
        else:
            pytest.fail("neither lock nor file came to the bucket")


def test_what_a_run_that_fails_wrote_is_brought_there_too(bucket, monkeypatch):
    workdir = opened()

    def fail(text):
        with remote.kept(workdir, training=False):
            (workdir.folder / "new").write_text(text)
            raise KeyError("the cause")

    with pytest.raises(KeyError, match="the cause"):
        fail("1")
    assert bucket.texts() == {"new": "1"}

    def refused(*_, **__):
        raise BucketError("it takes nothing")

    monkeypatch.setattr(bucket_store, "write", refused)
    with pytest.raises(WorkdirError, match=r"^it takes nothing\. What ended before that: 'the cause'$"):
        fail("longer")


@pytest.mark.parametrize(
    ("error", "stops"),
    [
        (OSError("full"), False),
        (BucketError("slow"), False),
        (BucketError("PERMISSION_DENIED"), True),
        (BucketError("NOT_FOUND"), True),
        (BucketError("UNAUTHENTICATED"), True),
        (WorkdirError("another's"), True),
    ],
    ids=str,
)
def test_what_passes_is_tried_again_and_what_stays_stops_the_run(monkeypatch, error, stops):
    signals, done, again = [], [], threading.Event()

    def kill(*given):
        signals.append(given)
        again.set()

    def work():
        done.append(1)
        if len(done) == 1:
            raise error
        again.set()

    monkeypatch.setattr(remote.os, "kill", kill)
    with remote._every(0.001, work):
        assert again.wait(timeout=30)
    assert signals == ([(os.getpid(), signal.SIGTERM)] if stops else [])
    assert (len(done) == 1) == stops
    num = len(done)
    with contextlib.suppress(ValueError), remote._every(1e6, work):
        raise ValueError  # whatever ends it, nothing goes on
    assert len(done) == num
    assert not [thread for thread in threading.enumerate() if "repeat" in thread.name]
