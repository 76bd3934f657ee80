"""`Found`: what a model found on one image, as a table, rows of COCO, `supervision.Detections` or a picture."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from PIL import Image

from detclipv2_jax import labels
from detclipv2_jax.colors import color_of
from detclipv2_jax.data import transforms

_TABLE_ROWS = 20  # of a printed table: the boxes of a photo are up to eval.max_detections, most without any score
_PLOT_SIDE_PX = 900  # of the long side of a picture, at least


@dataclasses.dataclass(frozen=True)
class Found:
    """What was found on one image, best first."""

    boxes: Float[np.ndarray, "n 4"]  # xyxy in pixels of the image as displayed (EXIF rotation applied)
    scores: Float[np.ndarray, " n"]
    labels: Int[np.ndarray, " n"]  # positions in `vocabulary`
    vocabulary: tuple[str, ...]
    size: tuple[int, int]  # (height, width) px of the image

    @property
    def names(self) -> list[str]:
        """Returns the word of every box."""
        return [self.vocabulary[label] for label in self.labels]

    def __str__(self) -> str:
        """Returns a table of the best: score, word and box of each, best first; and how many more there are."""
        if not len(self.scores):
            return f"nothing found of {len(self.vocabulary)} words"
        names = self.names[:_TABLE_ROWS]
        width = max(map(len, ["word", *names]))
        rows = [
            f"{score:6.2f}  {name:{width}}  " + " ".join(f"{side:7.1f}" for side in box)
            for score, name, box in zip(self.scores, names, self.boxes, strict=False)
        ]
        more = len(self.scores) - len(rows)
        last = [f"and {more} more, none with a higher score than {self.scores[_TABLE_ROWS]:.2f}"] if more else []
        return "\n".join([f"{'score':>6}  {'word':{width}}  {'x1':>7} {'y1':>7} {'x2':>7} {'y2':>7}", *rows, *last])

    def to_coco(self, *, image_id: int = 1) -> list[dict[str, Any]]:
        """Returns rows of COCO results with the word beside; category ids are positions in `vocabulary` from 1 on."""
        corners = self.boxes.astype(float)
        boxes = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1).round(3).tolist()
        scores = [float(str(score)) for score in self.scores]  # float32's shortest form
        columns = zip((self.labels + 1).tolist(), boxes, scores, self.names, strict=True)
        keys = ("category_id", "bbox", "score", "name")
        return [{"image_id": image_id, **dict(zip(keys, row, strict=True))} for row in columns]

    def to_supervision(self) -> Any:
        """Returns `supervision.Detections`, with the words as `data["class_name"]`; needs that package."""
        import supervision

        return supervision.Detections(
            xyxy=self.boxes.astype(np.float32).reshape(-1, 4),
            confidence=self.scores.astype(np.float32),
            class_id=self.labels.astype(int),
            data={"class_name": np.array(self.names, str)},
        )

    def plot(self, image: Any, *, min_score: float = 0.2, max_drawn: int = 20) -> Image.Image:
        """Returns the image (path or RGB array) with the best boxes, their words and scores; a notebook shows it.

        A place is shown once, with its best word. Where no box has `min_score`, the best three are drawn. A small image
        is enlarged, so that labels can be read.
        """
        is_path = isinstance(image, (str, os.PathLike))
        photo = transforms.read(image) if is_path else transforms.Photo(image, image.shape[:2])
        height, width = photo.pixels.shape[:2]
        factor = max(1.0, _PLOT_SIDE_PX / max(height, width))
        size = max(1, round(factor * width)), max(1, round(factor * height))
        picture = Image.fromarray(photo.pixels).resize(size, Image.Resampling.LANCZOS)
        drawn = labels.best_places(self.boxes, self.scores, min_score=min_score, max_drawn=max_drawn)
        names = [self.vocabulary[label] for label in self.labels[drawn]]
        texts = [f"{name} {score:.2f}" for name, score in zip(names, self.scores[drawn], strict=True)]
        boxes, font = self.boxes[drawn] * photo.scale * factor, labels.AsciiFont(max(15, max(size) // 60))
        labels.draw(picture, boxes, texts, [color_of(name) for name in names], font=font)
        return picture
