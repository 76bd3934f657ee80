"""What a run reports while it trains: a progress bar, rates, and scalars on disk."""

from __future__ import annotations

import contextlib
import json
import math
import os
import pathlib
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TextIO

import jax
from absl import logging
from tqdm import tqdm

from detclipv2_jax import files
from detclipv2_jax.runs.trackers import Tracker
from detclipv2_jax.runs.workdir import gone

if TYPE_CHECKING:
    from tensorboard.summary.writer.record_writer import RecordWriter


def prefix(kind: str, values: dict[str, Any]) -> dict[str, float]:
    """Returns the values as floats under names that begin with the kind."""
    return {f"{kind}/{name}": float(value) for name, value in values.items()}


class Progress:
    """Progress bar of a terminal (step, loss terms, images/s, time left), and rates for the log.

    Attributes:
      flops: done since the last call of `rates`; the caller adds to it.
    """

    def __init__(self, start: int, total: int, peak_flops: float | None = None):
        self._peak_flops = peak_flops  # a second, of all devices
        self._begun, self._done, self._left = time.monotonic(), 0, total - start
        self._bar = tqdm(
            initial=start, total=total, unit="step", dynamic_ncols=True, mininterval=0.5,
            disable=jax.process_index() != 0 or not sys.stderr.isatty(),
        )  # fmt: skip
        self._reset()

    def _reset(self) -> None:
        self._since, self._steps, self._images, self._waited, self.flops = time.monotonic(), 0, 0, 0.0, 0.0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time inside as waiting for data."""
        start = time.monotonic()
        yield
        self._waited += time.monotonic() - start

    def step(self, num_images: int) -> None:
        """Counts one step."""
        self._bar.update()
        self._steps, self._done = self._steps + 1, self._done + 1
        self._images += num_images

    def show(self, metrics: dict[str, float]) -> None:
        """Shows the loss terms of a step on the bar."""
        losses = {name: f"{value:.3f}" for name, value in metrics.items() if "loss" in name}
        self._bar.set_postfix(losses | {"img/s": f"{self._images / max(time.monotonic() - self._since, 1e-6):.1f}"})

    def rates(self) -> dict[str, float]:
        """Returns what happened since the last call: speed, share of time spent waiting for the data of any process.

        The utilisation is of the devices' peak (see `flops`), where that is known.
        """
        elapsed = max(time.monotonic() - self._since, 1e-6)
        rates = {
            "timing/images_per_second": self._images / elapsed,
            "timing/step_seconds": elapsed / max(self._steps, 1),
            "timing/data_wait_share": self._waited / elapsed,
        }
        if self._peak_flops:
            rates["timing/flop_utilization"] = self.flops / (elapsed * self._peak_flops)
        self._reset()
        return rates

    def seconds_left(self) -> float:
        """Returns how long the other steps take if they take what those of this process took, with all between them."""
        return (time.monotonic() - self._begun) / max(self._done, 1) * (self._left - self._done)

    def close(self) -> None:
        """Ends the bar."""
        self._bar.close()


class Events:
    """Scalars in a file of events as TensorBoard reads them, written through its own writer, without TensorFlow."""

    def __init__(self, folder: pathlib.Path):
        # half a second: not before the run is known to be good. Its EventFileWriter loads TensorFlow where there is one
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer import record_writer

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        name = f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}.{os.getpid()}"
        self._file: RecordWriter = record_writer.RecordWriter((folder / name).open("wb"))
        self._put(file_version="brain.Event:2")

    def _put(self, **fields: Any) -> None:
        self._file.write(self._event(wall_time=time.time(), **fields).SerializeToString())
        self._file.flush()

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Writes the scalars of a step."""
        values = [self._summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
        self._put(step=step, summary=self._summary(value=values))

    def close(self) -> None:
        """Ends the file."""
        self._file.close()


class MetricsWriter:
    """Scalars to metrics.jsonl (an object a line), TensorBoard and trackers, and a line to the log; process 0 only.

    Lines of steps after `start` are from a run that was continued from an older checkpoint; they are removed. `monitor`
    is the score that the log names; `open_trackers` makes the trackers when the first line is written.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        start: int,
        *,
        monitor: str = "AP",
        open_trackers: Callable[[], list[Tracker]] = list,
    ):
        self._path = workdir / "metrics.jsonl"
        self._monitor, self._score = f"eval/{monitor}", ""  # the last score, for the log
        self._open_trackers, self._trackers = open_trackers, list[Tracker]()
        self._file: TextIO | None = None  # opened by the first line: a run that is done writes nothing
        self._kept: list[dict[str, Any]] = []
        self._events: Events | None = None
        if jax.process_index() == 0 and self._path.exists():
            rows, num_other = files.read_json_lines(self._path)
            numbered = [row for row in rows if isinstance(row.get("step"), int)]
            self._kept = [row for row in numbered if row["step"] <= start]
            num_other += len(rows) - len(numbered)
            if num_other:  # a killed run may leave half a line, which is later than every checkpoint
                logging.warning("%s: %d lines that are no json objects with a step are removed", self._path, num_other)
            if num_other or len(self._kept) < len(rows):
                files.write_text(self._path, (json.dumps(row) + "\n" for row in self._kept))
            for row in self._kept:
                self._remember(row)

    def _remember(self, scalars: Mapping[str, float | None]) -> None:
        if (score := scalars.get(self._monitor)) is not None:
            self._score = f"{self._monitor.removeprefix('eval/')} {100 * score:.1f}%"

    def recorded(self, kind: str) -> list[tuple[int, dict[str, float]]]:
        """Returns (step, scores) of a kind's evaluations that the file held at the start; [] but on process 0."""
        found = (
            (row["step"], {k.removeprefix(f"{kind}/"): row[k] for k in row if k.startswith(f"{kind}/")})
            for row in self._kept
        )
        return [(step, scores) for step, scores in found if scores]

    def write(self, step: int, scalars: dict[str, float], *, seconds_left: float | None = None) -> None:
        """Writes the scalars of a step; the log gets the losses among them, the last score and the time that is left.

        Raises:
          WorkdirError: the file was removed, which nobody would notice.
        """
        if jax.process_index() != 0:
            return
        if self._file is None:
            self._file = self._path.open("a")
            self._events = Events(self._path.parent)
            self._trackers = self._open_trackers()
        # JSON has no NaN; null keeps the line readable by every parser
        line = {name: value if math.isfinite(value) else None for name, value in scalars.items()}
        self._file.write(json.dumps({"step": step, **line}) + "\n")
        self._file.flush()
        if not self._path.exists() or not os.path.samestat(os.fstat(self._file.fileno()), self._path.stat()):
            raise gone(self._path)
        if self._events is not None:
            self._events.write(step, scalars)
        for tracker in self._trackers:
            tracker.write(step, {name: value for name, value in scalars.items() if math.isfinite(value)})
        self._remember(scalars)
        said = [f"{name.replace('/', ' ')} {value:.4g}" for name, value in scalars.items() if name.endswith("/loss")]
        said += [self._score] if self._score else []
        said += [f"{_duration(seconds_left)} left"] if seconds_left is not None else []
        logging.info("step %d: %s", step, ", ".join(said) or "evaluated")

    def close(self) -> None:
        """Waits until everything is on disk and with the trackers."""
        if self._file is not None and self._events is not None:
            self._file.close()
            self._events.close()
            for tracker in self._trackers:
                tracker.close()


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes >= 60 else f"{minutes} min" if minutes else "< 1 min"
