"""Trackers get what metrics.jsonl gets; stand-ins for their packages note what they are told."""

import importlib
import json
import subprocess
import sys

import pytest

from detclipv2_jax import validation
from detclipv2_jax.runs import metrics, trackers

WANDB = """
said = []
class Run:
    def __init__(self, options): self.id = options["id"] or "new"
    def log(self, scalars, step): said.append((step, scalars))
    def finish(self): said.append("finished")
def init(**options):
    said.append(options)
    return Run(options)
"""
MLFLOW = """
import types
said = []
def set_experiment(name): said.append(name)
def start_run(run_id, run_name):
    said.append((run_id, run_name))
    return types.SimpleNamespace(info=types.SimpleNamespace(run_id=run_id or "made"))
def log_params(values):
    assert len(values) <= 100
    said.append(values)
def log_metrics(values, step): said.append((step, values))
def end_run(): said.append("ended")
"""


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """(wandb, mlflow) that note what they are told."""
    folder = tmp_path / "packages"
    folder.mkdir()
    for name, text in (("wandb", WANDB), ("mlflow", MLFLOW)):
        (folder / f"{name}.py").write_text(text)
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(folder)
    yield tuple(importlib.import_module(name) for name in ("wandb", "mlflow"))
    for name in ("wandb", "mlflow"):
        monkeypatch.delitem(sys.modules, name, raising=False)


def test_trackers_get_the_scalars_and_a_run_that_goes_on_stays_one(packages, micro, tmp_path):
    wandb, mlflow = packages
    micro.trackers, micro.closing = ("wandb", "mlflow"), 400 * "ab"

    def write(start, step):
        opener = trackers.opener(tmp_path, micro)
        writer = metrics.MetricsWriter(tmp_path, start, open_trackers=opener)
        assert not wandb.said  # nothing before the first line
        writer.write(step, {"eval/AR@300": 0.5, "loss": 1.5, "bad": float("nan")})
        writer.close()
        said = list(wandb.said), list(mlflow.said)
        wandb.said.clear()
        mlflow.said.clear()
        return said

    (begun, *sent), (experiment, start, *parameters, row, end) = write(0, 7)
    assert (begun["id"], begun["name"], begun["dir"], begun["resume"]) == (None, "micro", tmp_path, "allow")
    assert begun["config"]["optimizer.learning_rate"] == 1e-3
    assert sent == [(7, {"eval/AR@300": 0.5, "loss": 1.5}), "finished"]
    assert (experiment, start, end) == ("detclipv2_jax", (None, "micro"), "ended")
    values = {key: value for part in parameters for key, value in part.items()}
    assert values["optimizer.learning_rate"] == "0.001"
    assert values["closing"] == 250 * "ab"  # as long as it may be
    assert values.keys() == begun["config"].keys()
    assert row == (7, {"eval/AR_300": 0.5, "loss": 1.5})
    (begun, *_), mlflow_said = write(7, 8)
    assert begun["id"] == "new"
    assert mlflow_said == [("made", None), (8, {"eval/AR_300": 0.5, "loss": 1.5}), "ended"]
    micro.trackers = ("wandb",)
    assert write(8, 9)[1] == []
    assert json.loads((tmp_path / "trackers.json").read_text()) == {"wandb": "new", "mlflow": "made"}
    (tmp_path / "trackers.json").write_text("[]")
    with pytest.raises(ValueError, match=r"trackers\.json is damaged; remove it"):
        trackers.opener(tmp_path, micro)()


def test_they_are_checked_with_the_configuration(packages, micro, monkeypatch):
    micro.trackers = ("wandb", "mlflow")
    validation.validate(micro, num_devices=1)
    trackers.check_installed(micro.trackers)
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None if name == "wandb" else "there")
    with pytest.raises(ValueError, match=r"^config.trackers: wandb not installed: pip install wandb$"):
        trackers.check_installed(micro.trackers)
    micro.trackers = ("wanbd",)
    with pytest.raises(ValueError, match=r"config.trackers is \('wanbd',\); allowed: some of mlflow, wandb"):
        validation.validate(micro, num_devices=1)


def test_without_names_nothing_is_imported_or_written(tmp_path, micro):
    assert trackers.opener(tmp_path, micro)() == []
    assert not list(tmp_path.iterdir())
    (tmp_path / "trackers.json").write_text("{")
    assert trackers.opener(tmp_path, micro)() == []
    code = "import sys, detclipv2_jax.train; sys.exit(bool({'wandb', 'mlflow'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
