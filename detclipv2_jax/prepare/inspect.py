"""What training gets from data sets, to be looked at: sheets of batches, histograms as a picture and as JSON.

`python -m detclipv2_jax.prepare inspect` runs it on built folders, or on whatever a configuration names.
"""

from __future__ import annotations

import collections
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from detclipv2_jax import buckets, files
from detclipv2_jax import config as config_lib
from detclipv2_jax.data.built import REPORT
from detclipv2_jax.data.schema import Batch, Kind
from detclipv2_jax.data.streams import train_streams
from detclipv2_jax.visualize import charts, figures

_ROWS = 8  # images a batch: what is drawn is the whole batch, and the batch size changes nothing but the table
_NUM_SHEETS = 2  # a stream
_MAX_BINS = 40


def inspect(
    output: str, *, config: ConfigDict | None = None, folders: Sequence[str] = (), num_examples: int = 256
) -> dict[str, Any]:
    """Returns what the streams give, by stream, after writing `inspection.json` and pictures to a folder.

    Args:
      output: folder for `inspection.json`, `histograms.png` and `<stream>_<batch>.jpg`.
      config: names the data, canvases and numbers of concepts; None: `config.base()`.
      folders: built folders that are read instead of what the configuration names.
      num_examples: images a stream that are counted, in the order in which training reads them.

    Raises:
      ValueError: a folder is not built, a file is missing, or nothing is named.
    """
    config = buckets.localized(config or config_lib.base())
    kinds = [_kind_of(folder) for folder in folders]
    for kind in Kind:
        section = config[kind.value]
        section.batch_size = min(section.batch_size, _ROWS)
        if folders:
            section.data = tuple(folder for folder, held in zip(folders, kinds, strict=True) if held == kind)
            section["pairs" if kind is Kind.IMAGE_TEXT else "annotations"] = section.images = ""
    path = pathlib.Path(output)
    report, panels = {}, {}
    for stream in train_streams(config):
        values: collections.defaultdict[str, list[np.ndarray]] = collections.defaultdict(list)
        num_batches = -(-min(num_examples, stream.num_examples) // stream.batch_size)
        for n in range(num_batches):
            batch = stream.batch(n)
            if n < _NUM_SHEETS:
                picture = path / f"{stream.name.replace('/', '_')}_{n}.jpg"  # a PNG takes a second
                figures.training_batch(batch, kind=stream.kind, max_images=_ROWS, path=picture)
            for name, numbers in measure(batch, stream.kind).items():
                values[name].append(numbers)
        joined = {name: np.concatenate(parts) for name, parts in values.items()}
        measured = {name: numbers for name, numbers in joined.items() if len(numbers)}
        bins = {name: histogram(numbers) for name, numbers in measured.items()}
        panels[stream.name] = bins
        report[stream.name] = {
            "images of an epoch": stream.num_examples,
            "images counted": num_batches * stream.batch_size,
            "capacities": stream.capacities,
            "left out or repaired": dict(stream.counters),
            **{
                name: {
                    "smallest": float(numbers.min()),
                    "median": float(np.median(numbers)),
                    "mean": round(float(numbers.mean()), 3),
                    "largest": float(numbers.max()),
                    "edges": bins[name][0].tolist(),
                    "counts": bins[name][1].tolist(),
                }
                for name, numbers in measured.items()
            },
        }
    charts.histograms(panels, path=path / "histograms.png")
    files.write_json(path / "inspection.json", report, indent=1)
    return report


def _kind_of(folder: str) -> str:
    path = pathlib.Path(folder) / REPORT
    if not path.is_file():
        raise ValueError(
            f"--data={folder} is no folder that `python -m detclipv2_jax.prepare KIND` has built: it has no {REPORT}"
        )
    report = files.read_json(path)
    if not isinstance(report, dict) or report.get("kind") not in tuple(Kind):
        raise ValueError(f"{path} is damaged: it does not say which kind of data the folder holds")
    return report["kind"]


def measure(batch: Batch, kind: Kind) -> dict[str, np.ndarray]:
    """Returns each quantity's values in a batch: one an image, but for lengths, which are one a concept of an image."""
    rows, mask = (
        (batch.caption_concepts, batch.caption_mask)
        if kind is Kind.IMAGE_TEXT
        else (batch.box_concepts, batch.box_mask)
    )
    distinct = [np.unique(image_rows[used]) for image_rows, used in zip(rows, mask, strict=True)]
    lengths = (batch.concept_tokens > 0).sum(axis=1)
    boxes = {} if kind is Kind.IMAGE_TEXT else {"boxes an image": mask.sum(axis=1)}
    return boxes | {
        "concepts an image": np.array([len(concepts) for concepts in distinct]),
        "tokens a concept of an image": lengths[np.concatenate(distinct)],
        "tokens a negative": lengths[np.setdiff1d(np.flatnonzero(batch.concept_mask), np.concatenate(distinct))],
        "photo: short side, px": batch.original_size.min(axis=1),
        "photo: long side, px": batch.original_size.max(axis=1),
        "on the canvas: short side, px": batch.extent.min(axis=1),
    }


def histogram(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns (edges [n + 1], counts [n]) of integers; bins have one whole width and are at most 40."""
    low, high = int(values.min()), int(values.max())
    width = -(-(high - low + 1) // _MAX_BINS)
    edges = np.arange(low, high + width + 1, width)
    return edges, np.histogram(values, edges)[0]
