"""Which stream a step draws from: a pure function of (numbers of batches, epochs, seed, step).

Each global batch holds one kind of data on one canvas (paper section 3.4). Every source is passed `epochs` times and
steps are drawn in proportion to the streams' numbers of batches (docs/decisions.md: 5,156 / 6,016 / 2,116 an epoch).
All hosts compute the same order, and the position in every stream follows from the step, so a run resumes exactly,
also on another number of hosts.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from detclipv2_jax.data.schema import Kind

MIXTURES = ("proportional", "capped", "temperature")


def mixed(num_steps: Sequence[float], kinds: Sequence[Kind], *, mixture: str, value: float) -> list[float]:
    """Returns the factor on every stream's number of steps with which kinds of data share an epoch as they should.

    proportional: 1. capped: pairs have at most `value` steps a step of data with boxes, if there is such data; what is
    left over comes in later epochs. It wants all boxes from the first epoch of pairs on (`validation`). temperature: a
    kind's share goes with its number of steps to the power of 1 / `value`, and an epoch is as long as before; above 1
    that evens kinds out.

    Args:
      num_steps: an epoch, of every stream.
      kinds: of the streams.
      mixture: one of MIXTURES.
      value: above 0.
    """
    totals = dict.fromkeys(kinds, 0.0)
    for kind, num in zip(kinds, num_steps, strict=True):
        totals[kind] += num
    factors = dict.fromkeys(kinds, 1.0)
    boxes = sum(num for kind, num in totals.items() if kind is not Kind.IMAGE_TEXT)
    if mixture == "capped" and boxes and totals.get(Kind.IMAGE_TEXT):
        factors[Kind.IMAGE_TEXT] = min(1.0, value * boxes / totals[Kind.IMAGE_TEXT])
    if mixture == "temperature":
        shares = {kind: num ** (1.0 / value) for kind, num in totals.items() if num}
        length = sum(totals.values()) / sum(shares.values()) if shares else 0.0
        factors |= {kind: length * share / totals[kind] for kind, share in shares.items()}
    return [factors[kind] for kind in kinds]


@dataclasses.dataclass(frozen=True)
class Draw:
    """What one step trains on: the `position`-th batch of stream number `stream`."""

    stream: int
    position: int


class StepOrder:
    """The order of all steps of a run.

    Args:
      num_batches: batches an epoch of every stream.
      epochs: passes over every stream.
      seed: of the order.
      weights: a factor a stream on the number of its steps; a stream's passes are `epochs * weight`.
      num_steps: caps the run; 0 does not.
      from_epochs: the first epoch (from 0) that draws from each stream; None: all do from the beginning.

    Raises:
      ValueError: the first epoch has no steps.
    """

    def __init__(
        self,
        num_batches: Sequence[int],
        *,
        epochs: int,
        seed: int,
        weights: Sequence[float] | None = None,
        num_steps: int = 0,
        from_epochs: Sequence[int] | None = None,
    ):
        weights = [1.0] * len(num_batches) if weights is None else list(weights)
        self._per_epoch = [
            max(1, round(n * weight)) if weight > 0 else 0 for n, weight in zip(num_batches, weights, strict=True)
        ]
        self._from = [0] * len(weights) if from_epochs is None else list(from_epochs)
        lengths = np.zeros(epochs, np.int64)
        for count, start in zip(self._per_epoch, self._from, strict=True):
            lengths[start:] += count
        if not lengths[0]:
            raise ValueError(
                f"no steps to order: batches an epoch {list(num_batches)}, weights {weights}, first epochs "
                f"{self._from}; at least one stream needs batches and a weight above zero in the first epoch"
            )
        self.epoch_ends = np.cumsum(lengths)  # numbers of steps
        self.total_steps = int(self.epoch_ends[-1])  # the horizon of the learning rate, whatever caps the run
        self.num_steps = min(self.total_steps, num_steps) if num_steps else self.total_steps
        self._seed = seed
        self._order = functools.lru_cache(maxsize=2)(self._epoch_order)

    def _counts(self, epoch: int) -> list[int]:
        """Returns the steps of every stream in an epoch."""
        return [count * (epoch >= start) for count, start in zip(self._per_epoch, self._from, strict=True)]

    def _place(self, step: int) -> tuple[int, int]:
        """Returns (epoch, number of the step in it)."""
        epoch = int(np.searchsorted(self.epoch_ends, step, side="right"))
        return epoch, step - (int(self.epoch_ends[epoch - 1]) if epoch else 0)

    def _epoch_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns (stream, position) of every step of an epoch."""
        counts = self._counts(epoch)
        streams = np.repeat(np.arange(len(counts)), counts)
        streams = np.random.default_rng((self._seed, epoch)).permutation(streams)
        positions = np.empty_like(streams)
        for stream, count in enumerate(counts):
            positions[streams == stream] = (epoch - self._from[stream]) * count + np.arange(count)
        return streams, positions

    def draw(self, step: int) -> Draw:
        """Returns what step number `step` (from 0) trains on."""
        epoch, offset = self._place(step)
        streams, positions = self._order(epoch)
        return Draw(int(streams[offset]), int(positions[offset]))

    def next_positions(self, step: int) -> list[int]:
        """Returns, for every stream, the position of the first batch that step `step` or a later one draws."""
        if step == self.total_steps:
            epoch, drawn = len(self.epoch_ends), np.zeros(len(self._per_epoch), int)
        else:
            epoch, offset = self._place(step)
            drawn = np.bincount(self._order(epoch)[0][:offset], minlength=len(self._per_epoch))
        before = (max(epoch - start, 0) * count for count, start in zip(self._per_epoch, self._from, strict=True))
        return [passed + int(seen) for passed, seen in zip(before, drawn, strict=True)]

    def upcoming(self, step: int) -> list[int]:
        """Returns the streams that step `step` and later ones draw from: that step's first, the others by epoch."""
        if step >= self.num_steps:
            return []
        first = [int(self.epoch_ends[epoch - 1]) if epoch else 0 for epoch in self._from]
        drawn = [i for i, count in enumerate(self._per_epoch) if count and first[i] < self.num_steps]
        return sorted(drawn, key=lambda i: (i != self.draw(step).stream, first[i]))
