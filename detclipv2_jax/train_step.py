"""One training step per kind of data: (state, batch) -> (state, metrics), pure and written for the global batch.

Every step has the same three parts, so that gradient accumulation is exact for all kinds (also for the contrastive
loss, whose terms depend on all images):

1. all concepts of the global batch are encoded once;
2. images are embedded, and the loss's gradient to the parameters and to the concept embeddings is computed, in
   `optimizer.accumulate` chunks;
3. the concept embeddings' gradient goes through the text tower.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import flax
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from detclipv2_jax.data.schema import Batch, Kind
from detclipv2_jax.geometry import anchors as anchor_lib
from detclipv2_jax.geometry import atss
from detclipv2_jax.geometry import boxes as box_lib
from detclipv2_jax.losses import concept_table, contrastive, proposals
from detclipv2_jax.losses.alignment import alignment_loss, focal_loss
from detclipv2_jax.losses.localization import localization_losses
from detclipv2_jax.models.detclip import DetCLIP, Regions
from detclipv2_jax.runs.optimizer import without_frozen
from detclipv2_jax.runs.sharding import BATCH, REPLICATED
from detclipv2_jax.runs.state import TrainState

if TYPE_CHECKING:
    from ml_collections import ConfigDict

Metrics = dict[str, Float[Array, ""]]
Step = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


@flax.struct.dataclass
class Targets:
    """What each anchor of each image shall predict."""

    positive: Bool[Array, "b a"]
    boxes: Float[Array, "b a 4"]
    rows: Int[Array, "b a"]  # row of the de-duplicated concept table
    centerness: Float[Array, "b a"]  # 0 where not positive
    anchor_mask: Bool[Array, "b a"]  # anchors that take part: centre on the photo, image not padding


def assign_targets(batch: Batch, rows: Int[Array, " t"], canvas: tuple[int, int]) -> Targets:
    """Returns the ATSS targets of a batch; `rows` maps rows of its concept table to the de-duplicated table."""
    anchors = anchor_lib.grid(canvas)
    assign = functools.partial(atss.assign, anchors.boxes, anchors.levels)
    assignment = jax.vmap(assign)(batch.boxes, batch.box_mask)
    if batch.boxes.shape[1] == 0:
        raise ValueError("a batch with boxes needs boxes.shape[1] >= 1; pad with box_mask False")
    boxes = jnp.take_along_axis(batch.boxes, assignment.box_index[..., None], axis=1)
    concepts = jnp.take_along_axis(batch.box_concepts, assignment.box_index, axis=1)
    mask = anchor_mask(batch, canvas)
    positive = assignment.positive & mask
    centerness = box_lib.centerness_target(jnp.broadcast_to(jnp.asarray(anchors.boxes)[None], boxes.shape), boxes)
    return Targets(
        positive=positive,
        boxes=boxes,
        rows=rows[concepts],
        centerness=jnp.where(positive, centerness, 0.0),
        anchor_mask=mask,
    )


def anchor_mask(batch: Batch, canvas: tuple[int, int]) -> Bool[Array, "b a"]:
    """Returns the anchors whose centre lies on the photo, not on the padding around it or in a padding image."""
    x, y = box_lib.centers(jnp.asarray(anchor_lib.grid(canvas).boxes)).T
    extent = batch.extent.astype(jnp.float32)
    return (x[None] < extent[:, 1:]) & (y[None] < extent[:, :1]) & batch.image_mask[:, None]


@flax.struct.dataclass
class Shared:
    """What all images of a step have in common: concept embeddings [t, d], scale and bias of the logit."""

    text: Float[Array, "t d"]
    scale: Float[Array, ""]
    bias: Float[Array, ""]


def make_step(
    kind: Kind,
    *,
    model: DetCLIP,
    tx: optax.GradientTransformation,
    config: ConfigDict,
    canvas: tuple[int, int],
    mesh: Mesh,
) -> Step:
    """Returns the training step for batches of one kind on one canvas.

    Metrics are float32 scalars over the global batch: the loss and its terms before weighting, `grad_norm` and that of
    each module, and `finite`, 0 where loss or gradient is not finite; such a step changes nothing but the step count.
    """
    gradients = _pair_gradients if kind is Kind.IMAGE_TEXT else _box_gradients

    def encode_shared(params: Any, tokens: Int[Array, "t l"]) -> Shared:
        text: Any = model.apply({"params": params}, tokens, method="encode_text")
        scale, bias = model.apply({"params": params}, method="logit_parameters")
        return Shared(text, scale, bias)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        shared, shared_vjp = jax.vjp(lambda params: encode_shared(params, batch.concept_tokens), state.params)  # 1
        loss, metrics, grads, shared_grads = gradients(  # 2
            state.params, shared, batch, key, kind=kind, model=model, config=config, canvas=canvas, mesh=mesh
        )
        grads = jax.tree.map(jnp.add, grads, shared_vjp(shared_grads)[0])  # 3
        grads = without_frozen(grads, config.optimizer.frozen)
        return _apply(state, grads, tx=tx, ema_decay=config.optimizer.ema_decay, metrics={"loss": loss, **metrics})

    return step


def _apply(
    state: TrainState, grads: Any, *, tx: optax.GradientTransformation, ema_decay: float, metrics: Metrics
) -> tuple[TrainState, Metrics]:
    """Returns the state after one optimizer update; a gradient that is not finite is not applied."""
    grad_norm = optax.tree.norm(grads)
    finite = jnp.isfinite(grad_norm) & jnp.isfinite(metrics["loss"])
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = state.ema
    if ema is not None:
        # in this form the average of what does not change is exactly that
        ema = jax.tree.map(lambda average, param: average + (1.0 - ema_decay) * (param - average), ema, params)
    old = (state.params, state.opt_state, state.ema)
    params, opt_state, ema = jax.tree.map(lambda new, kept: jnp.where(finite, new, kept), (params, opt_state, ema), old)
    of_modules = {f"grad_norm_{name}": jnp.float32(optax.tree.norm(part)) for name, part in grads.items()}
    metrics = {**metrics, "grad_norm": grad_norm, **of_modules, "finite": finite.astype(jnp.float32)}
    return TrainState(step=state.step + 1, params=params, opt_state=opt_state, ema=ema), metrics


def _split(tree: Any, num_chunks: int, mesh: Mesh) -> Any:
    """Returns the tree with the batch axis cut into [num_chunks, rows]; each device's rows stay on it."""

    def split(x):
        per_device = x.shape[0] // (mesh.size * num_chunks)
        x = x.reshape(mesh.size, num_chunks, per_device, *x.shape[1:]).swapaxes(0, 1)
        x = x.reshape(num_chunks, mesh.size * per_device, *x.shape[3:])
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(None, *BATCH)))

    return jax.tree.map(split, tree)


def _join(tree: Any, mesh: Mesh) -> Any:
    """Undoes `_split`."""

    def join(x):
        num_chunks, rows = x.shape[:2]
        x = x.reshape(num_chunks, mesh.size, rows // mesh.size, *x.shape[2:]).swapaxes(0, 1)
        return jax.lax.with_sharding_constraint(x.reshape(num_chunks * rows, *x.shape[3:]), NamedSharding(mesh, BATCH))

    return jax.tree.map(join, tree)


def _encode_images(model: DetCLIP, params: Any, batch: Batch, key: jax.Array) -> Regions:
    regions: Any = model.apply(
        {"params": params}, batch.image, batch.extent, train=True, rngs={"dropout": key}, method="encode_image"
    )
    return regions


def _image_part(batch: Batch) -> Batch:
    """Returns the batch without its concept table, the only arrays that do not have one row an image."""
    return batch._replace(concept_tokens=None, concept_mask=None, concept_ids=None)


def _box_gradients(params, shared, batch, key, *, kind, model, config, canvas, mesh):
    """Returns (loss, metrics, gradient to params, gradient to shared) of a detection or grounding batch."""
    canonical = concept_table.canonical_rows(batch.concept_ids, batch.concept_mask)
    unique = concept_table.unique_rows(canonical, batch.concept_mask)
    concept_mask = jnp.arange(unique.order.shape[0]) < unique.count
    targets = assign_targets(batch, unique.slot, canvas)
    num_positive = jnp.sum(targets.positive)
    # a mean's count is over the global batch, also when the batch goes through in chunks
    normalizer = jnp.maximum(num_positive, 1).astype(jnp.float32)
    centerness_sum = jnp.maximum(jnp.sum(targets.centerness), 1e-6)
    anchors = jnp.asarray(anchor_lib.grid(canvas).boxes)

    def chunk_loss(params, shared, chunk, index):
        part, goal = chunk
        regions = _encode_images(model, params, part, jax.random.fold_in(key, index))
        text = jax.lax.with_sharding_constraint(shared.text, NamedSharding(mesh, REPLICATED))[unique.order]
        metrics = {
            "loss_alignment": alignment_loss(
                regions.embeddings,
                text.astype(regions.embeddings.dtype),
                scale=shared.scale,
                bias=shared.bias,
                concept_mask=concept_mask,
                anchor_mask=goal.anchor_mask,
                labels=goal.rows,
                positive=goal.positive,
                alpha=config.loss.focal_alpha,
                gamma=config.loss.focal_gamma,
                num_devices=mesh.size,
                chunk_bytes=config.loss.chunk_bytes,
            )
            / normalizer
        }
        loss = metrics["loss_alignment"]
        if kind is Kind.DETECTION:  # boxes of grounding data are too inaccurate (paper section 3.3)
            boxes, centerness = localization_losses(
                regions.box_deltas,
                regions.centerness,
                anchors=anchors,
                target_boxes=goal.boxes,
                target_centerness=goal.centerness,
                positive=goal.positive,
            )
            metrics["loss_box"] = boxes / centerness_sum
            metrics["loss_centerness"] = centerness / normalizer
            loss += config.loss.box_weight * metrics["loss_box"]
            loss += config.loss.centerness_weight * metrics["loss_centerness"]
            if regions.objectness is not None:
                metrics["loss_objectness"] = (
                    objectness_loss(regions, goal, anchors=anchors, target=config.model.head.objectness) / normalizer
                )
                loss += config.loss.objectness_weight * metrics["loss_objectness"]
        return loss, metrics

    value_and_grad = jax.value_and_grad(chunk_loss, argnums=(0, 1), has_aux=True)
    num_chunks = config.optimizer.accumulate[kind.value]
    if num_chunks == 1:
        (loss, metrics), (grads, shared_grads) = value_and_grad(params, shared, (_image_part(batch), targets), 0)
    else:
        chunks = _split((_image_part(batch), targets), num_chunks, mesh)

        def body(total, indexed):
            index, chunk = indexed
            return jax.tree.map(jnp.add, total, value_and_grad(params, shared, chunk, index)), None

        first = jax.tree.map(lambda x: x[0], chunks)
        zeros = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(value_and_grad, params, shared, first, 0)
        )
        ((loss, metrics), (grads, shared_grads)), _ = jax.lax.scan(body, zeros, (jnp.arange(num_chunks), chunks))
    metrics |= {
        "num_positive": num_positive.astype(jnp.float32),
        "num_concepts": unique.count.astype(jnp.float32),
    }
    return loss, metrics, grads, shared_grads


def objectness_loss(
    regions: Regions, targets: Targets, *, anchors: Float[Array, "a 4"], target: str
) -> Float[Array, ""]:
    """Returns the summed loss of the extra head that `loss.selection` classification or iou ranks proposals by.

    classification: focal loss, whether the anchor has a box; iou: cross-entropy with the IoU of the predicted box and
    its target on positive anchors (Table 2a names the heads, not their losses; these are ATSS's and IoU-Net's usual).
    """
    if target == "classification":
        loss = focal_loss(regions.objectness, targets.positive, alpha=0.25, gamma=2.0)
        return jnp.sum(jnp.where(targets.anchor_mask, loss, 0.0))
    predicted = box_lib.decode_deltas(jnp.broadcast_to(anchors[None], targets.boxes.shape), regions.box_deltas)
    iou = jax.lax.stop_gradient(box_lib.iou(predicted, targets.boxes))
    return jnp.sum(jnp.where(targets.positive, optax.sigmoid_binary_cross_entropy(regions.objectness, iou), 0.0))


def _pair_gradients(params, shared, batch, key, *, kind, model, config, canvas, mesh):
    """Returns (loss, metrics, gradient to params, gradient to shared) of an image-text batch."""
    del kind
    canonical = concept_table.canonical_rows(batch.concept_ids, batch.concept_mask)
    anchors = jnp.asarray(anchor_lib.grid(canvas).boxes)
    settings = config.loss

    def embed(params, part, index):
        regions = _encode_images(model, params, part, jax.random.fold_in(key, index))
        boxes = box_lib.decode_deltas(
            jnp.broadcast_to(anchors[None], regions.box_deltas.shape), jax.lax.stop_gradient(regions.box_deltas)
        )
        chosen = proposals.select_proposals(
            regions.embeddings,
            boxes,
            shared.text,
            shared.scale,
            shared.bias,
            centerness=regions.centerness,
            objectness=regions.objectness,
            anchor_mask=anchor_mask(part, canvas),
            concept_mask=batch.concept_mask,
            canonical=canonical,
            caption_concepts=part.caption_concepts,
            caption_mask=part.caption_mask,
            batch_concepts=batch.caption_concepts,
            batch_concepts_mask=batch.caption_mask,
            selection=settings.selection,
            scope=settings.selection_scope,
            num_proposals=min(settings.num_proposals, anchors.shape[0]),
            pre_nms=min(settings.selection_pre_nms, anchors.shape[0]),
            nms_iou=settings.selection_nms_iou,
            chunk_bytes=settings.chunk_bytes,
        )
        return proposals.take(regions.embeddings, chosen.indices), (chosen.mask, box_lib.area(chosen.boxes))

    def contrast(regions, shared, mask, areas):
        loss, metrics = contrastive.word_region_loss(
            regions,
            shared.text,
            shared.scale,
            region_mask=mask,
            region_areas=areas,
            concept_mask=batch.concept_mask,
            canonical=canonical,
            caption_concepts=batch.caption_concepts,
            caption_mask=batch.caption_mask,
            image_mask=batch.image_mask,
            matching=settings.matching,
            side=settings.side,
            temperature=settings.temperature,
            label_smoothing=settings.label_smoothing,
            matching_temperature=settings.matching_temperature,
            chunk_bytes=settings.chunk_bytes,
        )
        return settings.contrastive_weight * loss, {"loss_contrastive": loss, **metrics}

    contrast_and_grad = jax.value_and_grad(contrast, argnums=(0, 1), has_aux=True)
    num_chunks = config.optimizer.accumulate.image_text
    if num_chunks == 1:
        regions, embed_vjp, (mask, areas) = jax.vjp(
            lambda params: embed(params, _image_part(batch), 0), params, has_aux=True
        )
        (loss, metrics), (region_grads, shared_grads) = contrast_and_grad(regions, shared, mask, areas)
        return loss, metrics, embed_vjp(region_grads)[0], shared_grads

    # every image is embedded twice: first for the loss, which needs all of them, then for the gradient
    chunks = _split(_image_part(batch), num_chunks, mesh)
    indices = jnp.arange(num_chunks)
    _, embedded = jax.lax.scan(lambda _, xs: (None, embed(params, xs[1], xs[0])), None, (indices, chunks))
    regions, (mask, areas) = _join(embedded, mesh)
    (loss, metrics), (region_grads, shared_grads) = contrast_and_grad(regions, shared, mask, areas)

    def body(total, xs):
        index, chunk, region_grad = xs
        _, embed_vjp, _ = jax.vjp(lambda params: embed(params, chunk, index), params, has_aux=True)
        return jax.tree.map(jnp.add, total, embed_vjp(region_grad)[0]), None

    zeros = jax.tree.map(jnp.zeros_like, params)
    grads, _ = jax.lax.scan(body, zeros, (indices, chunks, _split(region_grads, num_chunks, mesh)))
    return loss, metrics, grads, shared_grads
