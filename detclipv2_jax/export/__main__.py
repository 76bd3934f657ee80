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

import json
import os
import pathlib
import shutil
import sys
from collections.abc import Mapping, Sequence

import flax
import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from jax.export import Exported, export, symbolic_shape
from safetensors.numpy import save_file

from detclipv2_jax import config_json, interrupts
from detclipv2_jax.export import scripts
from detclipv2_jax.inference import WORD_CHUNK, Limits, Photos, Predictor, vocabulary
from detclipv2_jax.models import detclip

FORMATS = ("safetensors", "stablehlo", "saved_model")
PLATFORMS = ("cpu", "tpu", "cuda")


def run(
    *,
    checkpoint: str,
    file_format: str,
    output: str,
    words: Mapping[str, str] | None = None,
    score_threshold: float | None = None,
    nms_iou: float | None = None,
    max_detections: int | None = None,
    dtype: str = "",
) -> list[pathlib.Path]:
    """Writes the newest checkpoint of a run; returns the files.

    Args:
      checkpoint: workdir of a training run.
      file_format: one of `FORMATS`.
      output: folder; must be empty or new.
      words: name → definition, written with their embeddings; not for a SavedModel, which takes any words.
      score_threshold: only boxes above it; None: the configuration's, as for the next two. Built into the programs.
      nms_iou: a box is removed by a better one of its word if their IoU is above it.
      max_detections: boxes an image.
      dtype: compute type, one of config.DTYPES; "": the configuration's. Results in bfloat16 depend on the compiler.

    Raises:
      ValueError: no checkpoint, a folder with something in it, or a limit that makes no sense.
    """
    folder = pathlib.Path(output)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"--output: {folder} holds something already; give a new folder")
    if file_format == "saved_model" and words:
        raise ValueError("--words: a SavedModel takes its words when it runs; leave them out")
    predictor = Predictor.from_checkpoint(checkpoint)
    config = predictor.config.copy_and_resolve_references()
    with config.unlocked():  # configurations of old runs have no such key
        # kernels would tie the program to this version of jaxlib
        config.model.swin.attention_impl = "xla"
        if config.model.head.deform_impl in ("auto", "pallas"):
            config.model.head.deform_impl = "xla"
    config.model.dtype = dtype or config.model.dtype
    predictor = Predictor(config, detclip.from_config(config.model), predictor.params, step=predictor.step)
    limits = Limits.from_config(
        predictor.config.eval, score_threshold=score_threshold, nms_iou=nms_iou, max_detections=max_detections
    )
    flat = flax.traverse_util.flatten_dict(predictor.params, sep="/")
    weights = {name: np.asarray(flat[name]) for name in sorted(flat)}
    if file_format == "saved_model":
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # it greets
        try:
            from detclipv2_jax.export import saved_model  # takes seconds
        except ImportError as error:
            raise ValueError(
                f"--format=saved_model needs tensorflow-text: pip install 'detclipv2_jax[export]' ({error})"
            ) from None
        saved_model.save(folder, make_modules(predictor, weights, limits), weights)
    else:
        write_weights(folder, predictor, weights, words)
    if file_format == "stablehlo":
        for name, module in make_modules(predictor, weights, limits).items():
            (folder / f"{name}.stablehlo").write_bytes(module.serialize())
        _copy_script("detector.py", folder)
    return sorted(path for path in folder.rglob("*") if path.is_file())


def write_weights(
    folder: pathlib.Path, predictor: Predictor, weights: dict[str, np.ndarray], words: Mapping[str, str] | None
) -> None:
    """Writes weights.safetensors, config.json, the vocabulary if there are words, and weights.py, which reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    about = {"layout": "detclipv2_jax", "step": str(predictor.step)}
    save_file(weights, folder / "weights.safetensors", metadata=about)
    (folder / "config.json").write_text(config_json.to_json(predictor.config))
    if words:
        names, text, mask = predictor.vocabulary(words)
        listed = {"words": names, "definitions": [words[name] for name in names]}
        (folder / "vocabulary.json").write_text(json.dumps(listed, indent=1, ensure_ascii=False), encoding="utf-8")
        save_file({"embeddings": text[mask]}, folder / "vocabulary.safetensors", metadata=about)
    _copy_script("weights.py", folder)


def _copy_script(name: str, folder: pathlib.Path) -> None:
    shutil.copyfile(pathlib.Path(scripts.__path__[0]) / name, folder / name)


def make_modules(predictor: Predictor, weights: Mapping[str, np.ndarray], limits: Limits) -> dict[str, Exported]:
    """Returns the exported functions, whose first argument is all weights by name.

    encode_text(weights, tokens) → float32[w, d], L2-normalised; detect_HxW(weights, image, extent, original_size, text)
    → dict for each canvas H x W of the configuration. Rows of text that are zero are no words.
    """
    model, config = predictor.detector.model, predictor.config
    b, w = symbolic_shape("b, w")
    shape = jax.ShapeDtypeStruct
    shapes = {name: shape(value.shape, value.dtype) for name, value in weights.items()}

    def nested(weights):
        return flax.traverse_util.unflatten_dict(weights, sep="/")

    def encode_text(weights, tokens):
        return model.apply({"params": nested(weights)}, tokens, method="encode_text")

    def detect(weights, image, extent, original_size, text):
        photos = Photos(image, extent, (extent / original_size).astype(jnp.float32), original_size)
        padding = -(-w // WORD_CHUNK) * WORD_CHUNK - w
        mask = jnp.pad(jnp.any(text != 0.0, axis=1), (0, padding))
        found = predictor.detector.predict(nested(weights), photos, jnp.pad(text, ((0, padding), (0, 0))), mask, limits)
        return vars(found)

    tokens = shape((w, config.model.text.context_length), jnp.int32)
    modules = {"encode_text": export(jax.jit(encode_text), platforms=PLATFORMS)(shapes, tokens)}
    sizes, text = shape((b, 2), jnp.int32), shape((w, modules["encode_text"].out_avals[0].shape[1]), jnp.float32)
    for height, width in config.eval.canvases:
        image = shape((b, height, width, 3), jnp.uint8)
        modules[f"detect_{height}x{width}"] = export(jax.jit(detect), platforms=PLATFORMS)(
            shapes, image, sizes, sizes, text
        )
    return modules


def _define_flags() -> None:
    # not at import: other tools have flags of these names
    flags.DEFINE_string("checkpoint", None, "workdir of a training run", required=True)
    flags.DEFINE_enum("format", None, FORMATS, "what to write", required=True)
    flags.DEFINE_string("output", None, "folder to write, new or empty", required=True)
    vocabulary.define_flags()
    flags.adopt_module_key_flags(vocabulary)  # for --help
    flags.DEFINE_float("score_threshold", None, "only boxes above it; default: the run's config.eval.score_threshold")
    flags.DEFINE_float("nms_iou", None, "IoU above which a better box removes another; default: the run's")
    flags.DEFINE_integer("max_detections", None, "boxes an image; default: the run's config.eval.max_detections")
    flags.DEFINE_enum("dtype", "", ("", *detclip.DTYPES), "compute type; default: the run's config.model.dtype")


@interrupts.in_one_line
def main(argv: Sequence[str]) -> None:
    """Runs the command; ends the process with status 1 if it cannot be done."""
    if len(argv) > 1:
        sys.exit(f"error: unexpected argument {argv[1]!r}; quote words that hold spaces")
    options = flags.FLAGS
    if options.verbosity == logging.INFO:  # absl's default; reading a checkpoint says much there
        logging.set_verbosity(logging.WARNING)
    given = {"words_file": options.words_file, "vocabulary": options.vocabulary}
    try:
        files = run(
            checkpoint=options.checkpoint,
            file_format=options.format,
            output=options.output,
            words=vocabulary.parse_words(options.words, **given) if options.words or any(given.values()) else None,
            score_threshold=options.score_threshold,
            nms_iou=options.nms_iou,
            max_detections=options.max_detections,
            dtype=options.dtype,
        )
    except ValueError as error:
        sys.exit(f"error: {error}")
    for path in files:
        print(f"{path.stat().st_size / 1e6:10.2f} MB  {path}")


if __name__ == "__main__":
    _define_flags()
    app.run(main)
