"""`Predictor`: any words on any images with a trained model."""

from __future__ import annotations

import functools
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, overload

import jax
import numpy as np
from jaxtyping import Bool, Float

from detclipv2_jax import files
from detclipv2_jax.data import concepts, transforms
from detclipv2_jax.inference import exemplars as exemplars_lib
from detclipv2_jax.inference import tiles, vocabulary
from detclipv2_jax.inference.detect import WORD_CHUNK, Alignment, Detections, Limits, Photos
from detclipv2_jax.inference.detector import Detector
from detclipv2_jax.inference.exemplars import Exemplars, OneImage
from detclipv2_jax.inference.found import Found
from detclipv2_jax.models.detclip import DetCLIP
from detclipv2_jax.runs import exported, hub, remote, state

if TYPE_CHECKING:
    from ml_collections import ConfigDict

Words = Sequence[str] | Mapping[str, str]


class Predictor:
    """Finds any words on any images with a trained model, on the first device of this process.

    predictor = Predictor.from_checkpoint("runs/demo")
    found = predictor("photo.jpg", ["cat", "red car"])
    print(found)
    found.plot("photo.jpg").save("found.jpg")
    """

    def __init__(
        self, config: ConfigDict, model: DetCLIP, params: Any, *, step: int = 0, cache: str | pathlib.Path | None = None
    ):
        self.config, self.params, self.step = config, params, step
        self.words: Mapping[str, str] = {}  # name → definition, looked for where a call names none
        self.detector = Detector(model)
        self._embed = vocabulary.Cache(
            functools.partial(self.detector.encode_vocabulary, params),
            config=config.model.text.to_dict(),
            params=params["text_encoder"],
            folder=cache,
        )
        sizes = {name: config.eval[name] for name in ("canvases", "short_side", "long_side")}
        self._show = exemplars_lib.Cache(
            self._describe, config={"model": config.model.to_dict(), **sizes}, params=params, folder=cache
        )

    @classmethod
    def from_checkpoint(cls, workdir: str | pathlib.Path, *, keep_vocabularies: bool = True) -> Predictor:
        """Returns the predictor of a training run's newest checkpoint; ValueError if there is none of that model.

        `workdir` may be the folder of an export. Embeddings of vocabularies are kept in `<workdir>/vocabularies` unless
        `keep_vocabularies` is False.
        """
        workdir = remote.here(workdir)
        cache = workdir / "vocabularies" if keep_vocabularies else None
        if exported.is_export(workdir):
            return cls._of_export(workdir, cache=cache)
        from detclipv2_jax.runs import checkpoints  # here: an export is read without orbax

        config, params, step = checkpoints.load_for_inference(workdir)
        what = f"the checkpoint of step {step} in {workdir}"
        model = state.checked_model(config, params, what=what, folder=workdir)
        return cls(config, model, params, step=step, cache=cache)

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike[str], *, revision: str | None = None) -> Predictor:
        """Returns the predictor of an export: of its folder, or of a model of the hub, which is downloaded once.

        Only data are read, no code. The words it was exported with are looked for where a call names none.

        Args:
          source: folder that `python -m detclipv2_jax.export` wrote, or USER/NAME on the hub (needs huggingface_hub).
          revision: branch, tag or commit on the hub.

        Raises:
          ValueError: no such folder or model, or it is damaged; the message says what is wrong and what to do.
        """
        return cls._of_export(hub.local_folder(source, revision=revision), cache=None)

    @classmethod
    def _of_export(cls, folder: str | os.PathLike[str], *, cache: pathlib.Path | None) -> Predictor:
        export = exported.load(folder)
        predictor = cls(export.config, export.model, export.params, step=export.step, cache=cache)
        if export.words:
            predictor.words = export.words
            predictor._embed.remember(_texts(export.words), export.embeddings)
        return predictor

    @overload
    def __call__(self, images: str | os.PathLike[str], words: Words = (), **settings: Any) -> Found: ...

    @overload
    def __call__(self, images: Iterable[OneImage], words: Words = (), **settings: Any) -> list[Found]: ...

    def __call__(
        self, images: OneImage | Iterable[OneImage], words: Words = (), **settings: Any
    ) -> Found | list[Found]:
        """Returns what is found on one image, or a list of that for each of several, in order.

        Args:
          images: a path or an RGB array of any size, or any number of them.
          words: what to look for, or name → definition.
          settings: what follows.
          exemplars: what to look for as name → 1 to 5 pairs of a photo and a box on it (xyxy, in pixels of the photo as
            displayed); beside words or in place of them.
          score_threshold: only boxes above it; None: the configuration's `eval` value, as for the next two.
          nms_iou: a box is removed by a better one of its word if their IoU is above it.
          max_detections: boxes an image.
          score: what ranks boxes, see `config.eval.score`.
          batch_size: images a step; a new value compiles anew.
          tile: images larger than a square of this side are predicted in such tiles too (see `tiles`); 0: none are.
          tile_overlap: least share of a tile's side that it shares with the next one.

        Raises:
          ValueError: an image cannot be read, no words, or a limit out of range.
        """
        is_one = isinstance(images, (str, os.PathLike)) or (isinstance(images, np.ndarray) and images.ndim == 3)
        listed: Any = [images] if is_one else images
        found = dict(self.iterate(listed, words, **settings))
        return found[0] if is_one else [found[i] for i in range(len(found))]

    def iterate(
        self,
        images: Iterable[Any],
        words: Words = (),
        *,
        exemplars: Exemplars | None = None,
        batch_size: int = 1,
        tile: int = 0,
        tile_overlap: float = 0.2,
        **given: Any,
    ) -> Iterator[tuple[int, Found]]:
        """Yields (position of the image, what is found) as batches of one canvas fill; see `__call__`.

        Holds no more than a batch of images a canvas, so `images` may be endless.
        """
        names, text, mask = self.vocabulary(words, exemplars)
        limits = Limits.from_config(self.config.eval, **given)

        def find(images: Iterable[Any]) -> Iterator[tuple[int, Found]]:
            waiting: dict[tuple[int, ...], list[tuple[int, Photos]]] = {}
            for i, image in enumerate(images):
                photo = self._photo(image)
                batch = waiting.setdefault(photo.image.shape[:2], [])
                batch.append((i, photo))
                if len(batch) == batch_size:
                    yield from self._find(batch, names, text, mask, limits=limits, batch_size=batch_size)
                    batch.clear()
            for batch in filter(None, waiting.values()):
                yield from self._find(batch, names, text, mask, limits=limits, batch_size=batch_size)

        if tile:
            yield from tiles.iterate(find, images, tile=tile, overlap=tile_overlap, limits=limits)
        else:
            yield from find(images)

    def _find(
        self,
        batch: list[tuple[int, Photos]],
        names: tuple[str, ...],
        text: vocabulary.Embeddings,
        mask: Bool[np.ndarray, " v"],
        *,
        limits: Limits,
        batch_size: int,
    ) -> Iterator[tuple[int, Found]]:
        photos = [photo for _, photo in batch]
        photos += photos[-1:] * (batch_size - len(photos))  # the compiled size; the copies' results are not read
        found = self.detector.predict(self.params, _stack(photos), text, mask, limits)
        found = jax.tree.map(np.asarray, found)
        for row, (i, photo) in enumerate(batch):
            keep = found.mask[row]
            arrays = (found.boxes[row][keep], found.scores[row][keep], found.labels[row][keep])
            height, width = map(int, photo.original_size)
            yield i, Found(*arrays, names, (height, width))

    def align(self, images: Sequence[Any], phrases: Sequence[str], *, index: int = 0) -> Alignment:
        """Returns the best region of each phrase on image `index`, and the image's rank among `images` for it.

        All images are put on the canvas of that image; maps cover it without padding. `figures.alignment` draws them.
        """
        photos = self.photos(images, index=index)
        names, text, _ = self.vocabulary(phrases)
        padded, _ = vocabulary.pad(text[: len(names)], multiple=8)  # few sizes are compiled
        found = self.detector.align(self.params, photos, padded[None], np.array([index], np.int32))
        found = jax.tree.map(lambda array: np.asarray(array)[0, : len(names)], found)
        return found.replace(maps=found.photo_maps(photos.extent[index]))

    def ground(self, image: Any, phrases: Float[np.ndarray, "p d"], *, max_detections: int) -> Detections:
        """Returns the best boxes of each phrase alone on one image, arrays beginning with [p].

        Phrases are rows of what `vocabulary` gives; their number is padded to a multiple of 8: few sizes are compiled.
        """
        limits = Limits.from_config(self.config.eval, max_detections=max_detections, score="words")
        padded, _ = vocabulary.pad(phrases, multiple=8)
        found = self.detector.ground(self.params, _stack([self._photo(image)]), padded, limits)
        return jax.tree.map(lambda array: np.asarray(array)[: len(phrases)], found)

    def vocabulary(
        self, words: Words = (), exemplars: Exemplars | None = None
    ) -> tuple[tuple[str, ...], np.ndarray, np.ndarray]:
        """Returns (names, padded embeddings, mask) of words and examples, from the cache where it has exactly them.

        Warns of texts that are longer than the model's context and lose their end.
        """
        if not (words or exemplars or isinstance(words, str)):
            words = self.words or words
        if isinstance(words, str) or not (words or exemplars):
            raise ValueError(
                f"words must be a list of words, or a dict name → definition, but are {words!r}"
                + " and there are no exemplars" * (exemplars is not None)
            )
        definitions = words if isinstance(words, Mapping) else dict.fromkeys(words, "")
        names = tuple(words)
        if not all(isinstance(name, str) and name.strip() for name in names):
            raise ValueError(f"words must be texts that are not empty, not {list(names)!r}")
        texts = _texts(definitions)
        vocabulary.warn_truncated(texts, max_length=self.config.model.text.context_length)
        parts = [self._embed(texts)] if texts else []
        if exemplars:
            shown = exemplars_lib.check(exemplars, words=names)
            parts.append(self._show([self._examples(name, examples) for name, examples in shown.items()]))
            names += tuple(shown)
        return names, *vocabulary.pad(np.concatenate(parts), multiple=WORD_CHUNK)

    def _examples(self, name: str, examples: list[exemplars_lib.Example]) -> list[exemplars_lib.Example]:
        """Returns examples with their boxes cut at the border of their photos; ValueError for one that is wrong."""
        checked: list[exemplars_lib.Example] = []
        for i, (image, box) in enumerate(examples, start=1):
            where = f"exemplars: example {i} of {name!r}"
            try:
                size = _open(image)[1]
            except (OSError, ValueError) as error:
                raise ValueError(f"{where}: cannot read the image {exemplars_lib.title(image)}: {error}") from error
            checked.append((image, exemplars_lib.checked_box(box, size, where=where).tolist()))
        return checked

    def _describe(self, queries: Sequence[list[exemplars_lib.Example]]) -> Float[np.ndarray, "q d"]:
        """Returns an embedding for every list of examples: the mean of their unit embeddings, of one length for all."""
        import tqdm  # here: words need fewer packages

        means, length = [], self.detector.query_length(self.params)
        for examples in tqdm.tqdm(queries, desc="examples", unit="name", leave=False, disable=None):
            embeddings = []
            for image, box in examples:
                photo = _stack([self._photo(image)])
                embeddings.append(self.detector.describe(self.params, photo, np.array([box], np.float32)))
            mean = np.mean(np.concatenate(embeddings), axis=0)
            means.append(length * mean / max(np.linalg.norm(mean), 1e-6))
        return np.stack(means)

    def photos(self, images: Sequence[Any], *, index: int = 0) -> Photos:
        """Returns paths, encoded images or RGB arrays as a batch, on the canvas that shows image `index` largest."""
        height, width, _ = self._photo(images[index]).image.shape
        return _stack([self._photo(image, (height, width)) for image in images])

    def _photo(self, image: Any, canvas: tuple[int, int] | None = None) -> Photos:
        """Returns one image (no batch axis) on the canvas that shows it largest, or on the given one."""
        sides = {"short_side": self.config.eval.short_side, "long_side": self.config.eval.long_side}
        try:
            source, size = _open(image)
            if canvas is None:  # as data.canvases assigns them: of equals the smallest, or the first
                fits = [(min(h / size[0], w / size[1]), -h * w, (h, w)) for h, w in self.config.eval.canvases]
                *_, canvas = max(fits, key=lambda fit: fit[:2])
            out = np.zeros((*canvas, 3), np.uint8)
            placed = transforms.place(source, out, annotated_size=(0, 0), **sides)
        except (OSError, ValueError) as error:
            name = image if isinstance(image, (str, os.PathLike)) else "array"
            raise ValueError(f"cannot read the image {name}: {error}") from error
        extent, original_size = np.array(placed, np.int32)
        return Photos(out, extent, (extent / original_size).astype(np.float32), original_size)


def _texts(words: Mapping[str, str]) -> list[str]:
    """Returns what is encoded for name → definition."""
    return [concepts.concept_text(name, definition) for name, definition in words.items()]


def _stack(photos: Sequence[Photos]) -> Photos:
    return Photos(*(np.stack(arrays) for arrays in zip(*photos, strict=True)))


def _open(image: Any) -> tuple[bytes | np.ndarray, tuple[int, int]]:
    """Returns encoded bytes or pixels of an image, and its (height, width) as displayed."""
    if isinstance(image, (str, os.PathLike)):
        image = files.read_bytes(image)
    if isinstance(image, bytes):
        return image, transforms.read_header(image).displayed_size
    pixels = np.ascontiguousarray(image)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or not pixels.size:
        raise ValueError(f"it is {pixels.dtype}{list(pixels.shape)}, not RGB uint8 [height, width, 3]")
    return pixels, pixels.shape[:2]
