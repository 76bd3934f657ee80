"""Writes a checkpoint in a form that runs without this package.

  python -m detclipv2_jax.export --checkpoint=DIR --format=FORMAT --output=DIR [--words="cat, red car"]

| FORMAT      | what is written                                                  | what reads it                   |
|-------------|------------------------------------------------------------------|---------------------------------|
| safetensors | weights, config.json, the words given and their embeddings       | weights.py beside it: NumPy     |
| stablehlo   | the same, and programs: image and text embeddings in, boxes out, | detector.py beside it: jax      |
|             | one for each canvas, and one that embeds tokens                  |                                 |
| saved_model | a TensorFlow SavedModel: image and words as strings in, boxes    | TensorFlow with tensorflow-text |
|             | and names out                                                    |                                 |

Both programs are the whole inference but resizing: normalisation, scores, best pairs, NMS. Number of images and of
words are free. They run on CPU, TPU and CUDA. Photos must lie on a canvas as `config.eval` says: resized to the largest
size that fits, in its top left; scripts/detector.py describes the arguments.
"""

from __future__ import annotations

import pathlib
import sys
from typing import Literal

from detclipv2_jax import commands


def run(
    *,
    checkpoint: str,
    format: Literal["safetensors", "stablehlo", "saved_model"],
    output: str,
    words: str = "",
    words_file: str = "",
    vocabulary: str = "",
    score_threshold: float | None = None,
    nms_iou: float | None = None,
    max_detections: int | None = None,
    dtype: Literal["", "float32", "bfloat16"] = "",
) -> None:
    """Writes the newest checkpoint of a run, and prints the files.

    Args:
      checkpoint: workdir of a training run
      format: what to write
      output: folder to write, new or empty
      words: e.g. "cat, red car" or "ram: male sheep, red car"; not for a SavedModel, which takes any words
      words_file: one word a line ("name", "name: definition" or "name<tab>definition"), or a COCO json with categories
      vocabulary: the names of the categories of a data set: lvis, coco or objects365
      score_threshold: only boxes above it, built into the programs; default: the run's config.eval.score_threshold
      nms_iou: IoU above which a better box removes another; default: the run's config.eval.nms_iou
      max_detections: boxes an image; default: the run's config.eval.max_detections
      dtype: compute type; default: the run's config.model.dtype. Results in bfloat16 depend on the compiler

    Raises:
      ValueError: no checkpoint, a folder with something in it, or a limit that makes no sense.
    """
    from detclipv2_jax.export import programs
    from detclipv2_jax.inference import Limits, Predictor, parse_words

    folder = pathlib.Path(output)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"--output: {folder} holds something already; give a new folder")
    asked = None
    if words or words_file or vocabulary:
        asked = parse_words(words, words_file=words_file, vocabulary=vocabulary)
    if format == "saved_model" and asked:
        raise ValueError("--words: a SavedModel takes its words when it runs; leave them out")
    predictor = programs.portable(Predictor.from_checkpoint(checkpoint), dtype=dtype)
    limits = Limits.from_config(
        predictor.config.eval, score_threshold=score_threshold, nms_iou=nms_iou, max_detections=max_detections
    )
    programs.write(folder, predictor, format, limits=limits, words=asked)
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        print(f"{path.stat().st_size / 1e6:10.2f} MB  {path}")


if __name__ == "__main__":
    sys.exit(commands.run(run, about=__doc__))
