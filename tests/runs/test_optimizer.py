"""Parameter groups, learning rate and update against a NumPy AdamW."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from detclipv2_jax.models import detclip
from detclipv2_jax.runs import state as train_state
from detclipv2_jax.runs.optimizer import (
    assign_groups,
    frozen_mask,
    learning_rate,
    make_optimizer,
    overview,
    param_name,
    verdict,
    with_rate_factor,
    without_frozen,
)


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


def test_ten_parameters_in_no_group_are_named():
    for num, more in ((10, False), (12, True)):
        with pytest.raises(ValueError, match=f"{num} parameters match no regex") as error:
            assign_groups({f"p{i:02d}": 0 for i in range(num)}, ())
        named = ", ".join(f"p{i:02d}" for i in range(10))
        assert f": {named}{' …' if more else ''}; add a group" in str(error.value)


def test_the_table_of_parameters():
    pytest.importorskip("clu")
    params = {"head": {"kernel": np.zeros((2, 3)), "kernel_two": np.zeros(4)}, "text": np.zeros((), np.float32)}
    groups = (("text", 0.1, False), ("head/.*", 1.0, True), (".*", 7.0, True))
    rows = overview(params, groups, frozen="head/kernel").splitlines()
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows if row.startswith("| ")][1:]
    assert cells == [
        ["head/kernel", "(2, 3)", "float64", "6", "frozen", "yes"],
        ["head/kernel_two", "(4,)", "float64", "4", "x 1", "yes"],
        ["text", "()", "float32", "1", "x 0.1", "no"],
    ]
    assert rows[-1] == "Total: 11"


def test_a_regex_matches_whole_names():
    with pytest.raises(ValueError, match="head/kernel"):
        assign_groups({"head": {"kernel": np.zeros(3)}}, (("head", 1.0, True),))


def test_learning_rate_warms_up_linearly_and_ends_at_zero(micro):
    micro.optimizer.warmup_steps = 10
    rate = learning_rate(micro.optimizer, 110)
    peak = micro.optimizer.learning_rate
    assert [float(rate(step)) / peak for step in (0, 5, 10, 60, 110)] == pytest.approx([0, 0.5, 1, 0.5, 0], abs=1e-6)


def test_a_run_shorter_than_its_warmup_only_warms_up(micro):
    micro.optimizer.warmup_steps = 10
    rate = learning_rate(micro.optimizer, 5)
    assert [float(rate(step)) for step in range(6)] == pytest.approx(
        [step / 10 * micro.optimizer.learning_rate for step in range(6)]
    )


def test_other_learning_rates(micro):
    c = micro.optimizer
    c.warmup_steps, c.decay_at, c.decay_factor, c.min_learning_rate = 10, (2 / 3, 11 / 12), 0.1, c.learning_rate / 50
    share = {}
    for c.schedule in ("cosine", "step", "plateau", "constant"):
        rate = learning_rate(c, 240)
        steps = (0, 5, 10, 159, 160, 219, 220, 240)
        share[c.schedule] = [float(rate(step)) / c.learning_rate for step in steps]
    assert share["step"] == pytest.approx([0, 0.5, 1, 1, 0.1, 0.1, 0.01, 0.01])
    assert share["plateau"] == share["constant"] == pytest.approx([0, 0.5, 1, 1, 1, 1, 1, 1])
    assert share["cosine"][-1] == pytest.approx(1 / 50)
    c.schedule = "step"  # after two thirds of a hundred steps, which is nearer to 67 than to 66
    assert [float(learning_rate(c, 100)(step)) / c.learning_rate for step in (66, 67)] == pytest.approx([1, 0.1])


def ways_down(scores, config):
    """Returns the verdict after each of the scores, given by epoch from 10 steps an epoch."""
    steps = [10 * (epoch + 1) for epoch in range(len(scores))]
    return [verdict(dict(zip(steps[: n + 1], scores, strict=False)), config) for n in range(len(scores))]


def test_plateaus_lower_the_rate_and_end_the_run(micro):
    c = micro.optimizer
    c.schedule, c.learning_rate, c.min_learning_rate, c.decay_factor = "plateau", 4e-5, 1e-8, 0.1
    c.patience, c.stop_patience, c.warmup_steps = 2, 3, 0
    #        gain gain same  2nd   gain  worse 2nd: down again …
    scores = [0.1, 0.2, 0.2, 0.1, 0.3, 0.3, 0.2] + [0.0] * 7
    found = ways_down(scores, c)
    smallest = 1e-8 / 4e-5  # 4e-9 would be below it
    factors = [1, 1, 1, 0.1, 0.1, 0.1, 1e-2, 1e-2, 1e-3, 1e-3, smallest, smallest, smallest, smallest]
    assert [decision.factor for decision in found] == pytest.approx(factors)
    assert [decision.over for decision in found] == [False] * 13 + [True]
    assert ways_down([*scores, 0.9], c)[-1].over  # what is over stays over
    rescued = ways_down([*scores[:12], 0.4, 0.0, 0.0, 0.0], c)
    assert [decision.over for decision in rescued[-4:]] == [False, False, False, True]
    c.stop_patience = 0
    assert not any(decision.over for decision in ways_down([0.0] * 50, c))
    # nothing is held against a run that still warms up: the first 5 epochs
    c.warmup_steps = 51
    assert [decision.factor for decision in ways_down([0.5] + [0.0] * 7, c)] == pytest.approx([1] * 6 + [0.1] * 2)
    # what is better than the one before is no gain if another was better still
    c.warmup_steps, c.patience = 0, 3
    factors = [decision.factor for decision in ways_down([0.5, 0.4, 0.45, 0.44, 0.1], c)]
    assert factors == pytest.approx([1, 1, 1, 0.1, 0.1])
    c.patience = 2
    # other schedules may end early too, and keep their rate
    c.schedule, c.stop_patience, c.warmup_steps = "cosine", 3, 0
    assert ways_down([0.1, 0, 0, 0], c) == [(1.0, False)] * 3 + [(1.0, True)]


def test_the_factor_of_a_plateau_scales_the_update(micro):
    config = micro.optimizer
    config.schedule, config.warmup_steps, config.groups = "plateau", 0, ((r".*", 1.0, True),)
    params = {"kernel": jnp.ones(3)}
    tx = make_optimizer(config, params, 100)
    state = tx.init(params)
    whole, _ = tx.update(params, state, params)
    part, after = tx.update(params, with_rate_factor(state, jnp.float32(0.1)), params)
    np.testing.assert_allclose(part["kernel"], 0.1 * whole["kernel"], rtol=1e-6)
    again, _ = tx.update(params, after, params)
    assert np.all(np.abs(again["kernel"]) < 0.2 * np.abs(whole["kernel"]))  # it stays


def test_what_is_frozen_has_no_moments_and_no_update(micro):
    config = micro.optimizer
    config.warmup_steps, config.schedule, config.clip_norm = 0, "plateau", 1.0
    config.groups = ((r".*bias", 1.0, False), (r".*", 0.1, True))
    rng = np.random.default_rng(0)
    tower = {"kernel": jnp.asarray(rng.normal(size=(3, 5)), jnp.float32), "bias": jnp.ones(7)}
    params = {"text_encoder": tower, "head": {"kernel": jnp.ones(11), "bias": jnp.ones(13)}}
    config.frozen = "text_encoder/.*"
    tx = make_optimizer(config, params, 100)
    state = tx.init(params)
    assert {x.shape for x in jax.tree.leaves(state)} == {(), (11,), (13,)}
    grads = jax.tree.map(lambda x: 100 * jnp.ones_like(x), params)
    updates, _ = jax.jit(tx.update)(without_frozen(grads, config.frozen), state, params)
    # as if the rest were everything, the norm that clips included
    config.frozen = ""
    rest = {"head": params["head"]}
    alone = make_optimizer(config, rest, 100)
    expected, _ = jax.jit(alone.update)({"head": grads["head"]}, alone.init(rest), rest)
    jax.tree.map(np.testing.assert_array_equal, updates["head"], expected["head"])
    after = optax.apply_updates(params, updates)
    jax.tree.map(np.testing.assert_array_equal, after["text_encoder"], tower)
    assert not any(np.any(x) for x in jax.tree.leaves(without_frozen(grads, "text_encoder/.*")["text_encoder"]))
    assert without_frozen(grads, "") is grads
    for config.frozen, which in (("text_tower/.*", "no parameter"), (".*", "all parameters")):
        with pytest.raises(ValueError, match=rf"optimizer.frozen '.*' matches {which}"):
            make_optimizer(config, params, 100)


@pytest.mark.parametrize("clip_norm", [0.0, 0.5])
def test_update_is_adamw_with_factors_masked_decay_schedule_and_clipping(micro, clip_norm):
    config = micro.optimizer
    config.clip_norm, config.warmup_steps, config.min_learning_rate = clip_norm, 2, 1e-4
    config.b1, config.b2 = 0.8, 0.97  # not optax's
    config.groups = ((r"slow/.*", 0.1, True), (r".*bias", 1.0, False), (r".*", 1.0, True))
    num_steps = 6
    rng = np.random.default_rng(0)
    # (factor on the learning rate, decay) of each parameter
    kinds = {"slow": {"kernel": (0.1, 1)}, "fast": {"kernel": (1, 1), "bias": (1, 0)}}
    draw = lambda scale: {x: {y: scale * rng.normal(size=3) for y in kinds[x]} for x in kinds}  # noqa: E731
    expected = draw(1.0)
    params = jax.tree.map(jnp.float32, expected)
    tx = make_optimizer(config, params, num_steps)
    state = tx.init(params)
    m, v = (jax.tree.map(np.zeros_like, expected) for _ in range(2))
    # gradients that are clipped, and one that is not: Adam would hide a factor that never changes
    for step, scale in enumerate((1.0, 0.01, 30.0, 1.0, 0.01, 3.0)):
        grads = draw(scale)
        updates, state = tx.update(jax.tree.map(jnp.float32, grads), state, params)
        params = optax.apply_updates(params, updates)
        norm = np.sqrt(sum(np.sum(x**2) for x in jax.tree.leaves(grads)))
        assert (norm > 0.5) == (scale > 0.1)
        cut = min(1.0, clip_norm / norm) if clip_norm else 1.0
        rate = config.learning_rate * step / 2
        if step >= 2:
            share = 0.5 * (1 + np.cos(np.pi * (step - 2) / (num_steps - 2)))
            rate = 1e-4 + (config.learning_rate - 1e-4) * share
        for outer, inner in (("slow", "kernel"), ("fast", "kernel"), ("fast", "bias")):
            gradient, (factor, decay) = cut * grads[outer][inner], kinds[outer][inner]
            m[outer][inner] = config.b1 * m[outer][inner] + (1 - config.b1) * gradient
            v[outer][inner] = config.b2 * v[outer][inner] + (1 - config.b2) * gradient**2
            adam = m[outer][inner] / (1 - config.b1 ** (step + 1))
            adam = adam / (np.sqrt(v[outer][inner] / (1 - config.b2 ** (step + 1))) + 1e-8)
            old = expected[outer][inner]
            expected[outer][inner] = old - rate * factor * (adam + decay * config.weight_decay * old)
    for path, value in jax.tree_util.tree_leaves_with_path(params):
        wanted = expected[path[0].key][path[1].key]
        np.testing.assert_allclose(value, wanted, rtol=1e-5, err_msg=param_name(path))


def test_what_a_regex_freezes():
    params = {"text_encoder": {"a": 1, "b": 2}, "head": {"text_encoder": 3}}
    assert frozen_mask(params, "") == {"text_encoder": {"a": False, "b": False}, "head": {"text_encoder": False}}
    found = frozen_mask(params, "text_encoder/.*")
    assert found == {"text_encoder": {"a": True, "b": True}, "head": {"text_encoder": False}}
    for regex, which in ((".*", "all parameters"), ("text_encoder", "no parameter")):
        with pytest.raises(ValueError, match=f"matches {which}"):
            frozen_mask(params, regex)
