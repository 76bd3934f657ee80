"""What an export consists of: weights, programs, and the scripts that read them."""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.export import Exported, export, symbolic_shape

from detclipv2_jax.export import scripts
from detclipv2_jax.inference import WORD_CHUNK, Limits, Photos, Predictor
from detclipv2_jax.models import detclip
from detclipv2_jax.runs import exported

PLATFORMS = ("cpu", "tpu", "cuda")


def portable(predictor: Predictor, *, dtype: str = "") -> Predictor:
    """Returns the predictor without kernels, which would tie a program to this version of jaxlib; `dtype` as given."""
    config = predictor.config.copy_and_resolve_references()
    with config.unlocked():  # configurations of old runs have no such key
        config.model.swin.attention_impl = "xla"
        if config.model.head.deform_impl in ("auto", "pallas"):
            config.model.head.deform_impl = "xla"
    config.model.dtype = dtype or config.model.dtype
    return Predictor(config, detclip.from_config(config.model), predictor.params, step=predictor.step)


def stored(predictor: Predictor, *, weights: str, dtype: str = "") -> Predictor:
    """Returns the predictor with weights rounded as `weights` stores them; it computes in `dtype` if that is given."""
    config = predictor.config.copy_and_resolve_references()
    config.model.dtype = dtype or config.model.dtype
    params = exported.cast(exported.cast(predictor.params, weights), "float32")
    return Predictor(config, detclip.from_config(config.model), jax.device_put(params), step=predictor.step)


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
    folder: pathlib.Path, predictor: Predictor, form: str, *, limits: Limits, words: Mapping[str, str] | None
) -> None:
    """Writes an export: "safetensors", "stablehlo" or "saved_model"; ValueError if a library is missing."""
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


def _by_name(params: Any) -> dict[str, np.ndarray]:
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    return {name: np.asarray(flat[name]) for name in sorted(flat)}


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

    def nested(weights: Mapping[str, Any]) -> dict[str, Any]:
        return flax.traverse_util.unflatten_dict(weights, sep="/")

    def encode_text(weights: Mapping[str, Any], tokens: Array) -> Any:
        return model.apply({"params": nested(weights)}, tokens, method="encode_text")

    def detect(
        weights: Mapping[str, Any], image: Array, extent: Array, original_size: Array, text: Array
    ) -> dict[str, Array]:
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
