"""Writes a checkpoint in a form that runs without this package.

  python -m detclipv2_jax.export --checkpoint=DIR --format=FORMAT --output=DIR [--words="cat, red car"]

| FORMAT      | what is written                                                  | what reads it                   |
|-------------|------------------------------------------------------------------|---------------------------------|
| hub         | weights, config.json, the words given and their embeddings, and  | Predictor.from_pretrained       |
|             | README.md, a model card: what a page of the model hub is made of |                                 |
| safetensors | the same without the card                                        | weights.py beside it: NumPy     |
| stablehlo   | the same, and programs: image and text embeddings in, boxes out, | detector.py beside it: jax      |
|             | one for each canvas, and one that embeds tokens                  |                                 |
| saved_model | a TensorFlow SavedModel: image and words as strings in, boxes    | TensorFlow with tensorflow-text |
|             | and names out                                                    |                                 |
| onnx        | the same programs as for stablehlo, as ONNX models; the words    | onnx_detector.py beside it:     |
|             | given are vocabulary.npz, or a part of them (--bake_words)       | onnxruntime                     |

Every command that takes --checkpoint takes the folder of the first three. Of the hub's it may be put there at once:
--push=USER/NAME (after `hf auth login`; pip install 'detclipv2_jax[hub]').

Both programs are the whole inference but resizing: normalisation, scores, best pairs, NMS. Number of images and of
words are free (of ONNX models too, unless --batch_size and --bake_words fix them). StableHLO runs on CPU, TPU and CUDA.
Photos must lie on a canvas as `config.eval` says: resized to the largest size that fits, in its top left;
scripts/detector.py describes the arguments.
"""

from __future__ import annotations

import pathlib
import sys
from typing import Any, Literal

from detclipv2_jax import commands
from detclipv2_jax.files import check_empty

WEIGHTS = {"hub": ("float32", "bfloat16", "float16"), "onnx": ("float32", "int8")}  # format → types of stored weights
OPSET = 18  # of ONNX


def run(
    *,
    checkpoint: str,
    format: Literal["hub", "safetensors", "stablehlo", "saved_model", "onnx"],
    output: str,
    words: str = "",
    words_file: str = "",
    vocabulary: str = "",
    score_threshold: float | None = None,
    nms_iou: float | None = None,
    max_detections: int | None = None,
    dtype: Literal["", "float32", "bfloat16"] = "",
    weights: Literal["float32", "bfloat16", "float16", "int8"] = "float32",
    license: str = "",
    push: str = "",
    private: bool = False,
    batch_size: int = 0,
    bake_words: bool = False,
    opset: int = OPSET,
) -> None:
    """Writes the newest checkpoint of a run, and prints the files.

    Args:
      checkpoint: workdir of a training run, or folder of an export
      format: what to write
      output: folder to write, new or empty
      words: e.g. "cat, red car" or "ram: male sheep, red car"; not for a SavedModel, which takes any words
      words_file: one word a line ("name", "name: definition" or "name<tab>definition"), or a COCO json with categories
      vocabulary: the names of the categories of a data set: lvis, coco or objects365
      score_threshold: only boxes above it, built into the programs; default: the run's config.eval.score_threshold
      nms_iou: IoU above which a better box removes another; default: the run's config.eval.nms_iou
      max_detections: boxes an image; default: the run's config.eval.max_detections
      dtype: compute type; default: the run's config.model.dtype. Results in bfloat16 depend on the compiler
      weights: type in which the hub's format stores them (not int8), or onnx's (float32 or int8)
      license: of the weights, for the card: its identifier on the hub, e.g. apache-2.0; default: the card names none
      push: USER/NAME of the model on the hub that the folder becomes
      private: make that model a private one
      batch_size: photos of every call of an ONNX model; 0: any number
      bake_words: the words become a part of the ONNX models, which then take no others
      opset: version of ONNX's operators

    Raises:
      ValueError: no checkpoint, a folder with something in it, or a limit that makes no sense.
    """
    from detclipv2_jax.export import card, programs
    from detclipv2_jax.inference import Limits, Predictor, parse_words
    from detclipv2_jax.runs import hub

    folder = pathlib.Path(output)
    check_empty(folder)
    asked = None
    if words or words_file or vocabulary:
        asked = parse_words(words, words_file=words_file, vocabulary=vocabulary)
    if format == "saved_model" and asked:
        raise ValueError("--words: a SavedModel takes its words when it runs; leave them out")
    of_hub, of_onnx = bool(license or push or private), bool(batch_size or bake_words or opset != OPSET)
    _check_options(format, of_hub=of_hub, of_onnx=of_onnx, weights=weights, dtype=dtype)
    if batch_size < 0:
        raise ValueError(f"--batch_size is {batch_size}; give a number of photos, or 0 for any")
    if license:
        card.check_license(license)
    if push:
        hub.check_push(push)
    predictor = Predictor.from_checkpoint(checkpoint)
    asked = asked or dict(predictor.words)
    if bake_words and not asked:
        raise ValueError("--bake_words needs words: give --words, --words_file or --vocabulary")
    if format == "hub":
        predictor = programs.stored(predictor, weights=weights, dtype=dtype)
        text = card.write(predictor, pathlib.Path(checkpoint), license=license, weights=weights, words=asked)
        programs.write_model(folder, predictor, words=asked, dtype=weights)
        (folder / "README.md").write_text(text, encoding="utf-8")
        if not license:
            print("note: the card names no licence; --license=… says how the weights may be used")
    else:
        is_onnx = format == "onnx"
        predictor = programs.portable(predictor, dtype="float32" if is_onnx else dtype, branches=not is_onnx)
        limits = Limits.from_config(
            predictor.config.eval, score_threshold=score_threshold, nms_iou=nms_iou, max_detections=max_detections
        )
        if is_onnx:
            settings: dict[str, Any] = {"batch_size": batch_size, "bake_words": bake_words, "opset": opset}
            programs.write_onnx(folder, predictor, limits=limits, words=asked, weights=weights, **settings)
        else:
            programs.write(folder, predictor, format, limits=limits, words=asked)
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        print(f"{path.stat().st_size / 1e6:10.2f} MB  {path}")
    if push:
        print(hub.push(folder, push, private=private))


def _check_options(format: str, *, of_hub: bool, of_onnx: bool, weights: str, dtype: str) -> None:
    """Raises a ValueError if options of another format were given, or values that this one does not have."""
    if of_hub and format != "hub":
        raise ValueError(f"--license, --push and --private are of --format=hub, not of {format}")
    if of_onnx and format != "onnx":
        raise ValueError(f"--batch_size, --bake_words and --opset are of --format=onnx, not of {format}")
    if weights not in WEIGHTS.get(format, ("float32",)):
        raise ValueError(
            f"--weights={weights} is not of --format={format}: hub stores {', '.join(WEIGHTS['hub'])}, "
            f"onnx {', '.join(WEIGHTS['onnx'])}, others float32"
        )
    if format == "onnx" and dtype == "bfloat16":
        raise ValueError("--dtype=bfloat16: ONNX models compute in float32; leave it out")


if __name__ == "__main__":
    sys.exit(commands.run(run, about=__doc__))
