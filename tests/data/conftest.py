"""A small data set of every kind, written as real files."""

import json
import pathlib

import cv2
import numpy as np
import pytest

from detclipv2_jax import config as config_lib

# (height, width) of the images: landscape, portrait and square ones
SIZES = [(60, 80), (80, 60), (64, 64), (40, 120), (90, 70), (48, 64), (100, 75)]
NAMES = ["cat", "dog", "red_car", "tree", "traffic light", "cup"]


def pixels(size: tuple[int, int], seed: int) -> np.ndarray:
    """Returns a smooth RGB picture, different for each seed; smooth, so that JPEG and resizing change little."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (3, 4, 3)).astype(np.uint8)
    return cv2.resize(coarse, size[::-1], interpolation=cv2.INTER_LINEAR)


def write_image(path: pathlib.Path, size: tuple[int, int], seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), pixels(size, seed)[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 97])


def detection_json() -> dict:
    """Returns a COCO json: image i has the boxes of category i % 6 and (i + 1) % 6."""
    images = [{"id": 10 + i, "file_name": f"{i}.jpg", "height": h, "width": w} for i, (h, w) in enumerate(SIZES)]
    annotations = [
        {"id": 2 * i + k, "image_id": 10 + i, "category_id": 1 + (i + k) % 6, "iscrowd": 0, "bbox": box, "area": 1.0}
        for i in range(len(SIZES))
        for k, box in enumerate(([5.0, 6.0, 20.0, 10.0], [10.0 + i, 4.0, 30.0, 25.0]))
    ]
    categories = [{"id": 1 + i, "name": name} for i, name in enumerate(NAMES)]
    return {"images": images, "annotations": annotations, "categories": categories}


CAPTIONS = [
    "a cat and a dog on grass",
    "the red car left of a tree",
    "a cup near the traffic light",
    "two dogs and a cat",
    "a blue boat",
    "a man riding a horse",
    "a bird on a branch",
]
PHRASES = [
    ["a cat", "a dog"],
    ["red car", "tree"],
    ["a cup", "traffic light"],
    ["dogs", "a cat"],
    ["a blue boat"],
    ["a man", "a horse"],
    ["a bird", "a branch"],
]


def grounding_json() -> dict:
    images, annotations = [], []
    for i, ((h, w), caption) in enumerate(zip(SIZES, CAPTIONS, strict=True)):
        images.append({"id": i, "file_name": f"{i}.jpg", "height": h, "width": w, "caption": caption})
        for k, phrase in enumerate(PHRASES[i]):
            span = [caption.index(phrase), caption.index(phrase) + len(phrase)]
            box = [2.0 + 5 * k, 3.0, 20.0, 20.0]
            annotations.append(
                {"id": len(annotations), "image_id": i, "category_id": 1, "bbox": box, "tokens_positive": [span]}
            )
    return {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "object"}]}


@pytest.fixture
def world(tmp_path) -> pathlib.Path:
    """A folder with images/, detection.json, grounding.json and pairs.tsv."""
    for i, size in enumerate(SIZES):
        write_image(tmp_path / "images" / f"{i}.jpg", size, seed=i)
    (tmp_path / "detection.json").write_text(json.dumps(detection_json()))
    (tmp_path / "grounding.json").write_text(json.dumps(grounding_json()))
    lines = [f"{i}.jpg\t{CAPTIONS[i]}\t{json.dumps(PHRASES[i])}\n" for i in range(len(SIZES))]
    (tmp_path / "pairs.tsv").write_text("".join(lines))
    return tmp_path


@pytest.fixture
def config(world):
    """The base configuration on the small world: two canvases of 64 × 96, batches of 4."""
    c = config_lib.base()
    for kind in ("detection", "grounding"):
        c[kind].annotations = str(world / f"{kind}.json")
        c[kind].canvases = ((64, 96), (96, 64))
        c[kind].short_side, c[kind].long_side, c[kind].max_boxes = (40, 64), 96, 5
    c.image_text.pairs = str(world / "pairs.tsv")
    c.image_text.canvases, c.image_text.short_side, c.image_text.long_side = ((64, 64),), (64, 64), 64
    c.eval.annotations = c.detection.annotations
    c.eval.canvases, c.eval.short_side, c.eval.long_side = ((64, 96), (96, 64)), 64, 96
    for kind in ("detection", "grounding", "image_text", "eval"):
        c[kind].images, c[kind].batch_size = str(world / "images"), 4
    return c
