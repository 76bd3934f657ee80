"""The loop's small decisions: what is due, which step was best, what is traced, reported, kept and compiled first."""

import contextlib
import dataclasses
import functools
import itertools
import signal
import types

import jax
import numpy as np
import optax
import pytest

from detclipv2_jax import chips, session, train
from detclipv2_jax import config as config_lib
from detclipv2_jax.data.schema import Kind
from detclipv2_jax.inference.detector import Detector
from detclipv2_jax.runs import sharding
from detclipv2_jax.runs import state as train_state
from detclipv2_jax.runs.order import Draw, StepOrder
from detclipv2_jax.runs.state import TrainState
from detclipv2_jax.visualize import charts


def test_steps_and_prediction_are_compiled_with_options_of_the_platform(monkeypatch):
    monkeypatch.setitem(chips.COMPILER_OPTIONS, "cpu", {"xla_cpu_enable_fast_math": False})
    sharding.compiler_options.cache_clear()
    mesh = sharding.make_mesh()
    assert sharding.compiler_options(mesh)
    seen = {}
    monkeypatch.setattr(jax, "jit", lambda function, **settings: seen.setdefault(function.__name__, settings))
    monkeypatch.setattr(train.train_step, "make_step", lambda *_, **__: lambda state, batch: state)
    nothing = dict.fromkeys(("model", "tx", "config", "shardings"))
    train.jitted_step(types.SimpleNamespace(**nothing, mesh=mesh), None, ())
    Detector(None, mesh=mesh)
    sharding.compiler_options.cache_clear()
    assert [seen[name]["compiler_options"] for name in ("<lambda>", "_predict")] == [
        {"xla_cpu_enable_fast_math": False}
    ] * 2


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


class Loop:
    """A run of five steps whose parts are stand-ins that note what they are told; step 3 is a batch of pairs."""

    def __init__(self, monkeypatch, tmp_path, *, start=0, scores=(), before=(), stop_at=None, compiled=True, **changes):
        self.done, self.config, self.scores = [], config_lib.base(), iter(scores)
        self.config.epochs, self.config.checkpoint.every_steps = 1, 2
        self.config.log_every_steps = self.config.pictures_every_steps = 2
        self.config.eval.monitor, self.config.optimizer.warmup_steps = "AP", 0
        for key, value in changes.items():
            section, _, last = key.rpartition("__")
            (self.config[section] if section else self.config)[last] = value
        kinds = (Kind.DETECTION, Kind.IMAGE_TEXT)
        self.streams = [types.SimpleNamespace(
            kind=kind, name=f"{kind.value}/8x8", canvases=((8, 8),), canvas_of=lambda n: (8, 8), batch_size=4,
            overflow={"cut": i}, counters={}, examples=[i], named=str,
            iterate=functools.partial(self.read, i),
        ) for i, kind in enumerate(kinds)]  # fmt: skip
        order = StepOrder([4, 1], epochs=1, seed=0)
        drawn = [Draw(0, 0), Draw(0, 1), Draw(1, 0), Draw(0, 2), Draw(0, 3)]
        monkeypatch.setattr(order, "draw", drawn.__getitem__)
        evaluator = functools.partial(self.evaluate) if scores else None
        if evaluator:
            evaluator.recorded = lambda step: None
        self.run = types.SimpleNamespace(
            config=self.config, mesh=sharding.make_mesh(), order=order, streams=self.streams, workdir=tmp_path,
            evaluator=evaluator, second=None, with_text=lambda params, batch: ("with text", batch),
        )  # fmt: skip
        self.stop_at, self.compiled, self.start, self.before = stop_at, compiled, start, before
        self.patch(monkeypatch)

    def note(self, *what):
        self.done.append(what)

    def read(self, stream, position):
        self.note("opened", stream, position)
        try:
            for n in itertools.count(position):
                yield stream, n
        finally:
            self.note("closed", stream)

    def evaluate(self, params, *, step):
        self.note("scored", step)
        return {"AP": next(self.scores)}

    def step(self, key, state, batch):
        self.note("step", int(state.step), key[0].value, batch)
        return dataclasses.replace(state, step=state.step + 1), {"loss": 1.0, "finite": 1.0}

    def patch(self, monkeypatch):
        state = TrainState(np.int32(self.start), {"a": np.zeros(3)}, None, None)
        checkpoints = types.SimpleNamespace(
            close=lambda: self.note("checkpoints closed"), latest_step=lambda: self.start or None,
            save=lambda step, state: self.note("saved", step, int(state.step)),
            mark_best=lambda step, **_: self.note("best", step),
            restore=lambda abstract, *, step: dataclasses.replace(state, step=np.int32(step)),
        )  # fmt: skip
        ahead = types.SimpleNamespace(
            ready=lambda key: self.compiled, wait=lambda key, *, what: self.note("waited", what),
            close=lambda *, wait: self.note("compiler closed", wait),
        )  # fmt: skip
        writer = types.SimpleNamespace(
            recorded=lambda kind: list(self.before) if kind == "eval" else [], close=lambda: self.note("writer closed"),
            write=lambda step, values, **_: self.note("wrote", step, sorted(values)),
        )  # fmt: skip

        def finish(step, kind, metrics, *, logged, stop, examples, **_):
            self.note("rate", round(float(metrics["learning_rate"]) / self.config.optimizer.learning_rate, 6))
            self.note("read", step, kind, logged, stop, examples(), metrics["cut"])

        conclude = train._conclude

        def noted_conclusion(*arguments, step):
            self.note("concluded", step)
            return conclude(*arguments, step=step)

        @contextlib.contextmanager
        def stop_signal():
            yield lambda step: signal.SIGTERM if step == self.stop_at else 0

        for name, stand_in in {
            "checkpoints_lib.Checkpoints": lambda workdir, *, keep: checkpoints,
            "jitted_step": lambda run, *key: functools.partial(self.step, key),
            "compile_ahead": lambda run, steps, state, *, start: ahead,
            "_abstract_state": lambda run: None,
            "initial_state": lambda run, checkpoints: state,
            "overview": lambda *_, **__: "table",
            "MetricsWriter": lambda *_, **__: writer,
            "finish_step": finish,
            "_conclude": noted_conclusion,
            "optimizer_lib.with_rate_factor": lambda state, factor: self.note("factor", round(float(factor), 6)),
            "step_cost": lambda *_: None,
            "flops.peak_per_second": lambda mesh: None,
            "sharding.to_global": lambda batch, mesh: batch,
            "processes.barrier": lambda name, *, note, timeout_s: self.note("all are here", note),
            "processes.stop_signal": stop_signal,
            "draw_batch": lambda run, stream, batch, state, *, step, aligned: self.note("drawn", step, aligned),
        }.items():
            *place, last = name.split(".")
            monkeypatch.setattr(getattr(train, place[0]) if place else train, last, stand_in)
        monkeypatch.setattr(charts, "curves", lambda lines, *, path: self.note("curves"))

    def of(self, *names):
        """Returns what was noted under some names, in order."""
        return [what for what in self.done if what[0] in names]


def test_every_step_is_read_after_the_next_one_is_sent_and_before_it_is_saved(monkeypatch, tmp_path):
    loop = Loop(monkeypatch, tmp_path)
    assert train.train(loop.run) == {}
    assert [what[:2] for what in loop.of("step", "read", "saved")] == [
        ("step", 0), ("step", 1), ("read", 1), ("read", 2), ("saved", 2), ("step", 2), ("step", 3), ("read", 3),
        ("read", 4), ("saved", 4), ("step", 4), ("read", 5), ("saved", 5), ("saved", 5),
    ]  # fmt: skip
    assert all(done == step for _, done, step in loop.of("saved"))
    sent = [(kind, batch[1]) for _, _, kind, batch in loop.of("step")]
    assert sent == [("detection", (0, 0)), ("detection", (0, 1)), ("image_text", (1, 0)), ("detection", (0, 2)),
                    ("detection", (0, 3))]  # fmt: skip
    # the first of a stream, every second after it, and the last
    assert [(step, logged) for _, step, _, logged, *_ in loop.of("read")] == [
        (1, True), (2, False), (3, True), (4, True), (5, True)
    ]  # fmt: skip
    assert {(kind, stop, examples, cut) for _, _, kind, _, stop, examples, cut in loop.of("read")} == {
        ("detection", True, "[0]", 0), ("image_text", True, "[1]", 1)
    }  # fmt: skip
    assert loop.of("drawn") == [("drawn", 1, False), ("drawn", 3, False), ("drawn", 4, True)]
    assert loop.of("opened") == [("opened", 0, 0), ("opened", 1, 0)]
    assert loop.of("all are here") == [("all are here", str(step)) for step in range(1, 6)]
    assert loop.of("waited")[2] == ("waited", "the step of image_text/8x8")
    ends = [what[0] for what in loop.done if "close" in what[0] or what[0] == "curves"]
    assert ends == ["curves", "closed", "closed", "writer closed", "compiler closed", "checkpoints closed"]
    assert (tmp_path / "parameters.txt").read_text() == "table\n"


def test_a_step_does_not_wait_for_the_program_of_the_next_to_be_read(monkeypatch, tmp_path):
    loop = Loop(monkeypatch, tmp_path, compiled=False)
    train.train(loop.run)
    names = [what[:2] for what in loop.of("waited", "step", "read")]
    assert names[:5] == [
        ("waited", "the step of detection/8x8"), ("step", 0), ("read", 1), ("waited", "the step of detection/8x8"),
        ("step", 1),
    ]  # fmt: skip
    assert [step for _, step, *_ in loop.of("read")] == [1, 2, 3, 4, 5]


def test_a_run_goes_on_where_its_checkpoint_is(monkeypatch, tmp_path):
    (tmp_path / "parameters.txt").write_text("of the beginning")
    loop = Loop(monkeypatch, tmp_path, start=3, nonfinite="skip")
    train.train(loop.run)
    assert loop.of("opened") == [("opened", 0, 2)]
    assert [step for _, step, *_ in loop.of("step")] == [3, 4]
    assert not any(stop for _, _, _, _, stop, *_ in loop.of("read"))
    assert (tmp_path / "parameters.txt").read_text() == "of the beginning"
    done = Loop(monkeypatch, tmp_path, start=5, scores=[0.5])
    assert train.train(done.run) == {"AP": 0.5}
    assert not done.of("step", "curves")
    done = Loop(monkeypatch, tmp_path, start=5, scores=[0.5])
    done.run.evaluator.recorded = {5: {"AP": 0.9}}.get  # it was scored, too
    assert train.train(done.run) == {"AP": 0.9}
    assert not done.of("scored")


def test_a_run_that_is_told_to_stop_saves_and_does_not_wait_for_the_compiler(monkeypatch, tmp_path):
    loop = Loop(monkeypatch, tmp_path, stop_at=3)
    with pytest.raises(train.Preempted, match="after step 3") as stopped:
        train.train(loop.run)
    assert stopped.value.number == signal.SIGTERM
    assert [what[:2] for what in loop.done[-7:]] == [
        ("read", 3), ("saved", 3), ("closed", 1), ("closed", 0), ("writer closed",), ("compiler closed", False),
        ("checkpoints closed",),
    ]  # fmt: skip


def test_scores_are_taken_along_the_way_and_may_end_the_run(monkeypatch, tmp_path):
    loop = Loop(monkeypatch, tmp_path, scores=[0.5, 0.7, 0.6], eval__every_steps=2, checkpoint__every_steps=100)
    assert train.train(loop.run) == {"AP": 0.6}
    assert loop.of("scored") == [("scored", 2), ("scored", 4), ("scored", 5)]
    assert loop.of("wrote")[0] == ("wrote", 2, ["eval/AP"])
    assert [what[:2] for what in loop.of("saved", "scored")][:4] == [
        ("saved", 2), ("scored", 2), ("saved", 4), ("scored", 4),  # a run that is killed meanwhile goes on there
    ]  # fmt: skip
    loop = Loop(monkeypatch, tmp_path, scores=[0.5, 0.4], eval__every_steps=2, optimizer__stop_patience=1)
    assert train.train(loop.run) == {"AP": 0.4}
    assert [step for _, step, *_ in loop.of("step")] == [0, 1, 2, 3]
    assert loop.of("scored") == [("scored", 2), ("scored", 4)]
    loop = Loop(monkeypatch, tmp_path, scores=[0.5, 0.4], eval__every_steps=2, optimizer__stop_patience=1,
                checkpoint__keep_best=True)  # fmt: skip
    assert train.train(loop.run) == {"AP": 0.5}
    assert [step for _, step in loop.of("best")] == [2, 2]


def test_scores_of_earlier_processes_count_and_are_not_taken_again(monkeypatch, tmp_path):
    options = {"eval__every_steps": 2, "optimizer__schedule": "plateau", "optimizer__patience": 1}
    loop = Loop(monkeypatch, tmp_path, scores=[0.5, 0.4, 0.6], **options)
    train.train(loop.run)
    assert loop.of("rate") == [("rate", 1.0)] * 4 + [("rate", 0.1)]
    assert loop.of("factor")[-1] == ("factor", 0.1)
    for start, before, rates, concluded in (
        (4, [(2, 0.5), (4, 0.4)], [0.1], [4, 5]),
        (4, [(1, 0.9), (2, 0.5), (4, 0.6)], [1.0], [4, 5]),  # of a step that is not to be evaluated any more
        (3, [(2, 0.5)], [1.0, 1.0], [3, 4, 5]),
    ):
        before = [(step, {"AP": value}) for step, value in before]
        loop = Loop(monkeypatch, tmp_path, start=start, before=before, scores=[0.7, 0.8], **options)
        train.train(loop.run)
        assert loop.of("rate") == [("rate", rate) for rate in rates]
        assert [step for _, step in loop.of("scored")] == [step for step in (4, 5) if step > start]
        assert [step for _, step in loop.of("concluded")] == concluded


def test_the_second_set_is_scored_before_and_after(monkeypatch, tmp_path):
    loop = Loop(monkeypatch, tmp_path)

    def second(params, *, step):
        return {"AP": 0.1 * step}

    second.recorded = lambda step: {"AP": 0.9}
    loop.run.second = second
    assert train.train(loop.run) == {"forgetting/before/AP": 0.0, "forgetting/after/AP": 0.5}
    assert loop.of("wrote") == [("wrote", 0, ["forgetting/AP"]), ("wrote", 5, ["forgetting/AP"])]
    later = Loop(monkeypatch, tmp_path, start=5)
    later.run.second = second
    assert train.train(later.run) == {}  # nobody knows what was before
    assert not later.of("wrote")


@pytest.mark.parametrize("ema_decay", [0.0, 0.5])
def test_where_a_run_starts(monkeypatch, tmp_path, ema_decay, caplog):
    config, asked = config_lib.base(), []
    config.optimizer.ema_decay, config.init_from.swin, config.init_from.text = ema_decay, "swin", ""
    shapes = {"a": jax.ShapeDtypeStruct((3,), np.float32), "b": jax.ShapeDtypeStruct((2,), np.float32)}
    tx, mesh = optax.adam(0.1), sharding.make_mesh()
    shardings = train_state.state_shardings(mesh, tx, shapes, ema=ema_decay > 0)
    run = types.SimpleNamespace(config=config, tx=tx, model=None, shapes=shapes, shardings=shardings)
    newest = iter([7, 7, None, None])
    kept = types.SimpleNamespace(
        intact_step=lambda items, *, before, set_aside: asked.append((items, before, set_aside)) or next(newest),
        restore=lambda abstract, *, step: (jax.tree.structure(abstract), step),
    )
    drawn = lambda _, key, *, context_length: {"a": jax.random.normal(key, (3,)), "b": np.ones(2, np.float32)}  # noqa: E731
    monkeypatch.setattr(train_state, "init_params", drawn)
    stored = {"a": np.full(3, 5.0, np.float32)}
    monkeypatch.setattr(train.pretrained_lib, "load_all", lambda files, shapes: (stored, ["a note"]))
    theirs = {"a": np.full(3, 2.0, np.float32), "b": np.full(2, 4.0, np.float32)}
    monkeypatch.setattr(train.checkpoints_lib, "load_for_inference", lambda workdir: (None, theirs, 9))

    expected = jax.tree.structure(train_state.create(theirs, tx, ema=ema_decay > 0))
    assert train.initial_state(run, kept) == (expected, 7)
    assert train.initial_state(run, kept, before=5) == (expected, 7)
    items = ["params", "optimizer", "ema"][: 3 if ema_decay else 2]
    assert asked == [(items, None, True), (items, 5, False)]  # what is only looked at stays where it is
    with caplog.at_level("INFO", logger="absl"):
        fresh = train.initial_state(run, kept)
    assert "a note" in caplog.text
    for found, params in ((fresh, {"a": [5.0] * 3, "b": [1.0] * 2}), (None, theirs)):
        if found is None:
            config.init_from.checkpoint = "elsewhere"
            found = train.initial_state(run, kept)
        assert int(found.step) == 0
        jax.tree.map(np.testing.assert_array_equal, found.params, {name: np.float32(x) for name, x in params.items()})
        assert (found.ema is not None) == (ema_decay > 0)


def test_all_that_is_wrong_before_a_run_is_one_error(micro, monkeypatch, tmp_path):
    micro.scenes.update({"num_detection": 4, "num_grounding": 0, "num_image_text": 0, "num_eval": 2, "size_px": 32})
    config = session.with_scenes(micro, tmp_path)
    config.eval.monitor, config.forgetting.annotations, config.trackers = "fixed_AP", "no.json", ("wandb",)
    config.init_from.swin, config.optimizer.text_once = "no.safetensors", True
    shapes = {"text_encoder": {"kernel": jax.ShapeDtypeStruct((3,), np.float32)}}
    monkeypatch.setattr(train_state, "param_shapes", lambda model, *, context_length: shapes)
    evaluator = types.SimpleNamespace(federated=False)
    monkeypatch.setattr(train.evaluation, "make", lambda *_: evaluator)
    monkeypatch.setattr(train, "check_installed", fails("no wandb"))
    monkeypatch.setattr(train.evaluation, "make_second", fails("no.json"))
    for federated in (False, True):
        evaluator.federated = federated
        with pytest.raises(ValueError, match="no wandb") as error:
            train.make_run(config, tmp_path)
        for part, is_wrong in (
            ("config.eval.monitor 'fixed_AP' is a score of LVIS", not federated), ("no.json", True),
            ("no.safetensors", True), ("optimizer.text_once needs a text tower", True),
        ):  # fmt: skip
            assert (part in str(error.value)) == is_wrong, part
    (tmp_path / "checkpoints" / "4").mkdir(parents=True)  # the run has its weights
    config.init_from.checkpoint = "elsewhere"
    monkeypatch.setattr(train.checkpoints_lib, "check_start", fails("does not fit"))
    with pytest.raises(ValueError, match="no wandb") as error:
        train.make_run(config, tmp_path)
    assert "no.safetensors" not in str(error.value)
    assert "does not fit" not in str(error.value)
    with pytest.raises(ValueError, match="does not fit"):
        train.make_run(config, tmp_path / "new")


def fails(message):
    """Returns a function that ends with an error, whatever it is given."""

    def function(*_, **__):
        raise ValueError(message)

    return function
