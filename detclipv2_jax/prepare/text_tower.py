"""How similar a public text tower finds names."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from flax import traverse_util
from jaxtyping import Float
from safetensors import SafetensorError, safe_open

from detclipv2_jax.data import tokenizer
from detclipv2_jax.models.text_encoder import TextEncoder

_ROOT = "text_encoder/"
_HEAD_WIDTH = 64  # of every tower of CLIP
_CONTEXT_LENGTH, _BATCH = 16, 256


def similarities(names: Sequence[str], others: Sequence[str], *, tower: str) -> Float[np.ndarray, "n m"]:
    """Returns the cosine of the embeddings of each name and each of the others.

    The tower is a file that `python -m detclipv2_jax.convert clip_text` made.

    Raises:
      ValueError: the file is none.
    """
    embeddings = _embed([*names, *others], tower)
    return embeddings[: len(names)] @ embeddings[len(names) :].T


def _embed(texts: Sequence[str], tower: str) -> Float[np.ndarray, "n d"]:
    """Returns the normalised embeddings of texts."""
    import jax  # a dictionary without a tower needs no device

    params = _read(tower)
    num_layers = len({name for name in params if re.fullmatch(r"block\d+", name)})
    width, embed_dim = params["projection"]["kernel"].shape
    encoder = TextEncoder(
        width=width,
        num_layers=num_layers,
        num_heads=max(width // _HEAD_WIDTH, 1),
        context_length=_CONTEXT_LENGTH,
        embed_dim=embed_dim,
    )
    params["position_embedding"] = params["position_embedding"][:_CONTEXT_LENGTH]
    encode = jax.jit(lambda tokens: encoder.apply({"params": params}, tokens))
    tokens = tokenizer.tokenize(texts, max_length=_CONTEXT_LENGTH)
    padded = np.pad(tokens, ((0, -len(tokens) % _BATCH), (0, 0)))
    parts = [np.asarray(encode(padded[i : i + _BATCH])) for i in range(0, len(padded), _BATCH)]
    found = np.concatenate(parts)[: len(tokens)]
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def _read(path: str) -> dict[str, Any]:
    """Returns the parameters of a converted text tower."""
    try:
        with safe_open(path, framework="np") as file:
            names = [name for name in file.keys() if name.startswith(_ROOT)]  # noqa: SIM118  (not a dict)
            params = {name.removeprefix(_ROOT): file.get_tensor(name).astype(np.float32) for name in names}
    # the last three: types that NumPy lacks
    except (OSError, SafetensorError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"--text={path} cannot be read: {error}") from error
    if not {"projection/kernel", "position_embedding"} <= params.keys():
        raise ValueError(
            f"--text={path} is no text tower; `python -m detclipv2_jax.convert clip_text` makes such files"
        )
    return traverse_util.unflatten_dict(params, sep="/")
