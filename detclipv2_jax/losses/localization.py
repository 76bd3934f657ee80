"""Losses of boxes and centerness, ATSS's (detection data only, paper section 3.3), and of the extra head."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from detclipv2_jax.geometry import boxes as box_lib
from detclipv2_jax.losses.alignment import AnchorTargets, focal_loss
from detclipv2_jax.models.detclip import Regions


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


def objectness_loss(
    regions: Regions,
    targets: AnchorTargets,
    *,
    anchors: Float[Array, "a 4"],
    target_boxes: Float[Array, "b a 4"],
    target: str,
) -> Float[Array, ""]:
    """Returns the summed loss of the extra head that `loss.selection` classification or iou ranks proposals by.

    classification: focal loss, whether the anchor has a box; iou: cross-entropy with the IoU of the predicted box and
    its target on positive anchors (Table 2a names the heads, not their losses; these are ATSS's and IoU-Net's usual).
    """
    if target == "classification":
        loss = focal_loss(jnp.asarray(regions.objectness), targets.positive, alpha=0.25, gamma=2.0)
        return jnp.sum(jnp.where(targets.mask, loss, 0.0))
    predicted = box_lib.decode_deltas(jnp.broadcast_to(anchors[None], target_boxes.shape), regions.box_deltas)
    iou = jax.lax.stop_gradient(box_lib.iou(predicted, target_boxes))
    return jnp.sum(jnp.where(targets.positive, optax.sigmoid_binary_cross_entropy(regions.objectness, iou), 0.0))
