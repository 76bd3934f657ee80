"""Pictures of how regions come about: which ones the texts of a batch choose, and where the deformable layer looks."""

from __future__ import annotations

import functools
import itertools
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from detclipv2_jax.data import transforms
from detclipv2_jax.geometry import anchors as anchor_lib
from detclipv2_jax.geometry import boxes as box_lib
from detclipv2_jax.inference import Detector, Photos, Predictor
from detclipv2_jax.losses import proposals
from detclipv2_jax.losses.concept_table import Captions, Concepts, Table
from detclipv2_jax.models.deform_conv import TAPS
from detclipv2_jax.models.detclip import Regions
from detclipv2_jax.visualize import drawing, figures, panels


class Anchors(NamedTuple):
    """What the model says of every anchor of a batch of photos."""

    regions: Regions
    boxes: Float[Array, "b a 4"]  # xyxy in pixels of the canvas
    # (y, x) in cells of the anchor's level, added to `TAPS`; t is 9, or 0 without the layer
    offsets: Float[Array, "b a t 2"]
    weights: Float[Array, "b a t"]  # modulation in [0, 1]
    on_photo: Bool[Array, "b a"]
    scale: Float[Array, ""]  # of the logit
    bias: Float[Array, ""]


@functools.partial(jax.jit, static_argnums=0)
def look(detector: Detector, params: Any, photos: Photos) -> Anchors:
    """Returns what the model says of every anchor, and what its deformable layer does there, if it has one."""
    model, variables = detector.model, {"params": params}
    regions, state = model.apply(
        variables, photos.image, photos.extent, method="encode_image", train=False, mutable=["intermediates"],
        capture_intermediates=lambda module, _: module.name == "steering",
    )  # fmt: skip
    steering = jnp.zeros((*regions.centerness.shape, 0))
    for levels in jax.tree.leaves(state.get("intermediates"), is_leaf=lambda leaf: isinstance(leaf, tuple)):
        steering = jnp.concatenate([x.reshape(len(x), -1, 3 * len(TAPS)).astype(jnp.float32) for x in levels], axis=1)
    _, height, width, _ = photos.image.shape
    anchors = jnp.asarray(anchor_lib.grid((height, width)).boxes)
    logit: Any = model.apply(variables, method="logit_parameters")
    return Anchors(
        regions,
        box_lib.decode_deltas(jnp.broadcast_to(anchors[None], regions.box_deltas.shape), regions.box_deltas),
        steering[..., : 2 * len(TAPS)].reshape(*steering.shape[:2], -1, 2),
        jax.nn.sigmoid(steering[..., 2 * len(TAPS) :]),
        anchor_lib.on_photo(anchors, photos.extent),
        *logit,
    )


def draw_proposals(
    predictor: Predictor,
    images: Sequence[Any],
    texts: Sequence[Sequence[str]],
    *,
    index: int = 0,
    max_drawn: int = 20,
    path: str | pathlib.Path | None = None,
) -> drawing.Picture:
    """Returns a photo with the regions that the contrastive loss would train, each with the text it is nearest to.

    They are chosen as in training (paper section 3.2, Table 2a): by the texts of the whole batch, not only the photo's.

    The images are the batch; `texts` has caption and phrases of each, `index` is the one that is drawn.
    """
    if len(texts) != len(images):
        raise ValueError(f"{len(images)} images have {len(texts)} lists of texts; give one for each")
    photos = predictor.photos(images, index=index)
    names, embedded, mask = predictor.vocabulary(list(dict.fromkeys(itertools.chain.from_iterable(texts))))
    row_of = {name: row for row, name in enumerate(names)}
    rows = np.zeros((len(texts), max(map(len, texts))), np.int32)
    used = np.zeros(rows.shape, bool)
    for i, image_texts in enumerate(texts):
        rows[i, : len(image_texts)], used[i, : len(image_texts)] = [row_of[text] for text in image_texts], True
    found = look(predictor.detector, predictor.params, photos)
    captions = Captions(jnp.asarray(rows), jnp.asarray(used))
    chosen = proposals.select_proposals(
        found.regions,
        found.boxes,
        Concepts(jnp.asarray(embedded), found.scale, found.bias),
        anchor_mask=found.on_photo,
        table=Table(jnp.asarray(mask), jnp.arange(len(embedded), dtype=jnp.int32)),
        captions=captions,
        batch_captions=captions,
        settings=proposals.settings_of(predictor.config.loss),
    )
    kept = np.asarray(chosen.indices[index])[np.asarray(chosen.mask[index])]
    regions = np.asarray(found.regions.embeddings[index], np.float32)[kept]
    similarity = float(found.scale) * regions @ embedded[: len(names)].T
    return figures.detections(
        _pixels(images[index]),
        _on_photo(np.asarray(chosen.boxes[index])[: len(kept)], photos, index),
        similarity.argmax(axis=1),
        names,
        scores=similarity.max(axis=1),
        min_score=-np.inf,
        max_drawn=max_drawn,
        max_iou=1.0,
        title=f"{len(kept)} regions that {len(names)} texts of {len(images)} images choose, each with its best text",
        path=path,
    )


def draw_sampling(
    predictor: Predictor, image: Any, phrases: Sequence[str], *, path: str | pathlib.Path | None = None
) -> drawing.Picture:
    """Returns where the deformable layer samples for the best region of every phrase (paper section 3.3, Table 3).

    Raises:
      ValueError: the model has no deformable layer.
    """
    if not predictor.config.model.head.deformable:
        raise ValueError("config.model.head.deformable is False: this model has no deformable layer to look at")
    photos = predictor.photos([image])
    _, embedded, _ = predictor.vocabulary(phrases)
    found = jax.tree.map(np.asarray, look(predictor.detector, predictor.params, photos))
    similarity = found.regions.embeddings[0].astype(np.float32) @ embedded[: len(phrases)].T
    best = np.where(found.on_photo[0][:, None], similarity, -np.inf).argmax(axis=0)
    _, height, width, _ = photos.image.shape
    grid = anchor_lib.grid((height, width))
    strides = np.repeat(anchor_lib.STRIDES, grid.levels)[best].astype(np.float32)
    centers = np.asarray(box_lib.centers(jnp.asarray(grid.boxes[best])))[:, None]
    to_photo = (1 / photos.scale[0])[::-1]
    regular, points = (
        (centers + cells[..., ::-1] * strides[:, None, None]) * to_photo
        for cells in (TAPS[None], TAPS + found.offsets[0][best])
    )
    return panels.sampling(
        _pixels(image),
        phrases,
        _on_photo(found.boxes[0][best], photos, 0),
        regular=regular,
        points=points,
        weights=found.weights[0][best],
        strides=strides,
        path=path,
    )


def _pixels(image: Any) -> drawing.Picture:
    return image if isinstance(image, np.ndarray) else transforms.read(image).pixels


def _on_photo(boxes: Float[np.ndarray, "n 4"], photos: Photos, index: int) -> Float[np.ndarray, "n 4"]:
    """Returns boxes of the canvas in pixels of the photo, cut at its border."""
    height, width = np.asarray(photos.original_size)[index]
    boxes = boxes / np.tile(np.asarray(photos.scale)[index][::-1], 2)
    return np.clip(boxes, 0, [width, height, width, height])
