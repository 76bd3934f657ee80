"""Concepts encoded once, when they are first met, where the text tower stays as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from detclipv2_jax.data.schema import Batch
from detclipv2_jax.runs.optimizer import frozen_mask

if TYPE_CHECKING:
    from ml_collections import ConfigDict

SIZE = 256  # concepts encoded at a time, always: an embedding depends on its concept alone


def make(config: ConfigDict, shapes: Any, encode_tokens: Callable[..., np.ndarray]) -> Callable[[Any, Batch], Batch]:
    """Returns the function from parameters and a host's batch to the batch with its concepts' embeddings.

    Without `optimizer.text_once` it returns the batch as it is.

    Args:
      config: of the run.
      shapes: tree of the parameters' shapes.
      encode_tokens: from parameters and rows of tokens to embeddings.

    Raises:
      ValueError: a step would change the embeddings, or needs others.
    """
    known: dict[bytes, np.ndarray] = {}

    def with_text(params: Any, batch: Batch) -> Batch:
        keys = [row.tobytes() for row in batch.concept_tokens]
        if new := [key for key in dict.fromkeys(keys) if key not in known]:
            tokens = np.frombuffer(b"".join(new), batch.concept_tokens.dtype).reshape(len(new), -1)
            padded = np.pad(tokens, ((0, -len(tokens) % SIZE), (0, 0)))
            known.update(zip(new, encode_tokens(params, padded), strict=False))
        return batch._replace(concept_text=np.stack([known[key] for key in keys]))

    if not config.optimizer.text_once:
        return lambda _, batch: batch
    if not all(jax.tree.leaves(frozen_mask(shapes, config.optimizer.frozen)["text_encoder"])):
        raise ValueError(
            f"config.optimizer.text_once needs a text tower that no step changes; optimizer.frozen is "
            f"{config.optimizer.frozen!r}, set it to 'text_encoder/.*'"
        )
    if config.loss.interaction == "tokens":
        raise ValueError(
            "config.optimizer.text_once keeps whole concepts; config.loss.interaction tokens needs each token"
        )
    if jax.process_count() > 1:
        raise ValueError("config.optimizer.text_once is for one process; other processes meet other concepts first")
    return with_text
