"""Losses of a training step and their gradients in float64 NumPy: dense, on one device, written from the paper.

What a model says comes in as `Outputs`; gradients go out in the same form. Only GIoU has no gradient by hand: its
difference quotient is exact to ten digits.
"""

import dataclasses
import pathlib
import sys
from typing import Any

import numpy as np
from oracle import geometry

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "losses"))
import contrastive_oracle


@dataclasses.dataclass
class Outputs:
    """What the two towers give for a global batch, or the gradients to it."""

    embeddings: Any  # [b, a, d]
    box_deltas: Any  # [b, a, 4]
    centerness: Any  # [b, a]
    objectness: Any  # [b, a], or None
    text: Any  # [t, d]
    scale: Any  # []
    bias: Any  # []

    def float64(self):
        values = {name: x if x is None else np.asarray(x, np.float64) for name, x in vars(self).items()}
        return Outputs(**values)

    def zeros(self):
        return Outputs(**{name: x if x is None else np.zeros_like(x, np.float64) for name, x in vars(self).items()})


def sigmoid(x):
    return 1.0 / (1.0 + np.exp(-x))


def focal(logits, targets, alpha, gamma):
    """Returns (loss, its derivative) of every entry (Lin et al. 2017)."""
    sign = np.where(targets, 1.0, -1.0)
    p = sigmoid(sign * logits)  # of the right answer
    weight = np.where(targets, alpha, 1.0 - alpha)
    loss = -weight * (1.0 - p) ** gamma * np.log(p)
    return loss, sign * weight * (gamma * p * (1.0 - p) ** gamma * np.log(p) - (1.0 - p) ** (gamma + 1.0))


def cross_entropy(logits, targets):
    """Returns (loss, its derivative) of every entry."""
    p = sigmoid(logits)
    return -targets * np.log(p) - (1.0 - targets) * np.log(1.0 - p), p - targets


def first_rows(batch):
    """Returns for each row of the concept table the first row in use with its id; a row that is not in use: itself."""
    first, seen = np.arange(len(batch.concept_ids)), {}
    for row, (concept, used) in enumerate(zip(map(tuple, batch.concept_ids), batch.concept_mask, strict=True)):
        if used:
            first[row] = seen.setdefault(concept, row)
    return first


def photo_anchors(batch, canvas):
    """Returns (anchors, anchors a level, which of them count [b, a])."""
    anchors, levels = geometry.anchors(canvas)
    rows = zip(batch.extent, batch.image_mask, strict=True)
    return anchors, levels, np.stack([geometry.on_photo(anchors, extent) & used for extent, used in rows])


def concepts_of_boxes(batch, limit):
    """Returns of every image and box the first `limit` rows of concepts: identical boxes are one box."""
    of_images = []
    for boxes, mask, rows in zip(batch.boxes.tolist(), batch.box_mask, batch.box_concepts, strict=True):
        of_box = {}
        for box, used, row in zip(map(tuple, boxes), mask, rows, strict=True):
            if used:
                of_box.setdefault(box, []).append(row)
        of_images.append([of_box.get(tuple(box), [])[:limit] for box in boxes])
    return of_images


def negatives(batch, first, columns):
    """Returns which columns are negatives of each image: all, or in federated images those it was annotated for."""
    found = np.ones((len(batch.image), len(columns)), bool)
    if batch.federated is not None:
        for i, (federated, rows, mask) in enumerate(zip(*batch.federated, strict=True)):
            if federated:
                found[i] = np.isin(columns, first[rows[mask]])
    return found


def box_step(outputs, batch, *, kind, canvas, settings, max_box_concepts, objectness="none"):
    """Returns (loss, metrics, gradients) of a detection or grounding batch; `settings` is config.loss."""
    outputs = outputs.float64()
    grads = outputs.zeros()
    anchors, levels, counts = photo_anchors(batch, canvas)
    assigned = [geometry.assign(anchors, levels, *row) for row in zip(batch.boxes, batch.box_mask, strict=True)]
    positive = np.stack([chosen for _, chosen in assigned]) & counts
    index = np.stack([owner for owner, _ in assigned])
    boxes = np.take_along_axis(np.float64(batch.boxes), index[..., None], axis=1)
    concepts = concepts_of_boxes(batch, max_box_concepts)
    num_positive = max(positive.sum(), 1)

    # 1. alignment: every anchor with every distinct concept
    first = first_rows(batch)
    columns = np.flatnonzero((first == np.arange(len(first))) & batch.concept_mask)
    text = outputs.text[columns]
    similarity = outputs.embeddings @ text.T
    targets = np.zeros(similarity.shape, bool)
    for i, anchor in np.argwhere(positive):
        targets[i, anchor] = np.isin(columns, first[concepts[i][index[i, anchor]]])
    loss, bar = focal(outputs.scale * similarity + outputs.bias, targets, settings.focal_alpha, settings.focal_gamma)
    counted = counts[..., None] & (targets | negatives(batch, first, columns)[:, None])
    metrics = {"loss_alignment": loss[counted].sum() / num_positive}
    total = metrics["loss_alignment"]
    bar = np.where(counted, bar, 0.0) / num_positive
    grads.embeddings = outputs.scale * bar @ text
    grads.text[columns] = outputs.scale * np.einsum("bac,bad->cd", bar, outputs.embeddings)
    grads.scale, grads.bias = (bar * similarity).sum(), bar.sum()

    # 2. boxes and centerness of detection data
    if kind == "detection":
        centerness = np.where(positive, geometry.centerness(anchors, boxes), 0.0)
        weight = centerness / max(centerness.sum(), 1e-6)

        def box_losses(deltas):
            return np.where(positive, 1.0 - geometry.generalized_iou(geometry.decode(anchors, deltas), boxes), 0.0)

        metrics["loss_box"] = (weight * box_losses(outputs.box_deltas)).sum()
        total += settings.box_weight * metrics["loss_box"]
        for axis in range(4):
            step = 1e-6 * np.eye(4)[axis]
            slope = (box_losses(outputs.box_deltas + step) - box_losses(outputs.box_deltas - step)) / 2e-6
            grads.box_deltas[..., axis] = settings.box_weight * weight * slope
        loss, bar = cross_entropy(outputs.centerness, centerness)
        metrics["loss_centerness"] = loss[positive].sum() / num_positive
        total += settings.centerness_weight * metrics["loss_centerness"]
        grads.centerness = np.where(positive, bar, 0.0) * settings.centerness_weight / num_positive

        # 3. the extra head of Table 2a
        if objectness != "none":
            where = counts if objectness == "classification" else positive
            predicted = geometry.decode(anchors, outputs.box_deltas)
            loss, bar = (
                focal(outputs.objectness, positive, 0.25, 2.0)
                if objectness == "classification"
                else cross_entropy(outputs.objectness, geometry.iou(predicted, boxes))
            )
            metrics["loss_objectness"] = loss[where].sum() / num_positive
            total += settings.objectness_weight * metrics["loss_objectness"]
            grads.objectness = np.where(where, bar, 0.0) * settings.objectness_weight / num_positive
    metrics |= {"num_positive": float(positive.sum()), "num_concepts": float(len(columns))}
    return total, metrics, grads


def select(outputs, batch, *, canvas, settings, num_devices, num_proposals=None):
    """Returns (anchors, their boxes) chosen in every image, best first: score, top of them, suppression, top k."""
    anchors, _, counts = photo_anchors(batch, canvas)
    boxes = np.stack([*map(geometry.clip, geometry.decode(anchors, outputs.box_deltas), batch.extent)])
    first, b = first_rows(batch), len(batch.image)
    distinct = np.flatnonzero((first == np.arange(len(first))) & batch.concept_mask)
    similarity = outputs.scale * outputs.embeddings @ outputs.text.T
    chosen = []
    for i in range(b):
        if settings.selection in ("classification", "iou"):
            score = outputs.objectness[i]
        elif settings.selection == "centerness":
            score = outputs.centerness[i]
        else:
            images = [i]
            if settings.selection != "text_sample":
                size = b // num_devices
                images = range(i // size * size, (i // size + 1) * size)
            concepts = batch.caption_concepts[images][batch.caption_mask[images]]
            if settings.selection != "text_sample" and settings.selection_scope == "global":
                concepts = distinct
            score = np.max(similarity[i][:, concepts], axis=1, initial=-100.0)
            if settings.selection == "text_batch_centerness":
                score = sigmoid(score + outputs.bias) * sigmoid(outputs.centerness[i])
        order = np.argsort(-np.where(counts[i], score, -np.inf), kind="stable")[: settings.selection_pre_nms]
        order = order[counts[i][order]]
        kept = geometry.nms(
            boxes[i][order], score[order], settings.selection_nms_iou, num_proposals or settings.num_proposals
        )
        chosen.append(order[kept])
    return chosen, [boxes[i][rows] for i, rows in enumerate(chosen)]


def by_token(outputs, batch):
    """Returns both with all tokens of captions, [SOS] to [EOS], as concepts; equal ones have the text and the place."""
    t, length, _ = outputs.text.shape
    first, shape = first_rows(batch), (len(batch.image), length)
    used, rows, mask = np.zeros((t, length), bool), np.zeros(shape, int), np.zeros(shape, bool)
    for i, (concepts, present) in enumerate(zip(batch.caption_concepts, batch.caption_mask, strict=True)):
        if present[0]:
            end = 1 + list(batch.concept_tokens[concepts[0]]).index(49407)
            used[concepts[0], :end] = mask[i, :end] = True
            rows[i, :end] = concepts[0] * length + np.arange(end)
    ids = np.array([(first[row], place) for row in range(t) for place in range(length)])
    batch = batch._replace(concept_mask=used.reshape(-1), concept_ids=ids, caption_concepts=rows, caption_mask=mask)
    return dataclasses.replace(outputs, text=outputs.text.reshape(t * length, -1)), batch


def class_step(outputs, batch, *, canvas, settings, num_devices):
    """Returns (loss, metrics, gradients) of an image-text batch whose captions are the names of classes."""
    outputs = outputs.float64()
    grads = outputs.zeros()
    chosen, _ = select(
        outputs,
        batch,
        canvas=canvas,
        settings=settings,
        num_devices=num_devices,
        num_proposals=settings.class_proposals,
    )
    first = first_rows(batch)
    names = np.flatnonzero((first == np.arange(len(first))) & batch.concept_mask)
    used = batch.image_mask & batch.caption_mask[:, 0] & np.array([len(rows) > 0 for rows in chosen])
    losses, hits, own_scores = [], [], []
    for i in np.flatnonzero(used):
        regions = outputs.embeddings[i, chosen[i]]
        scores = outputs.scale * regions.mean(axis=0) @ outputs.text[names].T
        own = names == first[batch.caption_concepts[i, 0]]
        target = (1 - settings.label_smoothing) * own + settings.label_smoothing / len(names)
        logits = scores / settings.temperature
        p = np.exp(logits - logits.max())
        p /= p.sum()
        losses.append(-(target * np.log(p)).sum())
        hits.append(scores.argmax() == own.argmax())
        own_scores.append(scores[own.argmax()])
        bar = settings.class_weight * (p - target) / settings.temperature / used.sum()
        for anchor, region in zip(chosen[i], regions, strict=True):
            grads.embeddings[i, anchor] = outputs.scale * bar @ outputs.text[names] / len(regions)
            grads.text[names] += outputs.scale * bar[:, None] * region / len(regions)
        grads.scale += bar @ scores / outputs.scale
    loss = sum(losses) / max(len(losses), 1)
    metrics = {"accuracy": np.mean(hits), "similarity": np.mean(own_scores), "num_concepts": float(len(names))}
    return settings.class_weight * loss, {"loss_classification": loss, **metrics}, grads


def pair_step(outputs, batch, *, canvas, settings, num_devices):
    """Returns (loss, metrics, gradients) of an image-text batch."""
    outputs = outputs.float64()
    shape_of_text = outputs.text.shape
    if settings.interaction == "tokens":
        outputs, batch = by_token(outputs, batch)
    grads = outputs.zeros()
    chosen, boxes = select(outputs, batch, canvas=canvas, settings=settings, num_devices=num_devices)
    b, k = len(chosen), max(map(len, chosen))
    index, mask, areas = np.zeros((b, k), int), np.zeros((b, k), bool), np.zeros((b, k))
    for i, rows in enumerate(chosen):
        index[i, : len(rows)], mask[i, : len(rows)], areas[i, : len(rows)] = rows, True, geometry.area(boxes[i])
    loss, (regions_bar, text_bar, scale_bar), metrics = contrastive_oracle.loss_and_gradients(
        np.take_along_axis(outputs.embeddings, index[..., None], axis=1),
        outputs.text,
        outputs.scale,
        region_mask=mask,
        region_areas=areas,
        concept_mask=batch.concept_mask,
        canonical=first_rows(batch),
        caption_concepts=batch.caption_concepts,
        caption_mask=batch.caption_mask,
        image_mask=batch.image_mask,
        matching=settings.matching,
        side=settings.side,
        temperature=settings.temperature,
        label_smoothing=settings.label_smoothing,
        matching_temperature=settings.matching_temperature,
    )
    weight = settings.contrastive_weight
    for i in range(b):
        grads.embeddings[i, chosen[i]] = weight * regions_bar[i, : len(chosen[i])]
    grads.text, grads.scale = weight * text_bar.reshape(shape_of_text), weight * scale_bar
    return weight * loss, {"loss_contrastive": loss, **metrics}, grads
