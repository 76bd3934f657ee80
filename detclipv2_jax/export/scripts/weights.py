"""Lists and reads exported weights; needs NumPy and safetensors only.

  python weights.py [NAME]    lists the arrays of this folder, or prints one

  import weights
  parameters = weights.load("FOLDER")    # name -> float32 array
  words, definitions, embeddings = weights.vocabulary("FOLDER")

A file whose header promises more than the file holds is refused before anything is allocated, so that reading needs no
more memory than the file's size.
"""

from __future__ import annotations

import json
import pathlib
import sys

import numpy as np
from safetensors import safe_open

HERE = pathlib.Path(__file__).parent
WEIGHTS, VOCABULARY = "weights.safetensors", "vocabulary.safetensors"


def shapes(folder: str | pathlib.Path = HERE, *, file: str = WEIGHTS) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Returns name -> (type, shape); reads the header only."""
    with safe_open(pathlib.Path(folder) / file, framework="np") as opened:
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118  (not a dict)
        return {name: (entry.get_dtype(), tuple(entry.get_shape())) for name, entry in slices.items()}


def read(name: str, folder: str | pathlib.Path = HERE, *, file: str = WEIGHTS) -> np.ndarray:
    """Returns one array."""
    with safe_open(pathlib.Path(folder) / file, framework="np") as opened:
        return opened.get_tensor(name)


def load(folder: str | pathlib.Path = HERE) -> dict[str, np.ndarray]:
    """Returns all arrays by name."""
    return {name: read(name, folder) for name in shapes(folder)}


def vocabulary(folder: str | pathlib.Path = HERE) -> tuple[list[str], list[str], np.ndarray]:
    """Returns words, their definitions ("" without one), and their embeddings float32[words, d], of length 1."""
    listed = json.loads((pathlib.Path(folder) / "vocabulary.json").read_text(encoding="utf-8"))
    return listed["words"], listed["definitions"], read("embeddings", folder, file=VOCABULARY)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(read(sys.argv[1]))
    else:
        for name, (kind, shape) in shapes().items():
            print(kind, list(shape), name)
