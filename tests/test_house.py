"""What holds for the package as a whole: which module may import which, and every configuration can be traced."""

import ast
import collections
import functools
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from detclipv2_jax import config as config_lib
from detclipv2_jax import sharding, step_program, train_state, train_step
from detclipv2_jax.data.schema import Kind
from detclipv2_jax.models import detclip
from detclipv2_jax.optimizer import make_optimizer

PACKAGE = pathlib.Path(train_step.__file__).parent
# what a part may import beside itself; nobody imports the command-line tools
MAY_IMPORT = {
    "alignment": {"data", "drawing", "geometry", "inference", "models", "visualize"},
    "builders": {"data"},
    "checkpoints": {"config", "optimizer", "train_state", "weights", "workdir"},
    "claims": {"config", "data", "eval", "findings", "visualize"},
    "config": set(),
    "convert": {"data", "weights"},
    "convert.__main__": {"convert"},
    "data": {"geometry"},
    "drawing": set(),
    "export": {"config", "inference", "models", "saved_model", "standalone", "vocabulary"},
    "eval": {
        "checkpoints", "data", "geometry", "inference", "models", "processes", "sharding", "visualize", "vocabulary",
        "workdir",
    },
    "findings": set(),
    "flops": {"data", "geometry", "models"},
    "geometry": set(),
    "hlo": set(),
    "inference": {"alignment", "checkpoints", "data", "geometry", "models", "sharding", "vocabulary"},
    "inspection": {"config", "data", "visualize"},
    "losses": {"geometry"},
    "main": {"config", "data", "eval", "processes", "replay", "train", "workdir"},
    "metrics": {"workdir"},
    "models": {"geometry"},
    "optimizer": set(),
    "predict": {"data", "eval", "inference", "visualize", "vocabulary"},
    "preflight": {"config", "data", "flops", "run_data", "step_program"},
    "prepare": {"builders", "config", "data", "inspection"},
    "processes": set(),
    "regions": {"data", "drawing", "geometry", "inference", "losses", "models", "visualize"},
    "replay": {"checkpoints", "metrics", "sharding", "train"},
    "run_data": {"builders", "data", "models", "optimizer", "train", "train_state", "weights"},
    "saved_model": {"data", "inference"},
    "schedule": set(),
    "sharding": {"data"},
    "standalone": set(),
    "step_program": {
        "config", "data", "flops", "hlo", "inference", "models", "optimizer", "schedule", "sharding", "train",
        "train_state",
    },
    "train": {
        "alignment", "checkpoints", "data", "eval", "flops", "inference", "metrics", "models", "optimizer",
        "processes", "schedule", "sharding", "train_state", "train_step", "visualize", "weights",
    },
    "train_state": {"models", "optimizer", "sharding"},
    "train_step": {"data", "geometry", "losses", "models", "optimizer", "sharding", "train_state"},
    "visualize": {"data", "drawing", "geometry"},
    "visualize.__main__": {"alignment", "builders", "data", "inference", "visualize"},
    "vocabulary": {"data"},
    "weights": set(),
    "workdir": set(),
}  # fmt: skip


def imports(path):
    """Yields every module that a file imports, as a dotted name."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_imports_follow_the_arrows():
    found = collections.defaultdict(set)
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        part = ".".join(parts) if parts[-1] == "__main__" else parts[0]  # a command may import more than its package
        for name in imports(path):
            names = name.split(".")
            if names[0] == "detclipv2_jax" and len(names) > 1 and names[1] != part:
                found[part].add(names[1])
    wrong = {part: sorted(names - MAY_IMPORT.get(part, set()) - {"files"}) for part, names in found.items()}
    assert not {part: names for part, names in wrong.items() if names}


def test_data_workers_stay_light():
    modules = [f"detclipv2_jax.data.{path.stem}" for path in (PACKAGE / "data").glob("*.py") if path.stem != "__init__"]
    heavy = "{'tensorflow', 'flax', 'optax', 'torch'}"
    code = f"import sys, {', '.join(modules)}; print(sorted({heavy} & set(sys.modules)))"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent
    )
    assert loaded.stdout.strip() == "[]"


def test_only_checkpoints_knows_orbax():
    users = {path.name for path in PACKAGE.rglob("*.py") if any(name.startswith("orbax") for name in imports(path))}
    assert users == {"checkpoints.py"}


@functools.cache
def traced(model_json):
    model = detclip.from_config(config_lib.from_json(model_json))
    return model, train_state.param_shapes(model, context_length=16)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kind"),
    # swin_l differs from swin_t in sizes only, and tracing its 24 blocks takes long
    [(name, kind) for name in ("demo", "coco_json", "swin_t") for kind in Kind]
    + [("swin_l", Kind.DETECTION), ("swin_l", Kind.IMAGE_TEXT)],
)
def test_every_config_can_be_traced(name, kind):
    config = __import__(f"configs.{name}", fromlist=["get_config"]).get_config()
    model, shapes = traced(config_lib.to_json(config.model))
    tx = make_optimizer(config.optimizer, shapes, 1000)
    mesh = sharding.make_mesh(fsdp=config.mesh.fsdp)
    state = jax.eval_shape(lambda params: train_state.create(params, tx, ema=False), shapes)
    canvas = tuple(config[kind.value].canvases[0])
    step = train_step.make_step(kind, model=model, tx=tx, config=config, canvas=canvas, mesh=mesh)
    with jax.set_mesh(mesh):
        after, metrics = jax.eval_shape(step, state, step_program.batch_shapes(config, kind, canvas, table_rows=8 * 96))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
    assert all(metric.shape == () and metric.dtype == jnp.float32 for metric in metrics.values())
    assert {"loss", "finite", "grad_norm"} <= metrics.keys()
