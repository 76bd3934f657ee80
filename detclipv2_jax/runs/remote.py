"""The workdir of a run in a bucket: a copy on this machine that the run works in, and the bucket's own, always whole.

A run reads the bucket's files when it starts, and works in a folder of this machine, as in any workdir. Process 0
brings what changed to the bucket every few seconds and when the run ends: of a checkpoint _CHECKPOINT_METADATA last,
without which nobody counts it, best.json after the checkpoint that it names, and only then goes what the run removed.
So a killed run leaves the bucket as it was a few seconds before, and nothing half-written is read.

The object `lock` keeps other runs out. It is written on condition that nobody wrote it before, and again every
`BEAT_S` seconds; where that stops for `LEASE_S`, the run is dead, and the next one may take its place.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator

import jax
from absl import logging

from detclipv2_jax import bucket_store, buckets, files
from detclipv2_jax.bucket_store import BucketError, Place
from detclipv2_jax.runs.workdir import WorkdirError

BEAT_S, LEASE_S, PUSH_S = 10.0, 60.0, 5.0
LAST_OF_STEP = "_CHECKPOINT_METADATA"
_STEP = re.compile(r"checkpoints/(\d+)/")
_NUM_THREADS = 8


def complete_steps(names: list[str]) -> list[int]:
    """Returns the steps of the checkpoints that are whole, of the names of all files of a workdir in a bucket."""
    steps = {int(match[1]) for name in names if (match := _STEP.match(name))}
    return sorted(step for step in steps if f"checkpoints/{step}/{LAST_OF_STEP}" in names)


def _is_needed(name: str, steps: list[int], *, arrays: bool) -> bool:
    """Returns whether a run that goes on reads a file of its workdir; `arrays`: also those of checkpoints."""
    if match := _STEP.match(name):
        return int(match[1]) in steps and (arrays or name.count("/") == 2)
    return name in ("config.json", "data.json", "best.json", "metrics.jsonl", "preempted") or (
        name.startswith(("eval/", "forgetting/")) and not name.endswith("_detections.json")
    )


def _is_whole(name: str) -> bool:
    """Returns whether a file of the copy is to be in the bucket: no lock, no scenes, nothing that is being written."""
    *folders, last = name.split("/")
    scenes = bool(folders) and folders[0] == "data"
    return not (scenes or last.startswith(".") or name == "lock" or any("orbax-checkpoint-tmp" in x for x in folders))


def here(workdir: str | pathlib.Path) -> pathlib.Path:
    """Returns the path of a workdir; of one in a bucket that of its best or newest checkpoint's weights, fetched.

    Of the folder of an export all files are fetched.

    Raises: as `buckets.fetch`.
    """
    place = bucket_store.place(workdir)
    if place is None:
        return pathlib.Path(workdir)
    folder = buckets.path_of(place)
    for left in reversed(range(5)):  # the run, if it still goes on, may remove what is listed
        names = bucket_store.names_below(place)
        steps = complete_steps(names)
        try:
            buckets.fetch_all(folder / name for name in ("config.json", "best.json") if name in names)
            step = _best_step(folder / "best.json", names, steps)
            lead = f"checkpoints/{step}/"
            wanted = [name for name in names if name.startswith(lead) and not name.startswith(f"{lead}optimizer/")]
            wanted = wanted or [name for name in names if "/" not in name]
            buckets.fetch_all(folder / name for name in wanted)
        except FileNotFoundError:
            if not left:
                raise
        else:
            break
    buckets.remove_others(folder / "checkpoints", {folder / name for name in wanted})
    return folder


def _best_step(path: pathlib.Path, names: list[str], steps: list[int]) -> int:
    """Returns the step that best.json names, if it is there and among `steps`, else the newest, -1 without any."""
    if "best.json" in names:
        with contextlib.suppress(ValueError, LookupError, TypeError):
            if (step := int(files.read_json(path)["step"])) in steps:
                return step
    return max(steps, default=-1)


class Remote:
    """A workdir in a bucket.

    Attributes:
      place: in the bucket.
      folder: the copy on this machine, of this process alone.
    """

    def __init__(self, place: Place, *, process: int, training: bool):
        self.place = place
        self.folder = buckets.path_of(place, part=f"workdirs/{process if training else uuid.uuid4().hex}")
        self._versions: dict[str, bytes] = {}  # in the bucket, of files that were read or written
        self._pushed: dict[str, tuple[int, int]] = {}  # size and time, here
        self._pushing = threading.Lock()
        self.lease: Lease | None = None

    def pull(self, *, arrays: bool) -> None:
        """Makes the copy what the bucket holds; BucketError if that cannot be read."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        for _ in range(5):  # a run that goes on while this one only reads may remove what is listed
            names = bucket_store.names_below(self.place)
            steps = complete_steps(names)
            wanted = [name for name in names if _is_needed(name, steps, arrays=arrays)]
            with contextlib.suppress(FileNotFoundError), concurrent.futures.ThreadPoolExecutor(_NUM_THREADS) as pool:
                list(pool.map(self._get, wanted))
                return
        raise BucketError(f"{self.place} changes while it is read: another run works there")

    def _get(self, name: str) -> None:
        content, version = bucket_store.read(self.place.below(name))
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content or b"")
        self._versions[name], self._pushed[name] = version, _facts(path)

    def unchanged(self) -> bool:
        """Returns whether the bucket still holds what was read."""
        names = bucket_store.names_below(self.place)
        steps = complete_steps(names)
        now = {name for name in names if _is_needed(name, steps, arrays=True)}

        def same(name: str) -> bool:
            return bucket_store.read(self.place.below(name), known=self._versions[name])[0] is None

        try:
            with concurrent.futures.ThreadPoolExecutor(_NUM_THREADS) as pool:
                return now == self._versions.keys() and all(pool.map(same, now))
        except FileNotFoundError:
            return False

    def push(self) -> None:
        """Brings what changed in the copy to the bucket, in the order that the module describes.

        Raises:
          WorkdirError: the workdir is not this run's any more.
          BucketError: the bucket does not take it; the next call tries again.
        """
        with self._pushing, concurrent.futures.ThreadPoolExecutor(_NUM_THREADS) as pool:
            found = self._found()
            if "config.json" in self._pushed.keys() - found.keys():  # else the bucket's files would go, too
                raise WorkdirError(
                    f"the copy of {self.place} in {self.folder} was removed; the bucket keeps what it has"
                )
            changed = [name for name in found if self._pushed.get(name) != found[name]]
            lasts = [name for name in changed if name.endswith(f"/{LAST_OF_STEP}")]
            best = [name for name in changed if name == "best.json"]
            others = [name for name in changed if name not in {*lasts, *best}]
            for group in (others, lasts, best):
                list(pool.map(lambda name: self._put(name, found[name]), group))
            gone = [name for name in self._pushed if name not in found]
            lasts = [name for name in gone if name.endswith(f"/{LAST_OF_STEP}")]
            for group in (lasts, [name for name in gone if name not in lasts]):
                list(pool.map(self._remove, group))

    def _found(self) -> dict[str, tuple[int, int]]:
        """Returns size and time of the files of the copy by name; what the run removes meanwhile may be among them."""
        found = {}

        def refuse(error: OSError) -> None:  # a folder that is gone has no files; one that cannot be read may have
            if not isinstance(error, FileNotFoundError):
                raise error

        for folder, _, names in os.walk(self.folder, onerror=refuse):
            for path in map(pathlib.Path(folder).joinpath, names):
                name = path.relative_to(self.folder).as_posix()
                with contextlib.suppress(FileNotFoundError):
                    if _is_whole(name) and path.is_file():
                        found[name] = _facts(path)
        return found

    def _put(self, name: str, facts: tuple[int, int]) -> None:
        try:
            content = (self.folder / name).read_bytes()
        except FileNotFoundError:
            return  # the run has just removed it
        if name == "metrics.jsonl":  # the last line may be half written
            content = content[: content.rfind(b"\n") + 1]
            if not content:
                return
        self._hold()
        version = bucket_store.write(self.place.below(name), content, known=self._versions.get(name))
        if version is None:
            raise self._lost(f"another run wrote {name}")
        self._versions[name], self._pushed[name] = version, facts

    def _remove(self, name: str) -> None:
        self._hold()
        bucket_store.write(self.place.below(name), None)
        self._versions.pop(name, None)
        del self._pushed[name]

    def _hold(self) -> None:
        if self.lease and not self.lease.held():
            raise self._lost("another run has taken its lock, since this one gave no sign of life")

    def _lost(self, why: str) -> WorkdirError:
        return WorkdirError(f"{self.place} is not this run's any more: {why}; start one of them again")


def _facts(path: pathlib.Path) -> tuple[int, int]:
    facts = path.stat()
    return facts.st_size, facts.st_mtime_ns


class Lease:
    """The lock of a workdir in a bucket, held as long as it is renewed."""

    def __init__(self, where: Place, *, token: str):
        self._where, self._token, self._number = where, token, 0
        self._version, self._renewed = b"", 0.0
        self._lock = threading.Lock()

    def _content(self) -> bytes:
        self._number += 1  # each is another: S3 tells versions apart by their content
        who = f"process {os.getpid()} on {socket.gethostname()}"
        return json.dumps({"run": who, "token": self._token, "number": self._number}).encode()

    def take(self, *, own: str) -> None:
        """Takes the lock; at once where a dead process of this machine with the token `own` has it.

        Raises:
          WorkdirError: another run holds it.
          BucketError: the bucket cannot be read or written.
        """
        seen, until = None, time.monotonic()
        while True:
            try:
                found, version = bucket_store.read(self._where)
            except FileNotFoundError:
                found, version = None, b""
            holder = _holder(found)
            if seen is not None and version != seen:
                raise WorkdirError(
                    f"another run trains in {self._where} ({holder.get('run', 'it does not say which')}); stop it, or "
                    "give another --workdir"
                )
            if seen is None:
                seen = version
                is_free = found is None or (bool(own) and holder.get("token") == own)
                until += 0.0 if is_free else LEASE_S
                if not is_free:
                    logging.info("%s is of %s: waiting for a sign of life", self._where, holder.get("run", "a run"))
            if time.monotonic() >= until:
                if self._write(version):
                    return
                continue  # somebody was faster
            time.sleep(min(BEAT_S, LEASE_S) / 2)

    def _write(self, version: bytes) -> bool:
        before = time.monotonic()
        new = bucket_store.write(self._where, self._content(), known=version)
        if new is not None:
            self._version, self._renewed = new, before
        return new is not None

    def renew(self) -> bool:
        """Writes the lock again; returns False if it is another's. BucketError: the bucket does not answer."""
        with self._lock:
            return self._write(self._version)

    def held(self) -> bool:
        """Returns whether the lock is surely this run's now; raises as `renew`."""
        return time.monotonic() - self._renewed < LEASE_S / 2 or self.renew()

    def release(self) -> None:
        """Gives the lock back."""
        with self._lock:
            bucket_store.write(self._where, None, known=self._version)


def _holder(content: bytes | None) -> dict[str, str]:
    try:
        found = json.loads(content or b"{}")
    except ValueError:
        found = {}
    return found if isinstance(found, dict) else {}


@contextlib.contextmanager
def opened(workdir: str, *, training: bool) -> Iterator[tuple[pathlib.Path, Remote | None]]:
    """Yields the folder of a workdir, and the workdir in a bucket of which it is a copy; None where there is none.

    Raises:
      ValueError: there is no such bucket.
      BucketError: it cannot be read.
      WorkdirError: another process of this machine has the copy.
    """
    place = bucket_store.place(workdir)
    if place is None:
        yield pathlib.Path(workdir), None
        return
    remote = Remote(place, process=jax.process_index(), training=training)
    with contextlib.ExitStack() as stack:
        if training:  # the name of the copy's lock: beside it, since the copy is removed
            try:
                remote.folder.parent.mkdir(parents=True, exist_ok=True)
                stack.enter_context(files.locked(_beside(remote.folder, "lock")))
            except files.LockedError as error:
                raise WorkdirError(f"another run trains in {place} ({error}); stop it, or give another") from None
        remote.pull(arrays=not training or jax.process_index() == 0)
        yield remote.folder, remote
        shutil.rmtree(remote.folder, ignore_errors=True)


def _beside(folder: pathlib.Path, what: str) -> pathlib.Path:
    return folder.with_name(f".{folder.name}.{what}")


@contextlib.contextmanager
def kept(remote: Remote, *, training: bool) -> Iterator[None]:
    """Holds the lock of a workdir in a bucket, and keeps the bucket up to date with its copy; of process 0.

    An evaluation takes no lock, and writes what it made when it ends.

    Raises:
      WorkdirError: another run trains there, or took over.
      BucketError: the bucket did not take what the run wrote.
    """
    with contextlib.ExitStack() as stack:
        if training:
            stack.enter_context(_leased(remote))
            if not remote.unchanged():
                raise WorkdirError(f"{remote.place} was changed while this run started; start the same command again")
            stack.enter_context(_every(PUSH_S, remote.push))
        try:
            yield
        except Exception as error:
            try:
                remote.push()
            except (BucketError, WorkdirError) as second:
                raise WorkdirError(f"{second}. What ended before that: {error}") from error
            raise
        remote.push()


@contextlib.contextmanager
def _leased(remote: Remote) -> Iterator[None]:
    token_file, token = _beside(remote.folder, "token"), uuid.uuid4().hex
    lease = Lease(remote.place.below("lock"), token=token)
    lease.take(own=token_file.read_text() if token_file.is_file() else "")
    files.write_text(token_file, [token])
    remote.lease = lease

    def renew() -> None:
        if not lease.renew():
            raise WorkdirError(f"another run has taken the lock of {remote.place}")

    with _every(BEAT_S, renew):
        yield
    with contextlib.suppress(BucketError):  # it runs out by itself
        lease.release()
    token_file.unlink(missing_ok=True)


@contextlib.contextmanager
def _every(seconds: float, work: Callable[[], None]) -> Iterator[None]:
    """Does some work again and again in a thread; what a bucket or a disk does not do is tried again.

    What else goes wrong stops the run as a preemption does: it ends at the same step on all processes.
    """
    over = threading.Event()

    def repeat() -> None:
        while not over.wait(seconds):
            try:
                work()
            except Exception as error:
                logging.warning("%s", error)
                stays = any(status in str(error) for status in ("PERMISSION_DENIED", "NOT_FOUND", "UNAUTHENTICATED"))
                if stays or not isinstance(error, BucketError | OSError):
                    return os.kill(os.getpid(), signal.SIGTERM)

    (thread := threading.Thread(target=repeat, daemon=True)).start()
    try:
        yield
    finally:
        over.set()
        thread.join()
