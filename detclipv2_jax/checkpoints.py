"""Checkpoints of a run: the only module that knows orbax.

A checkpoint holds the items `params`, `optimizer` (step and optimizer state) and `ema` where it is kept, so that
prediction reads no more than it needs. Nothing else is stored: order and position of the data follow from the step.
"""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp
from ml_collections import ConfigDict

from detclipv2_jax import config as config_lib
from detclipv2_jax import weights
from detclipv2_jax.optimizer import named_shapes
from detclipv2_jax.train_state import TrainState


class Checkpoints:
    """The checkpoints of one workdir."""

    def __init__(self, workdir: str | pathlib.Path, *, keep: int = 1):
        self._manager = ocp.CheckpointManager(
            pathlib.Path(workdir).resolve() / "checkpoints",
            # named here, because orbax tells shapes only of items whose handler it knows
            item_handlers={name: ocp.StandardCheckpointHandler() for name in ("params", "optimizer", "ema")},
            options=ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True),
        )

    def latest_step(self) -> int | None:
        """Returns the number of steps done at the newest checkpoint, None without one."""
        return self._manager.latest_step()

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

    def restore(self, abstract: TrainState) -> TrainState:
        """Returns the newest checkpoint as arrays of the shapes and shardings of `abstract`.

        Raises:
          ValueError: stored parameters and those of the configuration differ; missing, unexpected and reshaped names.
        """
        step = self._manager.latest_step()
        stored = self._manager.item_metadata(step)
        report_differences(stored["params"].tree, abstract.params, what=f"checkpoint of step {step}")
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

    def restore_params(self, item: str = "params") -> Any:
        """Returns the parameters of the newest checkpoint on this process's first device."""
        step = self._manager.latest_step()
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        abstract = jax.tree.map(
            lambda stored: jax.ShapeDtypeStruct(stored.shape, stored.dtype, sharding=device),
            self._manager.item_metadata(step)[item].tree,
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


def load_for_inference(workdir: str | pathlib.Path) -> tuple[ConfigDict, Any, int]:
    """Returns (config, parameters, step) of a run's newest checkpoint; the averaged parameters if the run keeps them.

    Raises:
      ValueError: `workdir` holds no run or no checkpoint.
    """
    workdir = pathlib.Path(workdir)
    if not (workdir / "config.json").is_file():
        raise ValueError(f"{workdir} is no workdir: it has no config.json; give the --workdir of a training run")
    config = config_lib.from_json((workdir / "config.json").read_text())
    if not (workdir / "checkpoints").is_dir():
        raise ValueError(f"{workdir} has no checkpoints; the run must train until its first one")
    checkpoints = Checkpoints(workdir)
    try:
        step = checkpoints.latest_step()
        if step is None:
            raise ValueError(f"{workdir}/checkpoints is empty; the run must train until its first checkpoint")
        return config, checkpoints.restore_params("ema" if config.optimizer.ema_decay else "params"), step
    finally:
        checkpoints.close()
