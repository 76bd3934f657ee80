"""Runs an exported detector; needs jax, NumPy and safetensors only.

  from detector import Detector

  detector = Detector("FOLDER")
  found = detector(image, extent, original_size, text)

  image          uint8[b, h, w, 3]: RGB photos at the top left of one of `detector.canvases`, resized, the rest anything
  extent         int32[b, 2]: (height, width) px of each photo on the canvas
  original_size  int32[b, 2]: (height, width) px of each photo; boxes are in these pixels
  text           float32[w, d]: embeddings of any number of words, e.g. `detector.encode(tokens)` of CLIP's tokens
                 int32[w, l] `[SOS] … [EOS] 0 … 0`, or those of vocabulary.safetensors
  found          boxes float32[b, n, 4] (xyxy), scores [b, n], labels [b, n] (rows of text), mask [b, n]; best first

Every size of a batch and every 128 words more are compiled when they first come.
"""

from __future__ import annotations

import pathlib
import re

import jax
import numpy as np
from jax import export
from safetensors.numpy import load_file

WORDS = 128  # rows of text are padded to a multiple of this with zeros, which are no words


class Detector:
    """An exported detector on the default device."""

    def __init__(self, folder: str | pathlib.Path):
        paths = sorted(pathlib.Path(folder).glob("*.stablehlo"))
        self._call = {p.stem: jax.jit(export.deserialize(bytearray(p.read_bytes())).call) for p in paths}
        self.canvases = [tuple(map(int, re.findall(r"\d+", name))) for name in self._call if name.startswith("detect_")]
        self._weights = jax.device_put(load_file(pathlib.Path(folder) / "weights.safetensors"))

    def encode(self, tokens: np.ndarray) -> np.ndarray:
        """Returns float32[w, d], the embeddings of rows of tokens."""
        return np.asarray(self._call["encode_text"](self._weights, np.asarray(tokens, np.int32)))

    def __call__(
        self, image: np.ndarray, extent: np.ndarray, original_size: np.ndarray, text: np.ndarray
    ) -> dict[str, np.ndarray]:
        """Returns boxes, scores, labels and mask."""
        height, width = image.shape[1:3]
        detect = self._call[f"detect_{height}x{width}"]
        text = np.pad(np.asarray(text, np.float32), ((0, -len(text) % WORDS), (0, 0)))
        sizes = (np.asarray(extent, np.int32), np.asarray(original_size, np.int32))
        return jax.tree.map(np.asarray, detect(self._weights, image, *sizes, text))
