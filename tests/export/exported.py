"""Runs exports from disk in processes without the package; for the tests and the benchmark."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
from collections.abc import Mapping, Sequence

import numpy as np
from scipy.optimize import linear_sum_assignment

from detclipv2_jax.data import concepts, tokenizer
from detclipv2_jax.inference import Found, Photos, Predictor

CHILD = pathlib.Path(__file__).with_name("run_export.py")

RUN = "del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')"


def _only_onnx(temporary: pathlib.Path) -> pathlib.Path:
    """Returns a folder of packages: onnxruntime, Pillow and what they consist of."""
    packages, site = temporary / "packages", pathlib.Path(np.__file__).parents[1]
    packages.mkdir(exist_ok=True)
    for name in ("numpy", "numpy.libs", "onnxruntime", "PIL", "pillow.libs"):
        if (site / name).exists() and not (packages / name).exists():
            (packages / name).symlink_to(site / name)
    return packages


def arguments(
    predictor: Predictor, photos: Sequence[np.ndarray | str], words: Mapping[str, str]
) -> dict[str, np.ndarray]:
    """Returns what an export needs to find words on photos of one canvas."""
    placed = Photos(*(np.stack(arrays) for arrays in zip(*map(predictor._photo, photos), strict=True)))
    texts = [concepts.concept_text(*pair) for pair in words.items()]
    return placed._asdict() | {"words": np.array(texts), "tokens": tokenizer.tokenize(texts)}


def run(
    file_format: str, folder: pathlib.Path, arrays: Mapping[str, np.ndarray], temporary: pathlib.Path
) -> dict[str, np.ndarray]:
    """Returns what an export finds, see run_export.py."""
    source, target = temporary / "in.npz", temporary / "out.npz"
    np.savez(source, **arrays)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    line = [str(CHILD), file_format, str(folder), str(source), str(target)]
    if file_format == "onnx":
        line = ["-I", "-S", "-c", f"import runpy, sys; sys.path.append({str(_only_onnx(temporary))!r}); {RUN}", *line]
    line.insert(0, sys.executable)
    done = subprocess.run(line, capture_output=True, text=True, cwd=temporary, env=environment, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return dict(np.load(target))


def differences(found: Mapping[str, np.ndarray], expected: Sequence[Found]) -> tuple[float, float]:
    """Returns the largest difference of boxes, as shares of their photo's sides, and of scores.

    Each detection is compared with the one it is nearest to, one to one: rounding may swap two of nearly equal scores.
    ValueError if their numbers or labels differ.
    """
    boxes, scores = [0.0], [0.0]
    for i, own in enumerate(expected):
        mask = found["mask"][i]
        labels = found["labels"][i][mask]
        if not np.array_equal(np.sort(labels), np.sort(own.labels)):
            raise ValueError(f"photo {i}: {labels} instead of {own.labels}")
        sides = np.array([own.size[::-1] * 2])
        box = np.abs((found["boxes"][i][mask][:, None] - own.boxes) / sides).max(-1, initial=0.0)
        score = np.abs(found["scores"][i][mask][:, None] - own.scores)
        pairs = linear_sum_assignment(np.maximum(box, score) + 10.0 * (labels[:, None] != own.labels))
        boxes.append(box[pairs].max(initial=0.0))
        scores.append(score[pairs].max(initial=0.0))
    return max(boxes), max(scores)
