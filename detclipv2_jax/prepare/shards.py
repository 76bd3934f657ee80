"""Parallel, restartable writing of a built folder.

1. `<output>/building/plan.json` holds what the build depends on; another plan in the same folder is an error.
2. Each shard is written by one process to building/, then its counts beside it; the counts say that it is done. After a
   kill, shards with counts are not done again.
3. All shards done: too many unusable items are an error (a larger share and the same command go on from here); else the
   files get their final names, shards without examples left out.
4. Metadata for TFDS, index and vocabulary; last `build_report.json`, without which a folder is no built folder.

Of several machines each does step 2 for every n-th shard, in one folder; one that is told their number does 3 and 4.

| file of a built folder | content |
|---|---|
| `*-train.array_record-00000-of-00012` | examples, in the order of the raw files; `record_builder` documents them |
| `dataset_info.json`, `features.json` | TFDS: `tfds.builder_from_directory(folder).as_data_source("train")` |
| `index.npz` | by example: sizes int32 [n, 2] (height, width), num_boxes int32 [n], num_concepts int32 [n] |
| `vocabulary.json` | categories or distinct phrases: names, definitions, category_ids |
| `phrases.tsv` | image-text: the most frequent noun phrases, lower case, with the number of captions that have them |
| `build_report.json` | what was kept, what was not and why, sha256 of the inputs, the command |
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import json
import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
import tqdm
from array_record.python.array_record_module import ArrayRecordWriter
from tensorflow_datasets.proto import tf_example_pb2

from detclipv2_jax import atomic, buckets, files
from detclipv2_jax.data import workers
from detclipv2_jax.data.built import INDEX, PHRASES, REPORT, VOCABULARY
from detclipv2_jax.data.checks import refuse_above_share
from detclipv2_jax.prepare.record_builder import (
    MAX_PHRASES,
    Reader,
    RecordBuilder,
    Tally,
    features,
    generate,
    to_example,
)

_BUILDING = buckets.BUILDING


@dataclasses.dataclass(frozen=True)
class Part:
    """Which of several machines this is, from 0; without an index the one that puts together what they wrote."""

    index: int | None
    count: int


ALONE = Part(None, 1)


@dataclasses.dataclass(frozen=True)
class Job:
    """What a process needs to write any shard."""

    reader: Reader
    folder: Path
    held_out: frozenset[str]
    drop_held_out: bool

    def file(self, shard: int, suffix: str) -> Path:
        return self.folder / f"{shard:06d}.{suffix}"

    def write(self, shard: int) -> int:
        """Writes a shard, its index and, last, its counts; returns its number."""
        tally, rows = Tally(), []
        part, connectors = self.file(shard, f"part{os.getpid()}"), features()
        writer = ArrayRecordWriter(str(part), "group_size:1")  # every record can be read alone
        examples = generate(self.reader, shard, tally, held_out=self.held_out, drop_held_out=self.drop_held_out)
        try:
            for name, record in examples:
                example = tf_example_pb2.Example.FromString(connectors.serialize_example(to_example(name, record)))
                # TFDS leaves the order of the features to chance; sorted, equal inputs give equal files
                writer.write(example.SerializeToString(deterministic=True))
                rows.append((*record.size, len(record.boxes), len(record.concepts)))
        finally:
            writer.close()
        part.rename(self.file(shard, "array_record"))
        files.write_json(self.file(shard, "index.json"), rows)
        files.write_json(self.file(shard, "json"), vars(tally), indent=1)
        return shard


_job: Job  # of a worker process


def _start_worker(job: Job) -> None:
    global _job
    _job = job
    workers.end_with_parent()


def _work(shard: int) -> int:
    return _job.write(shard)


@contextlib.contextmanager
def _mapper(job: Job, num_workers: int) -> Iterator[Callable[[list[int]], Iterator[int]]]:
    """Gives a function that writes shards and yields their numbers as they are done."""
    if num_workers <= 1:
        yield lambda shards: map(job.write, shards)
        return
    context = multiprocessing.get_context("spawn")  # TensorFlow and spaCy have threads: a fork may hang
    with workers.starting():
        pool = concurrent.futures.ProcessPoolExecutor(num_workers, context, _start_worker, (job,))

    def unordered(shards: list[int]) -> Iterator[int]:
        with workers.starting():
            futures = [pool.submit(_work, shard) for shard in shards]
        for future in concurrent.futures.as_completed(futures):
            yield future.result()

    wait = True
    try:
        yield unordered
    except KeyboardInterrupt:
        wait = False  # they end with this process
        raise
    except concurrent.futures.BrokenExecutor:
        raise ValueError(
            "a worker process died (out of memory?); the same command goes on with the shards that are missing, "
            "--workers=1 needs least memory"
        ) from None
    finally:
        pool.shutdown(wait, cancel_futures=True)


def build(
    builder_class: type[RecordBuilder],
    reader: Reader,
    output: str | Path,
    *,
    options: dict[str, Any],
    command: str,
    max_bad_share: float,
    num_workers: int,
    held_out: frozenset[str] = frozenset(),
    drop_held_out: bool = False,
    part: Part = ALONE,
) -> dict[str, Any] | None:
    """Returns the report of a finished build, after writing what is missing of it; None where only a part was to do.

    Args:
      builder_class: names the data set in the files.
      reader: the raw files.
      output: folder of the build.
      options: everything that decides what is written, for the plan.
      command: as typed; for the report.
      max_bad_share: an error above this share of unusable items.
      num_workers: processes.
      held_out: photos of validation sets, see `data.leakage.photo_of`.
      drop_held_out: leave them out.
      part: of several machines.

    Raises:
      ValueError: another build in `output`, no usable example, or too many unusable ones, with the worst reasons.
    """
    output, begin = Path(output), time.monotonic()
    plan = json.loads(json.dumps({"builder": builder_class.name, "inputs": reader.inputs, **options}))
    if (report := _finished(plan, output)) is not None:
        return report
    job = Job(reader, output / _BUILDING, held_out, drop_held_out)
    with _only_build(job, plan, output, part=part):
        if (report := _finished(plan, output)) is not None:  # by another process
            shutil.rmtree(output / _BUILDING, ignore_errors=True)
            return report
        tallies = _write_shards(job, output, part=part, max_bad_share=max_bad_share, num_workers=num_workers)
        if part.index is not None:
            return None
        total = Tally()
        for tally in tallies:  # in order, so that a report does not depend on which process was faster
            total.add(tally)
        _write_metadata(builder_class, job, output, tallies)
        if total.phrases:
            most_frequent = sorted(total.phrases.items(), key=lambda item: (-item[1], item[0]))[:MAX_PHRASES]
            lines = (f"{' '.join(phrase.split())}\t{number}\n" for phrase, number in most_frequent)
            files.write_text(output / PHRASES, lines)
        report = _report(job, total) | {
            "bytes": sum(path.stat().st_size for path in output.glob("*.array_record-*")),
            "seconds of the last run": round(time.monotonic() - begin, 1),
            "command": command,
            "plan": plan,
        }
        files.write_json(output / REPORT, report, indent=1)
        shutil.rmtree(output / _BUILDING, ignore_errors=True)
    return report


def _finished(plan: dict[str, Any], output: Path) -> dict[str, Any] | None:
    """Returns the report of a build of this plan that is done, None where it is not."""
    if not (output / REPORT).is_file():
        return None
    report = files.read_json(output / REPORT)
    if not isinstance(report, dict) or not isinstance(report.get("plan"), dict):
        raise ValueError(f"{output / REPORT} is damaged; remove the folder, or choose another")
    _check_plan(plan, report["plan"], output)
    return report


@contextlib.contextmanager
def _only_build(job: Job, plan: dict[str, Any], output: Path, *, part: Part) -> Iterator[None]:
    """Keeps other processes out of the folder of a build, or of a part of it; the folder is made if need be."""
    if (
        not (job.folder / "plan.json").is_file()
        and output.is_dir()
        and any(path.name != _BUILDING for path in output.iterdir())
    ):
        raise ValueError(f"--output={output} is not empty and no build; choose another folder")
    job.folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        own = job.folder / ("lock" if part.index is None else f"lock-{part.index}")
        try:
            for lock in [own] if part.index is not None else [own, *job.folder.glob("lock-*")]:
                stack.enter_context(files.locked(lock))
        except files.LockedError as error:
            raise ValueError(
                f"another process builds in {output} ({error}); wait for it, or choose another folder"
            ) from None
        _start(job, plan, output, part=part)
        yield


def _write_shards(job: Job, output: Path, *, part: Part, max_bad_share: float, num_workers: int) -> list[Tally]:
    """Returns what happened in each shard, or in those of a part, after writing those that are missing."""
    reader, shards = job.reader, range(part.index or 0, job.reader.num_shards, 1 if part.index is None else part.count)
    missing = [shard for shard in shards if not job.file(shard, "json").is_file()]
    if missing and part.index is None and part.count > 1:
        late = ", ".join(map(str, sorted({shard % part.count for shard in missing})))
        raise ValueError(f"{output}: of {part.count} machines these have not written their part: --index={late}")
    total = Tally()
    for shard in set(shards) - set(missing):
        total.add(_tally(job, shard))
    with (
        _progress(reader, total.seen, len(missing)) as progress,
        _mapper(job, min(num_workers, len(missing))) as write_all,
    ):
        for shard in write_all(missing):
            before = total.seen
            total.add(_tally(job, shard))
            progress.update(total.seen - before if reader.num_items else 1)
            if reader.num_items:  # what is known to be too much need not be read to its end
                refuse_above_share(total.dropped, reader.num_items, max_bad_share, what="items", where=output)
    if part.index is None:
        refuse_above_share(total.dropped, total.seen, max_bad_share, what="items", where=output)
    if part.index is None and not total.examples:
        raise ValueError(f"{output}: the input has no usable example; {_by_reason(total.dropped) or 'it is empty'}")
    return [_tally(job, shard) for shard in shards]


def _report(job: Job, total: Tally) -> dict[str, Any]:
    """Returns what a report says of the examples and what became of the others."""
    reader = job.reader
    return {
        "kind": reader.kind.value,
        "examples": total.examples,
        "boxes": total.boxes,
        "concepts": total.concepts,
        "distinct concepts": len(reader.vocabulary) or None,  # captions are not compared with each other
        "concepts above 16 tokens": total.long_concepts,
        "seen": total.seen,
        "dropped": dict(total.dropped.most_common()),
        "left out or repaired": dict((total.noted + type(total.noted)(reader.counters)).most_common()),
        "longest": dict(total.longest),
        "validation photos": {
            "compared with": len(job.held_out),
            "found": len(total.leaked),
            "left out": job.drop_held_out,
            "names": sorted(total.leaked)[:100],
        },
        **reader.facts,
        "inputs": {name: reader.inputs.get(name, {}) | facts for name, facts in (reader.inputs | total.inputs).items()},
    }


def _start(job: Job, plan: dict[str, Any], output: Path, *, part: Part) -> None:
    """Writes the plan of a build, or checks that the unfinished one is of the same plan."""
    plan_file = job.folder / "plan.json"
    if not plan_file.is_file():
        files.write_json(plan_file, plan, indent=1)
        return
    _check_plan(plan, files.read_json(plan_file), output)
    for left in job.folder.glob("*.part*"):  # of processes that were killed
        if part.index is None or int(left.stem) % part.count == part.index:
            left.unlink()


def _check_plan(plan: dict[str, Any], old: Any, output: Path) -> None:
    old = old if isinstance(old, dict) else {}
    changed = [
        f"{key}: {old.get(key)!r} -> {plan.get(key)!r}"
        for key in sorted(plan.keys() | old.keys())
        if plan.get(key) != old.get(key)
    ]
    if changed:
        raise ValueError(
            f"--output={output} holds a build of other files or options ({'; '.join(changed)[:2000]}); "
            "choose another folder, or remove it"
        )


def _tally(job: Job, shard: int) -> Tally:
    tally, path = Tally(), job.file(shard, "json")
    try:
        tally.add(Tally(**files.read_json(path)))
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}); remove it, and its shard is written again") from error
    return tally


def _index(job: Job, shard: int, *, num: int) -> np.ndarray:
    path = job.file(shard, "index.json")
    try:
        return np.array(files.read_json(path), np.int32).reshape(num, 4)
    except (OverflowError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}); remove {job.folder}, and all is written again") from error


def _by_reason(counts: dict[str, int]) -> str:
    return ", ".join(f"{num} {reason}" for reason, num in sorted(counts.items(), key=lambda item: -item[1]))


def _progress(reader: Reader, done: int, num_missing: int) -> tqdm.tqdm:
    by_item = reader.num_items > 0
    return tqdm.tqdm(
        desc="building",
        unit="example" if by_item else "shard",
        initial=done if by_item else reader.num_shards - num_missing,
        total=reader.num_items if by_item else reader.num_shards,
        mininterval=0.5 if sys.stderr.isatty() else 30.0,
        smoothing=0.05,  # shards end in bursts
    )


def _write_metadata(builder_class: type[RecordBuilder], job: Job, output: Path, tallies: list[Tally]) -> None:
    """Gives the shards their names and writes what describes them; doing it again changes nothing."""
    filled = [shard for shard, tally in enumerate(tallies) if tally.examples]
    template = tfds.core.ShardedFileTemplate(
        data_dir=output, dataset_name=builder_class.name, split="train", filetype_suffix="array_record"
    )
    paths = template.sharded_filepaths(len(filled))
    for shard, path in zip(filled, paths, strict=True):
        if (written := job.file(shard, "array_record")).is_file():
            written.rename(path)
    table = np.concatenate([_index(job, shard, num=tallies[shard].examples) for shard in filled])
    with atomic.whole(output / INDEX) as partial:
        np.savez(partial, sizes=table[:, :2], num_boxes=table[:, 2], num_concepts=table[:, 3])
    files.write_json(output / VOCABULARY, dataclasses.asdict(job.reader.vocabulary), indent=1)
    builder = builder_class.of(job.reader, data_dir=output)
    lengths = [tallies[shard].examples for shard in filled]
    num_bytes = sum(os.path.getsize(path) for path in paths)
    split = tfds.core.SplitInfo(name="train", shard_lengths=lengths, num_bytes=num_bytes, filename_template=template)
    builder.info.set_splits(tfds.core.splits.SplitDict([split]))
    builder.info.write_to_directory(output)
