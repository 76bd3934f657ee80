"""Losses and gradients that are not finite: injected, and from a poisoned example of a shard."""

import json
import logging

import building
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import test_main
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from micro import micro_config
from tensorflow_datasets.proto import tf_example_pb2

from detclipv2_jax import session, train, train_step
from detclipv2_jax.data import scenes
from detclipv2_jax.runs import checkpoints, sharding
from detclipv2_jax.runs.state import TrainState

POISONED = 11  # of 24 examples
NUM_STEPS = 3  # an epoch


def poison(shard, number):
    """Gives an example of a shard boxes whose area is more than float32 can hold."""
    reader = ArrayRecordReader(str(shard))
    records = reader.read_all()
    reader.close()
    shard.unlink()
    writer = ArrayRecordWriter(str(shard), "group_size:1")
    for i, record in enumerate(records):
        example = tf_example_pb2.Example.FromString(record)
        if i == number:
            boxes = example.features.feature["boxes"].float_list.value
            boxes[:] = [0.0, 0.0, 3e38, 3e38] * (len(boxes) // 4)
        writer.write(example.SerializeToString())
    writer.close()


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Three steps of detection, one of which meets the poisoned example."""
    folder = tmp_path_factory.mktemp("world")
    scenes.write(folder, num_detection=24, num_grounding=0, num_image_text=0, num_eval=0, size_px=64)
    options = {"input": str(folder / "detection.json"), "images": str(folder), "shard_size": 100}
    building.build("coco_json", output=str(folder / "poisoned"), **options)
    (shard,) = (folder / "poisoned").glob("*array_record*")
    poison(shard, POISONED)
    c = micro_config()
    c.num_steps = NUM_STEPS
    c.model.head.deformable = False  # much to compile
    c.scenes.num_detection = c.scenes.num_grounding = c.scenes.num_image_text = c.scenes.num_eval = 0
    c.detection.data = (str(folder / "poisoned"),)
    c.checkpoint.every_steps = 1
    c.pictures_every_steps = 0
    return c


@pytest.fixture(scope="module", autouse=True)
def _steps_are_compiled_once():
    make_mesh = sharding.make_mesh
    with test_main.shared_steps(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "make_mesh", lambda **options: make_mesh(**options, devices=jax.devices()[:1]))
        yield


@pytest.fixture(scope="module")
def stopped(config, tmp_path_factory):
    """(workdir, message) of the run that the poisoned example stops."""
    workdir = tmp_path_factory.mktemp("stopped")
    with pytest.raises(train.NonFiniteError) as error:
        test_main.start(config, workdir)
    return workdir, str(error.value)


def step_of(message):
    return int(message.removeprefix("step ").partition(" ")[0])


@pytest.mark.slow
def test_a_poisoned_example_stops_the_run_with_all_that_is_needed_to_find_it(stopped):
    workdir, message = stopped
    step = step_of(message)
    for part in (
        "was not applied", "detection/loss nan", "detection/loss_box nan", "gradients that are not finite: ", "swin",
        "examples of process 0: poisoned: ", f"--replay={step}", "config.nonfinite=skip",
    ):  # fmt: skip
        assert part in message, part
    terms, _, examples = message.partition("poisoned: ")
    assert "loss_alignment nan" not in terms  # only the boxes are wrong
    ids = examples.partition(".")[0].split(", ")
    assert len(ids) == 8
    assert str(POISONED) in ids
    assert json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])["detection/loss"] is None
    steps = [int(path.name) for path in (workdir / "checkpoints").iterdir()]
    assert max(steps, default=0) == step - 1  # the step is not saved


@pytest.mark.slow
def test_replay_runs_the_step_again_and_changes_nothing(config, stopped, capsys):
    workdir, message = stopped
    step = step_of(message)
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
    metrics = session.setup(config, workdir, training=True, replayed=step)()
    printed = capsys.readouterr().out
    assert f"step {step}, batch {step - 1} of detection/64x64:" in printed
    for name in ("loss_alignment", "loss_box nan", "grad_norm_swin nan", "grad_norm_head", "grad_norm_text_encoder"):
        assert f"detection/{name}" in printed
    assert message.partition("poisoned: ")[2].partition(".")[0] in printed
    assert np.isnan(metrics["detection/loss"])
    terms = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])
    assert metrics["detection/loss_alignment"] == terms["detection/loss_alignment"]  # bit for bit
    assert {path: path.stat().st_mtime_ns for path in workdir.rglob("*")} == before
    with pytest.raises(ValueError, match=r"--replay=9: the run has 3 steps"):
        session.setup(config, workdir, training=True, replayed=9)()


@pytest.mark.slow
def test_a_run_that_skips_goes_on_without_the_poisoned_step(config, stopped, tmp_path, caplog):
    config = config.copy_and_resolve_references()
    config.nonfinite, config.checkpoint.keep = "skip", 5
    with caplog.at_level(logging.ERROR, logger="absl"):
        test_main.start(config, tmp_path)
    (message,) = (record.getMessage() for record in caplog.records if "was not applied" in record.getMessage())
    step = step_of(message)
    assert step == step_of(stopped[1])
    history = test_main.lines(tmp_path)
    assert [history[n]["detection/loss"] is None for n in range(1, NUM_STEPS + 1)] == [n == step for n in range(1, 4)]
    manager = checkpoints.Checkpoints(tmp_path)
    before, after = (manager.restore_params(n) for n in (step - 1 or step, step))
    jax.tree.map(np.testing.assert_array_equal, before, after)
    manager.close()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_injected_gradient_is_not_applied_and_its_module_is_named(value):
    params = {"swin": {"kernel": jnp.ones(3)}, "head": {"kernel": jnp.ones(2)}}
    tx = optax.adam(0.1)
    state = TrainState(step=jnp.int32(4), params=params, opt_state=tx.init(params), ema=None)
    grads = {"swin": {"kernel": jnp.ones(3)}, "head": {"kernel": jnp.asarray([1.0, value])}}
    after, metrics = train_step._apply(state, grads, tx=tx, ema_decay=0.0, metrics={"loss": jnp.float32(1)})
    jax.tree.map(np.testing.assert_array_equal, (after.params, after.opt_state), (state.params, state.opt_state))
    assert (int(after.step), float(metrics["finite"])) == (5, 0)
    message = train.described({name: float(x) for name, x in metrics.items()}, "pairs: 3")
    assert "gradients that are not finite: head; examples of process 0: pairs: 3" in message
