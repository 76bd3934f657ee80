"""A closed vocabulary: a learned row of a table for each class in place of the text tower, everything else as it is."""

import json
import os

import jax
import numpy as np
import optax
import pytest

from detclipv2_jax import session, train_step, validation
from detclipv2_jax.data import scenes, shapes
from detclipv2_jax.data.concepts import check_classes
from detclipv2_jax.data.schema import Kind
from detclipv2_jax.data.streams import train_streams
from detclipv2_jax.eval import loop
from detclipv2_jax.inference import Detector, Predictor, vocabulary
from detclipv2_jax.models.detclip import l2_normalize
from detclipv2_jax.runs import checkpoints
from detclipv2_jax.runs import state as train_state
from detclipv2_jax.runs.sharding import batch_shapes, make_mesh


@pytest.fixture
def closed(micro):
    """The micro run on generated boxes, its classes those of the evaluation: novel ones are never seen in training."""
    micro.scenes.update({"num_grounding": 0, "num_image_text": 0})
    every = (*shapes.BASE_SHAPES, *shapes.NOVEL_SHAPES)
    micro.model.text.classes = tuple(f"{color} {shape}" for shape in every for color in scenes.COLORS)
    micro.num_steps, micro.optimizer.warmup_steps = 12, 1
    return micro


def test_a_step_trains_a_table_in_place_of_the_tower(closed):
    """The step with a table is the oracle's, see `oracle.towers.StandIn`."""
    model = train_state.make_model(closed.model)
    shapes = train_state.param_shapes(model, context_length=16)
    classes = closed.model.text.classes
    assert jax.tree.map(lambda x: x.shape, shapes["text_encoder"]) == {"classes": (len(classes), 16)}
    tx = optax.sgd(1.0)
    state = jax.eval_shape(lambda params: train_state.create(params, tx, ema=False), shapes)
    step = train_step.make_step(Kind.DETECTION, model=model, tx=tx, config=closed, canvas=(64, 64), mesh=make_mesh())
    with jax.set_mesh(make_mesh()):
        _, metrics = jax.eval_shape(step, state, batch_shapes(closed, Kind.DETECTION, (64, 64), table_rows=96))
    assert {"grad_norm_text_encoder", "loss_alignment"} <= metrics.keys()
    table = np.random.default_rng(0).normal(size=(len(classes), 16)).astype(np.float32)
    params = {"text_encoder": {"classes": table}, "logit_scale": np.float32(1), "logit_bias": np.float32(0)}
    found = Detector(model).encode_vocabulary(params, [classes[5], classes[2].upper()])
    np.testing.assert_allclose(found, table[[5, 2]] / np.linalg.norm(table[[5, 2]], axis=1)[:, None], rtol=1e-6)


@pytest.mark.skipif(not os.environ.get("EXHAUSTIVE"), reason="compiles a step and an evaluation: set EXHAUSTIVE=1")
def test_a_closed_vocabulary_is_trained_evaluated_and_asked(closed, tmp_path):
    scores = session.setup(closed, tmp_path / "run", training=True)()
    assert {"AP", "APr"} <= scores.keys()
    losses = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["detection/loss"] for row in losses if "detection/loss" in row]
    assert np.mean(losses[-3:]) < np.mean(losses[:3])
    config, params, step = checkpoints.load_for_inference(tmp_path / "run")
    classes = config.model.text.classes
    assert (classes, step) == (closed.model.text.classes, 12)
    assert jax.tree.map(np.shape, params["text_encoder"]) == {"classes": (len(classes), config.model.embed_dim)}
    predictor = Predictor.from_checkpoint(tmp_path / "run")
    asked = classes[5], classes[2].upper()
    np.testing.assert_allclose(
        predictor.vocabulary(asked)[1][:2], l2_normalize(params["text_encoder"]["classes"][np.array([5, 2])]), rtol=1e-6
    )
    with pytest.raises(
        ValueError, match=r"words: 2 of 3 texts are none of the \d+ classes .*: 'zebra', 'gnu, a cow'\."
    ):
        predictor.vocabulary({"zebra": "", classes[0]: "", "gnu": "a cow"})


def test_what_is_no_class_is_refused_before_anything_is_compiled(closed, tmp_path):
    complete = session.with_scenes(closed, tmp_path)
    [stream] = train_streams(complete)
    assert stream.num_examples == 24
    classes = complete.model.text.classes
    check_classes([classes[0].upper(), classes[-1]], complete.model.text, where="words")
    complete.model.text.classes = complete.model.text.classes[1:]
    for make, where in ((train_streams, r"config\.detection, \S+"), (loop.make_streams, r"config\.eval")):
        with pytest.raises(ValueError, match=rf"^{where}: 1 of \d+ texts are none of the \d+ classes .*: '\w+ \w+'\."):
            make(complete)
    complete.grounding.annotations, complete.grounding.images = complete.detection.annotations, str(tmp_path)
    complete.model.text.classes = ("cat", "Cat")
    with pytest.raises(ValueError, match=r"config\.model\.text\.classes has 'cat' and 'Cat', which are the same"):
        validation.validate(complete, num_devices=8)


def test_phrases_are_no_classes(closed, tmp_path):
    closed.scenes.num_grounding, closed.scenes.num_eval = 8, 0
    complete = session.with_scenes(closed, tmp_path)
    with pytest.raises(ValueError, match=r"config\.grounding has data, but phrases are no classes"):
        train_streams(complete)


def test_the_supervised_rows_are_closed_over_lvis(shared_data):
    config = __import__("configs.supervised_lvis", fromlist=["get_config"]).get_config("swin_l")
    listed = json.loads((shared_data / "categories" / "lvis_v1_categories.json").read_text())
    assert {category["name"].replace("_", " ") for category in listed} == set(config.model.text.classes)
    assert config.model.text.classes == vocabulary.named("lvis").names
    assert not config.detection.definitions
    assert not config.eval.definitions
    assert {factor for _, factor, _ in config.optimizer.groups} == {1.0}
