"""What holds for the package as a whole: which module may import which, and every configuration can be traced."""

import ast
import collections
import functools
import graphlib
import itertools
import json
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from detclipv2_jax import config as config_lib
from detclipv2_jax import train_step
from detclipv2_jax.data.schema import Kind
from detclipv2_jax.models import detclip
from detclipv2_jax.runs import sharding
from detclipv2_jax.runs import state as train_state
from detclipv2_jax.runs.optimizer import make_optimizer

PACKAGE = pathlib.Path(train_step.__file__).parent
# import nothing but each other, so that everything may import them
FOR_ALL = (
    "atomic", "bucket_store", "buckets", "chips", "colors", "commands", "config", "config_json", "files", "labels",
)  # fmt: skip
# rooms and what each may import beside these: only rooms below it. A command (`__main__`) is a part of its own, which
# nobody imports
MAY_IMPORT = {
    "geometry": set(),
    "models": {"geometry"},
    "losses": {"geometry", "models"},
    "runs": {"data", "models"},
    "inference": {"data", "geometry", "models", "runs"},
    "visualize": {"data", "geometry", "inference", "losses", "models"},
    "visualize.__main__": {"data", "inference"},
    "eval": {"data", "inference", "runs", "visualize"},
    "train_step": {"data", "geometry", "losses", "models", "runs"},
    "train": {"data", "eval", "inference", "models", "runs", "train_step", "visualize"},
    "validation": {"data", "eval", "inference", "losses", "models", "runs", "train"},
    "session": {"data", "eval", "runs", "train", "validation"},
    "main": {"session"},
    "interpolate": {"eval", "runs", "visualize"},
    "transfer": {"eval"},
    "predict": {"data", "eval", "inference"},
    "predict.__main__": {"eval", "inference", "visualize"},
    "preflight": {"data", "inference", "models", "runs", "train", "validation"},
    "prepare": {"data", "inference", "models", "visualize"},
    "prepare.__main__": {"data"},
    "convert": {"data", "runs"},
    "export": {"data", "inference", "runs"},
    "export.__main__": {"inference", "runs"},
    "claims.__main__": {"data", "eval", "visualize"},
    "demo": {"data", "inference", "visualize"},
    "demo.__main__": {"inference"},
}


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
        part = f"{parts[0]}.__main__" if parts[-1] == "__main__" else parts[0]
        for name in imports(path):
            names = name.split(".")
            if names[0] == "detclipv2_jax" and len(names) > 1 and names[1] not in (parts[0], *FOR_ALL):
                found[part].add(names[1])
    # an arrow that nobody uses is one that nobody would miss
    assert {part: sorted(names) for part, names in found.items()} == {
        part: sorted(names) for part, names in MAY_IMPORT.items() if names
    }


def test_rooms_form_no_circle():
    def below(part, above):
        assert part not in above, f"circle: {' -> '.join((*above, part))}"
        for name in MAY_IMPORT.get(part, ()):
            below(name, (*above, part))

    for part in MAY_IMPORT:
        below(part, ())


def test_modules_form_no_circle():
    """Nor do imports inside functions or for types alone."""
    files = {".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}
    files = {name.removesuffix(".__init__"): path for name, path in files.items()}
    found = {name: {one for one in imports(path) if one in files} for name, path in files.items()}
    rooms = {name for name in files if any(other.startswith(f"{name}.") for other in files)}
    graph = {name: {one for one in found[name] if one not in rooms} for name in files if name not in rooms}
    graphlib.TopologicalSorter(graph).prepare()  # CycleError names the circle


def parameters(function):
    """Returns the parameters of a function, without `self` and `cls`, `*args` and `**kwargs` last."""
    given = function.args
    named = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
    return [one for one in named if one is not None and one.arg not in ("self", "cls")]


def functions():
    """Yields (room, name, function) of the whole package."""
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                yield parts[0], ".".join((*parts, node.name)), node


def test_files_and_functions_are_of_a_size_to_read():
    long_files = [path.name for path in PACKAGE.rglob("*.py") if path.read_text().count("\n") > 400]
    assert long_files == ["train.py"]
    assert [name for _, name, function in functions() if num_lines(function) > 60] == ["train.train"]  # the loop


def num_lines(function):
    """Returns the lines of a function's body without its docstring."""
    body = [node for node in function.body if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))]
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0


def test_training_takes_few_parameters():
    path = ("geometry", "models", "losses", "data", "runs", "train_step", "train", "eval", "session", "main")
    assert [name for room, name, function in functions() if room in path and len(parameters(function)) > 10] == []


SLOW_TO_IMPORT = {"jax", "flax", "grain", "matplotlib", "orbax", "spacy", "tensorflow", "tensorflow_datasets"}


@pytest.mark.slow
def test_help_imports_nothing_that_takes_long():
    for path in PACKAGE.rglob("*.py"):
        if "commands.run(" not in path.read_text() or path.name == "commands.py":
            continue
        module = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__main__")
        code = (
            "import runpy, sys\ntry:\n    runpy.run_module(sys.argv.pop(1), run_name='__main__', alter_sys=True)\n"
            "finally:\n    print(*sys.modules, file=sys.stderr)"
        )
        command = [sys.executable, "-c", code, module, "--help"]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=PACKAGE.parent)
        assert done.stdout.startswith("usage: python -m detclipv2_jax."), command
        assert not SLOW_TO_IMPORT & set(done.stderr.split()), command


def test_every_public_function_is_named_by_a_test():
    tests = pathlib.Path(__file__).parent
    files = [path for path in tests.rglob("*.py") if "mutations" not in path.parts]
    named = set(re.findall(r"\w+", "\n".join(path.read_text() for path in files)))
    unnamed = []
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text())
        classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_")]
        nodes = itertools.chain(tree.body, *(node.body for node in classes))
        names = [node.name for node in nodes if isinstance(node, ast.FunctionDef)]
        unnamed += [f"{path.name}: {name}" for name in names if not name.startswith("_") and name not in named]
    assert not unnamed


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


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("inference", {"matplotlib", "pycocotools", "tensorflow"}),
        ("losses.contrastive", {"optax", "detclipv2_jax.data", "detclipv2_jax.models"}),
        ("runs.checkpoints", {"matplotlib", "pycocotools", "tensorflow", "grain"}),
        ("train_step", {"matplotlib", "pycocotools", "tensorflow"}),
    ],
)
def test_rooms_load_only_what_is_below(module, unwanted):
    code = f"import sys, detclipv2_jax.{module}; print(sorted({unwanted} & set(sys.modules)))"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent
    )
    assert loaded.stdout.strip() == "[]"


LOAD = """
import importlib, os, sys
import flax.linen, grain, jax, ml_collections, optax, orbax.checkpoint  # once for all rooms
for line in sys.stdin:
    room, *modules = line.split()
    if not os.fork():
        for module in modules:
            try:
                importlib.import_module(module)
            except ModuleNotFoundError as error:  # of an extra
                if error.name.startswith("detclipv2_jax"):
                    raise
        print(room, *{name.split(".")[1] for name in sys.modules if name.startswith("detclipv2_jax.")}, flush=True)
        os._exit(0)
    if os.wait()[1]:
        sys.exit(f"{room} cannot be imported")
"""


def test_a_room_loads_only_rooms_below_it():
    """Each in a process of its own."""
    rooms = {room: room for room in MAY_IMPORT if "." not in room}
    for room in rooms:
        paths = sorted((PACKAGE / room).rglob("*.py")) or [PACKAGE / f"{room}.py"]
        skipped = {"__main__.py", "scripts", "saved_model.py"}  # commands; what goes with an export; TensorFlow
        paths = [path for path in paths if not skipped & {*path.parts}]
        names = (".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts) for path in paths)
        rooms[room] = " ".join([room, *(name.removesuffix(".__init__") for name in names)])
    given = "\n".join(rooms.values())
    done = subprocess.run([sys.executable, "-c", LOAD], input=given, capture_output=True, text=True, cwd=PACKAGE.parent)
    assert done.returncode == 0, done.stderr
    loaded = {line.split()[0]: {*line.split()[1:]} for line in done.stdout.splitlines()}
    assert loaded.keys() == rooms.keys()

    def below(room):
        return {room, *FOR_ALL}.union(*(below(one) for one in MAY_IMPORT.get(room, ())))

    assert {room: sorted(found - below(room)) for room, found in loaded.items()} == {room: [] for room in rooms}


@functools.cache
def traced(model_json):
    model = detclip.from_config(config_lib.ConfigDict(json.loads(model_json)))
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
    model, shapes = traced(json.dumps(config.model.to_dict()))
    tx = make_optimizer(config.optimizer, shapes, 1000)
    mesh = sharding.make_mesh(fsdp=config.mesh.fsdp)
    state = jax.eval_shape(lambda params: train_state.create(params, tx, ema=False), shapes)
    canvas = tuple(config[kind.value].canvases[0])
    step = train_step.make_step(kind, model=model, tx=tx, config=config, canvas=canvas, mesh=mesh)
    with jax.set_mesh(mesh):
        after, metrics = jax.eval_shape(step, state, sharding.batch_shapes(config, kind, canvas, table_rows=8 * 96))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
    assert all(metric.shape == () and metric.dtype == jnp.float32 for metric in metrics.values())
    assert {"loss", "finite", "grad_norm"} <= metrics.keys()
