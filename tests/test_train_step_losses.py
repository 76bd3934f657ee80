"""Every loss, switch and mask of a step against the float64 oracle, with a stand-in for the model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from micro import micro_config
from oracle.towers import StandIn, assert_same_gradients, expected_step, jit_towers, make_batch, recorder

from detclipv2_jax import train_step
from detclipv2_jax.data.schema import Kind
from detclipv2_jax.runs import sharding
from detclipv2_jax.runs import state as train_state

CANVAS = (64, 96)
RATE, DECAY = 0.1, 0.75
CASES = {
    "detection": (Kind.DETECTION, 1, {}),
    "detection in chunks": (Kind.DETECTION, 2, {"head": "classification", "objectness_weight": 0.4}),
    "detection, iou head": (Kind.DETECTION, 1, {"head": "iou", "objectness_weight": 2.5, "chunk_bytes": 1 << 27}),
    "detection, federated": (Kind.DETECTION, 1, {}),
    "detection, in chunks and federated": (Kind.DETECTION, 2, {"chunk_bytes": 1 << 27}),
    "grounding": (Kind.GROUNDING, 1, {"focal_alpha": 0.4, "focal_gamma": 1.5, "frozen": "text_encoder"}),
    "grounding, one concept a box": (Kind.GROUNDING, 1, {"max_box_concepts": 1}),
    "grounding, two concepts a box": (Kind.GROUNDING, 2, {"max_box_concepts": 2}),
    "grounding, texts by length": (Kind.GROUNDING, 1, {"text_lengths": ((4, 0.25), (3, 0.5))}),
    "pairs": (Kind.IMAGE_TEXT, 1, {}),
    "pairs, texts by length": (Kind.IMAGE_TEXT, 2, {"text_lengths": ((4, 0.75), (3, 0.25))}),
    "pairs in chunks": (Kind.IMAGE_TEXT, 2, {"selection_scope": "device", "selection": "text_batch_centerness"}),
    "pairs, classification": (Kind.IMAGE_TEXT, 1, {"head": "classification", "selection": "classification"}),
    "pairs, iou": (
        Kind.IMAGE_TEXT,
        1,
        {"head": "iou", "selection": "iou", "matching": "max_size", "side": "bilateral"},
    ),
    "pairs, centerness": (
        Kind.IMAGE_TEXT,
        1,
        {"selection": "centerness", "matching": "one_to_many", "side": "bilateral"},
    ),
    "pairs, own text": (
        Kind.IMAGE_TEXT,
        1,
        {"selection": "text_sample", "selection_nms_iou": 0.3, "side": "image_to_text"},
    ),
    "class names": (Kind.IMAGE_TEXT, 1, {"interaction": "tokens"}),  # of captions alone
    "class names in chunks": (
        Kind.IMAGE_TEXT,
        2,
        {"class_proposals": 3, "selection_scope": "device", "chunk_bytes": 1 << 20},
    ),
    "class names on one device": (Kind.IMAGE_TEXT, 2, {"selection": "centerness", "label_smoothing": 0.0}),
    "tokens": (Kind.IMAGE_TEXT, 1, {"interaction": "tokens", "side": "bilateral"}),
    "tokens in chunks": (
        Kind.IMAGE_TEXT,
        2,
        {"interaction": "tokens", "matching": "one_to_many", "selection_scope": "device", "side": "image_to_text"},
    ),
    "tokens on one device": (Kind.IMAGE_TEXT, 2, {"interaction": "tokens", "selection": "text_sample"}),
}


def configuration(kind, num_chunks, head="none", frozen="", max_box_concepts=8, text_lengths=(), **switches):
    """Returns a configuration in which no weight is 1 and no switch of the losses stands at what hides a fault."""
    config = micro_config()
    config.seed = 7
    config.model.head.objectness = head
    config.optimizer.accumulate[kind.value] = num_chunks
    config.optimizer.text_lengths[kind.value] = text_lengths
    if kind is not Kind.IMAGE_TEXT:
        config[kind.value].max_box_concepts = max_box_concepts
    config.optimizer.ema_decay, config.optimizer.frozen = DECAY, frozen
    values = {
        "box_weight": 1.7, "class_weight": 0.45, "centerness_weight": 0.6, "contrastive_weight": 0.3,
        "temperature": 0.7, "label_smoothing": 0.15, "matching_temperature": 0.4, "num_proposals": 6,
        "selection_pre_nms": 40, "selection_nms_iou": 0.5, "chunk_bytes": 8 * 2 * 6 * 7,
    }  # fmt: skip
    for name, value in (values | switches).items():
        config.loss[name] = value
    return config


@functools.cache
def compiled(case):
    """Returns (configuration, model, its towers, mesh, optimizer, jitted step) of a case."""
    kind, num_chunks, switches = CASES[case]
    config = configuration(kind, num_chunks, **switches)
    model = StandIn(objectness=config.model.head.objectness != "none")
    mesh = sharding.make_mesh(devices=jax.devices()[:1] if "one device" in case else None)
    tx = optax.chain(recorder(), optax.scale(-RATE))
    step = train_step.make_step(kind, model=model, tx=tx, config=config, canvas=CANVAS, mesh=mesh)
    tokens = config.loss.interaction == "tokens" and "class names" not in case
    return config, model, jit_towers(model, text="encode_tokens" if tokens else "encode_text"), mesh, tx, jax.jit(step)


def run(case, batch, *, step=3, change=None):
    """Returns (state before, state after, metrics, gradient) of one step on all devices of the case."""
    _, model, _, mesh, tx, function = compiled(case)
    params = model.init(jax.random.key(1))["params"]
    state = train_state.create(params, tx, ema=True)
    state = state.replace(step=jnp.int32(step), ema=jax.tree.map(lambda x: x + 0.5, params))
    state = change(state) if change else state
    with jax.set_mesh(mesh):
        after, metrics = function(state, sharding.to_global(batch, mesh))
    before, after, metrics = jax.device_get((state, after, metrics))
    return before, after, {name: float(value) for name, value in metrics.items()}, after.opt_state[0]


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_equal_the_oracle(case):
    kind, num_chunks, _ = CASES[case]
    config, _, towers, mesh, *_ = compiled(case)
    # names that repeat over devices; all different, so that the last chunk of concepts overlaps the one before; few
    # names; almost nothing to learn from
    for seed, options in enumerate(({"distinct": 20}, {"distinct": 32}, {"distinct": 3}, {"share": 0.0})):
        batch = make_batch(kind, seed=seed, federated="federated" in case, class_names="class names" in case, **options)
        before, _, metrics, grads = run(case, batch, step=seed)
        loss, expected, wanted = expected_step(
            towers, before.params, batch, kind=kind, config=config, canvas=CANVAS, step=seed, num_devices=mesh.size,
            num_chunks=num_chunks,
        )  # fmt: skip
        assert metrics["loss"] == pytest.approx(loss, rel=1e-6), options
        for name, value in expected.items():
            assert metrics[name] == pytest.approx(value, rel=1e-5), (options, name)
        if config.optimizer.frozen:
            assert np.any(wanted[config.optimizer.frozen])
            wanted[config.optimizer.frozen] = np.zeros_like(wanted[config.optimizer.frozen])
        assert_same_gradients(grads, wanted)


def test_texts_that_find_no_room_in_their_group_are_told():
    told = []
    for case in ("grounding, texts by length", "pairs, texts by length"):
        kind, _, switches = CASES[case]
        for options in ({"distinct": 20}, {"distinct": 3}, {"share": 0.0}):
            batch = make_batch(kind, seed=0, **options)
            lengths = np.where(batch.concept_mask, batch.concept_tokens.argmax(axis=1) + 1, 0).reshape(8, -1)
            limits = [n for n, share in switches["text_lengths"] for _ in range(int(share * lengths.shape[1]))]
            limits += [0] * (lengths.shape[1] - len(limits))
            told.append(run(case, batch)[2]["text_overflow"])
            assert told[-1] == np.any(-np.sort(-lengths, axis=1) > limits), (case, options)
    assert {0.0, 1.0} == set(told)
    assert "text_overflow" not in run("pairs", make_batch(Kind.IMAGE_TEXT, seed=0))[2]


def test_the_update_the_average_and_the_norms_follow_from_the_gradient():
    before, after, metrics, grads = run("grounding", make_batch(Kind.GROUNDING, seed=0))
    assert after.step == before.step + 1
    for name, grad in grads.items():
        np.testing.assert_allclose(after.params[name], before.params[name] - RATE * grad, rtol=1e-6)
        average = DECAY * before.ema[name] + (1 - DECAY) * after.params[name]
        np.testing.assert_allclose(after.ema[name], average, rtol=1e-5, atol=1e-6)
        assert metrics[f"grad_norm_{name}"] == pytest.approx(np.linalg.norm(grad), rel=1e-5)
    assert metrics["grad_norm"] == pytest.approx(np.sqrt(sum(np.sum(x**2) for x in grads.values())), rel=1e-5)
    assert metrics["finite"] == 1.0


@pytest.mark.parametrize(
    ("values", "loss_is_finite"),
    [
        ({"logit_scale": np.nan}, False),
        ({"logit_bias": 1e38}, False),  # the loss overflows, its gradient is bounded
        ({"logit_scale": 1e25, "region": 0.0}, True),  # the gradient overflows, the loss is that of the bias
    ],
)
def test_what_is_not_finite_changes_nothing_but_the_step(values, loss_is_finite):
    def poison(state):
        bad = {name: jnp.full_like(state.params[name], value) for name, value in values.items()}
        return state.replace(params=state.params | bad)

    before, after, metrics, _ = run("grounding", make_batch(Kind.GROUNDING, seed=0), change=poison)
    assert metrics["finite"] == 0.0
    assert np.isfinite(metrics["loss"]) == loss_is_finite
    assert after.step == before.step + 1
    jax.tree.map(np.testing.assert_array_equal, after.replace(step=before.step), before)
