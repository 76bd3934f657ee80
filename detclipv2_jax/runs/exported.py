"""A model as a folder that anybody may have made: config.json, weights.safetensors, a vocabulary. Only data are read.

`save` writes one, `load` reads it without orbax. A folder from elsewhere may have its weights in several files, which
weights.safetensors.index.json lists as `transformers` does.
"""

from __future__ import annotations

import hashlib
import os
import pathlib
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import flax
import jax
import ml_dtypes
import numpy as np
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from detclipv2_jax import atomic, files
from detclipv2_jax.models.detclip import DetCLIP
from detclipv2_jax.runs import state
from detclipv2_jax.runs.optimizer import param_name
from detclipv2_jax.runs.workdir import read_config

if TYPE_CHECKING:
    from ml_collections import ConfigDict

WEIGHTS, INDEX = "weights.safetensors", "weights.safetensors.index.json"
WORDS, EMBEDDINGS = "vocabulary.json", "vocabulary.safetensors"
DTYPES: dict[str, Any] = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
_AGAIN = "it is damaged or half downloaded; download or export it again"


class Export(NamedTuple):
    """What a folder holds."""

    config: ConfigDict
    model: DetCLIP
    params: Any  # float32, on the first device
    step: int
    words: dict[str, str]  # name → definition; none without a vocabulary
    embeddings: Float[np.ndarray, "w d"]  # of the words


def is_export(folder: str | os.PathLike[str]) -> bool:
    """Returns whether a folder holds an export, and not a run."""
    path = pathlib.Path(folder)
    return not (path / "checkpoints").is_dir() and any((path / name).is_file() for name in (WEIGHTS, INDEX))


def cast(params: Any, dtype: str) -> Any:
    """Returns parameters in one of `DTYPES`; ValueError where a number is too large for it."""

    def convert(path: Any, value: Any) -> np.ndarray:
        with np.errstate(over="ignore"):
            converted = np.asarray(value).astype(DTYPES[dtype])
        if np.isfinite(np.asarray(value)).all() and not np.isfinite(converted.astype(np.float32)).all():
            raise ValueError(f"{param_name(path)} has numbers too large for {dtype}; give another --weights")
        return converted

    return jax.tree_util.tree_map_with_path(convert, params)


def save(
    folder: pathlib.Path,
    *,
    config: ConfigDict,
    params: Any,
    step: int,
    dtype: str = "float32",
    words: Mapping[str, str] | None = None,
    embeddings: Float[np.ndarray, "w d"] | None = None,
) -> None:
    """Writes an export; `embeddings` are those of the words, in their order."""
    from detclipv2_jax import config_json

    flat = flax.traverse_util.flatten_dict(cast(params, dtype), sep="/")
    about = {"layout": "detclipv2_jax", "step": str(step), "sha256": _digest(flat)}
    files.write_text(folder / "config.json", [config_json.to_json(config)])
    if words and embeddings is not None:
        files.write_json(folder / WORDS, {"words": list(words), "definitions": list(words.values())}, indent=1)
        with atomic.whole(folder / EMBEDDINGS) as partial:
            save_file({"embeddings": embeddings}, partial, metadata=about)
    with atomic.whole(folder / WEIGHTS) as partial:  # last: without it, it is no export
        save_file({name: flat[name] for name in sorted(flat)}, partial, metadata=about)


def load(folder: str | os.PathLike[str]) -> Export:
    """Returns what a folder holds.

    Raises:
      ValueError: a file is missing, damaged or of another kind, or the weights are not those of config.json.
    """
    folder = pathlib.Path(folder)
    weights, step = _read_weights(folder)
    config = read_config(folder)
    params = flax.traverse_util.unflatten_dict(weights, sep="/")
    what = f"{folder}: weights and config.json are not of one model, export it again: what it holds"
    model = state.checked_model(config, params, what=what, folder=folder)
    params = jax.device_put(cast(params, "float32"), jax.local_devices()[0])
    return Export(config, model, params, step, *_read_vocabulary(folder, width=config.model.embed_dim))


def _read_weights(folder: pathlib.Path) -> tuple[dict[str, np.ndarray], int]:
    """Returns the weights by name, and the number of steps of their training, 0 where the file does not say it."""
    weights, about = dict[str, np.ndarray](), dict[str, str]()
    for path in (paths := _files_of_weights(folder)):
        tensors, about = _read(path)
        weights |= tensors
    if wrong := [f"{name} ({value.dtype})" for name, value in weights.items() if value.dtype.name not in DTYPES]:
        raise ValueError(
            f"{folder}: weights of another type than {', '.join(DTYPES)}: {', '.join(sorted(wrong)[:5])}; write the "
            "folder with `python -m detclipv2_jax.export --format=hub`"
        )
    if not all(np.isfinite(value.astype(np.float32, copy=False)).all() for value in weights.values()):
        raise ValueError(f"{folder}: weights that are no finite numbers; {_AGAIN}")
    if len(paths) == 1 and about.get("sha256", digest := _digest(weights)) != digest:
        raise ValueError(f"{folder}: weights that are not those that were written; {_AGAIN}")
    parts = {name[: match.start()] for name in weights for match in re.finditer("/", name)}
    if both := sorted(parts & weights.keys()):
        raise ValueError(f"{folder}: {both[0]} is a weight and holds others; {_AGAIN}")
    step = about.get("step", "")
    return weights, int(step) if re.fullmatch(r"[0-9]{1,15}", step) else 0


def _digest(weights: Mapping[str, np.ndarray]) -> str:
    """Returns a hash of names and values: a file that was downloaded by halves may have its whole length."""
    hasher = hashlib.sha256()
    for name in sorted(weights):
        hasher.update(f"{name} {weights[name].dtype} {weights[name].shape} ".encode())
        hasher.update(np.ascontiguousarray(weights[name]).view(np.uint8).data)
    return hasher.hexdigest()


def _files_of_weights(folder: pathlib.Path) -> list[pathlib.Path]:
    """Returns the file of the weights, or those of an index; ValueError where one is missing."""
    names = {WEIGHTS}
    if not (folder / WEIGHTS).is_file() and (folder / INDEX).is_file():
        content = files.read_json(folder / INDEX)
        listed = content.get("weight_map") if isinstance(content, dict) else None
        names = set(listed.values()) if isinstance(listed, dict) and all(map(_is_name, listed.values())) else set()
        if not names:
            raise ValueError(f"{folder / INDEX} has no weight_map that names .safetensors files beside it; {_AGAIN}")
    if missing := sorted(name for name in names if not (folder / name).is_file()):
        there = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
        raise ValueError(
            f"{folder} has no {', '.join(missing[:5])}, only {', '.join(there[:8]) or 'nothing'}: {_AGAIN}; of a "
            "training run, give the workdir with its checkpoints/ to Predictor.from_checkpoint"
        )
    return [folder / name for name in sorted(names)]


def _is_name(name: Any) -> bool:
    """Returns whether an entry of an index names a .safetensors file beside it, and no other place."""
    return isinstance(name, str) and re.fullmatch(r"[\w.-]{1,200}\.safetensors", name) is not None


def _read(path: pathlib.Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Returns the arrays of a .safetensors file and what it says about itself."""
    try:
        with safe_open(path, framework="np") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118  (no dict)
    except (SafetensorError, OSError, AttributeError, KeyError, TypeError) as error:  # the latter: types NumPy lacks
        raise ValueError(f"{path} cannot be read ({error}): {_AGAIN}") from error


def _read_vocabulary(folder: pathlib.Path, *, width: int) -> tuple[dict[str, str], Float[np.ndarray, "w d"]]:
    """Returns the words of an export with their definitions, and their embeddings; nothing where it has none."""
    if not (folder / WORDS).exists() and not (folder / EMBEDDINGS).exists():
        return {}, np.zeros((0, width), np.float32)
    try:
        content = files.read_json(folder / WORDS)
        words = dict(zip(content["words"], content["definitions"], strict=True))
        fits = all(isinstance(text, str) for pair in words.items() for text in pair) and all(map(str.strip, words))
        if not fits or len(words) != len(content["words"]):
            raise ValueError("words must be different texts, and definitions texts")
    except (OSError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / WORDS} is no vocabulary ({error}): {_AGAIN}") from error
    stored = _read(folder / EMBEDDINGS)[0].get("embeddings", np.zeros(0))
    if stored.shape != (len(words), width) or stored.dtype != np.float32 or not np.isfinite(stored).all():
        raise ValueError(
            f"{folder / EMBEDDINGS} holds {stored.dtype}{list(stored.shape)}, not finite numbers "
            f"float32{[len(words), width]}, one row for each word: {_AGAIN}"
        )
    return words, stored
