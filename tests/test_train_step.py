"""Steps of the whole model: equal to the oracle on eight devices in chunks; gradients reach what they should.

What the losses make of a model's outputs is tested with a stand-in for the model, in test_train_step_losses.py.
"""

import functools
import types

import jax
import numpy as np
import optax
import pytest
import stand_in
from jax.sharding import NamedSharding
from oracle.towers import assert_same_gradients, expected_step, jit_towers, make_batch, recorder

from detclipv2_jax import config_json, train_step
from detclipv2_jax.data.schema import Kind
from detclipv2_jax.models import detclip
from detclipv2_jax.runs import sharding
from detclipv2_jax.runs import state as train_state
from detclipv2_jax.runs.optimizer import make_optimizer, param_name

CANVAS = (96, 128)


def batch_of(kind):
    return make_batch(kind, seed=0, canvas=CANVAS)


@functools.cache
def fresh_params(micro_json):
    """Returns initial parameters on the host; the same whatever a step is compiled for."""
    model = detclip.from_config(config_json.from_json(micro_json).model)
    init = jax.jit(lambda key: train_state.init_params(model, key, context_length=16))
    return jax.device_get(init(jax.random.key(0)))


def trained_params(micro_json):
    """Returns parameters of which none is zero, as after training: every gradient goes through every layer."""
    rng = np.random.default_rng(0)

    def move(x):
        return x + rng.normal(scale=max(0.3 * np.std(x), 0.05), size=np.shape(x)).astype(np.float32)

    return jax.tree.map(move, fresh_params(micro_json))


@functools.cache
def compiled(micro_json, kind, num_devices, num_chunks, fsdp):
    """Returns (configuration, maker of a state, jitted step, mesh); shared, because compiling is what takes time."""
    config = config_json.from_json(micro_json).unlock()
    config.optimizer.accumulate[kind.value] = num_chunks
    config.optimizer.warmup_steps = 0
    config.model.swin.drop_path_rate = 0.3
    config.loss.chunk_bytes = 4 * 257 * 2 * 8  # several chunks of concepts
    model = detclip.from_config(config.model)
    shapes = train_state.param_shapes(model, context_length=16)
    tx = optax.chain(recorder(), make_optimizer(config.optimizer, shapes, 100))
    mesh = sharding.make_mesh(fsdp=fsdp, devices=jax.devices()[:num_devices])
    placed = train_state.state_shardings(mesh, tx, shapes, ema=False)

    new = jax.jit(functools.partial(train_state.create, tx=tx, ema=False), out_shardings=placed)
    step = train_step.make_step(kind, model=model, tx=tx, config=config, canvas=CANVAS, mesh=mesh)
    step = jax.jit(step, donate_argnums=0, out_shardings=(placed, NamedSharding(mesh, sharding.REPLICATED)))
    return config, new, step, mesh


@functools.cache
def towers(micro_json):
    config, *_ = compiled(micro_json, Kind.DETECTION, 8, 2, 2)
    return jit_towers(detclip.from_config(config.model))


@functools.cache
def one_step(micro_json, kind):
    """Returns (state after one step on eight devices in two chunks, metrics)."""
    _, new, step, mesh = compiled(micro_json, kind, 8, 2, 2)
    with jax.set_mesh(mesh):
        state, metrics = step(new(trained_params(micro_json)), sharding.to_global(batch_of(kind), mesh))
    return jax.device_get(state), {name: float(value) for name, value in metrics.items()}


@pytest.mark.slow
@pytest.mark.parametrize("kind", Kind)
def test_eight_devices_in_chunks_equal_the_oracle(micro, kind):
    micro_json = config_json.to_json(micro)
    config, *_ = compiled(micro_json, kind, 8, 2, 2)
    params = trained_params(micro_json)
    state, metrics = one_step(micro_json, kind)
    loss, expected, grads = expected_step(
        towers(micro_json), params, batch_of(kind), kind=kind, config=config, canvas=CANVAS, step=0, num_devices=8,
        num_chunks=2,
    )  # fmt: skip
    assert metrics["loss"] == pytest.approx(loss, rel=1e-6)
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, rel=1e-5), name
    assert_same_gradients(state.opt_state[0], grads)
    # the update is the optimizer's, as on one device
    tx = make_optimizer(config.optimizer, params, 100)
    updates, _ = jax.jit(tx.update)(state.opt_state[0], tx.init(params), params)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6),
                 state.params, optax.apply_updates(params, updates))  # fmt: skip


def memory(micro, *settings):
    """Returns the compiler's account of a step on pairs, in bytes a device, and the bytes of the whole state."""
    micro_json = config_json.to_json(micro)
    _, new, step, mesh = compiled(micro_json, Kind.IMAGE_TEXT, *settings)
    with jax.set_mesh(mesh):
        state, batch = new(fresh_params(micro_json)), sharding.to_global(batch_of(Kind.IMAGE_TEXT), mesh)
        account = step.lower(state, batch).compile().memory_analysis()
    return account, sum(x.nbytes for x in jax.tree.leaves(state))


@pytest.mark.slow
def test_the_state_is_updated_in_place_and_chunks_save_memory(micro):
    split, state = memory(micro, 8, 2, 2)
    assert split.alias_size_in_bytes < 0.52 * state
    with stand_in.installed():
        micro.name = "stand-in"  # what is compiled is shared by configuration
        (whole, state), (chunked, _) = (memory(micro, *settings) for settings in ((1, 1, 1), (1, 4, 1)))
    assert whole.alias_size_in_bytes == pytest.approx(state, rel=0.01)  # donated, and all of it used again
    assert chunked.temp_size_in_bytes < 0.6 * whole.temp_size_in_bytes


@pytest.mark.slow
def test_each_kind_reaches_the_parameters_it_should(micro):
    grads = {kind: one_step(config_json.to_json(micro), kind)[0].opt_state[0] for kind in Kind}
    moved = {
        kind: {param_name(path) for path, grad in jax.tree_util.tree_leaves_with_path(tree) if np.any(grad)}
        for kind, tree in grads.items()
    }
    everything = {param_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(grads[Kind.DETECTION])}
    outputs = {
        name for name in everything if name.startswith(("head/box_deltas", "head/centerness", "head/level_scales"))
    }
    assert len(outputs) >= 4, sorted(everything)
    assert moved[Kind.DETECTION] == everything
    # neither grounding boxes (too inaccurate) nor pairs (none at all) train boxes and centerness; but both reach the
    # regression tower, through the offsets of the deformable layer
    assert moved[Kind.GROUNDING] == everything - outputs
    high = {name for name in everything if name.startswith(("fpn/output6", "fpn/output7"))}  # no proposal lies there
    assert moved[Kind.IMAGE_TEXT] | high == everything - outputs - {"logit_bias"}  # it cancels in the softmax


@pytest.mark.slow
def test_padding_does_not_blow_up_the_gradient_of_a_fresh_model(micro):
    """Padded patches are all alike, and layer norms divide by their spread."""
    micro_json = config_json.to_json(micro)
    _, new, step, mesh = compiled(micro_json, Kind.DETECTION, 8, 2, 2)
    norms = []
    for extent in (96, 49):
        batch = batch_of(Kind.DETECTION)
        batch = batch._replace(extent=np.full_like(batch.extent, extent))
        with jax.set_mesh(mesh):
            _, metrics = step(new(fresh_params(micro_json)), sharding.to_global(batch, mesh))
        norms.append(float(metrics["grad_norm"]))
    assert norms[1] < 20 * norms[0], norms


def test_towers_are_asked_for_what_a_step_needs(micro):
    calls = []

    class Model:
        def apply(self, variables, *arguments, method, **options):
            calls.append((variables, arguments, method, options))
            return (2.0, -4.0) if method == "logit_parameters" else "encoded"

    program = train_step.Program(Kind.DETECTION, Model(), micro, (8, 8), None)
    table = types.SimpleNamespace(concept_tokens="tokens", concept_text=None, class_names=None)
    assert program.encode_concepts("params", table) == (("encoded", 2.0, -4.0), {})
    known = types.SimpleNamespace(concept_tokens="tokens", concept_text="known", class_names=None)
    assert program.encode_concepts("params", known) == (("known", 2.0, -4.0), {})
    batch = types.SimpleNamespace(image="image", extent="extent")
    assert program.encode_images("params", batch, "key") == "encoded"
    assert calls == [
        ({"params": "params"}, ("tokens",), "encode_text", {}),
        ({"params": "params"}, (), "logit_parameters", {}),
        ({"params": "params"}, (), "logit_parameters", {}),
        ({"params": "params"}, ("image", "extent"), "encode_image", {"train": True, "rngs": {"dropout": "key"}}),
    ]
    assert program.num_chunks == micro.optimizer.accumulate.detection


@pytest.mark.parametrize("what", ["class names", "closed vocabulary", "tokens", "known texts"])
def test_what_has_no_lengths_is_encoded_whole(micro, what):
    class Model:
        def apply(self, variables, *arguments, method, **options):
            return (2.0, -4.0) if method == "logit_parameters" else np.full((3, 5), len(method))

    micro.optimizer.text_lengths.image_text = ((8, 0.5),)
    if what == "closed vocabulary":
        micro.model.text.classes = ("a", "b")
    program = train_step.Program(Kind.IMAGE_TEXT, Model(), micro, (8, 8), None)
    names, known = np.ones(3, bool) if what == "class names" else None, np.zeros((3, 5))
    table = types.SimpleNamespace(
        concept_tokens=np.zeros((4, 16), np.int32), concept_text=known if what == "known texts" else None,
        class_names=names,
    )  # fmt: skip
    concepts, metrics = program.encode_concepts("params", table, every_token=what == "tokens")
    assert metrics == {}
    expected = {"tokens": len("encode_tokens"), "known texts": 0}.get(what, len("encode_text"))
    np.testing.assert_array_equal(concepts.text, np.full((3, 5), expected))
