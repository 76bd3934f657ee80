"""What an export consists of: weights, programs, and the scripts that read them."""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.export import Exported, export, symbolic_shape

from detclipv2_jax.export import scripts
from detclipv2_jax.inference import WORD_CHUNK, Limits, Photos, Predictor
from detclipv2_jax.runs import exported
from detclipv2_jax.runs.state import make_model

PLATFORMS = ("cpu", "tpu", "cuda")


def portable(predictor: Predictor, *, dtype: str = "", branches: bool = True) -> Predictor:
    """Returns the predictor without kernels, which would tie a program to this version of jaxlib; `dtype` as given.

    Without `branches` nothing depends on the device that the program is compiled for.
    """
    config = predictor.config.copy_and_resolve_references()
    with config.unlocked():  # configurations of old runs have no such key
        config.model.swin.attention_impl = "xla"
        if config.model.head.deform_impl in ("auto", "pallas"):
            config.model.head.deform_impl = "xla"
        if not branches:
            config.model.head.deform_impl = "gather"
    config.model.dtype = dtype or config.model.dtype
    return Predictor(config, make_model(config.model), predictor.params, step=predictor.step)


def stored(predictor: Predictor, *, weights: str, dtype: str = "") -> Predictor:
    """Returns the predictor with weights rounded as `weights` stores them; it computes in `dtype` if that is given."""
    config = predictor.config.copy_and_resolve_references()
    config.model.dtype = dtype or config.model.dtype
    params = exported.cast(exported.cast(predictor.params, weights), "float32")
    return Predictor(config, make_model(config.model), jax.device_put(params), step=predictor.step)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Drops what is written to stderr: TensorFlow greets, and misses CUDA in red, before it can be told not to."""
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def write(
    folder: pathlib.Path,
    predictor: Predictor,
    form: str,
    *,
    limits: Limits,
    words: Mapping[str, str] | None,
) -> None:
    """Writes an export: "safetensors", "stablehlo" or "saved_model".

    Raises:
      ValueError: a library is missing.
    """
    weights = _by_name(predictor.params)
    if form == "saved_model":
        try:
            with quiet():
                from detclipv2_jax.export import saved_model  # takes seconds

                saved_model.tf.config.list_logical_devices("CPU")
        except ImportError as error:
            raise ValueError(
                f"--format=saved_model needs tensorflow-text: pip install 'detclipv2_jax[export]' ({error})"
            ) from None
        saved_model.save(folder, make_modules(predictor, weights, limits), weights)
        return
    write_model(folder, predictor, words=words)
    _copy_script("weights.py", folder)
    if form == "stablehlo":
        for name, module in make_modules(predictor, weights, limits).items():
            (folder / f"{name}.stablehlo").write_bytes(module.serialize())
        _copy_script("detector.py", folder)


def write_model(
    folder: pathlib.Path, predictor: Predictor, *, words: Mapping[str, str] | None, dtype: str = "float32"
) -> None:
    """Writes what `Predictor.from_pretrained` reads, weights stored as `dtype`; no code."""
    _, text, mask = predictor.vocabulary(words) if words else ((), np.zeros((0, 0)), np.zeros(0, bool))
    exported.save(
        folder,
        config=predictor.config,
        params=predictor.params,
        step=predictor.step,
        dtype=dtype,
        words=words,
        embeddings=text[mask],
    )


def write_onnx(
    folder: pathlib.Path,
    predictor: Predictor,
    *,
    limits: Limits,
    words: Mapping[str, str],
    batch_size: int = 0,
    bake_words: bool = False,
    opset: int = 18,
    weights: str = "float32",
) -> None:
    """Writes ONNX models: detect_HxW for each canvas, and encode_text, whose inputs are those of `make_functions`.

    Args:
      folder: where to.
      predictor: whose weights become constants of the models.
      limits: what counts as a detection.
      words: of vocabulary.npz, beside the models, or of the models themselves.
      batch_size: photos of every call; 0: any number.
      bake_words: the words are a part of the models, which then take no text.
      opset: version of ONNX's operators.
      weights: "float32" or "int8".

    Raises:
      ValueError: onnx is missing, or what was asked for it cannot do.
    """
    try:
        from detclipv2_jax.export import onnx_model
    except ImportError as error:
        raise ValueError(f"--format=onnx needs onnx: pip install 'detclipv2_jax[onnx]' ({error})") from None
    onnx_model.check_opset(opset)
    sides = {name: predictor.config.eval[name] for name in ("short_side", "long_side")}
    listed = {"words": list(words), "definitions": list(words.values())}
    text = np.zeros((0, 0), np.float32)
    if words:
        _, padded, mask = predictor.vocabulary(words)
        text = np.asarray(padded[mask], np.float32)
    folder.mkdir(parents=True, exist_ok=True)
    images, free = symbolic_shape("b, w")
    given = {"images": batch_size or images, "words": len(words) if bake_words else free}
    by_name = _by_name(predictor.params)
    for name, (function, shapes) in make_functions(predictor, by_name, limits, **given).items():
        options: dict[str, Any] = {"weights": by_name, "opset": opset, "as_int8": weights == "int8"}
        if name != "encode_text":
            baked: dict[str, Any] = {"text": text, "about": sides | listed} if bake_words else {"about": sides}
            inputs = ("image", "extent", "original_size", "text")
            model = onnx_model.build(name, function, shapes, names=inputs, **options, **baked)
        elif bake_words:
            continue
        else:
            model = onnx_model.build(name, function, shapes, names=("tokens",), **options)
        onnx_model.save(folder / f"{name}.onnx", model)
    if words and not bake_words:
        arrays: dict[str, Any] = {"embeddings": text, **listed}
        np.savez(folder / "vocabulary.npz", **arrays)
    _copy_script("onnx_detector.py", folder)


def _by_name(params: Any) -> dict[str, np.ndarray]:
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    return {name: np.asarray(flat[name]) for name in sorted(flat)}


def _copy_script(name: str, folder: pathlib.Path) -> None:
    shutil.copyfile(pathlib.Path(scripts.__path__[0]) / name, folder / name)


def make_functions(
    predictor: Predictor, weights: Mapping[str, np.ndarray], limits: Limits, *, images: Any, words: Any
) -> dict[str, tuple[Callable, tuple[Any, ...]]]:
    """Returns name → (function, shapes of its arguments); the first argument is all weights by name.

    encode_text(weights, tokens) → float32[w, d], L2-normalised; detect_HxW(weights, image, extent, original_size, text)
    → dict for each canvas H x W of the configuration. Rows of text that are zero are no words.

    Args:
      predictor: of `portable`.
      weights: its parameters by name.
      limits: what counts as a detection.
      images, words: their numbers, symbolic where they are free.
    """
    model, config = predictor.detector.model, predictor.config
    shape = jax.ShapeDtypeStruct
    shapes = {name: shape(value.shape, value.dtype) for name, value in weights.items()}

    def nested(weights: Mapping[str, Any]) -> dict[str, Any]:
        return flax.traverse_util.unflatten_dict(weights, sep="/")

    def encode_text(weights: Mapping[str, Any], tokens: Array) -> Any:
        return model.apply({"params": nested(weights)}, tokens, method="encode_text")

    def detect(
        weights: Mapping[str, Any], image: Array, extent: Array, original_size: Array, text: Array
    ) -> dict[str, Array]:
        photos = Photos(image, extent, (extent / original_size).astype(jnp.float32), original_size)
        padding = -(-words // WORD_CHUNK) * WORD_CHUNK - words
        mask = jnp.pad(jnp.any(text != 0.0, axis=1), (0, padding))
        found = predictor.detector.predict(nested(weights), photos, jnp.pad(text, ((0, padding), (0, 0))), mask, limits)
        return vars(found)

    tokens = shape((words, config.model.text.context_length), jnp.int32)
    sizes, text = shape((images, 2), jnp.int32), shape((words, config.model.embed_dim), jnp.float32)
    functions: dict[str, tuple[Callable, tuple[Any, ...]]] = {"encode_text": (encode_text, (shapes, tokens))}
    for height, width in config.eval.canvases:
        image = shape((images, height, width, 3), jnp.uint8)
        functions[f"detect_{height}x{width}"] = detect, (shapes, image, sizes, sizes, text)
    return functions


def make_modules(predictor: Predictor, weights: Mapping[str, np.ndarray], limits: Limits) -> dict[str, Exported]:
    """Returns the functions of `make_functions`, exported for any number of images and words."""
    images, words = symbolic_shape("b, w")
    functions = make_functions(predictor, weights, limits, images=images, words=words)
    return {
        name: export(jax.jit(function), platforms=PLATFORMS)(*shapes) for name, (function, shapes) in functions.items()
    }
