"""Runs an exported detector; needs onnxruntime, NumPy and Pillow only.

  from onnx_detector import Detector

  detector = Detector("FOLDER")
  found = detector(*detector.place("photo.jpg"))          # looks for the words of the export
  found = detector(image, extent, original_size, text)    # or for others

  image          uint8[b, h, w, 3]: RGB photos at the top left of one of `detector.canvases`, resized, the rest anything
  extent         int32[b, 2]: (height, width) px of each photo on the canvas
  original_size  int32[b, 2]: (height, width) px of each photo; boxes are in these pixels
  text           float32[w, d]: embeddings of any number of words, e.g. `detector.encode(tokens)` of CLIP's tokens
                 int32[w, l] `[SOS] … [EOS] 0 … 0`; not where the words are a part of the model
  found          boxes float32[b, n, 4] (xyxy), scores [b, n], labels [b, n] (of `detector.words`, or rows of text),
                 mask [b, n]; best first

`place` resizes with Pillow. Training resizes with OpenCV (area averages where it shrinks); do that for the same scores.
"""

from __future__ import annotations

import json
import pathlib
import re
from typing import Any

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


class Detector:
    """An exported detector; `threads` 0: one a core; `options`: of onnxruntime.InferenceSession, such as providers."""

    def __init__(self, folder: str | pathlib.Path, *, threads: int = 0, **options: Any):
        self._sessions, settings = {}, onnxruntime.SessionOptions()
        settings.intra_op_num_threads = threads
        settings.add_session_config_entry("session.disable_quant_qdq", "1")  # int8 weights become floats once
        for path in sorted(pathlib.Path(folder).glob("*.onnx")):
            self._sessions[path.stem] = onnxruntime.InferenceSession(path, settings, **options)
        sizes = (re.findall(r"\d+", name) for name in self._sessions if name.startswith("detect_"))
        self.canvases = [tuple(map(int, size)) for size in sizes]
        about = next(session for name, session in self._sessions.items() if name.startswith("detect_")).get_modelmeta()
        self._about = {name: json.loads(value) for name, value in about.custom_metadata_map.items()}
        self.words, self.text = self._about.get("words", []), None
        if (pathlib.Path(folder) / "vocabulary.npz").exists():
            vocabulary = np.load(pathlib.Path(folder) / "vocabulary.npz")
            self.words, self.text = vocabulary["words"].tolist(), vocabulary["embeddings"]

    def encode(self, tokens: np.ndarray) -> np.ndarray:
        """Returns float32[w, d], the embeddings of rows of tokens."""
        return self._sessions["encode_text"].run(None, {"tokens": np.asarray(tokens, np.int32)})[0]

    def place(self, photo: str | pathlib.Path | Image.Image) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns image, extent and original size of one photo on the canvas that shows it largest."""
        photo = photo if isinstance(photo, Image.Image) else Image.open(photo)
        photo = ImageOps.exif_transpose(photo).convert("RGB")
        size = photo.size[::-1]
        canvas = max(self.canvases, key=lambda canvas: min(canvas[0] / size[0], canvas[1] / size[1]))
        sides = self._about["short_side"] / min(size), self._about["long_side"] / max(size)
        scale = min(*sides, canvas[0] / size[0], canvas[1] / size[1])
        height, width = (min(max(round(size[i] * scale), 1), canvas[i]) for i in (0, 1))
        image = np.zeros((1, *canvas, 3), np.uint8)
        image[0, :height, :width] = np.asarray(photo.resize((width, height), Image.Resampling.BILINEAR))
        return image, np.array([[height, width]], np.int32), np.array([size], np.int32)

    def __call__(
        self, image: np.ndarray, extent: np.ndarray, original_size: np.ndarray, text: np.ndarray | None = None
    ) -> dict[str, np.ndarray]:
        """Returns boxes, scores, labels and mask."""
        session = self._sessions["detect_{}x{}".format(*image.shape[1:3])]
        given = {"image": image, "extent": extent, "original_size": original_size}
        names = {value.name for value in session.get_inputs()}
        text = self.text if text is None else text
        if ("text" in names) == (text is None):
            raise ValueError("give text, the embeddings of words" if text is None else "this model has its own words")
        given |= {} if text is None else {"text": text}
        types = {"image": np.uint8, "text": np.float32}
        given = {name: np.asarray(array, types.get(name, np.int32)) for name, array in given.items()}
        return dict(zip((value.name for value in session.get_outputs()), session.run(None, given), strict=True))
