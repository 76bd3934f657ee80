"""Runs one step of a run again, to see what happened in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
from absl import logging
from jax.sharding import Mesh

from detclipv2_jax.data.schema import Batch
from detclipv2_jax.data.streams import Stream
from detclipv2_jax.runs import sharding
from detclipv2_jax.runs.metrics import prefix
from detclipv2_jax.runs.order import StepOrder
from detclipv2_jax.runs.state import TrainState


def replay(
    number: int,
    *,
    state: TrainState,
    order: StepOrder,
    streams: Sequence[Stream],
    compiled: Callable[..., Callable],
    with_text: Callable[..., Batch],
    mesh: Mesh,
) -> dict[str, float]:
    """Returns the metrics of step `number` of a run (1 is the first), and prints them with the step's examples.

    `state` is that after fewer than `number` steps, and is donated; `compiled` is (kind, canvas) → the training step,
    `with_text` that of `train.Run`.
    """
    for step in range(int(state.step), number):
        draw = order.draw(step)
        stream = streams[draw.stream]
        batch = with_text(state.params, stream.batch(draw.position))
        with jax.set_mesh(mesh):
            state, found = compiled(stream.kind, stream.canvas_of(draw.position))(
                state, sharding.to_global(batch, mesh)
            )
        metrics = prefix(stream.kind.value, jax.device_get(found))
        logging.info("step %d: loss %.6g", step + 1, metrics[f"{stream.kind.value}/loss"])
    gradients = "\n".join(f"  {name} {value:.6g}" for name, value in metrics.items())
    print(f"step {number}, batch {draw.position} of {stream.name}:\n{gradients}")
    print(f"examples of process {jax.process_index()}: {stream.named(stream.examples)}", flush=True)
    return metrics
