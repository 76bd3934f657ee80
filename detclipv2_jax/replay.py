"""One step of a run again, to see what happened in it."""

from __future__ import annotations

import contextlib

import jax
from absl import logging

from detclipv2_jax import checkpoints as checkpoints_lib
from detclipv2_jax import sharding, train
from detclipv2_jax.metrics import prefix
from detclipv2_jax.train import Run


def replay(run: Run, number: int) -> dict[str, float]:
    """Returns the metrics of step `number` of a run (1 is the first), and prints them with the step's examples.

    Goes on from the newest checkpoint before that step, or from the beginning, as the run did; writes nothing.

    Raises:
      ValueError: the run has no such step, or no checkpoint is intact.
    """
    if number > run.schedule.num_steps:
        raise ValueError(f"--replay={number}: the run has {run.schedule.num_steps} steps")
    with contextlib.closing(checkpoints_lib.Checkpoints(run.workdir)) as checkpoints:
        state = train.initial_state(run, checkpoints, before=number)
    steps: dict[tuple, train.train_step.Step] = {}
    for step in range(int(state.step), number):
        draw = run.schedule.draw(step)
        stream = run.streams[draw.stream]
        key = (stream.kind, stream.canvas)
        if key not in steps:
            steps[key] = train.jitted_step(run, *key)
        batch = stream.batch(draw.position)
        with jax.set_mesh(run.mesh):
            state, found = steps[key](state, sharding.to_global(batch, run.mesh))
        metrics = prefix(stream.kind.value, jax.device_get(found))
        logging.info("step %d: loss %.6g", step + 1, metrics[f"{stream.kind.value}/loss"])
    gradients = "\n".join(f"  {name} {value:.6g}" for name, value in metrics.items())
    print(f"step {number}, batch {draw.position} of {stream.name}:\n{gradients}")
    print(f"examples of process {jax.process_index()}: {stream.named(stream.examples)}", flush=True)
    return metrics
