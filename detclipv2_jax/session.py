"""What stands around the loop: checks before anything is compiled, the workdir, generated scenes, the last lines."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import pathlib
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator

import jax
from absl import logging
from ml_collections import ConfigDict

from detclipv2_jax import buckets, commands, config_json, validation
from detclipv2_jax import config as config_lib
from detclipv2_jax import train as train_lib
from detclipv2_jax.bucket_store import BucketError
from detclipv2_jax.chips import CUDA_SHARE, chip_of, warn_of_unused_accelerator
from detclipv2_jax.data import identity, scenes
from detclipv2_jax.data.schema import DataError, StalledError
from detclipv2_jax.eval import loop as evaluation
from detclipv2_jax.files import collector_paused, read_json, write_json, write_text
from detclipv2_jax.runs import processes, remote
from detclipv2_jax.runs.ahead import is_compiling
from detclipv2_jax.runs.checkpoints import DamagedError, read_best
from detclipv2_jax.runs.workdir import WorkdirError, only_run, read_config, room

# keys that may change when a run is continued: how long it trains and how it is watched, not what it learns
CHANGEABLE = (
    "num_steps", "log_every_steps", "pictures_every_steps", "profile_steps", "nonfinite", "timeout_s", "checkpoint",
    "eval", "input", "mesh", "chips", "closing", "trackers", "optimizer.text_lengths",
)  # fmt: skip


def run(
    config: ConfigDict,
    workdir: str,
    *,
    training: bool,
    distributed: str,
    replayed: int | None,
    changed_data: bool,
    preempted_status: int,
) -> int:
    """Trains, evaluates or runs a step again, and says what came of it; returns the exit status."""
    started = time.monotonic()
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", str(CUDA_SHARE))  # before JAX looks for devices
    stack = contextlib.ExitStack()
    try:
        processes.join(distributed, timeout_s=config.timeout_s)
        folder, bucket = stack.enter_context(remote.opened(workdir, training=training and not replayed))
        with collector_paused():
            work = setup(config, folder, training=training, replayed=replayed, changed_data=changed_data, bucket=bucket)
    except (ValueError, processes.MissingProcessError, WorkdirError, BucketError) as error:
        sys.exit(f"error: {error}")
    message, number, scores = "", 0, dict[str, float]()
    try:
        scores = work()
    except train_lib.Preempted as stop:
        message, number = str(stop), stop.number
    except StalledError as error:
        print(f"error: {error}", file=sys.stderr)
        commands.leave(1)  # a thread that waits for a disk cannot be ended, and would be waited for
    except (
        BucketError, DataError, DamagedError, processes.MissingProcessError, train_lib.NonFiniteError, WorkdirError,
    ) as error:  # fmt: skip
        sys.exit(f"error: {error}")
    except (ValueError, OSError):  # a fault of the program, not of what it was given
        traceback.print_exc()
        return 1
    if number:  # not above, where the exception still holds batches of the data workers
        logging.info("%s; the same command goes on from there", message)
        status = commands.INTERRUPTED if number == signal.SIGINT else preempted_status
        return commands.leave(status) if is_compiling() else status
    if jax.process_index() == 0 and not replayed:
        report(folder, scores, minutes=(time.monotonic() - started) / 60)
        print_closing(config.closing, scores)
    stack.close()
    return 0


def setup(
    config: ConfigDict,
    workdir: pathlib.Path,
    *,
    training: bool,
    replayed: int | None = None,
    changed_data: bool = False,
    bucket: remote.Remote | None = None,
) -> Callable[[], dict[str, float]]:
    """Returns what trains (or evaluates) and returns scores; all is checked, and nothing compiled.

    With a step `replayed` it runs that step again and returns its metrics. `bucket` is what the workdir is a copy of.

    Raises:
      ValueError: the configuration, the files it names or the workdir are wrong, or (unless `changed_data`) the data
        are not those that the run of the workdir began with.
      MissingProcessError: another process did not get this far.
    """
    warn_of_unused_accelerator()
    logging.info(
        "compiled programs are kept in %s (--compilation_cache)",
        jax.config.values["jax_compilation_cache_dir"] or "no folder",
    )
    known = chip_of(jax.devices()[0].device_kind)
    chip = known.name if known else None
    if chip and config.chips[chip]:
        logging.info("values for %s: %s (config.chips.%s)", chip, dict(config.chips[chip]), chip)
    validation.validate(config_lib.for_chip(config, chip), num_devices=jax.device_count())
    processes.check_same(config_json.to_json(config), what="configuration", timeout_s=config.timeout_s)
    fresh_allowed = not replayed and (training or bool(config.init_from.checkpoint))
    check_workdir(workdir, config, fresh_allowed=fresh_allowed)
    complete = buckets.localized(with_scenes(config_lib.for_chip(config, chip), workdir))
    work: Callable[[], dict[str, float]]
    data: dict[str, str] = {}
    if training or replayed:
        data = identity.of_run(complete)
        processes.check_same(json.dumps(data), what="data", timeout_s=config.timeout_s)
        check_data(workdir, data, allowed=changed_data)
    if replayed:
        return functools.partial(train_lib.replay_step, train_lib.make_run(complete, workdir), replayed)
    if training:
        work = functools.partial(train_lib.train, train_lib.make_run(complete, workdir))
    else:
        work = evaluation.make_evaluation(complete, workdir)
    # only after all processes have checked everything: a run that fails before must not take the workdir
    processes.barrier("all is checked", timeout_s=config.timeout_s)
    return functools.partial(in_workdir, work, config, workdir, training=training, data=data, bucket=bucket)


def in_workdir(
    work: Callable[[], dict[str, float]],
    config: ConfigDict,
    workdir: pathlib.Path,
    *,
    training: bool,
    data: dict[str, str],
    bucket: remote.Remote | None = None,
) -> dict[str, float]:
    """Returns what `work` does, in a workdir that says which configuration it holds and, trained, on which data.

    Raises:
      WorkdirError: another run trains there, or nothing can be written there.
    """
    with contextlib.ExitStack() as stack:
        if jax.process_index() == 0:
            if training:
                stack.enter_context(only_run(workdir))
            if bucket:
                stack.enter_context(remote.kept(bucket, training=training))
            workdir.mkdir(parents=True, exist_ok=True)
            stack.enter_context(room(workdir))
            if training:
                write_json(workdir / "data.json", data, indent=1)
            if training or not (workdir / "config.json").exists():
                write_text(workdir / "config.json", [config_json.to_json(config)])
            if training:
                stack.enter_context(said_when_preempted(workdir / "preempted"))
        if bucket:
            processes.barrier("the workdir is held", timeout_s=config.timeout_s)
        return work()


@contextlib.contextmanager
def said_when_preempted(path: pathlib.Path) -> Iterator[None]:
    """Leaves a word at `path` where the run ends inside because it was told to, and none otherwise.

    A scheduler that ends all processes with the first of them does not see the exit status that says so.
    """
    path.unlink(missing_ok=True)
    try:
        yield
    except train_lib.Preempted as stop:
        write_text(path, [f"{stop}\n"])
        raise


def check_workdir(workdir: pathlib.Path, config: ConfigDict, *, fresh_allowed: bool) -> None:
    """Checks that a workdir is new or holds a run of this configuration.

    Raises:
      ValueError: the workdir holds another run; every difference that matters is listed.
    """
    if (workdir / "config.json").exists():
        changed = [
            line
            for line in config_json.differences(read_config(workdir), config)
            if not line.startswith(tuple(f"{key}:" for key in CHANGEABLE) + tuple(f"{key}." for key in CHANGEABLE))
        ]
        if changed:
            raise ValueError(
                f"{buckets.name_of(workdir)} holds another run (stored -> now):\n"
                + "\n".join(f"  {line}" for line in changed)
                + "\nGive another --workdir, or the stored values to continue that run."
            )
    elif not fresh_allowed:
        raise ValueError(
            f"{buckets.name_of(workdir)} has no config.json, so there is no run to evaluate or replay; give its "
            "--workdir, or another workdir and --config.init_from.checkpoint=<workdir of the run>"
        )


def check_data(workdir: pathlib.Path, data: dict[str, str], *, allowed: bool) -> None:
    """Checks that a run goes on with the data (`identity.of_run`) it began with, and says what changed.

    Raises:
      ValueError: there is a checkpoint of other data, and they are not `allowed`.
    """
    path = workdir / "data.json"
    if not path.exists() or not train_lib.has_checkpoint(workdir):
        return
    stored = read_json(path)
    changed = "\n".join(f"  {line}" for line in identity.changes(stored if isinstance(stored, dict) else {}, data))
    if changed and not allowed:
        raise ValueError(
            f"the data are not those that the run of {buckets.name_of(workdir)} began with:\n{changed}\nRestore them, "
            "give another --workdir, or go on with --changed_data."
        )
    if changed:
        logging.warning("the data changed since the run of %s began:\n%s", workdir, changed)


def with_scenes(config: ConfigDict, workdir: pathlib.Path) -> ConfigDict:
    """Returns the configuration with the files of the generated world, which are written if it asks for one."""
    wanted = config.scenes.to_dict()
    counts = {key: wanted[key] for key in wanted if key.startswith("num_")}
    if not any(counts.values()):
        return config
    folder = pathlib.Path(wanted.pop("folder") or workdir / "data")
    if jax.process_index() == 0 or buckets.is_workdir(folder):
        logging.info("generating scenes in %s", folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise WorkdirError(f"nothing can be written to {folder}: {error}; give another --workdir") from error
        with room(folder, what="the generated scenes"):
            scenes.write(folder, **wanted)
    processes.barrier("scenes are written", timeout_s=config.timeout_s)
    config = config.copy_and_resolve_references()
    for key, section, name, file in (
        ("num_detection", config.detection, "annotations", "detection.json"),
        ("num_grounding", config.grounding, "annotations", "grounding.json"),
        ("num_image_text", config.image_text, "pairs", "pairs.tsv"),
        ("num_eval", config.eval, "annotations", "eval.json"),
    ):
        if counts[key]:
            section[name] = str(folder / file)
            section.images = str(folder)
    return config


def report(workdir: pathlib.Path, scores: dict[str, float], *, minutes: float) -> None:
    """Prints the scores and where everything is."""
    for group in ("", "forgetting/before", "forgetting/after"):
        group_scores = {
            name.rpartition("/")[2]: value for name, value in scores.items() if name.rpartition("/")[0] == group
        }
        if group_scores:
            measured = (
                f"{name} {100 * value:.1f}" for name, value in group_scores.items() if value >= 0
            )  # -1: nothing of it
            print(f"{f'second set, {group[11:]} training' if group else 'scores'} in %: {', '.join(measured)}")
    if best := read_best(workdir / "best.json"):
        print(f"best checkpoint: step {best['step']}, {best['score']} {100 * best['value']:.1f}")
    print(f"done in {minutes:.1f} minutes; everything is in {buckets.name_of(workdir)}/:")
    for name, what in {
        "checkpoints": "parameters and optimizer state",
        "metrics.jsonl": "loss terms, speed and scores by step (TensorBoard events beside it)",
        "parameters.txt": "names, shapes and groups of the parameters",
        "eval": "detections in COCO format and scores",
        "forgetting": "the same of the second set",
        "pictures": "what the model saw and found",
    }.items():
        if (workdir / name).exists():
            print(f"  {name:14} {what}")


def print_closing(closing: str, scores: dict[str, float]) -> None:
    """Prints `config.closing` with scores in %; where the data have no score that it names, the log says so instead."""
    try:
        print(closing.format(**{name: 100 * value for name, value in scores.items()}), end="\n" if closing else "")
    except KeyError as missing:
        logging.info("config.closing is not printed: the data have no score %s", missing)
