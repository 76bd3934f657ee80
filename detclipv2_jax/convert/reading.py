"""Checkpoints as NumPy arrays by name: .safetensors as they are, PyTorch's pickles through PyTorch, weights only."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

_WRAPPERS = ("model", "state_dict", "module", "model_state_dict")  # keys under which training scripts keep the weights


def read(path: Path) -> dict[str, np.ndarray]:
    """Returns the arrays of a checkpoint by name. No code of a pickle is ever run.

    Raises:
      ValueError: unknown ending, broken file, PyTorch is needed and not installed, or more than weights is in a pickle.
    """
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, TypeError, KeyError) as error:  # the latter: types that NumPy does not have
            raise ValueError(f"{path} cannot be read: {error}") from error
    if path.suffix not in (".pth", ".pt", ".bin"):
        raise ValueError(f"{path}: the ending is {path.suffix!r}; allowed are .safetensors, .pth, .pt and .bin")
    return _read_pickle(path)


def _read_pickle(path: Path) -> dict[str, np.ndarray]:
    try:
        import torch
    except ImportError as error:
        raise ValueError(
            f"{path} is a pickle, which only PyTorch reads: `pip install torch`, or give a .safetensors file of the "
            "same weights (timm and transformers publish them); it was not opened"
        ) from error
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for what is broken or refused
        reason = str(error).partition("\n")[0].partition(". ")[0]  # what follows advises to run the code
        raise ValueError(
            f"{path} holds more than plain weights or is broken; nothing in it was run ({reason}). Give a .safetensors "
            "file of the same weights or, if you trust it, save them plainly: for OpenAI's TorchScript files with\n"
            f"    python -c \"import torch; torch.save(torch.jit.load('{path.name}').state_dict(), 'weights.pth')\""
        ) from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}, not weights by name")
    while wrapper := next((key for key in _WRAPPERS if isinstance(content.get(key), Mapping)), None):
        content = content[wrapper]
    if other := [str(name) for name, value in content.items() if not isinstance(value, torch.Tensor)]:
        raise ValueError(f"{path} has no weights under {', '.join(other[:8])}; save the weights alone")
    return {name: _to_numpy(torch, value) for name, value in content.items()}


def _to_numpy(torch: Any, tensor: Any) -> np.ndarray:
    """Returns a tensor as an array; NumPy has no bfloat16, float32 holds all its values."""
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
