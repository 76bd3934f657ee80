"""Parameter groups, learning rate and update against a NumPy AdamW."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from detclipv2_jax import train_state
from detclipv2_jax.models import detclip
from detclipv2_jax.optimizer import assign_groups, learning_rate, make_optimizer, param_name


def names_of_group(config, *, factor=None, decay=None):
    shapes = train_state.param_shapes(detclip.from_config(config.model), context_length=16)
    assigned = assign_groups(shapes, config.optimizer.groups)
    groups = config.optimizer.groups
    return {
        param_name(path)
        for path, index in jax.tree_util.tree_leaves_with_path(assigned)
        if (factor is None or groups[index][1] == factor) and (decay is None or groups[index][2] == decay)
    }


def test_the_text_tower_and_nothing_else_has_a_tenth_of_the_learning_rate(micro):
    everything = names_of_group(micro)
    assert names_of_group(micro, factor=0.1) == {name for name in everything if name.startswith("text_encoder/")}


def test_kernels_decay_and_norms_biases_tables_and_scales_do_not(micro):
    decayed, kept = names_of_group(micro, decay=True), names_of_group(micro, decay=False)
    assert {name.rsplit("/", 1)[-1] for name in decayed} <= {"kernel"}, decayed
    assert not {name for name in kept if name.endswith("/kernel")}
    assert {"logit_scale", "logit_bias"} <= kept
    assert any(name.endswith("relative_position_table") for name in kept)


def test_a_parameter_in_no_group_is_named():
    with pytest.raises(ValueError, match=r"1 parameters match no regex .* head/kernel"):
        assign_groups({"head": {"kernel": 0}, "swin": {"bias": 0}}, ((r"swin/.*", 1.0, True),))


def test_learning_rate_warms_up_linearly_and_ends_at_zero(micro):
    micro.optimizer.warmup_steps = 10
    rate = learning_rate(micro.optimizer, 110)
    peak = micro.optimizer.learning_rate
    assert [float(rate(step)) / peak for step in (0, 5, 10, 60, 110)] == pytest.approx([0, 0.5, 1, 0.5, 0], abs=1e-6)


def test_update_is_adamw_with_factors_and_masked_decay(micro):
    config = micro.optimizer
    config.clip_norm, config.warmup_steps, config.schedule = 0.0, 0, "constant"
    config.groups = ((r"slow/.*", 0.1, True), (r".*bias", 1.0, False), (r".*", 1.0, True))
    rng = np.random.default_rng(0)
    params = {
        "slow": {"kernel": rng.normal(size=3)},
        "fast": {"kernel": rng.normal(size=3), "bias": rng.normal(size=3)},
    }
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    tx = make_optimizer(config, params, 100)
    state = tx.init(params)
    expected = jax.tree.map(np.asarray, params)
    moments = jax.tree.map(lambda x: (np.zeros(3), np.zeros(3)), params)
    for step in range(1, 4):
        grads = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=3), jnp.float32), params)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        for outer, inner, factor, decay in (
            ("slow", "kernel", 0.1, 1),
            ("fast", "kernel", 1, 1),
            ("fast", "bias", 1, 0),
        ):
            gradient = np.asarray(grads[outer][inner])
            m, v = moments[outer][inner]
            m = config.b1 * m + (1 - config.b1) * gradient
            v = config.b2 * v + (1 - config.b2) * gradient**2
            moments[outer][inner] = (m, v)
            adam = m / (1 - config.b1**step) / (np.sqrt(v / (1 - config.b2**step)) + 1e-8)
            old = expected[outer][inner]
            expected[outer][inner] = old - config.learning_rate * factor * (adam + decay * config.weight_decay * old)
    for path, value in jax.tree_util.tree_leaves_with_path(params):
        wanted = expected[path[0].key][path[1].key]
        np.testing.assert_allclose(value, wanted, rtol=1e-5, err_msg=param_name(path))
