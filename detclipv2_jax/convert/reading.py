"""Checkpoints as NumPy arrays by name: .safetensors as they are, PyTorch's pickles through PyTorch, weights only."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, deserialize

from detclipv2_jax import files

_FLOAT8 = (ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2)
_TYPES: dict[str, Any] = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "F8_E4M3": _FLOAT8[0],
    "F8_E5M2": _FLOAT8[1], "I64": np.int64, "U64": np.uint64, "I32": np.int32, "U32": np.uint32, "I16": np.int16,
    "U16": np.uint16, "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip
_WRAPPERS = ("model", "state_dict", "module", "model_state_dict")  # keys under which training scripts keep the weights


def read(path: Path) -> dict[str, np.ndarray]:
    """Returns the arrays of a checkpoint by name. No code of a pickle is ever run.

    Raises:
      ValueError: unknown ending, broken file, PyTorch is needed and not installed, or more than weights is in a pickle.
    """
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix not in (".pth", ".pt", ".bin"):
        raise ValueError(f"{path}: the ending is {path.suffix!r}; allowed are .safetensors, .pth, .pt and .bin")
    return _read_pickle(path)


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    try:
        tensors = deserialize(files.read_bytes(path))
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if other := [f"{name} ({tensor['dtype']})" for name, tensor in tensors if tensor["dtype"] not in _TYPES]:
        raise ValueError(f"{path} has tensors of a type other than {', '.join(_TYPES)}: {', '.join(other[:8])}")
    arrays = {
        name: np.frombuffer(tensor["data"], _TYPES[tensor["dtype"]]).reshape(tensor["shape"])
        for name, tensor in tensors
    }
    # NumPy computes little with 8 bits, and float32 holds all their values
    return {name: array.astype(np.float32) if array.dtype in _FLOAT8 else array for name, array in arrays.items()}


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
    # NumPy has no bfloat16, float32 holds all its values
    return {name: (x.float() if x.dtype == torch.bfloat16 else x).numpy() for name, x in content.items()}
