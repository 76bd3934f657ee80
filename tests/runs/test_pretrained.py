"""Converted weights at the start of a run: fitted to the model, all else fresh, and errors that say what to do."""

import pathlib
import sys

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from detclipv2_jax import convert, session, train, validation
from detclipv2_jax.convert import layouts
from detclipv2_jax.models import detclip
from detclipv2_jax.runs import checkpoints, pretrained
from detclipv2_jax.runs import state as train_state
from detclipv2_jax.runs.optimizer import named_shapes

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
sys.path.insert(0, str(GOLDEN))
import cases  # noqa: E402  (lives beside the fixtures, which are made in another environment)
import seeded  # noqa: E402


def shapes_of(config):
    """Returns the shapes of all parameters of `config.model`."""
    model = detclip.from_config(config)
    return named_shapes(train_state.param_shapes(model, context_length=config.text.context_length))


def write(path, shapes):
    """Writes seeded parameters and returns them."""
    params = {name: seeded.parameter(name, shape) for name, shape in shapes.items()}
    save_file(params, path, metadata={"layout": "timm"})
    return params


def start_files(config, *, swin, text):
    """Returns config.init_from with the two files."""
    config.init_from.swin, config.init_from.text = str(swin), str(text)
    return config.init_from


@pytest.mark.parametrize(("old", "new"), cases.TABLE_WINDOWS)
def test_tables_are_resized_as_by_torch(old, new):
    resized = pretrained.resize_table(cases.relative_position_table(old), rows=(2 * new - 1) ** 2)
    expected = np.load(GOLDEN / "layouts.npz")[f"table/{old}/{new}"]
    assert resized.shape == expected.shape
    np.testing.assert_allclose(resized, expected, atol=1e-5)
    table = cases.relative_position_table(old)
    assert pretrained.resize_table(table, rows=(2 * new - 1) ** 2 + 1) is table  # of no window
    assert pretrained.resize_table(table[1:], rows=(2 * new - 1) ** 2).shape == table[1:].shape


def test_files_are_fitted_to_the_model(micro, tmp_path):
    shapes = shapes_of(micro.model)
    tower = {name: shape for name, shape in shapes.items() if name.startswith("swin/") and name not in pretrained.FRESH}
    window = {name: (15**2, shape[1]) if "table" in name else shape for name, shape in tower.items()}  # 8, not 4
    swin = write(tmp_path / "swin.safetensors", window)
    tower = {name: shape for name, shape in shapes.items() if name.startswith("text_encoder/")}
    position = "text_encoder/position_embedding"
    text = write(tmp_path / "text.safetensors", tower | {position: (77, tower[position][1])})
    files = start_files(micro, swin=tmp_path / "swin.safetensors", text=tmp_path / "text.safetensors")
    params, notes = pretrained.load_all(files, shapes)
    assert {name: value.shape for name, value in params.items()} == {
        name: shape for name, shape in shapes.items() if name.split("/")[0] in ("swin", "text_encoder")
        and name not in pretrained.FRESH
    }  # fmt: skip
    for name, value in params.items():
        if "relative_position_table" in name:
            np.testing.assert_array_equal(value, pretrained.resize_table(swin[name], rows=49))
        elif name == position:
            np.testing.assert_array_equal(value, text[name][:16])
        else:
            np.testing.assert_array_equal(value, (swin | text)[name])
    notes = "\n".join(notes)
    assert f"they start fresh: {', '.join(pretrained.FRESH)}" in notes
    assert "fitted to the model (4): " in notes
    assert f"parameters from {tmp_path / 'swin.safetensors'}, converted from layout timm" in notes
    assert "stage1_block0/attention/relative_position_table (225, 1) -> (49, 1)" in notes
    assert "fitted to the model (1): text_encoder/position_embedding (77, 16) -> (16, 16)" in notes
    assert pretrained.load_all(start_files(micro, swin="", text=""), shapes) == ({}, [])


def test_short_types_become_float32_and_norms_that_are_there_are_taken(tmp_path):
    shapes = {"swin/norm2/bias": (3,), "swin/norm2/scale": (3,), "swin/a/kernel": (2, 3), "head/bias": (1,)}
    stored = {name: seeded.parameter(name, shape).astype(np.float16) for name, shape in shapes.items()}
    del stored["swin/norm2/bias"]
    others = {"swinging/kernel": np.zeros(2, np.float16)}  # not of the tower, whatever they begin with
    save_file(stored | others, tmp_path / "swin.safetensors")
    params, notes = pretrained.load(tmp_path / "swin.safetensors", "swin", shapes)
    assert params.keys() == {"swin/norm2/scale", "swin/a/kernel"}
    for name, value in params.items():
        assert value.dtype == np.float32
        np.testing.assert_array_equal(value, stored[name])
    assert notes[0].endswith("converted from layout unknown")
    assert notes[1:] == ["not in the file, they start fresh: swin/norm2/bias"]


def test_weights_of_another_size_are_refused_with_names(micro, tmp_path):
    large = layouts.swin_shapes(16, (1, 1, 1, 2), [(49, 1)] * 2 + [(49, 2)] * 2)
    write(tmp_path / "large.safetensors", large)
    write(tmp_path / "short.safetensors", layouts.text_shapes(16, 1, positions=8, embed_dim=16))
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    shapes = shapes_of(micro.model)
    files = start_files(micro, swin=tmp_path / "large.safetensors", text=tmp_path / "short.safetensors")
    with pytest.raises(ValueError, match=r"large\.safetensors does not fit") as error:
        pretrained.load_all(files, shapes)
    for part in (
        "config.init_from.swin: ",
        "unexpected (13): swin/stage4_block1/attention/projection/bias, ",
        "swin/patch_embedding/bias (16,) -> (8,)",
        "config.init_from.text: ",
        "reshaped (1): text_encoder/position_embedding (8, 16) -> (16, 16)",
    ):
        assert part in str(error.value), part
    files = start_files(micro, swin=tmp_path / "short.safetensors", text=tmp_path / "broken.safetensors")
    with pytest.raises(ValueError, match=r"has no parameter named swin/[\s\S]*broken\.safetensors cannot be read"):
        pretrained.load_all(files, shapes)


@pytest.mark.parametrize(("name", "source"), [("swin_t", "swin_tiny_patch4"), ("swin_l", "swin_large_patch4")])
def test_configs_say_which_files_are_missing_and_how_to_make_them(name, source, tmp_path, monkeypatch):
    module = __import__(f"configs.{name}", fromlist=["get_config"])
    config = module.get_config()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="does not exist") as error:
        train.make_run(config, tmp_path / "run")
    for part in (
        f"python -m detclipv2_jax.convert swin --input={source}",
        f"--output={config.init_from.swin}",
        "python -m detclipv2_jax.convert clip_text --input=open_clip_model.safetensors",
        f"--output={config.init_from.text}",
        "--config.init_from.swin=\n",
        "python -m detclipv2_jax.prepare",  # data in the same list, evaluation's too
        "config.eval.annotations",
    ):
        assert part in str(error.value), part
    for file in (config.init_from.swin, config.init_from.text):
        known = pretrained.PUBLIC_FILES[pathlib.Path(file).name]
        assert known.name in module.__doc__ or name == "swin_l"
    config.init_from.swin = config.init_from.text = ""
    validation.validate(config, num_devices=32)
    with pytest.raises(ValueError, match="prepare") as error:
        train.make_run(config, tmp_path / "run")
    assert "convert" not in str(error.value)


def test_a_checkpoint_needs_no_weights(micro, tmp_path):
    assert not train.has_parameters(micro, tmp_path)
    (tmp_path / "checkpoints" / "8.orbax-checkpoint-tmp").mkdir(parents=True)
    assert not train.has_parameters(micro, tmp_path)
    (tmp_path / "checkpoints" / "8").mkdir()
    assert train.has_parameters(micro, tmp_path)
    micro.init_from.checkpoint = "elsewhere"
    assert train.has_parameters(micro, tmp_path / "new")


def test_only_converted_files_are_allowed(micro):
    micro.init_from.swin = "swin_tiny_patch4_window7_224.pth"
    with pytest.raises(ValueError, match=r"config.init_from.swin is .*allowed: a .safetensors file that `python -m"):
        validation.validate(micro, num_devices=8)


@pytest.mark.slow
def test_a_run_starts_from_a_checkpoint_of_timm_and_one_of_transformers(micro, tmp_path):
    shapes = shapes_of(micro.model)
    for part, layout, root in (("swin", "timm", "swin/"), ("clip_text", "transformers", "text_encoder/")):
        tower = {
            name: shape for name, shape in shapes.items() if name.startswith(root) and name not in pretrained.FRESH
        }
        params = {name: seeded.parameter(name, shape) for name, shape in tower.items()}
        theirs = layouts.to_checkpoint(part, params, layout=layout, what="the test").params
        save_file(theirs, tmp_path / f"{layout}.safetensors")
        output = tmp_path / f"{part}.safetensors"
        convert.run(part, input=tmp_path / f"{layout}.safetensors", output=output)
    fresh = state_at_start(micro, tmp_path / "fresh")
    start_files(micro, swin=tmp_path / "swin.safetensors", text=tmp_path / "clip_text.safetensors")
    started = state_at_start(micro, tmp_path / "started")
    assert started.keys() == fresh.keys() == shapes.keys()
    for name, value in started.items():
        loaded = name.split("/")[0] in ("swin", "text_encoder") and name not in pretrained.FRESH
        np.testing.assert_array_equal(value, seeded.parameter(name, value.shape) if loaded else fresh[name], name)


def state_at_start(config, workdir):
    """Returns the parameters of a run before its first step, by name."""
    workdir.mkdir()
    run = train.make_run(session.with_scenes(config, workdir), workdir)
    manager = checkpoints.Checkpoints(workdir, keep=1)
    state = train.initial_state(run, manager)
    manager.close()
    assert int(state.step) == 0
    leaves = jax.tree_util.tree_leaves_with_path(state.params)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(value) for path, value in leaves}
