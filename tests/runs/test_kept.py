"""What processes keep for each other: traces of functions, parameter shapes; when a kept one does not count."""

import importlib.metadata
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import planted
import pytest

from detclipv2_jax import files
from detclipv2_jax.inference import Predictor
from detclipv2_jax.models import detclip
from detclipv2_jax.runs import kept, state


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Where traces are kept."""
    monkeypatch.setattr(kept, "folder", lambda: tmp_path / "traced")
    return tmp_path / "traced"


def counted():
    """Returns (a function of a tree and a number, the list that grows when it is traced)."""
    traces = []

    def function(tree, factor):
        traces.append(tree["x"].shape)
        return tree["x"] * factor + jax.tree.leaves(tree["y"])[0]

    return function, traces


def test_a_trace_is_kept_for_what_is_the_same(place):
    function, traces = counted()
    x = np.arange(6, dtype=np.float32)
    tree = {"x": x, "y": jnp.float32(1)}
    for _ in range(2):
        later = kept.jit(function, of="model")  # as of another process
        np.testing.assert_array_equal(later(tree, 2.0), 2 * x + 1)
        np.testing.assert_array_equal(later(tree, 3.0), 3 * x + 1)
        np.testing.assert_array_equal(kept.jit(function, of="model")(tree, 2.0), 2 * x + 1)
    assert traces == [(6,)]

    def other(tree, factor):
        return tree["x"] - factor

    np.testing.assert_array_equal(kept.jit(other, of="model")(tree, 2.0), x - 2)  # another function
    both = kept.jit(function, of="two shapes")
    for size in (6, 4):
        np.testing.assert_array_equal(both(tree | {"x": x[:size]}, 2.0), 2 * x[:size] + 1)
    for of, arguments in (
        ("model", ({"x": x[:4], "y": jnp.float32(1)}, 2.0)),  # another shape
        ("model", ({"x": x.astype(np.int32), "y": jnp.float32(1)}, 2.0)),  # type
        ("model", ({"x": x, "y": [jnp.float32(1)]}, 2.0)),  # tree
        ("model", ({"x": x, "y": jnp.float32(1)}, jnp.float32(2.0))),  # not a Python number, which is weaker
        ("other", ({"x": x, "y": jnp.float32(1)}, 2.0)),
    ):
        before = len(traces)
        expected = arguments[0]["x"] * 2.0 + 1
        np.testing.assert_array_equal(kept.jit(function, of=of)(*arguments), expected)
        assert len(traces) == before + 1


def test_within_another_trace_it_is_a_part_of_that(place):
    function, _ = counted()
    inner = kept.jit(function, of="model")
    (num,) = jax.export.symbolic_shape("n")
    given = {"x": jax.ShapeDtypeStruct((num,), np.float32), "y": jax.ShapeDtypeStruct((), np.float32)}
    exported = jax.export.export(jax.jit(lambda tree: inner(tree, 2.0)))(given)
    np.testing.assert_array_equal(exported.call({"x": np.ones(5, np.float32), "y": np.float32(1)}), [3.0] * 5)
    assert not place.exists()


def test_other_sources_or_settings_are_traced_anew(place, monkeypatch):
    function, traces = counted()
    tree = {"x": np.ones(3, np.float32), "y": jnp.float32(1)}
    of_now = kept._environment()
    assert any(len(part) == 64 for part in of_now)  # sources by their hash
    assert {jax.__version__} < set(of_now)
    sources = sorted(kept.pathlib.Path(kept.__file__).parents[1].rglob("*.py"))
    assert of_now[: len(sources)] == tuple(files.sha256(path) for path in sources)
    for environment in (of_now, of_now[1:], of_now):
        monkeypatch.setattr(kept, "_environment", lambda environment=environment: environment)
        kept.jit(function, of="")(tree, 2.0)
    assert len(traces) == 2


def test_a_trace_is_of_every_version_and_setting_that_it_depends_on(monkeypatch):
    environment, version = kept._environment.__wrapped__, importlib.metadata.version
    found = [environment()]
    for changed in ("jax", "jaxlib", "flax"):
        monkeypatch.setattr(
            importlib.metadata, "version", lambda name, new=changed: version(name) + "x" * (name == new)
        )
        found.append(environment())
    monkeypatch.undo()
    for name, value in (("jax_enable_x64", True), ("jax_default_matmul_precision", "float32")):
        before = jax.config.values[name]
        jax.config.update(name, value)
        try:
            found.append(environment())
        finally:
            jax.config.update(name, before)
    assert len(set(found)) == len(found)


def test_damaged_files_are_made_again_and_a_disk_that_takes_none_costs_time_alone(place, monkeypatch):
    function, traces = counted()
    tree = {"x": np.ones(3, np.float32), "y": jnp.float32(1)}
    kept.jit(function, of="")(tree, 2.0)
    (path,) = place.iterdir()
    whole = path.read_bytes()
    for data in (b"", whole[:-9], b"x" * len(whole)):
        path.write_bytes(data)
        np.testing.assert_array_equal(kept.jit(function, of="")(tree, 2.0), [3, 3, 3])
        assert len(path.read_bytes()) == len(whole)
        assert path.read_bytes() != data
    assert len(traces) == 4
    place.parent.joinpath("file").touch()
    monkeypatch.setattr(kept, "folder", lambda: place.parent / "file" / "traced")
    np.testing.assert_array_equal(kept.jit(function, of="")(tree, 2.0), [3, 3, 3])
    assert kept.value(lambda: {"a": [1]}, of="") == {"a": [1]}
    with pytest.raises(FileNotFoundError, match="nothing"):  # of what is computed, not of the disk
        kept.value(lambda: pathlib.Path("nothing").read_text(), of="")


def test_a_value_is_computed_once(place, monkeypatch):
    computed = []

    def compute():
        computed.append(1)
        return {"a": [1, 2]}

    assert [kept.value(compute, of=name) for name in ("x", "x", "y")] == [{"a": [1, 2]}] * 3
    assert len(computed) == 2
    for path in place.iterdir():
        path.write_text("{")
    assert kept.value(compute, of="x") == {"a": [1, 2]}
    assert len(computed) == 3
    monkeypatch.setattr(kept, "folder", lambda: None)
    assert kept.value(compute, of="x") == {"a": [1, 2]}
    assert len(computed) == 4


def test_traces_stand_beside_the_compiled_programs_of_cpus(monkeypatch):
    folder = kept.folder.__wrapped__
    assert str(folder()) == jax.config.values["jax_compilation_cache_dir"] + "/traced"
    for accelerator in ("gpu", "tpu"):
        monkeypatch.setattr(jax, "default_backend", lambda accelerator=accelerator: accelerator)
        assert folder() is None
    monkeypatch.undo()
    monkeypatch.setattr(kept.importlib.util, "find_spec", {"flatbuffers": None}.__getitem__)
    assert folder() is None
    monkeypatch.undo()
    before = jax.config.values["jax_compilation_cache_dir"]
    jax.config.update("jax_compilation_cache_dir", None)
    try:
        assert folder() is None
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


def test_a_predictor_finds_the_same_by_what_was_kept(place, monkeypatch):
    config, model, params = planted.make()
    photo = planted.paint((64, 128), {"red": (10, 10, 40, 40), "blue": (70, 20, 110, 50)})
    results = []
    for used in (None, place, place):
        monkeypatch.setattr(kept, "folder", lambda used=used: used)
        results.append(Predictor(config, model, params)(photo, ["red", "blue"], score_threshold=0.0))
    assert len(results[0].scores) > 0
    for found in results[1:]:
        np.testing.assert_array_equal(found.boxes, results[0].boxes)
        np.testing.assert_array_equal(found.scores, results[0].scores)
    assert len(list(place.iterdir())) == 2  # texts, photos


def test_shapes_of_parameters_are_checked_by_what_was_kept(place, micro, monkeypatch):
    model = detclip.from_config(micro.model)
    shapes = state.param_shapes(model, context_length=micro.model.text.context_length)
    less = {name: value for name, value in shapes.items() if name != "logit_bias"}
    traced, param_shapes = [], state.param_shapes
    monkeypatch.setattr(state, "param_shapes", lambda *_, **options: traced.append(1) or param_shapes(*_, **options))
    for _ in range(2):
        assert state.checked_model(micro, shapes, what="it", folder="here") == model
        with pytest.raises(ValueError, match=r"it does not fit .* configuration:\n  missing \(1\): logit_bias$"):
            state.checked_model(micro, less, what="it", folder="here")
    assert len(traced) == 1
    micro.model.embed_dim *= 2
    with pytest.raises(ValueError, match=r"reshaped \(\d+\): .*head/embedding/bias"):
        state.checked_model(micro, shapes, what="it", folder="here")
    assert len(traced) == 2
