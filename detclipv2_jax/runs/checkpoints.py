"""Checkpoints of a run: the only module that knows orbax.

A checkpoint holds the items `params`, `optimizer` (step and optimizer state) and `ema` where it is kept, so that
prediction reads no more than it needs. Nothing else is stored: order and position of the data follow from the step,
the rate of plateau from scores. `best.json` beside `checkpoints/` names the best one where it is kept.

Every item has a `sha256.json` with the digest of each of its files, without which it does not count as complete. They
are compared before anything is restored: bits of an array that flipped on disk would otherwise be restored in silence.
"""

from __future__ import annotations

import contextlib
import json
import pathlib
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from jax.experimental import multihost_utils

from detclipv2_jax import buckets, files
from detclipv2_jax.files import write_text
from detclipv2_jax.runs import exported, remote
from detclipv2_jax.runs.state import TrainState, report_differences
from detclipv2_jax.runs.workdir import read_config, room

if TYPE_CHECKING:
    from ml_collections import ConfigDict

_DIGESTS = "sha256.json"

# The devices that hold the same array write a slice of it each, and every slice is a program to compile: only where a
# slice is of 1 MiB or more. orbax offers this argument of its handler only to those who make the handler anew.
ocp.type_handlers.get_type_handler(jax.Array)._min_slice_bytes_for_replica_parallel = 1 << 20


class DamagedError(ValueError):
    """A checkpoint, or all of them, cannot be read; the message says which and what to do."""


def read_best(path: pathlib.Path) -> dict[str, Any] | None:
    """Returns what best.json says (step, score, value); None, with a warning, where it is damaged."""
    if not path.is_file():
        return None
    try:
        best = files.read_json(path)
        return {"step": int(best["step"]), "score": str(best["score"]), "value": float(best["value"])}
    except (ValueError, LookupError, TypeError, OverflowError) as error:
        logging.warning("%s is damaged (%s): the newest checkpoint counts", path, error)
        return None


class _Handler(ocp.StandardCheckpointHandler):
    """Writes the digests of an item's files before orbax gives the item its name."""

    def finalize(self, directory: Any) -> None:
        """Ends the writing of an item; orbax's interface, called by process 0 when all have written."""
        super().finalize(directory)
        folder = pathlib.Path(directory)
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        digests = {str(path.relative_to(folder)): files.sha256(path) for path in paths}
        write_text(folder / _DIGESTS, [json.dumps(digests, indent=1), "\n"])


@ocp.args.register_with_handler(_Handler, for_save=True)
class _Save(ocp.args.StandardSave):
    """What is saved in an item."""


@ocp.args.register_with_handler(_Handler, for_restore=True)
class _Restore(ocp.args.StandardRestore):
    """Shapes and shardings of what is read from an item."""


class _NewestAndBest:
    """Keeps the newest checkpoints, and the one of step `best` where it is set."""

    def __init__(self, num_newest: int):
        self.best: int | None = None
        self._num_newest = num_newest

    def should_preserve(self, checkpoints: Sequence[Any], **_: Any) -> Sequence[bool]:
        """Returns which of the checkpoints, oldest first, stay; orbax's interface."""
        old = len(checkpoints) - self._num_newest
        return [i >= old or checkpoint.step == self.best for i, checkpoint in enumerate(checkpoints)]


class Checkpoints:
    """The checkpoints of one workdir."""

    def __init__(self, workdir: str | pathlib.Path, *, keep: int = 0):
        """Opens the checkpoints of a workdir, to read or, with a number `keep` of newest ones, to write."""
        self._best_file = pathlib.Path(workdir) / "best.json"
        self._folder = pathlib.Path(workdir).resolve() / "checkpoints"
        self._policy = _NewestAndBest(keep)
        self._num_bytes = 0  # of the checkpoint that was written last
        # only process 0 has the checkpoints of a workdir in a bucket: it writes and reads for all
        self._is_alone = buckets.is_workdir(self._folder) and jax.process_count() > 1
        if self._is_alone:
            self._folder.mkdir(parents=True, exist_ok=True)
        mine = {"primary_host": jax.process_index(), "active_processes": {jax.process_index()}}
        mine["barrier_sync_key_prefix"] = f"process{jax.process_index()}"
        self._manager = ocp.CheckpointManager(
            self._folder,
            # named here, because orbax tells shapes only of items whose handler it knows
            item_handlers={name: _Handler() for name in ("params", "optimizer", "ema")},
            options=ocp.CheckpointManagerOptions(
                preservation_policy=self._policy,
                enable_async_checkpointing=True,
                cleanup_tmp_directories=keep > 0,  # a reader may see a checkpoint that is still being written
                create=not self._is_alone,
                multiprocessing_options=ocp.options.MultiprocessingOptions(**mine if self._is_alone else {}),
            ),
        )

    def latest_step(self) -> int | None:
        """Returns the number of steps done at the newest checkpoint, None without one."""
        return self._manager.latest_step()

    def mark_best(self, step: int, *, score: str, value: float) -> None:
        """Keeps the checkpoint of this step, saved before or next, beyond the newest ones, and says so in best.json."""
        if step == self._policy.best:
            return
        self._policy.best = step
        if jax.process_index() == 0:
            write_text(self._best_file, [json.dumps({"step": step, "score": score, "value": value}), "\n"])

    def best_step(self) -> int | None:
        """Returns the step of the best checkpoint where it is kept, else of the newest one, None without one."""
        best = read_best(self._best_file)
        if best and best["step"] in self._manager.all_steps():  # it is marked before it is written
            return best["step"]
        return self.latest_step()

    def damage(self, step: int, items: Sequence[str]) -> list[str]:
        """Returns the files of the items of a checkpoint that are not as they were written, with what is wrong."""
        found = []
        for item in items:
            folder = self._folder / str(step) / item
            try:
                digests = files.read_json(folder / _DIGESTS)
            except (OSError, ValueError):
                digests = None
            if not isinstance(digests, dict):
                digests = {_DIGESTS: ""}
            for name, digest in digests.items():
                if not (folder / name).is_file():
                    found.append(f"{item}/{name} is missing")
                elif files.sha256(folder / name) != digest:
                    found.append(f"{item}/{name} has changed")
        return found

    def intact_step(
        self, items: Sequence[str], *, first: int | None = None, before: int | None = None, set_aside: bool = False
    ) -> int | None:
        """Returns the step of the newest checkpoint whose items are as they were written, None without any checkpoint.

        Process 0 reads them for all, and names in the log those that are damaged.

        Args:
          first: the step that is preferred to newer ones.
          before: only steps below this one.
          set_aside: move damaged ones to damaged_checkpoints/, since they will be written again.

        Raises:
          DamagedError: there are checkpoints, and none of them is intact.
          items: what has to be intact.
        """
        steps = [step for step in self._manager.all_steps() if before is None or step < before]
        found, damaged = -1 if steps else -2, dict[int, str]()
        if jax.process_index() == 0:
            for step in sorted(steps, key=lambda step: (step == first, step), reverse=True):
                if not (damage := self.damage(step, items)):
                    found = step
                    break
                damaged[step] = f"checkpoint {self._folder / str(step)} is damaged: {', '.join(damage[:5])}"
                logging.error("%s; it is not used", damaged[step])
            for step in damaged if set_aside and found >= 0 else ():
                place = self._folder.with_name("damaged_checkpoints")
                place.mkdir(exist_ok=True)
                (self._folder / str(step)).rename(place / time.strftime(f"{step}_%Y%m%d_%H%M%S"))
        if jax.process_count() > 1:
            found = int(multihost_utils.broadcast_one_to_all(np.int32(found)))
        if found == -1:
            raise DamagedError(
                "\n".join(
                    [
                        *damaged.values(),
                        f"no checkpoint is intact; move {self._folder} away to start from the beginning",
                    ]
                )
            )
        if set_aside:
            self._manager.reload()
        return found if found >= 0 else None

    def save(self, step: int, state: TrainState) -> None:
        """Starts writing `state` after `step` steps; returns when the arrays are copied. A saved step is left alone.

        Raises:
          WorkdirError: there is no room on the disk, now or for the checkpoint before.
        """
        is_saved = step in self._manager.all_steps()
        if self._is_alone:
            is_saved = bool(multihost_utils.broadcast_one_to_all(np.int32(is_saved)))
        if is_saved:
            return
        if self._is_alone:
            state = jax.tree.map(_whole, state)
            if jax.process_index() > 0:
                return
        items = {"params": _Save(state.params), "optimizer": _Save({"step": state.step, "opt_state": state.opt_state})}
        if state.ema is not None:
            items["ema"] = _Save(state.ema)
        self._num_bytes = sum(x.nbytes for x in jax.tree.leaves(state))
        with room(self._folder, self._num_bytes, what=f"the checkpoint of step {step}"):
            self._manager.save(step, args=ocp.args.Composite(**items))

    def restore(self, abstract: TrainState, *, step: int) -> TrainState:
        """Returns the checkpoint of a step as arrays of the shapes and shardings of `abstract`.

        Raises:
          ValueError: stored parameters and those of the configuration differ; missing, unexpected and reshaped names.
        """
        self.wait()
        if self._is_alone:
            return self._restore_for_all(abstract, step=step)
        return self._restore(abstract, step=step)

    def _restore_for_all(self, abstract: TrainState, *, step: int) -> TrainState:
        """Returns what `restore` does, where only process 0 has the files."""
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        here = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), abstract)
        if jax.process_index() == 0:
            found = jax.tree.map(np.asarray, self._restore(here, step=step))
        else:
            found = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), abstract)

        def spread(value: np.ndarray, wanted: jax.ShapeDtypeStruct) -> jax.Array:
            value = np.asarray(multihost_utils.broadcast_one_to_all(value))
            return jax.make_array_from_callback(value.shape, wanted.sharding, lambda index: value[index])

        return jax.tree.map(spread, found, abstract)

    def _restore(self, abstract: TrainState, *, step: int) -> TrainState:
        report_differences(self.stored(step), abstract.params, what=f"checkpoint of step {step}")
        items = {
            "params": _Restore(abstract.params),
            "optimizer": _Restore({"step": abstract.step, "opt_state": abstract.opt_state}),
        }
        if abstract.ema is not None:
            items["ema"] = _Restore(abstract.ema)
        restored = self._manager.restore(step, args=ocp.args.Composite(**items))
        return TrainState(
            step=restored["optimizer"]["step"],
            params=restored["params"],
            opt_state=restored["optimizer"]["opt_state"],
            ema=restored["ema"] if abstract.ema is not None else None,
        )

    def stored(self, step: int, item: str = "params") -> Any:
        """Returns the tree of shapes that the checkpoint of a step holds."""
        return self._manager.item_metadata(step)[item].tree

    def restore_params(self, step: int, item: str = "params") -> Any:
        """Returns the parameters of the checkpoint of a step on this process's first device."""
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        abstract = jax.tree.map(
            lambda stored: jax.ShapeDtypeStruct(stored.shape, stored.dtype, sharding=device), self.stored(step, item)
        )
        return self._manager.restore(step, args=ocp.args.Composite(**{item: _Restore(abstract)}))[item]

    def wait(self) -> None:
        """Returns when everything saved is on disk; raises as `save`."""
        with self._room_for_last():
            self._manager.wait_until_finished()

    def _room_for_last(self) -> contextlib.AbstractContextManager[None]:
        return room(self._folder, what=f"a checkpoint of {self._num_bytes / 1e6:,.2f} MB")

    def close(self) -> None:
        """Waits for writing and frees the manager; raises as `save`."""
        with self._room_for_last():
            self._manager.close()


def _whole(x: jax.Array) -> np.ndarray:
    """Returns an array that may be split over processes; all of them must ask for it."""
    if x.is_fully_replicated:
        return np.asarray(x.addressable_data(0))
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))


@contextlib.contextmanager
def _opened(workdir: str | pathlib.Path) -> Iterator[tuple[ConfigDict, Checkpoints, int, str]]:
    """Yields (config, checkpoints, step and item that count) of a run; raises as `load_for_inference`."""
    workdir = pathlib.Path(workdir)
    config = read_config(workdir)
    if not (workdir / "checkpoints").is_dir():
        raise ValueError(
            f"{workdir} has no checkpoints; the run must train until its first one. If it is an export, it lacks "
            f"{exported.WEIGHTS}: download or export it again"
        )
    item = "ema" if config.optimizer.ema_decay else "params"
    with contextlib.closing(Checkpoints(workdir)) as checkpoints:
        step = checkpoints.intact_step([item], first=checkpoints.best_step())
        if step is None:
            raise ValueError(f"{workdir}/checkpoints is empty; the run must train until its first checkpoint")
        yield config, checkpoints, step, item


def load_for_inference(workdir: str | pathlib.Path) -> tuple[ConfigDict, Any, int]:
    """Returns (config, parameters, step) of a run's best checkpoint where it keeps that one, else of its newest.

    They are the averaged parameters if the run keeps them. `workdir` may also be the folder of an export.

    Raises:
      ValueError: `workdir` holds no run or no intact checkpoint.
    """
    workdir = remote.here(workdir)
    if exported.is_export(workdir):
        export = exported.load(workdir)
        return export.config, export.params, export.step
    with _opened(workdir) as (config, checkpoints, step, item):
        try:
            return config, checkpoints.restore_params(step, item), step
        except Exception as error:  # orbax and tensorstore have many kinds, and the files may be a stranger's
            first_line = str(error).strip().partition("\n")[0]
            raise DamagedError(
                f"the {item} of checkpoint {step} in {workdir} cannot be read ({type(error).__name__}: {first_line})"
            ) from error


def check_start(workdir: str | pathlib.Path, model: ConfigDict, shapes: Any) -> None:
    """Raises a ValueError unless `load_for_inference` gives parameters of these shapes; lists every difference.

    `model` is config.model of this run, which explains the shapes.
    """
    from detclipv2_jax import config_json

    workdir = remote.here(workdir)
    if exported.is_export(workdir):
        config, stored, _ = load_for_inference(workdir)
    else:
        with _opened(workdir) as (config, checkpoints, step, item):
            stored = checkpoints.stored(step, item)
    try:
        report_differences(stored, shapes, what=f"init_from.checkpoint {workdir}")
    except ValueError as error:
        lines = [f"  config.model.{line}" for line in config_json.differences(config.model, model)]
        raise ValueError("\n".join([f"{error}\nits configuration -> this one:", *lines])) from None
