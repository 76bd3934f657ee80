"""The inverse of `boxes.decode_deltas`, for tests that know which boxes shall be predicted."""

import jax.numpy as jnp

from detclipv2_jax.geometry import boxes as box_lib


def encode_deltas(anchors, boxes):
    """Returns the deltas that turn anchors into boxes, both [..., 4]; sides below `EPSILON` count as that."""
    size = anchors[..., 2:] - anchors[..., :2]
    log_ratio = jnp.log(jnp.maximum(boxes[..., 2:] - boxes[..., :2], box_lib.EPSILON) / size)
    deltas = jnp.concatenate([(box_lib.centers(boxes) - box_lib.centers(anchors)) / size, log_ratio], axis=-1)
    return deltas / jnp.broadcast_to(jnp.asarray(box_lib.DELTA_STD, deltas.dtype), deltas.shape)
