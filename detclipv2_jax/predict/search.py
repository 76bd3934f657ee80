"""What is looked for, and on which photos it was found."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Generic, TypeVar

import numpy as np

from detclipv2_jax.data.transforms import Photo
from detclipv2_jax.inference import Found, Predictor, vocabulary
from detclipv2_jax.inference.exemplars import Exemplars

Key = TypeVar("Key")


@dataclasses.dataclass(frozen=True)
class Search(Generic[Key]):
    """Words and examples, and how a predictor looks for them."""

    predictor: Predictor
    words: Mapping[str, str]  # name → definition
    exemplars: Exemplars
    settings: Mapping[str, Any]  # of `Predictor.iterate`
    thresholds: np.ndarray | None = None  # of every word: only boxes above it are kept

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        """The names of the labels."""
        return self.predictor.vocabulary(self.words, self.exemplars)[0]

    def described(self) -> dict[str, Any]:
        """Returns all that results depend on, as json has it."""
        shown = {
            name: [[str(image), [float(side) for side in box]] for image, box in examples]
            for name, examples in self.exemplars.items()
        }
        config = self.predictor.config
        return {
            "words": dict(self.words),
            "exemplars": shown,
            "weights": vocabulary.weights_key(self.predictor.params),
            "configuration": json.loads(json.dumps([config.model.to_dict(), config.eval.to_dict()], default=str)),
            "options": dict(self.settings),
            "thresholds": None if self.thresholds is None else self.thresholds.tolist(),
        }

    def find(self, photos: Iterable[tuple[Key, Photo]]) -> Iterator[tuple[Key, Photo, Found]]:
        """Yields what is found on photos, in whatever order batches fill; boxes are in pixels of the photo itself."""
        loaded: dict[int, tuple[Key, Photo]] = {}

        def pixels() -> Iterator[np.ndarray]:
            for i, (key, photo) in enumerate(photos):
                loaded[i] = key, photo
                yield photo.pixels

        for i, found in self.predictor.iterate(pixels(), self.words, exemplars=self.exemplars, **self.settings):
            key, photo = loaded.pop(i)
            kept = slice(None) if self.thresholds is None else found.scores > self.thresholds[found.labels]
            found = dataclasses.replace(found, boxes=found.boxes / photo.scale[None], size=photo.size)
            columns = {name: getattr(found, name)[kept] for name in ("boxes", "scores", "labels")}
            yield key, photo, dataclasses.replace(found, **columns)
