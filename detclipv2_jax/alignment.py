"""Word-region alignment of photos and their phrases, and its pictures (the paper's Figure 1)."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array, Float, Int

from detclipv2_jax import drawing, visualize
from detclipv2_jax.data import tokenizer, transforms
from detclipv2_jax.data.schema import Batch
from detclipv2_jax.geometry import anchors as anchor_lib
from detclipv2_jax.geometry import boxes as box_lib
from detclipv2_jax.models.detclip import Regions

if TYPE_CHECKING:
    from detclipv2_jax.inference import Detector, Predictor

AnyArray = Array | np.ndarray


@flax.struct.dataclass
class Alignment:
    """For every phrase its best region on one image of a batch."""

    boxes: Float[Array, "m 4"]  # xyxy in pixels of the original image
    scores: Float[Array, " m"]  # similarity, the contrastive loss's s
    ranks: Int[Array, " m"]  # place of the image in the batch ordered by best similarity, from 1
    maps: Float[Array, "m h w"]  # similarity at every cell of P3, the best of the levels; -inf on the padding

    def photo_maps(self, extent: Int[np.ndarray, " 2"]) -> Float[np.ndarray, "m h w"]:
        """Returns the maps without padding, given the image's (height, width) px on the canvas."""
        rows, columns = np.maximum(np.ceil(np.asarray(extent) / anchor_lib.STRIDES[0] - 0.5), 1).astype(int)
        return np.asarray(self.maps)[:, :rows, :columns]


def align(
    regions: Regions,
    phrases: Float[AnyArray, "m d"],
    *,
    index: int | Int[Array, ""],
    canvas: tuple[int, int],
    scale: Float[Array, ""],
    extent: Int[AnyArray, "b 2"],
    image_scale: Float[AnyArray, "b 2"],
    original_size: Int[AnyArray, "b 2"],
) -> Alignment:
    """Returns the best region on image `index` of the batch for every phrase, and what it means among the batch.

    Similarity is scale * region . phrase, as in the contrastive loss, over all anchors whose centre lies on the photo.
    """
    grid = anchor_lib.grid(canvas)
    center_yx = box_lib.centers(jnp.asarray(grid.boxes))[:, ::-1]
    on_image = jnp.all(center_yx[None] < extent[:, None].astype(jnp.float32), axis=-1)
    words = phrases.astype(regions.embeddings.dtype)
    similarity = scale * jnp.einsum("bad,md->bma", regions.embeddings, words, preferred_element_type=jnp.float32)
    similarity = jnp.where(on_image[:, None], similarity, -jnp.inf)
    best = jnp.max(similarity, axis=-1)  # [b, m]
    anchor_of = jnp.argmax(similarity[index], axis=-1)
    boxes = box_lib.decode_deltas(jnp.asarray(grid.boxes)[anchor_of], regions.box_deltas[index][anchor_of])
    boxes = box_lib.clip(box_lib.scale(boxes, (1.0 / image_scale[index])[None]), original_size[index][None])
    (height, width), *_ = sizes = anchor_lib.level_sizes(canvas)
    maps, start = jnp.full((len(phrases), height, width), -jnp.inf), 0
    for level_height, level_width in sizes:
        level = similarity[index, :, start : start + level_height * level_width]
        start += level_height * level_width
        rows, columns = np.arange(height) * level_height // height, np.arange(width) * level_width // width
        maps = jnp.maximum(maps, level.reshape(-1, level_height, level_width)[:, rows][:, :, columns])
    return Alignment(boxes, best[index], 1 + jnp.sum(best > best[index][None], axis=0), maps)


def draw(
    predictor: Predictor,
    images: Sequence[Any],
    phrases: Sequence[str],
    *,
    index: int = 0,
    caption: str = "",
    path: str | pathlib.Path | None = None,
) -> drawing.Picture:
    """Returns the picture of one photo's best regions: boxes, scores, ranks and similarity maps of its phrases.

    Args:
      predictor: a checkpoint of ours.
      images: paths or RGB arrays; the ranks are among them.
      phrases: of the photo's caption.
      index: position of the photo.
      caption: text above the picture.
      path: where to write the picture.
    """
    found = predictor.align(images, phrases, index=index)
    photo = images[index] if isinstance(images[index], np.ndarray) else transforms.read(images[index])
    return visualize.alignment(
        photo,
        phrases,
        found.boxes,
        scores=found.scores,
        ranks=found.ranks,
        num_images=len(images),
        maps=found.maps,
        caption=caption,
        path=path,
    )


def draw_batch(
    detector: Detector, params: Any, batch: Batch, *, num_pictures: int, folder: str | pathlib.Path, name: str
) -> None:
    """Draws the first photos of an image-text batch with the best region of each of their phrases.

    Ranks are among all images of the global batch. All processes take part; process 0 writes `<name>_<i>.jpg`.

    Args:
      detector: of the model and the mesh.
      params: of the model.
      batch: this process's rows.
      num_pictures: photos drawn, at most those of the batch on process 0.
      folder: where to write.
      name: beginning of the files' names.
    """
    num_pictures = min(num_pictures, len(batch.image))
    tokens = batch.concept_tokens[batch.caption_concepts[:num_pictures]]  # [p, m, l]
    if jax.process_count() > 1:  # all processes must ask for the same phrases
        tokens = np.asarray(multihost_utils.broadcast_one_to_all(tokens))
    phrases = detector.encode_tokens(params, tokens.reshape(-1, tokens.shape[-1]))
    phrases = phrases.reshape(*tokens.shape[:2], -1)
    photos = detector.to_global(batch)
    found = detector.align(params, photos, phrases, np.arange(num_pictures, dtype=np.int32))
    if jax.process_index() != 0:
        return
    found = jax.tree.map(np.asarray, found)
    for i in range(num_pictures):
        mask, (height, width) = batch.caption_mask[i], batch.extent[i]
        caption, *rest = tokenizer.decode(tokens[i][mask])
        own = jax.tree.map(lambda array, i=i, mask=mask: array[i][mask], found)
        visualize.alignment(
            batch.image[i, :height, :width],
            ["the whole caption", *rest],
            own.boxes * batch.scale[i][[1, 0, 1, 0]],  # shown at canvas size
            scores=own.scores,
            ranks=own.ranks,
            num_images=photos.image.shape[0],
            maps=own.photo_maps(batch.extent[i]),
            caption=caption,
            path=pathlib.Path(folder) / f"{name}_{i}.jpg",
        )
