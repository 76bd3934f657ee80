"""The training loop, top to bottom: data, order of the steps, state (fresh, pre-trained towers, or resumed), steps."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import pathlib
import signal
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import jax
import numpy as np
import optax
from absl import logging
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from detclipv2_jax import train_step
from detclipv2_jax.data import streams as streams_lib
from detclipv2_jax.data.checks import dictionary_once
from detclipv2_jax.data.definitions import training_notes
from detclipv2_jax.data.schema import Batch, Kind
from detclipv2_jax.eval import loop as evaluation
from detclipv2_jax.files import collector_paused, write_text
from detclipv2_jax.inference import Detector
from detclipv2_jax.models import flops
from detclipv2_jax.models.detclip import DetCLIP
from detclipv2_jax.runs import checkpoints as checkpoints_lib
from detclipv2_jax.runs import optimizer as optimizer_lib
from detclipv2_jax.runs import pretrained as pretrained_lib
from detclipv2_jax.runs import processes, sharding, text_once
from detclipv2_jax.runs import state as train_state
from detclipv2_jax.runs.ahead import Ahead
from detclipv2_jax.runs.metrics import MetricsWriter, Progress, prefix
from detclipv2_jax.runs.optimizer import learning_rate, make_optimizer, named_shapes, overview, param_name
from detclipv2_jax.runs.order import StepOrder, mixed
from detclipv2_jax.runs.replay import replay
from detclipv2_jax.runs.state import TrainState
from detclipv2_jax.runs.trackers import check_installed, opener
from detclipv2_jax.visualize import alignment, figures

NONFINITE = ("stop", "skip")  # what a loss or gradient that is not finite does to the run
PROFILE_AFTER_STEPS = 10  # by then the steps drawn most often are compiled


class Preempted(Exception):  # noqa: N818 -- a run that stops like this stops well
    """SIGTERM or Ctrl-C came (`number`); the state is saved, and the run goes on from there when started again."""

    def __init__(self, number: int, step: int):
        sender = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
        super().__init__(f"stopped by {sender} after step {step}, which is saved")
        self.number = number


class NonFiniteError(RuntimeError):
    """A loss or a gradient was NaN or infinite; continuing from the last checkpoint leads to the state before it."""


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run consists of before anything is compiled; `make_run` makes it."""

    config: ConfigDict
    workdir: pathlib.Path
    mesh: Mesh
    streams: list[streams_lib.Stream]
    order: StepOrder
    model: DetCLIP
    shapes: Any  # tree of the parameters' shapes
    tx: optax.GradientTransformation
    shardings: TrainState
    detector: Detector
    evaluator: evaluation.Evaluator | None  # None without config.eval.annotations
    second: evaluation.Evaluator | None  # None without config.forgetting.annotations
    with_text: Callable[[Any, Batch], Batch]  # from parameters and a host's batch to what the step is given


def make_run(config: ConfigDict, workdir: pathlib.Path) -> Run:
    """Returns the run of a configuration, its files checked and nothing compiled.

    Raises:
      ValueError: files (all that are missing), sizes, parameter groups or stored parameters that do not fit.
    """
    model = train_state.make_model(config.model)
    shapes = train_state.param_shapes(model, context_length=config.model.text.context_length)
    mesh = sharding.make_mesh(fsdp=config.mesh.fsdp)
    place = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    detector, evaluator, second = Detector(model, mesh=mesh), None, None
    problems: list[str] = []
    with listed(problems):
        check_installed(config.trackers)
    with listed(problems):
        streams = streams_lib.train_streams(config, **place, table_multiple=jax.local_device_count())
    with listed(problems):
        if config.eval.annotations or config.eval.images:
            evaluator = evaluation.make(config, detector, workdir)
            if config.eval.monitor.startswith("fixed_") and not evaluator.federated:
                raise ValueError(
                    f"config.eval.monitor {config.eval.monitor!r} is a score of LVIS, whose images list "
                    f"neg_category_ids; those of {config.eval.annotations} do not: use AP"
                )
    with listed(problems):
        second = evaluation.make_second(config, detector, workdir)
    with listed(problems):
        with_text = text_once.make(config, shapes, detector.encode_tokens)
    with listed(problems):
        if not has_parameters(config, workdir):
            pretrained_lib.load_all(config.init_from, named_shapes(shapes))  # read again when needed
        elif not has_checkpoint(workdir):
            checkpoints_lib.check_start(config.init_from.checkpoint, config.model, shapes)
    if problems:
        raise ValueError("\n".join(problems))
    for note in training_notes(streams):
        logging.info(note)
    order = make_order(config, streams)
    tx = make_optimizer(config.optimizer, shapes, order.total_steps)
    return Run(
        config=config,
        workdir=workdir,
        mesh=mesh,
        streams=streams,
        order=order,
        model=model,
        shapes=shapes,
        tx=tx,
        shardings=train_state.state_shardings(mesh, tx, shapes, ema=config.optimizer.ema_decay > 0),
        detector=detector,
        evaluator=evaluator,
        second=second,
        with_text=with_text,
    )


def make_order(config: ConfigDict, streams: list[streams_lib.Stream]) -> StepOrder:
    """Returns the order of the steps of a run."""
    num_batches, kinds = [stream.num_batches for stream in streams], [stream.kind for stream in streams]
    num_steps = [num * stream.weight for num, stream in zip(num_batches, streams, strict=True)]
    factors = mixed(num_steps, kinds, mixture=config.mixing[0], value=config.mixing[1])
    return StepOrder(
        num_batches,
        epochs=config.epochs,
        seed=config.seed,
        weights=[stream.weight * factor for stream, factor in zip(streams, factors, strict=True)],
        num_steps=config.num_steps,
        from_epochs=[config[kind.value].from_epoch for kind in kinds],
    )


def train(run: Run) -> dict[str, float]:
    """Trains to the last step, or until scores end it; returns the scores of the last checkpoint ({} without any).

    With `checkpoint.keep_best` they are those of the best checkpoint. Scores of the second set, of the parameters at
    the start and of those that are left, are led by "forgetting/before/" and "forgetting/after/".

    Continues from the newest checkpoint of the workdir. Writes checkpoints/, metrics.jsonl, TensorBoard events, eval/,
    forgetting/ and pictures/ there.

    Raises:
      Preempted: SIGTERM or Ctrl-C came to any of the processes; all have saved the same step.
      NonFiniteError: a loss or gradient is not finite and `config.nonfinite` is "stop".
      MissingProcessError: another process is gone, or late by more than `config.timeout_s`.
    """
    config, mesh, order = run.config, run.mesh, run.order
    first_process = jax.process_index() == 0
    with contextlib.ExitStack() as stack:  # closes everything opened below, also after an error
        # --- state: fresh, started from other weights, or resumed
        checkpoints = stack.enter_context(
            contextlib.closing(checkpoints_lib.Checkpoints(run.workdir, keep=config.checkpoint.keep))
        )
        # --- one compiled step a (kind, canvas), the first of them while there is no state yet
        keys = {(stream.kind, canvas) for stream in run.streams for canvas in stream.canvases}
        steps, known = {key: jitted_step(run, *key) for key in keys}, checkpoints.latest_step() or 0
        ahead = compile_ahead(run, steps, _abstract_state(run), start=known)
        # a run that is told to stop may be killed before a compiler is done
        stack.push(lambda error, *_: ahead.close(wait=error is not Preempted))
        state = initial_state(run, checkpoints)
        start = int(state.step)
        if first_process and not (table := run.workdir / "parameters.txt").exists():
            write_text(table, [overview(state.params, config.optimizer.groups, frozen=config.optimizer.frozen), "\n"])
        size = sum(x.size for x in jax.tree.leaves(state.params))
        logging.info("step %d of %d, %d devices, %.4g M parameters", start, order.num_steps, mesh.size, size / 1e6)

        # --- one reader a stream, made when first drawn
        readers: dict[int, Iterator[Batch]] = {}
        positions = order.next_positions(start)
        trackers = opener(run.workdir, config)
        writer = MetricsWriter(run.workdir, start, monitor=config.eval.monitor, open_trackers=trackers)
        stack.enter_context(contextlib.closing(writer))
        peak_flops = flops.peak_per_second(mesh)
        progress = stack.enter_context(contextlib.closing(Progress(start, order.num_steps, peak_flops)))

        # --- scores by step, of this run's earlier processes too: the rest of the run may depend on them
        scores = {step: values for step, values in recorded(writer, "eval").items() if evaluation_due(run, step)}
        before = recorded(writer, "forgetting").get(0)
        if run.second and before is None and start == 0:
            before = _evaluate_state(run.second, state, writer, kind="forgetting")

        # --- the loop
        rate = learning_rate(config.optimizer, order.total_steps)
        cost = functools.cache(functools.partial(step_cost, run))
        stopping = stack.enter_context(processes.stop_signal())
        profiled = profiled_steps(start, order.num_steps, config.profile_steps)
        decision = optimizer_lib.Verdict(1.0, False)
        # reads the metrics of the last step after the next one is dispatched
        finish_last: Callable[[], None] | None = None
        for step in range(start, order.num_steps):
            if run.evaluator and evaluation_due(run, step) and step not in scores:
                scores[step] = _evaluate_state(run.evaluator, state, writer)
            if step == start or evaluation_due(run, step):
                state, decision = _conclude(run, state, scores, checkpoints, step=step)
            if decision.over:
                best, monitor = best_step(run, scores), config.eval.monitor
                waited = f"{monitor} was not better for {config.optimizer.stop_patience} evaluations"
                logging.info("stopped at step %d: %s; best %.4g, step %d", step, waited, scores[best][monitor], best)
                break
            draw = order.draw(step)
            stream = run.streams[draw.stream]
            with progress.waiting():
                if draw.stream not in readers:
                    reader = stream.iterate(positions[draw.stream])
                    readers[draw.stream] = stack.enter_context(contextlib.closing(reader))
                batch = run.with_text(state.params, next(readers[draw.stream]))
                processes.barrier("step", note=str(step + 1), timeout_s=config.timeout_s)
            if profiled and step == profiled[0]:
                options = jax.profiler.ProfileOptions()
                # else every Python call while a step is traced would be an event: millions
                options.python_tracer_level = 0
                jax.profiler.start_trace(run.workdir / "profile", profiler_options=options)
            key = (stream.kind, stream.canvas_of(draw.position))
            if finish_last and not ahead.ready(key):  # its metrics shall not wait for a program
                finish_last()
                finish_last = None
            rate_now = rate(step) * decision.factor  # before waiting: it is many small programs, compiled meanwhile
            ahead.wait(key, what="the step of {}/{}x{}".format(stream.kind.value, *key[1]))
            with jax.set_mesh(mesh), jax.profiler.StepTraceAnnotation("train", step_num=step):
                state, metrics = steps[key](state, sharding.to_global(batch, mesh))
            if finish_last:
                finish_last()
            done, last = step + 1, step + 1 == order.num_steps
            finish_last = functools.partial(
                finish_step,
                done,
                stream.kind.value,
                metrics | {"learning_rate": rate_now} | sharding.summed(stream.overflow, mesh),
                logged=draw.position % config.log_every_steps == 0 or last,
                stop=config.nonfinite == "stop",
                cost=cost(draw.stream, key[1]) if peak_flops else None,
                examples=functools.partial(stream.named, stream.examples),
                writer=writer,
                progress=progress,
            )
            progress.step(stream.batch_size)
            preempted = stopping(done)
            if draw.position == 0 or due(draw.position, config.pictures_every_steps):
                draw_batch(run, stream, batch, state, step=done, aligned=draw.position > 0)
            # before an evaluation too, which may take longer than the grace of a preemption
            saved = last or preempted or due(done, config.checkpoint.every_steps) or evaluation_due(run, done)
            traced = bool(profiled) and step == profiled[-1]
            if saved or traced:
                # first, so that a run stopped by its loss does not leave that step as its newest checkpoint
                finish_last()
                finish_last = None
            if traced:
                jax.profiler.stop_trace()
            if saved:
                checkpoints.save(done, state)
            if preempted:
                raise Preempted(preempted, done)

        for stream in run.streams:
            if stream.counters:
                logging.info("stream %s: %s", stream.name, dict(stream.counters))

        # --- the end: the last step, or the best one
        done = int(state.step)
        checkpoints.save(done, state)  # where scores ended the run
        if run.evaluator and not decision.over:
            found = run.evaluator.recorded(done) if start == done else None
            scores[done] = found or _evaluate_state(run.evaluator, state, writer)
            _conclude(run, state, scores, checkpoints, step=done)
        if scores and config.checkpoint.keep_best and (best := best_step(run, scores)) != done:
            done, state = best, checkpoints.restore(_abstract_state(run), step=best)
        result = scores.get(done, {})
        if run.second and before is not None:
            after = run.second.recorded(done) if start == order.num_steps else None
            after = after or _evaluate_state(run.second, state, writer, kind="forgetting")
            result = result | prefix("forgetting/before", before) | prefix("forgetting/after", after)
        if first_process and order.num_steps > start:
            from detclipv2_jax.visualize import charts  # takes half a second, at the end

            charts.curves(run.workdir / "metrics.jsonl", path=run.workdir / "pictures" / "curves.png")
    return result


def replay_step(run: Run, number: int) -> dict[str, float]:
    """Runs step `number` of a run again (1 is the first), prints it with its examples and returns its metrics.

    Continues from the newest checkpoint before that step, or from the beginning; writes nothing.

    Raises:
      ValueError: the run has no such step, or no checkpoint is intact.
    """
    if number > run.order.num_steps:
        raise ValueError(f"--replay={number}: the run has {run.order.num_steps} steps")
    with contextlib.closing(checkpoints_lib.Checkpoints(run.workdir)) as checkpoints:
        state = initial_state(run, checkpoints, before=number)
    compiled = functools.cache(functools.partial(jitted_step, run))
    options: dict[str, Any] = {"compiled": compiled, "with_text": run.with_text, "mesh": run.mesh}
    return replay(number, state=state, order=run.order, streams=run.streams, **options)


def evaluation_due(run: Run, step: int) -> bool:
    """Returns whether the state after `step` steps is to be evaluated, wherever the run ends."""
    section = run.config.eval
    passed = section.every_epochs and step in run.order.epoch_ends[section.every_epochs - 1 :: section.every_epochs]
    return run.evaluator is not None and step > 0 and bool(due(step, section.every_steps) or passed)


def best_step(run: Run, scores: dict[int, dict[str, float]]) -> int:
    """Returns the first step with the best `eval.monitor`."""
    return max(sorted(scores), key=lambda step: scores[step][run.config.eval.monitor])


def _conclude(
    run: Run,
    state: TrainState,
    scores: dict[int, dict[str, float]],
    checkpoints: checkpoints_lib.Checkpoints,
    *,
    step: int,
) -> tuple[TrainState, optimizer_lib.Verdict]:
    """Returns the state with the learning rate that the scores lead to, and whether they end the run.

    Keeps the best checkpoint if the configuration says so: a state that is the best so far is saved.
    """
    config, monitor = run.config, run.config.eval.monitor
    decision = optimizer_lib.verdict({number: values[monitor] for number, values in scores.items()}, config.optimizer)
    if scores and config.checkpoint.keep_best:
        best = best_step(run, scores)
        checkpoints.mark_best(best, score=monitor, value=scores[best][monitor])
        if best == step:
            checkpoints.save(step, state)
    if config.optimizer.schedule == "plateau":
        factor = jax.device_put(np.float32(decision.factor), NamedSharding(run.mesh, sharding.REPLICATED))
        state = dataclasses.replace(state, opt_state=optimizer_lib.with_rate_factor(state.opt_state, factor))
    return state, decision


def recorded(writer: MetricsWriter, kind: str) -> dict[int, dict[str, float]]:
    """Returns the scores of a kind that the run has written so far, by step, the same on every process."""
    return dict(evaluation.from_first_process(writer.recorded(kind)))


def jitted_step(run: Run, kind: Kind, canvas: tuple[int, int]) -> train_step.Step:
    """Returns the training step of a stream, compiled when first called; the state passed to it is donated."""
    step = train_step.make_step(kind, model=run.model, tx=run.tx, config=run.config, canvas=canvas, mesh=run.mesh)
    replicated = NamedSharding(run.mesh, sharding.REPLICATED)
    options = sharding.compiler_options(run.mesh)
    return jax.jit(step, donate_argnums=0, out_shardings=(run.shardings, replicated), compiler_options=options)


def compile_ahead(run: Run, steps: dict[tuple[Kind, tuple[int, int]], Any], state: TrainState, *, start: int) -> Ahead:
    """Returns what compiles the steps in the order in which they are first drawn, the later ones while others run."""
    if jax.process_count() > 1:  # processes must compile a program at the same time
        return Ahead({})
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    programs: dict[Hashable, Callable[[], object]] = {}
    positions = run.order.next_positions(start)
    for stream, first in ((run.streams[i], positions[i]) for i in run.order.upcoming(start)):
        sizes: dict[str, Any] = {"table_rows": stream.capacities["table"], "num_verified": stream.num_verified}
        sizes["class_names"] = stream.class_names
        for canvas in map(stream.canvas_of, range(first, first + 2 * len(stream.canvases))):  # every one is among them
            batch = sharding.batch_shapes(run.config, stream.kind, canvas, **sizes, mesh=run.mesh)

            def compiled(key: Any = (stream.kind, canvas), batch: Batch = batch) -> object:
                with jax.set_mesh(run.mesh), collector_paused():
                    lowered = steps[key].lower(shapes, batch)
                with jax.set_mesh(run.mesh):
                    return lowered.compile()

            programs.setdefault((stream.kind, canvas), compiled)
    return Ahead(programs)


def step_cost(run: Run, number: int, canvas: tuple[int, int]) -> Callable[[float], float]:
    """Returns the function from the number of distinct concepts to the FLOPs of a step on a canvas of a stream."""
    stream = run.streams[number]
    table_rows = stream.capacities["table"] * jax.process_count()
    return flops.of_step(run.config, stream.kind, canvas, table_rows=table_rows, num_devices=run.mesh.size)


def draw_batch(
    run: Run, stream: streams_lib.Stream, batch: Batch, state: TrainState, *, step: int, aligned: bool
) -> None:
    """Writes what a step was trained on and, if `aligned`, the best region of every phrase of image-text pairs."""
    folder, name = run.workdir / "pictures", f"{stream.name.replace('/', '_')}_step{step}"
    if jax.process_index() == 0:
        figures.training_batch(batch, kind=stream.kind, path=folder / f"batch_{name}.jpg")
    if stream.kind is Kind.IMAGE_TEXT and aligned:
        alignment.draw_batch(run.detector, state.params, batch, num_pictures=4, folder=folder, name=f"alignment_{name}")


def _evaluate_state(
    evaluator: evaluation.Evaluator, state: TrainState, writer: MetricsWriter, *, kind: str = "eval"
) -> dict[str, float]:
    """Returns the scores of a state, of its averaged parameters if they are kept; writes them under `kind`/…."""
    step = int(state.step)
    scores = evaluator(state.params if state.ema is None else state.ema, step=step)
    writer.write(step, prefix(kind, scores))
    return scores


def initial_state(run: Run, checkpoints: checkpoints_lib.Checkpoints, *, before: int | None = None) -> TrainState:
    """Returns the state a run starts from, or before step `before`, in order of preference:

    1. the newest intact checkpoint of this workdir;
    2. fresh optimizer, parameters from another run (`init_from.checkpoint`);
    3. fresh everything, but for the towers that `init_from.swin` and `init_from.text` hold.
    """
    config = run.config
    new = functools.partial(train_state.create, tx=run.tx, ema=config.optimizer.ema_decay > 0)

    def create(key: jax.Array, pretrained: dict[str, np.ndarray]) -> TrainState:
        params = train_state.init_params(run.model, key, context_length=config.model.text.context_length)
        return new(jax.tree_util.tree_map_with_path(lambda path, x: pretrained.get(param_name(path), x), params))

    items = ["params", "optimizer", "ema"] if config.optimizer.ema_decay > 0 else ["params", "optimizer"]
    if (newest := checkpoints.intact_step(items, before=before, set_aside=before is None)) is not None:
        return checkpoints.restore(_abstract_state(run), step=newest)
    if config.init_from.checkpoint:
        _, params, step = checkpoints_lib.load_for_inference(config.init_from.checkpoint)
        logging.info("parameters from step %d of %s", step, config.init_from.checkpoint)
        return jax.jit(new, out_shardings=run.shardings)(jax.tree.map(np.asarray, params))
    pretrained, notes = pretrained_lib.load_all(config.init_from, named_shapes(run.shapes))
    for note in notes:
        logging.info(note)
    # a program that runs once: the same values, compiled in half the time
    quickly = {"xla_backend_optimization_level": 1} if jax.default_backend() == "cpu" else {}
    fresh = jax.jit(create, out_shardings=run.shardings, compiler_options=quickly)
    return fresh(jax.random.key(config.seed), pretrained)


def _abstract_state(run: Run) -> TrainState:
    """Returns shapes and shardings of the state."""
    new = functools.partial(train_state.create, tx=run.tx, ema=run.config.optimizer.ema_decay > 0)
    return jax.tree.map(
        lambda shape, place: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=place),
        jax.eval_shape(new, run.shapes),
        run.shardings,
    )


@contextlib.contextmanager
def listed(problems: list[str]) -> Iterator[None]:
    """Adds a ValueError raised inside to a list, so that the checks after it run too; a missing dictionary once."""
    try:
        yield
    except ValueError as error:
        problems[:] = dictionary_once([*problems, str(error)])


def has_parameters(config: ConfigDict, workdir: pathlib.Path) -> bool:
    """Returns whether a run starts from a checkpoint, so that `init_from.swin` and `init_from.text` are not read."""
    return has_checkpoint(workdir) or bool(config.init_from.checkpoint)


def has_checkpoint(workdir: pathlib.Path) -> bool:
    """Returns whether a workdir has a checkpoint to continue from."""
    return any(path.name.isdigit() for path in (workdir / "checkpoints").glob("*"))


def profiled_steps(start: int, end: int, num_steps: int) -> range:
    """Returns the steps of a run from `start` to `end` that are traced, on process 0 only."""
    first = max(start, min(start + PROFILE_AFTER_STEPS, end - num_steps))
    return range(first, min(first + num_steps, end)) if jax.process_index() == 0 else range(0)


def due(step: int, every: int) -> bool:
    """Returns whether something done every `every` steps (0: never) is done at `step`."""
    return every > 0 and step % every == 0


def finish_step(
    step: int,
    kind: str,
    metrics: dict[str, Any],
    *,
    logged: bool,
    stop: bool,
    cost: Callable[[float], float] | None,
    examples: Callable[[], str],
    writer: MetricsWriter,
    progress: Progress,
) -> None:
    """Reads the metrics of a step, shows and (if `logged`) writes them, and reports a step that was not finite.

    `cost` says how many FLOPs a step with so many distinct concepts takes, where the utilisation is of interest,
    `examples` what this process's rows were.
    """
    metrics = prefix(kind, jax.device_get(metrics))
    if cost:
        progress.flops += cost(metrics[f"{kind}/num_concepts"])
    finite = metrics.pop(f"{kind}/finite") > 0
    progress.show(metrics)
    if logged or not finite:
        writer.write(step, metrics | progress.rates(), seconds_left=progress.seconds_left())
    if not finite:
        message = f"step {step} was not applied, its loss or gradient is not finite: {described(metrics, examples())}"
        if stop:
            raise NonFiniteError(
                f"{message}. --replay={step} runs it again, config.nonfinite=skip goes on past such steps"
            )
        logging.error(message)


def described(metrics: dict[str, float], examples: str) -> str:
    """Returns loss terms, modules whose gradients are not finite, and examples of a step, for a message."""
    terms = ", ".join(f"{name} {value:.6g}" for name, value in metrics.items() if "grad_norm_" not in name)
    modules = [n.partition("grad_norm_")[2] for n, x in metrics.items() if "grad_norm_" in n and not np.isfinite(x)]
    return (
        f"{terms}; gradients that are not finite: {', '.join(modules) or 'none'}; examples of process "
        f"{jax.process_index()}: {examples}"
    )
