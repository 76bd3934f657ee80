"""One training step per kind of data: (state, batch) -> (state, metrics), pure and written for the global batch.

Every step has the same three parts, so that gradient accumulation is exact for all kinds (also for the contrastive
loss, whose terms depend on all images):

1. all concepts of the global batch are encoded once;
2. images are embedded, and the loss's gradient to the parameters and to the concept embeddings is computed, in
   `optimizer.accumulate` chunks;
3. the concept embeddings' gradient goes through the text tower.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Bool, Float, Int

from detclipv2_jax.data.schema import Batch, Federated, Kind
from detclipv2_jax.geometry import anchors as anchor_lib
from detclipv2_jax.geometry import atss
from detclipv2_jax.geometry import boxes as box_lib
from detclipv2_jax.losses import concept_table, contrastive, proposals
from detclipv2_jax.losses.alignment import AnchorTargets, FocalSettings, alignment_loss
from detclipv2_jax.losses.class_names import class_name_loss
from detclipv2_jax.losses.concept_table import Captions, Concepts, Table, UniqueRows
from detclipv2_jax.losses.contrastive import Proposed
from detclipv2_jax.losses.localization import localization_losses, objectness_loss
from detclipv2_jax.losses.proposals import Proposals
from detclipv2_jax.models.by_length import encode_by_length
from detclipv2_jax.models.detclip import DetCLIP, Regions
from detclipv2_jax.runs import sharding
from detclipv2_jax.runs.optimizer import without_frozen
from detclipv2_jax.runs.sharding import BATCH, REPLICATED
from detclipv2_jax.runs.state import TrainState

if TYPE_CHECKING:
    from ml_collections import ConfigDict

Metrics = dict[str, Float[Array, ""]]
# loss, metrics, gradient to the parameters, gradient to the concepts
Gradients = tuple[Float[Array, ""], Metrics, Any, Concepts]
Step = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


@flax.struct.dataclass
class Targets:
    """What each anchor of each image shall predict."""

    anchors: AnchorTargets  # rows are those of the de-duplicated concept table
    boxes: Float[Array, "b a 4"]
    centerness: Float[Array, "b a"]  # 0 where not positive


@jax.named_scope("targets")
def assign_targets(batch: Batch, rows: Int[Array, " t"], *, canvas: tuple[int, int], max_box_concepts: int) -> Targets:
    """Returns the ATSS targets of a batch; `rows` maps rows of its concept table to the de-duplicated table."""
    anchors = anchor_lib.grid(canvas)
    assign = functools.partial(atss.assign, anchors.boxes, anchors.levels)
    assignment = jax.vmap(assign)(batch.boxes, batch.box_mask)
    if batch.boxes.shape[1] == 0:
        raise ValueError("a batch with boxes needs boxes.shape[1] >= 1; pad with box_mask False")
    boxes = jnp.take_along_axis(batch.boxes, assignment.box_index[..., None], axis=1)
    concepts = jnp.take_along_axis(_concepts_of(batch, max_box_concepts), assignment.box_index[..., None], axis=1)
    mask = anchor_mask(batch, anchors.boxes)
    positive = assignment.positive & mask
    centerness = box_lib.centerness_target(jnp.broadcast_to(jnp.asarray(anchors.boxes)[None], boxes.shape), boxes)
    goal = AnchorTargets(mask, positive, rows[concepts], _verified(batch.federated, rows))
    return Targets(goal, boxes, jnp.where(positive, centerness, 0.0))


def _concepts_of(batch: Batch, max_box_concepts: int) -> Int[Array, "b n k"]:
    """Returns the first concepts of each box: identical boxes are one box, of which ATSS assigns the first.

    Where a box has fewer than k, its own is repeated.
    """
    num_boxes = batch.boxes.shape[1]
    if (k := min(max_box_concepts, num_boxes)) == 1:
        return batch.box_concepts[..., None]
    same = jnp.all(batch.boxes[:, :, None] == batch.boxes[:, None], axis=-1) & batch.box_mask[:, None]
    found, index = jax.lax.top_k(same.astype(jnp.int32), k)  # the first of equals first
    index = jnp.where(found > 0, index, jnp.arange(num_boxes)[None, :, None])
    return jax.vmap(lambda concepts, index: concepts[index])(batch.box_concepts, index)


def _verified(federated: Federated | None, rows: Int[Array, " t"]) -> Bool[Array, "b t"] | None:
    """Returns which concepts of the de-duplicated table are an image's negatives; None: all, of all images."""
    if federated is None:
        return None
    columns = jnp.arange(rows.shape[0])
    listed = (rows[federated.concepts][..., None] == columns[None, None]) & federated.mask[..., None]
    return jnp.any(listed, axis=1) | ~federated.images[:, None]


def anchor_mask(batch: Batch, anchors: Float[np.ndarray, "a 4"]) -> Bool[Array, "b a"]:
    """Returns the anchors that take part: their centre lies on a photo that is no padding image."""
    return anchor_lib.on_photo(anchors, batch.extent) & batch.image_mask[:, None]


@dataclasses.dataclass(frozen=True)
class Program:
    """What a step is made for; nothing of it is an array."""

    kind: Kind
    model: DetCLIP
    config: ConfigDict
    canvas: tuple[int, int]
    mesh: Mesh

    @property
    def num_chunks(self) -> int:
        return self.config.optimizer.accumulate[self.kind.value]

    def encode_concepts(
        self, params: Any, table: Batch, *, every_token: bool = False
    ) -> tuple[Concepts, dict[str, Bool[Array, ""]]]:
        """Returns what logits need beside regions, and metrics; of `every_token` each token is a concept."""

        def encode(params: Any, tokens: Int[Array, "t l"]) -> Any:
            method = "encode_tokens" if every_token else "encode_text"
            return self.model.apply({"params": params}, tokens, method=method)

        text, tokens, metrics = table.concept_text, table.concept_tokens, {}
        # names of classes fill their table, and a closed vocabulary has no tower that reads them
        whole = every_token or table.class_names is not None or self.config.model.text.classes
        groups = () if whole else self.config.optimizer.text_lengths[self.kind.value]
        if text is None and groups:
            text, is_full = encode_by_length(encode, params, tokens, table.concept_mask, groups)
            metrics["text_overflow"] = is_full
        elif text is None:
            text = encode(params, tokens)
        if every_token:
            text = text.reshape(-1, text.shape[-1])
        return Concepts(text, *self.model.apply({"params": params}, method="logit_parameters")), metrics

    def encode_images(self, params: Any, batch: Batch, key: jax.Array) -> Regions:
        """Returns the regions of the images; `key` draws what stochastic depth leaves out."""
        regions: Any = self.model.apply(
            {"params": params}, batch.image, batch.extent, train=True, rngs={"dropout": key}, method="encode_image"
        )
        return regions


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
    if remat := config.optimizer.remat[kind.value]:
        model = model.clone(remat=remat)
    program = Program(kind, model, config, canvas, mesh)
    gradients = _pair_gradients if kind is Kind.IMAGE_TEXT else _box_gradients
    every_token = kind is Kind.IMAGE_TEXT and config.loss.interaction == "tokens"

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        if by_tokens := every_token and batch.class_names is None:
            batch = by_token(batch, mesh)
        encode = functools.partial(program.encode_concepts, table=batch, every_token=by_tokens)
        concepts, concepts_vjp, overflow = jax.vjp(encode, state.params, has_aux=True)  # 1
        loss, metrics, grads, concept_grads = gradients(program, state.params, concepts, batch, key)  # 2
        metrics |= {name: value.astype(jnp.float32) for name, value in overflow.items()}
        grads = jax.tree.map(jnp.add, grads, concepts_vjp(concept_grads)[0])  # 3
        grads = without_frozen(grads, config.optimizer.frozen)
        return _apply(state, grads, tx=tx, ema_decay=config.optimizer.ema_decay, metrics={"loss": loss, **metrics})

    return step


@jax.named_scope("optimizer")
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
    by_module = {f"grad_norm_{name}": jnp.float32(optax.tree.norm(part)) for name, part in grads.items()}
    metrics = {**metrics, "grad_norm": grad_norm, **by_module, "finite": finite.astype(jnp.float32)}
    return TrainState(step=state.step + 1, params=params, opt_state=opt_state, ema=ema), metrics


def by_token(batch: Batch, mesh: Mesh) -> Batch:
    """Returns a batch of pairs whose concepts are the tokens of captions, [SOS] and [EOS] too; phrases are none.

    The table has a row for every token of every caption; those of equal captions are the same concepts.
    """
    captions = batch.caption_concepts[:, 0]
    rows = NamedSharding(mesh, BATCH)
    tokens = jax.lax.with_sharding_constraint(batch.concept_tokens[captions], rows)
    b, length = tokens.shape
    place = jnp.arange(length, dtype=jnp.int32)[None]
    # padding has the id of "!", so that only the place of [EOS], the largest id, tells where a caption ends
    mask = (place <= jnp.argmax(tokens, axis=1)[:, None]) & batch.caption_mask[:, :1]
    first = Table.of(batch.concept_ids, batch.concept_mask).canonical[captions]
    ids = (first[:, None] * length + place).reshape(-1).astype(jnp.uint32)
    return batch._replace(
        concept_tokens=tokens,
        concept_mask=mask.reshape(-1),
        concept_ids=jnp.stack([jnp.zeros_like(ids), ids], axis=1),
        caption_concepts=jnp.arange(b * length, dtype=jnp.int32).reshape(b, length),
        caption_mask=mask,
    )


def _image_part(batch: Batch) -> Batch:
    """Returns the batch without its concept table, the only arrays that do not have one row an image."""
    return batch._replace(concept_tokens=None, concept_mask=None, concept_ids=None, concept_text=None)


def _box_gradients(program: Program, params: Any, concepts: Concepts, batch: Batch, key: jax.Array) -> Gradients:
    """Returns loss, metrics and gradients of a detection or grounding batch."""
    table = Table.of(batch.concept_ids, batch.concept_mask)
    unique = concept_table.unique_rows(table.canonical, table.mask)
    max_box_concepts = program.config[program.kind.value].max_box_concepts
    targets = assign_targets(batch, unique.slot, canvas=program.canvas, max_box_concepts=max_box_concepts)
    num_positive = jnp.sum(targets.anchors.positive)
    # a mean's count is over the global batch, also when the batch goes through in chunks
    normalizer = jnp.maximum(num_positive, 1).astype(jnp.float32)
    centerness_sum = jnp.maximum(jnp.sum(targets.centerness), 1e-6)

    def chunk_loss(params: Any, concepts: Concepts, chunk: tuple, index: Any) -> tuple[Float[Array, ""], Metrics]:
        images, goal = chunk
        regions = program.encode_images(params, images, jax.random.fold_in(key, index))
        return _box_loss(program, regions, concepts, unique, goal, (normalizer, centerness_sum))

    value_and_grad = jax.value_and_grad(chunk_loss, argnums=(0, 1), has_aux=True)
    if program.num_chunks == 1:
        total = value_and_grad(params, concepts, (_image_part(batch), targets), 0)
    else:
        chunks = sharding.split_rows((_image_part(batch), targets), program.num_chunks, program.mesh)

        def body(total: Any, indexed: tuple) -> tuple[Any, None]:
            index, chunk = indexed
            return jax.tree.map(jnp.add, total, value_and_grad(params, concepts, chunk, index)), None

        first = jax.tree.map(lambda x: x[0], chunks)
        shapes = jax.eval_shape(value_and_grad, params, concepts, first, 0)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        total, _ = jax.lax.scan(body, zeros, (jnp.arange(program.num_chunks), chunks))
    (loss, metrics), (grads, concept_grads) = total
    counts = {"num_positive": num_positive, "num_concepts": unique.count}
    return loss, metrics | {name: x.astype(jnp.float32) for name, x in counts.items()}, grads, concept_grads


def _box_loss(
    program: Program,
    regions: Regions,
    concepts: Concepts,
    unique: UniqueRows,
    goal: Targets,
    normalizers: tuple[Float[Array, ""], Float[Array, ""]],
) -> tuple[Float[Array, ""], Metrics]:
    """Returns (loss, its terms) of the images at hand, divided by positives and centerness of the whole batch."""
    config, (num_positive, centerness_sum) = program.config.loss, normalizers
    text = jax.lax.with_sharding_constraint(concepts.text, NamedSharding(program.mesh, REPLICATED))[unique.order]
    alignment = alignment_loss(
        regions.embeddings,
        concepts._replace(text=text.astype(regions.embeddings.dtype)),
        concept_mask=jnp.arange(unique.order.shape[0]) < unique.count,
        targets=goal.anchors,
        settings=FocalSettings(config.focal_alpha, config.focal_gamma, config.chunk_bytes),
    )
    loss = alignment / num_positive
    metrics = {"loss_alignment": loss}
    if program.kind is not Kind.DETECTION:  # boxes of grounding data are too inaccurate (paper section 3.3)
        return loss, metrics
    anchors = jnp.asarray(anchor_lib.grid(program.canvas).boxes)
    boxes, centerness = localization_losses(
        regions.box_deltas,
        regions.centerness,
        anchors=anchors,
        target_boxes=goal.boxes,
        target_centerness=goal.centerness,
        positive=goal.anchors.positive,
    )
    metrics["loss_box"] = boxes / centerness_sum
    metrics["loss_centerness"] = centerness / num_positive
    loss += config.box_weight * metrics["loss_box"]
    loss += config.centerness_weight * metrics["loss_centerness"]
    if regions.objectness is not None:
        target = program.config.model.head.objectness
        of_targets = {"anchors": anchors, "target_boxes": goal.boxes, "target": target}
        metrics["loss_objectness"] = objectness_loss(regions, goal.anchors, **of_targets) / num_positive
        loss += config.objectness_weight * metrics["loss_objectness"]
    return loss, metrics


def _pair_gradients(program: Program, params: Any, concepts: Concepts, batch: Batch, key: jax.Array) -> Gradients:
    """Returns loss, metrics and gradients of an image-text batch."""
    table = Table.of(batch.concept_ids, batch.concept_mask)
    captions = Captions(batch.caption_concepts, batch.caption_mask)
    settings = program.config.loss

    def encode(params: Any, images: Batch, index: Any) -> Regions:
        return program.encode_images(params, images, jax.random.fold_in(key, index))

    def embed(params: Any, images: Batch, index: Any) -> tuple[Float[Array, "b k d"], Proposals]:
        regions = encode(params, images, index)
        chosen = _choose(program, regions, concepts, images, table=table, batch_captions=captions)
        return proposals.take(regions.embeddings, chosen.indices), chosen

    def contrast(
        regions: Float[Array, "b k d"], concepts: Concepts, chosen: Proposals
    ) -> tuple[Float[Array, ""], Metrics]:
        loss_of, name, weight = contrastive.word_region_loss, "contrastive", settings.contrastive_weight
        if batch.class_names is not None:
            loss_of, name, weight = class_name_loss, "classification", settings.class_weight
        loss, metrics = loss_of(
            regions,
            concepts.text,
            concepts.scale,
            proposed=Proposed(chosen.mask, box_lib.area(chosen.boxes)),
            table=table,
            captions=captions,
            image_mask=batch.image_mask,
            settings=contrastive.settings_of(settings),
        )
        return weight * loss, {f"loss_{name}": loss, **metrics}

    contrast_and_grad = jax.value_and_grad(contrast, argnums=(0, 1), has_aux=True)
    if program.num_chunks == 1:
        embed_all = functools.partial(embed, images=_image_part(batch), index=0)
        regions, embed_vjp, chosen = jax.vjp(embed_all, params, has_aux=True)
        (loss, metrics), (region_grads, concept_grads) = contrast_and_grad(regions, concepts, chosen)
        return loss, metrics, embed_vjp(region_grads)[0], concept_grads

    # every image is embedded twice: first for the loss, which needs all of them, then for the gradient of what was
    # chosen the first time
    chunks = sharding.split_rows(_image_part(batch), program.num_chunks, program.mesh)
    indices = jnp.arange(program.num_chunks)
    _, (embedded, chosen) = jax.lax.scan(lambda _, xs: (None, embed(params, xs[1], xs[0])), None, (indices, chunks))
    regions, joined = sharding.join_rows((embedded, chosen), program.mesh)
    (loss, metrics), (region_grads, concept_grads) = contrast_and_grad(regions, concepts, joined)

    def body(total: Any, xs: tuple) -> tuple[Any, None]:
        index, images, region_grad, anchors = xs

        def embed_again(params: Any) -> Float[Array, "b k d"]:
            return proposals.take(encode(params, images, index).embeddings, anchors)

        return jax.tree.map(jnp.add, total, jax.vjp(embed_again, params)[1](region_grad)[0]), None

    zeros = jax.tree.map(jnp.zeros_like, params)
    region_grads = sharding.split_rows(region_grads, program.num_chunks, program.mesh)
    grads, _ = jax.lax.scan(body, zeros, (indices, chunks, region_grads, chosen.indices))
    return loss, metrics, grads, concept_grads


@jax.named_scope("selection")
def _choose(
    program: Program, regions: Regions, concepts: Concepts, images: Batch, *, table: Table, batch_captions: Captions
) -> Proposals:
    """Returns the regions of the images at hand that take part in the contrastive loss."""
    anchors = anchor_lib.grid(program.canvas).boxes
    boxes = box_lib.decode_deltas(
        jnp.broadcast_to(jnp.asarray(anchors)[None], regions.box_deltas.shape),
        jax.lax.stop_gradient(regions.box_deltas),
    )
    settings = proposals.settings_of(program.config.loss)
    if images.class_names is not None:
        settings = dataclasses.replace(settings, num_proposals=program.config.loss.class_proposals)
    return proposals.select_proposals(
        regions,
        box_lib.clip(boxes, images.extent[:, None]),  # before suppression, as mmdetection does
        concepts,
        anchor_mask=anchor_mask(images, anchors),
        table=table,
        captions=Captions(images.caption_concepts, images.caption_mask),
        batch_captions=batch_captions,
        settings=settings,
    )
