"""The loop's small decisions: what is due, which step was best, what is traced."""

import types

import pytest

from detclipv2_jax import config as config_lib
from detclipv2_jax import train
from detclipv2_jax.data.schema import Kind
from detclipv2_jax.runs.order import StepOrder


def test_what_is_due():
    assert [step for step in range(10) if train.due(step, 3)] == [0, 3, 6, 9]
    assert not any(train.due(step, 0) for step in range(3))


def run_of(*, every_epochs=0, every_steps=0, evaluator="there is one"):
    """Returns what decisions need of a run of five epochs, the first of 3 steps, the others of 5."""
    config = config_lib.base()
    config.eval.every_epochs, config.eval.every_steps, config.eval.monitor = every_epochs, every_steps, "AP50"
    order = StepOrder([3, 2], epochs=5, seed=0, from_epochs=[0, 1])
    return types.SimpleNamespace(config=config, order=order, evaluator=evaluator)


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"every_epochs": 1}, [3, 8, 13, 18, 23]),
        ({"every_epochs": 2}, [8, 18]),
        ({"every_steps": 10}, [10, 20]),
        ({"every_steps": 10, "every_epochs": 2}, [8, 10, 18, 20]),
        ({}, []),
        ({"every_epochs": 1, "evaluator": None}, []),
    ],
)
def test_evaluations_come_at_the_ends_of_epochs_or_every_few_steps(options, steps):
    run = run_of(**options)
    assert run.order.total_steps == 23
    assert [step for step in range(24) if train.evaluation_due(run, step)] == steps


def test_the_best_step_is_the_first_with_the_best_monitored_score():
    scores = {20: {"AP": 0.9, "AP50": 0.5}, 5: {"AP": 0.1, "AP50": 0.7}, 10: {"AP": 0.2, "AP50": 0.7}}
    assert train.best_step(run_of(), scores) == 5


def test_traced_steps_come_after_the_first_and_before_the_end():
    after = train.PROFILE_AFTER_STEPS
    assert train.profiled_steps(100, 1000, 3) == range(100 + after, 103 + after)
    assert train.profiled_steps(0, after, 3) == range(after - 3, after)  # a short run: its last steps
    assert train.profiled_steps(5, 7, 3) == range(5, 7)
    assert not train.profiled_steps(0, 1000, 0)


def test_only_whole_checkpoints_are_continued_from(tmp_path):
    assert not train.has_checkpoint(tmp_path)
    (tmp_path / "checkpoints" / "7.partial").mkdir(parents=True)
    assert not train.has_checkpoint(tmp_path)
    (tmp_path / "checkpoints" / "7").mkdir()
    assert train.has_checkpoint(tmp_path)


def test_the_order_of_a_run_follows_its_configuration():
    config = config_lib.base()
    config.epochs, config.num_steps, config.grounding.from_epoch = 5, 7, 1
    kinds = (Kind.DETECTION, Kind.GROUNDING)
    streams = [
        types.SimpleNamespace(num_batches=n, weight=w, kind=k)
        for n, w, k in zip((4, 3), (1.0, 2.0), kinds, strict=True)
    ]
    order = train.make_order(config, streams)
    assert (order.total_steps, order.num_steps) == (5 * 4 + 4 * 6, 7)
    config.seed += 1
    other = train.make_order(config, streams)
    assert [order.draw(step) for step in range(44)] != [other.draw(step) for step in range(44)]


def test_a_step_beyond_the_run_is_not_replayed():
    with pytest.raises(ValueError, match="--replay=24: the run has 23 steps"):
        train.replay_step(run_of(), 24)
