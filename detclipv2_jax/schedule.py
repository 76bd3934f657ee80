"""Which stream a step draws from: a pure function of (numbers of batches, epochs, seed, step).

Each global batch holds one kind of data on one canvas (paper section 3.4). Every source is passed `epochs` times and
steps are drawn in proportion to the streams' numbers of batches (spec section 4: 5,156 / 6,016 / 2,116 an epoch).
All hosts compute the same order, and the position in every stream follows from the step, so a run resumes exactly,
also on another number of hosts.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Draw:
    """What one step trains on: the `position`-th batch of stream number `stream`."""

    stream: int
    position: int


class Schedule:
    """The order of all steps of a run.

    Args:
      num_batches: batches an epoch of every stream.
      epochs: passes over every stream.
      seed: of the order.
      weights: a factor a stream on the number of its steps; a stream's passes are `epochs * weight`.
      num_steps: caps the run; 0 does not.
      order: shuffled | cycle; the latter spreads the steps of every stream evenly, without the seed.
    """

    def __init__(
        self,
        num_batches: Sequence[int],
        *,
        epochs: int,
        seed: int,
        weights: Sequence[float] | None = None,
        num_steps: int = 0,
        order: str = "shuffled",
    ):
        weights = [1.0] * len(num_batches) if weights is None else list(weights)
        self._per_epoch = [
            max(1, round(n * weight)) if weight > 0 else 0 for n, weight in zip(num_batches, weights, strict=True)
        ]
        self.steps_per_epoch = sum(self._per_epoch)
        if not self.steps_per_epoch:
            raise ValueError(
                f"no steps to schedule: batches an epoch {list(num_batches)}, weights {weights}; "
                "at least one stream needs both above zero"
            )
        self.total_steps = epochs * self.steps_per_epoch  # the horizon of the learning rate, whatever caps the run
        self.num_steps = min(self.total_steps, num_steps) if num_steps else self.total_steps
        self._seed, self._shuffled = seed, order == "shuffled"
        self._order = functools.lru_cache(maxsize=2)(self._epoch_order)

    def _epoch_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns (stream, position) of every step of an epoch."""
        streams = np.repeat(np.arange(len(self._per_epoch)), self._per_epoch)
        if self._shuffled:
            streams = np.random.default_rng((self._seed, epoch)).permutation(streams)
        else:  # the middles of equal parts of the epoch, as many as the stream has steps
            times = np.concatenate([(np.arange(count) + 0.5) / max(count, 1) for count in self._per_epoch])
            streams = streams[np.argsort(times, kind="stable")]
        positions = np.empty_like(streams)
        for stream, count in enumerate(self._per_epoch):
            positions[streams == stream] = epoch * count + np.arange(count)
        return streams, positions

    def draw(self, step: int) -> Draw:
        """Returns what step number `step` (from 0) trains on."""
        epoch, offset = divmod(step, self.steps_per_epoch)
        streams, positions = self._order(epoch)
        return Draw(int(streams[offset]), int(positions[offset]))

    def next_positions(self, step: int) -> list[int]:
        """Returns, for every stream, the position of the first batch that step `step` or a later one draws."""
        epoch, offset = divmod(step, self.steps_per_epoch)
        drawn = np.bincount(self._order(epoch)[0][:offset], minlength=len(self._per_epoch))
        return [epoch * count + int(seen) for count, seen in zip(self._per_epoch, drawn, strict=True)]
