"""The loop's small decisions: what is due, which step was best, what is traced, reported, kept and compiled first."""

import signal
import types

import jax
import numpy as np
import pytest

from detclipv2_jax import config as config_lib
from detclipv2_jax import train
from detclipv2_jax.data.schema import Kind
from detclipv2_jax.runs import sharding
from detclipv2_jax.runs.order import StepOrder
from detclipv2_jax.runs.state import TrainState


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
    config.mixing = ("temperature", 1e9)  # kinds are even: 5 of 10 steps an epoch each
    assert train.make_order(config, streams).epoch_ends.tolist() == [5, 15, 25, 35, 45]
    config.mixing = ("proportional", 1.0)
    config.seed += 1
    other = train.make_order(config, streams)
    assert [order.draw(step) for step in range(44)] != [other.draw(step) for step in range(44)]


def test_a_step_beyond_the_run_is_not_replayed():
    with pytest.raises(ValueError, match="--replay=24: the run has 23 steps"):
        train.replay_step(run_of(), 24)


@pytest.mark.parametrize("logged", [True, False])
@pytest.mark.parametrize("stop", [True, False])
@pytest.mark.parametrize("finite", [True, False])
def test_what_is_written_of_a_step_and_what_stops_a_run(logged, stop, finite, caplog):
    written, shown, left = [], [], []
    writer = types.SimpleNamespace()
    writer.write = lambda step, values, *, seconds_left: written.append((step, values)) or left.append(seconds_left)
    progress = types.SimpleNamespace(
        flops=5.0, show=shown.append, rates=lambda: {"rate": 2.0}, seconds_left=lambda: 8.0
    )
    values = {"loss": 0.5 if finite else np.nan, "num_concepts": 7.0, "finite": float(finite)}
    values |= {"grad_norm": 3.0, "grad_norm_fpn": 1.0 if finite else np.inf, "grad_norm_swin": 2.0}

    def finish():
        train.finish_step(
            9, "detection", values, logged=logged, stop=stop, cost=lambda num: 10 * num, examples=lambda: "a: 1, 2",
            writer=writer, progress=progress,
        )  # fmt: skip

    told = (
        "step 9 was not applied, its loss or gradient is not finite: detection/grad_norm 3, detection/loss nan, "
        "detection/num_concepts 7; gradients that are not finite: fpn; examples of process 0: a: 1, 2"
    )
    if finite or not stop:
        finish()
    else:
        with pytest.raises(train.NonFiniteError) as error:
            finish()
        assert str(error.value) == f"{told}. --replay=9 runs it again, config.nonfinite=skip goes on past such steps"
    assert (told in caplog.text) == (not finite and not stop)
    expected = {f"detection/{name}": value for name, value in values.items() if name != "finite"}
    assert progress.flops == 75.0
    np.testing.assert_equal(shown, [expected])
    assert left == [8.0] * len(written)
    np.testing.assert_equal(written, [(9, expected | {"rate": 2.0})] if logged or not finite else [])


@pytest.mark.parametrize("keep_best", [True, False])
def test_the_best_state_so_far_is_saved(keep_best):
    done = []
    kept = types.SimpleNamespace(
        mark_best=lambda step, *, score, value: done.append((step, score, value)),
        save=lambda step, state: done.append((step, state)),
    )
    run = run_of()
    run.config.checkpoint.keep_best, run.config.optimizer.schedule = keep_best, "constant"
    run.config.optimizer.warmup_steps, run.config.optimizer.stop_patience = 0, 2
    scores = {}
    for step, value, over in ((5, 0.5, False), (10, 0.7, False), (15, 0.7, False), (20, 0.6, True)):
        scores[step] = {"AP": 1 - value, "AP50": value}
        state, decision = train._conclude(run, f"state {step}", scores, kept, step=step)
        assert (state, decision) == (f"state {step}", (1.0, over))
    best = [(5, "AP50", 0.5), (5, "state 5"), (10, "AP50", 0.7), (10, "state 10"), *[(10, "AP50", 0.7)] * 2]
    assert done == (best if keep_best else [])


def test_steps_are_compiled_in_the_order_of_their_first_use(monkeypatch):
    monkeypatch.setattr(sharding, "batch_shapes", lambda config, kind, *_, **sizes: (kind, sizes["table_rows"]))
    compiled = []

    def step(key):
        def lower(state, batch):
            return types.SimpleNamespace(compile=lambda: compiled.append((key, state["a"].shape, batch)))

        return types.SimpleNamespace(lower=lower)

    keys = [
        (Kind.DETECTION, (64, 64)),
        (Kind.GROUNDING, (64, 96)),
        (Kind.DETECTION, (64, 64)),
        (Kind.IMAGE_TEXT, (8, 8)),
    ]
    small = Kind.GROUNDING, (32, 48)  # the second stream is on two canvases, on this one at its positions 1, 4, 7
    streams = [
        types.SimpleNamespace(
            kind=kind,
            canvases=(canvas, small[1])[: 1 + (i == 1)],
            canvas_of=lambda n, i=i, canvas=canvas: small[1] if i == 1 and n % 3 == 1 else canvas,
            capacities={"table": 10 + i},
            num_verified=0,
            class_names=i == 3,
        )
        for i, (kind, canvas) in enumerate(keys)
    ]
    order = types.SimpleNamespace(
        upcoming=lambda start: {3: [1, 2, 0], 9: []}[start], next_positions=lambda start: [0, 7, 2, 0]
    )
    keys.append(small)
    run = types.SimpleNamespace(streams=streams, order=order, config=None, mesh=sharding.make_mesh())
    steps = {key: step(key) for key in keys}
    ahead = train.compile_ahead(run, steps, {"a": jax.numpy.zeros((2, 3))}, start=3)
    for key in keys:
        ahead.wait(key, what="it")
    ahead.close()
    assert compiled == [
        (small, (2, 3), (Kind.GROUNDING, 11)),
        (keys[1], (2, 3), (Kind.GROUNDING, 11)),
        (keys[0], (2, 3), (Kind.DETECTION, 12)),
    ]
    train.compile_ahead(run, steps, {}, start=9).close()
    assert len(compiled) == 3


def test_averaged_parameters_are_scored_where_they_are_kept():
    written, seen = [], []
    writer = types.SimpleNamespace(write=lambda step, values: written.append((step, values)))

    def evaluator(params, *, step):
        seen.append((params, step))
        return {"AP": 0.5}

    for ema, params in ((None, "own"), ("averaged", "averaged")):
        state = TrainState(np.int32(7), "own", None, ema)
        assert train._evaluate_state(evaluator, state, writer, kind="forgetting") == {"AP": 0.5}
        assert seen.pop() == (params, 7)
        assert written.pop() == (7, {"forgetting/AP": 0.5})


def test_checks_go_on_after_a_problem_and_stops_are_named():
    problems = []
    for error in ("first", "second"):
        with train.listed(problems):
            raise ValueError(error)
    with train.listed(problems):
        pass
    with pytest.raises(TypeError), train.listed(problems):
        raise TypeError
    assert problems == ["first", "second"]
    for number, name in ((signal.SIGINT, "Ctrl-C"), (signal.SIGTERM, "SIGTERM")):
        stopped = train.Preempted(number, 12)
        assert (str(stopped), stopped.number) == (f"stopped by {name} after step 12, which is saved", number)
