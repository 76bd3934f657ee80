"""Box and centerness losses of ATSS on the positive anchors (detection data only, paper section 3.3)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from detclipv2_jax.geometry import boxes as box_lib


@jax.named_scope("localization_losses")
def localization_losses(
    box_deltas: Float[Array, "b a 4"],
    centerness: Float[Array, "b a"],
    *,
    anchors: Float[Array, "a 4"],
    target_boxes: Float[Array, "b a 4"],
    target_centerness: Float[Array, "b a"],
    positive: Bool[Array, "b a"],
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Returns two sums over the positive anchors: GIoU loss weighted by the centerness target, and centerness loss.

    The caller divides the first by the sum of the centerness targets and the second by the number of positives, over
    the global batch (mmdet's ATSSHead: the targets weight `loss_bbox` and their sum is its `avg_factor`).

    Args:
      box_deltas: predicted deltas to the anchors.
      centerness: logits.
      anchors: boxes xyxy, px.
      target_boxes: the box assigned to each anchor; any finite box where `positive` is False.
      target_centerness: 0 where `positive` is False.
      positive: anchors with a box.
    """
    anchors = jnp.broadcast_to(anchors[None], target_boxes.shape)
    # a place without target gets its own anchor, so that no gradient of the masked-out loss can be NaN
    target_boxes = jnp.where(positive[..., None], target_boxes, anchors)
    predicted = box_lib.decode_deltas(anchors, box_deltas)
    box_sum = jnp.sum(target_centerness * (1.0 - box_lib.generalized_iou(predicted, target_boxes)))
    cross_entropy = optax.sigmoid_binary_cross_entropy(centerness, target_centerness)
    return box_sum, jnp.sum(jnp.where(positive, cross_entropy, 0.0))
