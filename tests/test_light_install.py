"""Models, losses, steps and inference need few packages: the others are taken away here."""

import importlib.metadata
import os
import pathlib
import re
import subprocess
import sys
import textwrap
import tomllib

import pytest

from detclipv2_jax import config_json

ROOT = pathlib.Path(__file__).parents[1]
ENOUGH = {
    "jax", "flax", "optax", "orbax-checkpoint", "numpy", "opencv-python-headless", "pillow", "safetensors",
    "tokenizers", "absl-py", "jaxtyping",
}  # fmt: skip


def other_modules():
    """Returns the modules of all other packages that the project asks for."""
    asked = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*asked["dependencies"], *(line for extra in asked["optional-dependencies"].values() for line in extra)]
    packages = {re.match(r"[\w.-]+", line)[0].lower().replace("_", "-") for line in lines} - ENOUGH
    # parts of any environment, and what jaxtyping looks for
    packages -= {"setuptools", "importlib-resources", "protobuf", "pytest", "pyyaml", "typeguard"}
    return {
        module
        for module, owners in importlib.metadata.packages_distributions().items()
        if packages & {owner.lower().replace("_", "-") for owner in owners}
    } - {"jax"}  # as an extra


LIGHT = """
    import importlib, json, sys

    class Absent:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] in absent:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    absent = set(json.loads(sys.argv[1]))
    sys.meta_path.insert(0, Absent())
"""


def run_without_others(code, *arguments):
    """Runs code where only the packages of `ENOUGH` can be imported."""
    import json

    absent = other_modules()
    assert {
        "tensorflow",
        "grain",
        "clu",
        "ml_collections",
        "tensorflow_datasets",
        "pycocotools",
        "simplejpeg",
    } <= absent
    command = [sys.executable, "-c", textwrap.dedent(LIGHT) + textwrap.dedent(code), json.dumps(sorted(absent))]
    return subprocess.run([*command, *arguments], capture_output=True, text=True, cwd=ROOT, timeout=600)


def test_rooms_of_arrays_and_inference_import_with_few_packages():
    done = run_without_others("""
        import pkgutil, detclipv2_jax
        from detclipv2_jax import geometry, inference, losses, models, train_step
        for room in (geometry, inference, losses, models):
            for module in pkgutil.iter_modules(room.__path__, room.__name__ + "."):
                importlib.import_module(module.name)
        from detclipv2_jax.runs import checkpoints, optimizer, sharding, state
        print("imported")
    """)
    assert done.stdout.strip() == "imported", done.stderr


def test_only_saved_models_need_tensorflow(tmp_path):
    asked = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = {name for name, lines in asked["optional-dependencies"].items() if "tensorflow>" in " ".join(lines)}
    needed = {re.match(r"[\w-]+", line)[0] for line in asked["dependencies"]}
    assert not needed & {"tensorflow", "tensorflow-datasets", "pyarrow", "spacy"}
    assert extras == {"export", "test"}

    def take_away(*modules):
        for module in modules:
            (tmp_path / f"{module}.py").write_text(f"raise ModuleNotFoundError('absent', name={module!r})")

    take_away("tensorflow", "tensorflow_text")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}", "JAX_PLATFORMS": "cpu"}

    def run(*command):
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment, timeout=300)
        assert done.returncode == 0, done.stderr

    run("-c", textwrap.dedent("""
        import importlib, pkgutil, detclipv2_jax
        names = [module.name for module in pkgutil.walk_packages(detclipv2_jax.__path__, "detclipv2_jax.")]
        for name in names:
            if name != "detclipv2_jax.export.saved_model":
                importlib.import_module(name)
    """))  # fmt: skip
    scenes = tmp_path / "scenes"
    run("-m", "detclipv2_jax.prepare", "scenes", f"--output={scenes}", "--num_examples=4")
    build = ["detclipv2_jax.prepare", "coco_json", f"--input={scenes}/detection.json", f"--output={tmp_path}/built"]
    run("-m", *build)
    take_away("tensorflow_datasets", "pyarrow", "spacy")  # built sets are read without what builds them
    run("-m", "detclipv2_jax.prepare", "inspect", f"--data={tmp_path}/built", f"--output={tmp_path}/seen")
    assert (tmp_path / "seen" / "inspection.json").is_file()
    done = subprocess.run([sys.executable, "-m", *build], capture_output=True, text=True, env=environment, timeout=300)
    assert done.stderr == "error: absent: pip install 'detclipv2_jax[prepare]'\n"


def test_what_is_absent_cannot_be_imported():
    done = run_without_others("import ml_collections")
    assert "No module named 'ml_collections'" in done.stderr


@pytest.mark.slow
def test_a_step_trains_on_arrays_with_few_packages(micro):
    micro.model.head.deformable = False  # much to compile
    done = run_without_others(
        """
        import jax
        from detclipv2_jax import train_step
        from detclipv2_jax.data.schema import Kind
        from detclipv2_jax.models import detclip
        from detclipv2_jax.runs import optimizer, sharding, state
        from tests.benchmarks import accelerator_inputs

        class Values(dict):  # what a configuration is asked for
            __getattr__ = dict.__getitem__

        def tuples(value):
            return tuple(map(tuples, value)) if isinstance(value, list) else value

        def values(pairs):
            return Values({key: tuples(value) for key, value in pairs})

        config = json.loads(sys.argv[2], object_pairs_hook=values)
        mesh = sharding.make_mesh(devices=jax.devices()[:1])
        model = detclip.from_config(config.model)
        params = jax.jit(lambda key: state.init_params(model, key, context_length=config.model.text.context_length))(
            jax.random.key(0)
        )
        tx = optimizer.make_optimizer(config.optimizer, params, 100)
        step = train_step.make_step(
            Kind.DETECTION, model=model, tx=tx, config=config, canvas=(64, 64), mesh=mesh
        )
        batch = accelerator_inputs.batch(config, Kind.DETECTION, (64, 64), num_names=5)
        with jax.set_mesh(mesh):
            after, metrics = jax.jit(step)(state.create(params, tx, ema=False), batch)
        print(int(after.step), float(metrics["finite"]), float(metrics["loss"]) > 0)
        """,
        config_json.to_json(micro),
    )
    assert done.stdout.strip() == "1 1.0 True", done.stderr


def test_the_floors_that_are_tried_are_those_that_are_asked_for():
    asked = dict(
        re.fullmatch(r"([\w-]+)>=([\d.]+).*", line).groups()
        for line in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    )
    lines = [line for line in (ROOT / ".ci" / "floors.txt").read_text().splitlines() if not line.startswith("#")]
    assert len(lines) == 8
    for name, version in (line.split("==") for line in lines):
        assert f"{version}.".startswith(f"{asked[name]}."), name
