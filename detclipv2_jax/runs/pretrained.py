"""Pre-trained weights at the start of a run: the files of `config.init_from.swin` and `.text`, fitted to the model.

`python -m detclipv2_jax.convert` makes such a file from a public checkpoint: a .safetensors file with our names. What
depends on the configuration is fitted here, when a run starts: relative-position tables of another window are resized,
and of the text tower's positions the first `config.model.text.context_length` are taken.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

Shape = tuple[int, ...]
ROOTS = {"swin": "swin", "clip_text": "text_encoder"}  # what `convert` makes: the first name of its parameters
KEYS = {"swin": "swin", "text": "clip_text"}  # of config.init_from: what its file holds
# the norms of a detector's feature maps: checkpoints of classifiers have none, they start fresh
FRESH = tuple(f"swin/norm{stage}/{leaf}" for stage in (2, 3, 4) for leaf in ("bias", "scale"))


class PublicFile(NamedTuple):
    """A published checkpoint."""

    name: str
    origin: str


_SWIN = "https://github.com/SwinTransformer/storage/releases/download/v1.0.0"
PUBLIC_FILES = {  # by the name of the converted file
    "swin_tiny.safetensors": PublicFile("swin_tiny_patch4_window7_224.pth", _SWIN),
    "swin_large.safetensors": PublicFile("swin_large_patch4_window12_384_22k.pth", _SWIN),
    "clip_text_vit_b32.safetensors": PublicFile(
        "open_clip_model.safetensors", "https://huggingface.co/timm/vit_base_patch32_clip_224.openai"
    ),
}


def command_of(path: str, part: str) -> str:
    """Returns the command that makes a file, with its public source where the name of the file tells it."""
    known = PUBLIC_FILES.get(PurePath(path).name)
    command = f"python -m detclipv2_jax.convert {part} --input={known.name if known else 'FILE'} --output={path}"
    return f"{command}   # {known.name} is from {known.origin}" if known else command


def load_all(init_from: Mapping[str, str], shapes: Mapping[str, Shape]) -> tuple[dict[str, np.ndarray], list[str]]:
    """Returns the float32 parameters that a run starts from, by name, and lines on what was fitted or is missing.

    An empty file name leaves a tower as it is initialised.

    Raises:
      ValueError: every file that is missing, with the command that makes it, or does not fit the model.
    """
    params: dict[str, np.ndarray] = {}
    notes, problems = [], []
    for key, part in KEYS.items():
        path = init_from[key]
        if not path:
            continue
        if not os.path.isfile(path):
            problems.append(
                f"config.init_from.{key}: the file {path} does not exist; make it with\n    {command_of(path, part)}\n"
                f"    or start from random values with --config.init_from.{key}="
            )
            continue
        try:
            loaded, lines = load(path, ROOTS[part], shapes)
        except ValueError as error:
            problems.append(f"config.init_from.{key}: {error}")
        else:
            params |= loaded
            notes += [f"config.init_from.{key}: {line}" for line in lines]
    if problems:
        raise ValueError("\n".join(problems))
    return params, notes


def load(path: str | Path, root: str, shapes: Mapping[str, Shape]) -> tuple[dict[str, np.ndarray], list[str]]:
    """Returns the parameters of one tower, fitted to `shapes`, and lines on what was fitted or is missing.

    Raises:
      ValueError: the file holds something else, or parameters do not fit; missing, unexpected and reshaped names.
    """
    want = {name: shape for name, shape in shapes.items() if name.startswith(f"{root}/")}
    try:
        with safe_open(path, framework="np") as file:
            names = [name for name in file.keys() if name.startswith(f"{root}/")]  # noqa: SIM118  (not a dict)
            stored = {name: file.get_tensor(name).astype(np.float32) for name in names}
            layout = (file.metadata() or {}).get("layout", "unknown")
    except (SafetensorError, AttributeError, KeyError, TypeError) as error:  # the latter: types that NumPy lacks
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not stored:
        raise ValueError(f"{path} has no parameter named {root}/…; `python -m detclipv2_jax.convert` makes such files")
    params = {name: _fit(name, value, want.get(name, value.shape)) for name, value in stored.items()}
    fresh = [name for name in FRESH if name in want and name not in params]
    have = {name: value.shape for name, value in params.items()}
    if lines := differences(have, {name: shape for name, shape in want.items() if name not in fresh}):
        raise ValueError(f"{path} does not fit the model of this configuration:\n" + "\n".join(lines))
    notes = [f"{len(params)} parameters from {path}, converted from layout {layout}"]
    notes += [f"not in the file, they start fresh: {', '.join(fresh)}"] if fresh else []
    fitted = [
        f"{name} {value.shape} -> {params[name].shape}"
        for name, value in stored.items()
        if value.shape != params[name].shape
    ]
    notes += [f"fitted to the model ({len(fitted)}): {', '.join(fitted)}"] if fitted else []
    return params, notes


def differences(have: Mapping[str, Shape], want: Mapping[str, Shape]) -> list[str]:
    """Returns a line each on missing, unexpected and reshaped names, where there are any."""
    changed = [name for name in sorted(have) if want.get(name, have[name]) != have[name]]
    problems = {
        "missing": sorted(want.keys() - have.keys()),
        "unexpected": sorted(have.keys() - want.keys()),
        "reshaped": [f"{name} {have[name]} -> {want[name]}" for name in changed],
    }
    return [f"  {kind} ({len(names)}): {', '.join(names)}" for kind, names in problems.items() if names]


def _fit(name: str, value: np.ndarray, shape: Shape) -> np.ndarray:
    """Returns the value with the rows of `shape` where the configuration may choose their number."""
    if name.endswith("position_embedding"):
        return value[: shape[0]]
    if name.endswith("relative_position_table") and value.shape != shape:
        return resize_table(value, rows=shape[0])
    return value


def resize_table(table: np.ndarray, *, rows: int) -> np.ndarray:
    """Returns a table of (2 window - 1)^2 rows resized bicubically to that of another window, as the Swin repository.

    A table that is not square is returned as it is.
    """
    import cv2  # not needed by whoever only converts

    side, new = math.isqrt(len(table)), math.isqrt(rows)
    if side**2 != len(table) or new**2 != rows:
        return table
    square = cv2.resize(table.reshape(side, side, -1), (new, new), interpolation=cv2.INTER_CUBIC)
    return square.reshape(rows, -1)
