"""A stand-in for the network whose answer is known: it reports the bounding boxes of pure red and pure blue pixels."""

from __future__ import annotations

import json
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from deltas import encode_deltas
from ml_collections import ConfigDict
from PIL import Image

from detclipv2_jax import config as config_lib
from detclipv2_jax.data import tokenizer
from detclipv2_jax.geometry import anchors as anchor_lib
from detclipv2_jax.geometry import boxes as box_lib
from detclipv2_jax.models.detclip import Regions

CANVASES = ((64, 128), (128, 64))
COLORS = {"red": (255, 0, 0), "blue": (0, 0, 255)}


class Planted(nn.Module):
    """Has DetCLIP's methods; the embedding of a word or region says red or blue."""

    text: dict

    def setup(self):
        self.text_weights = self.param("text_encoder", nn.initializers.ones, (2,))

    def __call__(self):
        return self.text_weights

    def encode_text(self, tokens):
        ids = jnp.asarray(tokenizer.tokenize(list(COLORS))[:, 1])
        return (tokens[:, 1][:, None] == ids[None]).astype(jnp.float32)

    def logit_parameters(self):
        return jnp.float32(10.0), jnp.float32(-5.0)

    def encode_image(self, image, extent, *, train: bool):
        del extent, train
        grid = jnp.asarray(anchor_lib.grid(image.shape[1:3]).boxes)

        def regions(image):
            boxes = jnp.stack([_bounding_box(image, color) for color in COLORS.values()])
            target = jax.vmap(lambda box: box_lib.centerness_target(grid, jnp.broadcast_to(box, grid.shape)))(boxes)
            deltas = jax.vmap(lambda box: encode_deltas(grid, jnp.broadcast_to(box, grid.shape)))(boxes)
            best = jnp.argmax(target, axis=0)
            return Regions(
                (target > 0).astype(jnp.float32).T,
                jnp.take_along_axis(deltas, best[None, :, None], axis=0)[0],
                jnp.where(jnp.max(target, axis=0) > 0, 0.0, -20.0),
                None,
            )

        return jax.vmap(regions)(image)


def _bounding_box(image, color):
    # resizing blurs an edge over two pixels: a pixel counts from half colour on
    other = 2 if color[0] else 0
    inside = (image[..., 0 if color[0] else 2] > 127) & (image[..., other] < 128) & (image[..., 1] < 128)
    sides = []
    for axis in (0, 1):
        line = jnp.any(inside, axis=axis)
        first, last = jnp.argmax(line), line.size - jnp.argmax(line[::-1])
        sides.append((first, jnp.where(jnp.any(line), last, first)))
    (x1, x2), (y1, y2) = sides
    return jnp.stack([x1, y1, x2, y2]).astype(jnp.float32)


def make() -> tuple[ConfigDict, Planted, dict]:
    """Returns configuration, model and parameters."""
    config = config_lib.base()
    config.model = config_lib.model("nano")
    config.eval.canvases = CANVASES
    config.eval.short_side, config.eval.long_side = 64, 128
    config.eval.definitions = False
    model = Planted({"context_length": 16, "classes": ()})
    return config, model, model.init(jax.random.key(0))["params"]


def paint(size: tuple[int, int], boxes: dict[str, tuple[int, int, int, int]]) -> np.ndarray:
    """Returns a gray photo of `size` (height, width) with coloured rectangles given as xyxy."""
    image = np.full((*size, 3), 128, np.uint8)
    for name, (x1, y1, x2, y2) in boxes.items():
        image[y1:y2, x1:x2] = COLORS[name]
    return image


def write_dataset(folder: pathlib.Path, *, num_images: int) -> pathlib.Path:
    """Writes photos of many shapes with one or two rectangles and their COCO json; returns its path."""
    rng = np.random.default_rng(0)
    sizes = ((100, 300), (300, 100), (200, 210), (64, 128), (400, 700))
    (folder / "images").mkdir(parents=True)
    images, annotations = [], []
    for i in range(num_images):
        height, width = sizes[i % len(sizes)]
        boxes = {}
        for half, name in enumerate(COLORS):
            if half == 0 or i % 3:
                x = half * width // 2 + int(rng.integers(0, width // 8))
                y = int(rng.integers(0, height // 4))
                boxes[name] = (x, y, x + int(rng.integers(width // 5, width // 3)), y + height // 2)
        Image.fromarray(paint((height, width), boxes)).save(folder / "images" / f"{i}.png")
        images.append({"id": 1000 + 7 * i, "file_name": f"{i}.png", "height": height, "width": width})
        for name, (x1, y1, x2, y2) in boxes.items():
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": images[-1]["id"],
                    "category_id": {"red": 5, "blue": 3}[name],
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": (x2 - x1) * (y2 - y1),
                    "iscrowd": 0,
                }
            )
    categories = [{"id": 5, "name": "red", "frequency": "f"}, {"id": 3, "name": "blue", "frequency": "r"}]
    path = folder / "instances.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return path
