"""Services that follow runs (`config.trackers`): each is imported only by a run that names it."""

from __future__ import annotations

import functools
import importlib.util
import pathlib
import re
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from ml_collections import ConfigDict

from detclipv2_jax import files
from detclipv2_jax.config import flat

PROJECT = "detclipv2_jax"


class Tracker(Protocol):
    """What follows a run."""

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Sends the finite scalars of a step."""

    def close(self) -> None:
        """Waits until everything is sent."""


class Wandb:
    """Weights & Biases; WANDB_MODE=offline writes to the workdir only."""

    def __init__(self, workdir: pathlib.Path, config: ConfigDict, known: str | None):
        import wandb

        self._run = wandb.init(
            project=PROJECT, name=config.name, dir=workdir, id=known, resume="allow", config=flat(config)
        )
        self.id = str(self._run.id)

    def write(self, step: int, scalars: dict[str, float]) -> None:
        self._run.log(scalars, step=step)

    def close(self) -> None:
        self._run.finish()


class Mlflow:
    """MLflow, where MLFLOW_TRACKING_URI says; its names of metrics have no "@"."""

    def __init__(self, workdir: pathlib.Path, config: ConfigDict, known: str | None):
        import mlflow

        self._mlflow = mlflow
        if known is None:
            mlflow.set_experiment(PROJECT)
        self.id = str(mlflow.start_run(run_id=known, run_name=None if known else config.name).info.run_id)
        if known is None:
            values = [(key, str(value)[:500]) for key, value in flat(config).items()]
            for i in range(0, len(values), 100):  # as many as it takes at once
                mlflow.log_params(dict(values[i : i + 100]))

    def write(self, step: int, scalars: dict[str, float]) -> None:
        self._mlflow.log_metrics({re.sub(r"[^\w./ -]", "_", name): x for name, x in scalars.items()}, step=step)

    def close(self) -> None:
        self._mlflow.end_run()


TRACKERS: dict[str, Callable[[pathlib.Path, ConfigDict, str | None], Any]] = {"mlflow": Mlflow, "wandb": Wandb}


def check_installed(names: Iterable[str]) -> None:
    """Raises a ValueError that says how to install a tracker that is not."""
    if absent := [name for name in names if importlib.util.find_spec(name) is None]:
        raise ValueError(f"config.trackers: {', '.join(absent)} not installed: pip install {' '.join(absent)}")


def opener(workdir: pathlib.Path, config: ConfigDict) -> Callable[[], list[Tracker]]:
    """Returns what opens the trackers of `config.trackers`; a run that goes on stays one run there.

    Its names there are kept in <workdir>/trackers.json.
    """
    return functools.partial(_open, workdir / "trackers.json", workdir, config)


def _open(path: pathlib.Path, workdir: pathlib.Path, config: ConfigDict) -> list[Tracker]:
    ids = files.read_json(path) if config.trackers and path.exists() else {}
    if not isinstance(ids, dict):
        raise ValueError(f"{path} is damaged; remove it, and the run is a new one to its trackers")
    trackers = {name: TRACKERS[name](workdir, config, ids.get(name)) for name in config.trackers}
    if trackers:
        files.write_json(path, ids | {name: tracker.id for name, tracker in trackers.items()})
    return list(trackers.values())
