"""Trains or evaluates DetCLIPv2: `python -m detclipv2_jax.main --config=FILE [--workdir=DIR] [--config.key=value …]`.

Run the same command on every host. A run continues from the newest checkpoint of its workdir.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import pathlib
import signal
import sys
import time
from collections.abc import Callable, Sequence

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from detclipv2_jax import config as config_lib
from detclipv2_jax import config_json, files, interrupts, validation
from detclipv2_jax import train as train_lib
from detclipv2_jax.chips import CUDA_SHARE, chip_of
from detclipv2_jax.data import identity, scenes
from detclipv2_jax.data.schema import DataError, StalledError
from detclipv2_jax.eval import loop as evaluation
from detclipv2_jax.files import read_json, write_json, write_text
from detclipv2_jax.runs import processes
from detclipv2_jax.runs.checkpoints import DamagedError, read_best
from detclipv2_jax.runs.workdir import WorkdirError, only_run, room

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "configuration, e.g. configs/demo.py or configs/swin_t.py:full"
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "where checkpoints, metrics and pictures go; default: runs/<config name>"
)
_MODE = flags.DEFINE_enum(
    "mode",
    "train",
    ["train", "eval"],
    "train (and evaluate), or evaluate the newest checkpoint of --workdir or of config.init_from.checkpoint",
)
_DISTRIBUTED = flags.DEFINE_enum(
    "distributed", "auto", ["auto", "off", "on"],
    "several processes: on, off, or auto (on where a TPU pod, Slurm or the JAX_COORDINATOR_ADDRESS variable says so)",
)  # fmt: skip

_REPLAY = flags.DEFINE_integer(
    "replay", None, "runs this step of the workdir's run again, from the newest checkpoint before it, and prints its "
    "loss terms, gradient norms and examples; writes nothing", lower_bound=1,
)  # fmt: skip
_CHANGED_DATA = flags.DEFINE_boolean(
    "changed_data", False, "go on with a run whose annotation files or built folders are not those it began with"
)
_PREEMPTED_STATUS = flags.DEFINE_integer(
    "preempted_status", 0, "exit status of a run that SIGTERM stopped; not 0 where a scheduler shall start it again"
)

# keys that may change when a run is continued: how long it trains and how it is watched, not what it learns
CHANGEABLE = (
    "num_steps", "log_every_steps", "pictures_every_steps", "profile_steps", "nonfinite", "timeout_s", "checkpoint",
    "eval", "input", "mesh", "chips", "closing",
)  # fmt: skip


@interrupts.in_one_line
def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        sys.exit(f"error: unexpected argument {argv[1]!r}; values are given as --config.key=value")
    if _CONFIG.value is None:
        sys.exit(
            "error: --config is missing, e.g. --config=configs/demo.py; configs/ has all of them, --help the flags"
        )
    # orbax logs every file that it touches
    logging.get_absl_handler().addFilter(lambda record: record.levelno > 20 or "orbax" not in record.pathname)
    logging.set_verbosity(logging.INFO)
    logging.set_stderrthreshold(logging.INFO)
    config = _CONFIG.value
    workdir = pathlib.Path(_WORKDIR.value or f"runs/{config.name}")
    started = time.monotonic()
    # before JAX looks for devices
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", str(CUDA_SHARE))
    if config.mesh.cpu_devices > 0:
        jax.config.update("jax_num_cpu_devices", config.mesh.cpu_devices)
    try:
        processes.join(_DISTRIBUTED.value, timeout_s=config.timeout_s)
        training = _MODE.value == "train"
        work = prepare(config, workdir, training=training, replayed=_REPLAY.value, changed_data=_CHANGED_DATA.value)
    except (ValueError, processes.MissingProcessError, WorkdirError) as error:
        sys.exit(f"error: {error}")
    message, number, scores = "", 0, dict[str, float]()
    try:
        scores = work()
    except train_lib.Preempted as stop:
        message, number = str(stop), stop.number
    except StalledError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        os._exit(1)  # a thread that waits for a disk cannot be ended, and would be waited for
    except (
        DataError, DamagedError, processes.MissingProcessError, train_lib.NonFiniteError, WorkdirError,
    ) as error:  # fmt: skip
        sys.exit(f"error: {error}")
    if number:  # not above, where the exception still holds batches of the data workers
        logging.info("%s; the same command goes on from there", message)
        sys.exit(interrupts.STATUS if number == signal.SIGINT else _PREEMPTED_STATUS.value)
    if _REPLAY.value:
        return
    if jax.process_index() == 0:
        report(workdir, scores, minutes=(time.monotonic() - started) / 60)
        print_closing(config.closing, scores)


def prepare(
    config: ConfigDict,
    workdir: pathlib.Path,
    *,
    training: bool,
    replayed: int | None = None,
    changed_data: bool = False,
) -> Callable[[], dict[str, float]]:
    """Returns what trains (or evaluates) and returns scores; all is checked, and nothing compiled.

    With a step `replayed` it runs that step again and returns its metrics.

    Raises:
      ValueError: the configuration, the files it names or the workdir are wrong, or (unless `changed_data`) the data
        are not those that the run of the workdir began with.
      MissingProcessError: another process did not get this far.
    """
    known = chip_of(jax.devices()[0].device_kind)
    chip = known.name if known else None
    if chip and config.chips[chip]:
        logging.info("values for %s: %s (config.chips.%s)", chip, dict(config.chips[chip]), chip)
    validation.validate(config_lib.for_chip(config, chip), num_devices=jax.device_count())
    processes.check_same(config_json.to_json(config), what="configuration", timeout_s=config.timeout_s)
    fresh_allowed = not replayed and (training or bool(config.init_from.checkpoint))
    check_workdir(workdir, config, fresh_allowed=fresh_allowed)
    complete = with_scenes(config_lib.for_chip(config, chip), workdir)
    work: Callable[[], dict[str, float]]
    data: dict[str, str] = {}
    if training or replayed:
        data = identity.of_run(complete)
        processes.check_same(json.dumps(data), what="data", timeout_s=config.timeout_s)
        check_data(workdir, data, allowed=changed_data)
    if replayed:
        return functools.partial(train_lib.replay_step, train_lib.prepare_run(complete, workdir), replayed)
    if training:
        work = functools.partial(train_lib.train, train_lib.prepare_run(complete, workdir))
    else:
        work = evaluation.prepare(complete, workdir)
    # only after all processes have checked everything: a run that fails before must not take the workdir
    processes.barrier("all is checked", timeout_s=config.timeout_s)
    return functools.partial(in_workdir, work, config, workdir, training=training, data=data)


def in_workdir(
    work: Callable[[], dict[str, float]],
    config: ConfigDict,
    workdir: pathlib.Path,
    *,
    training: bool,
    data: dict[str, str],
) -> dict[str, float]:
    """Returns what `work` does, in a workdir that says which configuration it holds and, trained, on which data.

    Raises:
      WorkdirError: another run trains there, or nothing can be written there.
    """
    with contextlib.ExitStack() as stack:
        if jax.process_index() == 0:
            if training:
                stack.enter_context(only_run(workdir))
            workdir.mkdir(parents=True, exist_ok=True)
            stack.enter_context(room(workdir))
            if training and (not (workdir / "data.json").exists() or read_json(workdir / "data.json") != data):
                write_json(workdir / "data.json", data, indent=1)
            path, text = workdir / "config.json", config_json.to_json(config)
            if not path.exists() or (training and path.read_bytes() != text.encode()):
                write_text(path, [text])
        return work()


def check_workdir(workdir: pathlib.Path, config: ConfigDict, *, fresh_allowed: bool) -> None:
    """Checks that a workdir is new or holds a run of this configuration.

    Raises:
      ValueError: the workdir holds another run; every difference that matters is listed.
    """
    path = workdir / "config.json"
    if path.exists():
        stored = config_json.from_json(files.decode(files.read_bytes(path), where=path), where=str(path))
        changed = [
            line
            for line in config_lib.differences(stored, config)
            if not line.startswith(tuple(f"{key}:" for key in CHANGEABLE) + tuple(f"{key}." for key in CHANGEABLE))
        ]
        if changed:
            raise ValueError(
                f"{workdir} holds another run (stored -> now):\n"
                + "\n".join(f"  {line}" for line in changed)
                + "\nGive another --workdir, or the stored values to continue that run."
            )
    elif not fresh_allowed:
        raise ValueError(
            f"{workdir} has no config.json, so there is no run to evaluate or replay; give its --workdir, or another"
            " workdir and --config.init_from.checkpoint=<workdir of the run>"
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
            f"the data are not those that the run of {workdir} began with:\n{changed}\nRestore them, give another "
            "--workdir, or go on with --changed_data."
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
    if jax.process_index() == 0:
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
    print(f"done in {minutes:.1f} minutes; everything is in {workdir}/:")
    for name, what in {
        "checkpoints": "parameters and optimizer state",
        "metrics.jsonl": "loss terms, speed and scores by step (TensorBoard events beside it)",
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


def open_streams() -> None:
    """Opens standard streams that are closed; else the next file gets their number, and with it what C++ prints."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r+"))  # noqa: SIM115  (for as long as the program runs)
    handler = logging.get_absl_handler().python_handler
    handler.stream = handler.stream or sys.stderr


def cli() -> None:
    open_streams()
    app.run(main, flags_parser=config_lib.parse_flags)


if __name__ == "__main__":
    cli()
