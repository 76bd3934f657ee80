"""One step per kind of data: devices and chunks change nothing, gradients reach what they should."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from detclipv2_jax import config as config_lib
from detclipv2_jax import train_step
from detclipv2_jax.data.schema import Batch, Kind
from detclipv2_jax.models import detclip
from detclipv2_jax.runs import sharding
from detclipv2_jax.runs import state as train_state
from detclipv2_jax.runs.optimizer import make_optimizer, param_name

CANVAS = (64, 64)


def make_batch(kind, *, seed, b=16, n=3, t=32, m=3):
    """A batch in which every concept stands twice in the table, some rows are padding and one photo is smaller."""
    rng = np.random.default_rng(seed)
    corner, size = rng.uniform(0, 30, (b, n, 2)), rng.uniform(8, 30, (b, n, 2))
    concept = np.arange(t) // 2
    tokens = np.zeros((t, 16), np.int32)
    tokens[:, 0], tokens[:, 1], tokens[:, 2], tokens[:, 3] = 49406, 300 + concept, 500 + concept % 3, 49407
    n, m = (0, m) if kind is Kind.IMAGE_TEXT else (n, 0)
    extent = np.full((b, 2), 64, np.int32)
    extent[0] = (40, 64)
    return Batch(
        image=rng.integers(0, 255, (b, *CANVAS, 3)).astype(np.uint8),
        extent=extent,
        scale=np.ones((b, 2), np.float32),
        original_size=extent,
        image_mask=np.arange(b) < b - 1,
        example_id=np.arange(b, dtype=np.int32),
        boxes=np.concatenate([corner, corner + size], -1).astype(np.float32)[:, :n],
        box_mask=(rng.uniform(size=(b, n)) < 0.8),
        box_concepts=rng.integers(0, t - 2, (b, n)).astype(np.int32),
        concept_tokens=tokens,
        concept_mask=np.arange(t) < t - 2,
        concept_ids=np.stack([np.full(t, 7), concept], axis=1).astype(np.uint32),
        caption_concepts=rng.integers(0, t - 2, (b, m)).astype(np.int32),
        caption_mask=np.arange(m)[None] <= rng.integers(0, max(m, 1), (b, 1)),
    )


@functools.cache
def fresh_params(micro_json):
    """Returns initial parameters on the host; the same whatever a step is compiled for."""
    model = detclip.from_config(config_lib.from_json(micro_json).model)
    init = jax.jit(lambda key: train_state.init_params(model, key, context_length=16))
    return jax.device_get(init(jax.random.key(0)))


@functools.cache
def compiled(micro_json, kind, num_devices, num_chunks, fsdp, ema_decay):
    """Returns (maker of a fresh state, jitted step, mesh); shared by the tests because compiling is what takes time."""
    config = config_lib.from_json(micro_json).unlock()
    config.optimizer.accumulate[kind.value] = num_chunks
    config.optimizer.ema_decay = ema_decay
    config.loss.chunk_bytes = 4 * 85 * 16 * 8  # several chunks of concepts
    model = detclip.from_config(config.model)
    shapes = train_state.param_shapes(model, context_length=16)
    tx = make_optimizer(config.optimizer, shapes, 100)
    mesh = sharding.make_mesh(fsdp=fsdp, devices=jax.devices()[:num_devices])
    placed = train_state.state_shardings(mesh, tx, shapes, ema=ema_decay > 0)

    new = jax.jit(functools.partial(train_state.create, tx=tx, ema=ema_decay > 0), out_shardings=placed)
    step = train_step.make_step(kind, model=model, tx=tx, config=config, canvas=CANVAS, mesh=mesh)
    step = jax.jit(step, donate_argnums=0, out_shardings=(placed, NamedSharding(mesh, sharding.REPLICATED)))
    return lambda: new(fresh_params(micro_json)), step, mesh


def run(micro, kind, *, num_devices=1, num_chunks=1, fsdp=1, num_steps=5, ema_decay=0.0, poison=None):
    create, step, mesh = compiled(config_lib.to_json(micro), kind, num_devices, num_chunks, fsdp, ema_decay)
    state, history = create(), []
    with jax.set_mesh(mesh):
        for i in range(num_steps):
            if poison is not None:
                state = poison(state)
            state, metrics = step(state, sharding.to_global(make_batch(kind, seed=i), mesh))
            history.append({name: float(value) for name, value in metrics.items()})
    return jax.device_get(state), history


@pytest.mark.slow
@pytest.mark.parametrize("kind", Kind)
def test_eight_devices_in_chunks_agree_with_one_device(micro, kind):
    one, expected = run(micro, kind)
    other, history = run(micro, kind, num_devices=8, num_chunks=2, fsdp=2)
    for step, (ours, theirs) in enumerate(zip(history, expected, strict=True)):
        for name, value in theirs.items():
            assert ours[name] == pytest.approx(value, rel=1e-5, abs=1e-6), (step, name)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(one.params), jax.tree.leaves(other.params), strict=True
    ):
        # Adam turns a rounding error of a gradient that is zero in theory into one of a whole step
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-4, err_msg=param_name(path))


def memory(micro, kind, *settings):
    """Returns the compiler's account of a step, in bytes a device."""
    create, step, mesh = compiled(config_lib.to_json(micro), kind, *settings, 0.0)
    with jax.set_mesh(mesh):
        lowered = step.lower(create(), sharding.to_global(make_batch(kind, seed=0), mesh))
    return lowered.compile().memory_analysis()


@pytest.mark.slow
def test_the_state_is_updated_in_place_and_chunks_save_memory(micro):
    create, *_ = compiled(config_lib.to_json(micro), Kind.IMAGE_TEXT, 1, 1, 1, 0.0)
    state = sum(x.nbytes for x in jax.tree.leaves(create()))
    whole, split, chunked = (memory(micro, Kind.IMAGE_TEXT, *s) for s in ((1, 1, 1), (8, 2, 2), (1, 4, 1)))
    assert whole.alias_size_in_bytes == pytest.approx(state, rel=0.01)  # donated, and all of it used again
    assert split.alias_size_in_bytes < 0.52 * whole.alias_size_in_bytes
    assert chunked.temp_size_in_bytes < 0.6 * whole.temp_size_in_bytes


@pytest.mark.slow
@pytest.mark.parametrize("kind", Kind)
def test_loss_falls_on_one_batch(micro, kind):
    create, step, mesh = compiled(config_lib.to_json(micro), kind, 1, 1, 1, 0.0)
    state, losses = create(), []
    with jax.set_mesh(mesh):
        batch = sharding.to_global(make_batch(kind, seed=0), mesh)
        for _ in range(30):
            state, metrics = step(state, batch)
            losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.9 * losses[0]


def moved(micro, kind):
    """Returns the names of parameters that gradients reach, read from Adam's first moments.

    Of three steps: the first has learning rate zero, and nothing goes through the offsets while they are zero.
    """
    state, _ = run(micro, kind, num_steps=3)
    moments = next(s for s in jax.tree.leaves(state.opt_state, is_leaf=lambda s: hasattr(s, "mu")) if hasattr(s, "mu"))
    return {param_name(path) for path, mu in jax.tree_util.tree_leaves_with_path(moments.mu) if np.any(mu != 0)}


@pytest.mark.slow
def test_each_kind_reaches_the_parameters_it_should(micro):
    everything = {
        param_name(path)
        for path, _ in jax.tree_util.tree_leaves_with_path(
            train_state.param_shapes(detclip.from_config(micro.model), context_length=16)
        )
    }
    outputs = {
        name for name in everything if name.startswith(("head/box_deltas", "head/centerness", "head/level_scales"))
    }
    assert len(outputs) >= 4, sorted(everything)
    detection, grounding, pairs = (moved(micro, kind) for kind in Kind)
    assert outputs <= detection
    # neither grounding boxes (too inaccurate) nor pairs (none at all) train boxes and centerness
    assert not outputs & grounding
    assert not outputs & pairs
    # but both reach the regression tower, through the offsets of the deformable layer
    tower = {name for name in everything if name.startswith("head/box_tower")}
    assert tower
    assert tower <= grounding
    assert tower <= pairs
    assert "logit_bias" not in pairs  # it cancels in the softmax
    assert "logit_bias" in grounding


@pytest.mark.slow
def test_a_gradient_that_is_not_finite_changes_nothing_but_the_step(micro):
    def poison(state):
        return state.replace(params=state.params | {"logit_scale": jnp.asarray(jnp.nan)})

    before, _ = run(micro, Kind.DETECTION, num_steps=0, ema_decay=0.0)
    after, history = run(micro, Kind.DETECTION, num_steps=1, poison=poison)
    assert history[0]["finite"] == 0.0
    assert after.step == 1
    after = after.replace(params=after.params | {"logit_scale": before.params["logit_scale"]}, step=before.step)
    jax.tree.map(np.testing.assert_array_equal, before, after)


@pytest.mark.slow
def test_padding_does_not_blow_up_the_gradient_of_a_fresh_model(micro):
    """Padded patches are all alike, and layer norms divide by their spread."""
    create, step, mesh = compiled(config_lib.to_json(micro), Kind.DETECTION, 1, 1, 1, 0.0)
    norms = []
    for extent in (64, 33):
        batch = make_batch(Kind.DETECTION, seed=0)
        batch = batch._replace(extent=np.full_like(batch.extent, extent))
        with jax.set_mesh(mesh):
            _, metrics = step(create(), sharding.to_global(batch, mesh))
        norms.append(float(metrics["grad_norm"]))
    assert norms[1] < 20 * norms[0], norms
