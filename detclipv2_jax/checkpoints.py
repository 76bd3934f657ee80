"""Checkpoints of a run: the only module that knows orbax.

A checkpoint holds the items `params`, `optimizer` (step and optimizer state) and `ema` where it is kept, so that
prediction reads no more than it needs. Nothing else is stored: order and position of the data follow from the step,
what evaluations lead to from their scores. `best.json` beside `checkpoints/` names the best one where it is kept.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp
from ml_collections import ConfigDict

from detclipv2_jax import config as config_lib
from detclipv2_jax import weights
from detclipv2_jax.optimizer import named_shapes
from detclipv2_jax.train_state import TrainState


class _NewestAndBest:
    """Keeps the newest checkpoints, and the one of step `best` where it is set."""

    def __init__(self, num_newest: int):
        self.best: int | None = None
        self._num_newest = num_newest

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        """Returns which of the checkpoints, oldest first, stay; orbax's interface."""
        del context
        old = len(checkpoints) - self._num_newest
        return [i >= old or checkpoint.step == self.best for i, checkpoint in enumerate(checkpoints)]


class Checkpoints:
    """The checkpoints of one workdir."""

    def __init__(self, workdir: str | pathlib.Path, *, keep: int = 1):
        self._best_file = pathlib.Path(workdir) / "best.json"
        self._policy = _NewestAndBest(keep)
        self._manager = ocp.CheckpointManager(
            pathlib.Path(workdir).resolve() / "checkpoints",
            # named here, because orbax tells shapes only of items whose handler it knows
            item_handlers={name: ocp.StandardCheckpointHandler() for name in ("params", "optimizer", "ema")},
            options=ocp.CheckpointManagerOptions(preservation_policy=self._policy, enable_async_checkpointing=True),
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
            partial = self._best_file.with_suffix(".partial")
            partial.write_text(json.dumps({"step": step, "score": score, "value": value}) + "\n")
            os.replace(partial, self._best_file)

    def best_step(self) -> int | None:
        """Returns the step of the best checkpoint where it is kept, else of the newest one, None without one."""
        if self._best_file.is_file():
            best = json.loads(self._best_file.read_text())["step"]
            if best in self._manager.all_steps():  # it is marked before it is written
                return best
        return self.latest_step()

    def save(self, step: int, state: TrainState) -> None:
        """Starts writing `state` after `step` steps; returns when the arrays are copied. A saved step is left alone."""
        if step in self._manager.all_steps():
            return
        items = {
            "params": ocp.args.StandardSave(state.params),
            "optimizer": ocp.args.StandardSave({"step": state.step, "opt_state": state.opt_state}),
        }
        if state.ema is not None:
            items["ema"] = ocp.args.StandardSave(state.ema)
        self._manager.save(step, args=ocp.args.Composite(**items))

    def restore(self, abstract: TrainState, *, step: int) -> TrainState:
        """Returns the checkpoint of a step as arrays of the shapes and shardings of `abstract`.

        Raises:
          ValueError: stored parameters and those of the configuration differ; missing, unexpected and reshaped names.
        """
        self.wait()
        report_differences(self.stored(step), abstract.params, what=f"checkpoint of step {step}")
        items = {
            "params": ocp.args.StandardRestore(abstract.params),
            "optimizer": ocp.args.StandardRestore({"step": abstract.step, "opt_state": abstract.opt_state}),
        }
        if abstract.ema is not None:
            items["ema"] = ocp.args.StandardRestore(abstract.ema)
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
            lambda stored: jax.ShapeDtypeStruct(stored.shape, stored.dtype, sharding=device),
            self.stored(step, item),
        )
        return self._manager.restore(step, args=ocp.args.Composite(**{item: ocp.args.StandardRestore(abstract)}))[item]

    def wait(self) -> None:
        """Returns when everything saved is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for writing and frees the manager."""
        self._manager.close()


def report_differences(stored: Any, expected: Any, *, what: str) -> None:
    """Raises a ValueError that lists missing, unexpected and reshaped parameters of `stored`, if there are any."""
    if lines := weights.differences(named_shapes(stored), named_shapes(expected)):
        raise ValueError(f"{what} does not fit the model of this configuration:\n" + "\n".join(lines))


@contextlib.contextmanager
def _opened(workdir: str | pathlib.Path) -> Iterator[tuple[ConfigDict, Checkpoints, int, str]]:
    """Yields (config, checkpoints, step and item that count) of a run; raises as `load_for_inference`."""
    workdir = pathlib.Path(workdir)
    if not (workdir / "config.json").is_file():
        raise ValueError(f"{workdir} is no workdir: it has no config.json; give the --workdir of a training run")
    config = config_lib.from_json((workdir / "config.json").read_text())
    if not (workdir / "checkpoints").is_dir():
        raise ValueError(f"{workdir} has no checkpoints; the run must train until its first one")
    with contextlib.closing(Checkpoints(workdir)) as checkpoints:
        step = checkpoints.best_step()
        if step is None:
            raise ValueError(f"{workdir}/checkpoints is empty; the run must train until its first checkpoint")
        yield config, checkpoints, step, "ema" if config.optimizer.ema_decay else "params"


def load_for_inference(workdir: str | pathlib.Path) -> tuple[ConfigDict, Any, int]:
    """Returns (config, parameters, step) of a run's best checkpoint where it keeps that one, else of its newest.

    They are the averaged parameters if the run keeps them.

    Raises:
      ValueError: `workdir` holds no run or no checkpoint.
    """
    with _opened(workdir) as (config, checkpoints, step, item):
        return config, checkpoints.restore_params(step, item), step


def check_start(workdir: str | pathlib.Path, model: ConfigDict, shapes: Any) -> None:
    """Raises a ValueError unless `load_for_inference` gives parameters of these shapes; lists every difference.

    Args:
      workdir: of another run.
      model: config.model of this one, which explains the shapes.
      shapes: tree of shapes of its parameters.
    """
    with _opened(workdir) as (config, checkpoints, step, item):
        try:
            report_differences(checkpoints.stored(step, item), shapes, what=f"init_from.checkpoint {workdir}")
        except ValueError as error:
            lines = [f"  config.model.{line}" for line in config_lib.differences(config.model, model)]
            raise ValueError("\n".join([f"{error}\nits configuration -> this one:", *lines])) from None
