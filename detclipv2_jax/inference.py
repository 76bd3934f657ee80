"""From regions and words to boxes: fused scores and top-k, NMS, the compiled model, and `Predictor`."""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, UInt8
from ml_collections import ConfigDict

from detclipv2_jax import alignment, checkpoints, vocabulary
from detclipv2_jax.data import concepts, tokenizer, transforms
from detclipv2_jax.data.schema import Batch
from detclipv2_jax.geometry import anchors as anchor_lib
from detclipv2_jax.geometry import boxes as box_lib
from detclipv2_jax.geometry import nms as nms_lib
from detclipv2_jax.models import detclip
from detclipv2_jax.models.detclip import DetCLIP, Regions
from detclipv2_jax.sharding import BATCH, REPLICATED

# words scored at once: 22,400 anchors x 128 words are 11 MB of scores an image, however large the vocabulary is
WORD_CHUNK = 128
TEXT_BATCH = 256  # texts encoded at once
AnyArray = Array | np.ndarray


# --- arrays to arrays


@flax.struct.dataclass
class Detections:
    """Boxes found on a batch of images, best first, in pixels of the original images; zero where not `mask`."""

    boxes: Float[Array, "b n 4"]  # xyxy, inside the image
    scores: Float[Array, "b n"]
    labels: Int[Array, "b n"]  # rows of the vocabulary
    mask: Bool[Array, "b n"]


class Photos(NamedTuple):
    """A batch of photos on one canvas; the fields are those of `data.schema.Batch`."""

    image: UInt8[AnyArray, "b h w 3"]
    extent: Int[AnyArray, "b 2"]
    scale: Float[AnyArray, "b 2"]
    original_size: Int[AnyArray, "b 2"]


@flax.struct.dataclass
class Limits:
    """What counts as a detection; see `detect`. A new value of the integers compiles anew."""

    score_threshold: float
    nms_iou: float
    pre_nms: int = flax.struct.field(pytree_node=False)
    max_detections: int = flax.struct.field(pytree_node=False)
    class_agnostic: bool = flax.struct.field(pytree_node=False, default=False)

    @classmethod
    def from_config(
        cls,
        config: ConfigDict,
        *,
        score_threshold: float | None = None,
        nms_iou: float | None = None,
        max_detections: int | None = None,
    ) -> Limits:
        """Returns the limits of `config.eval`, each replaced where given; ValueError if one is out of range."""
        score_threshold = config.score_threshold if score_threshold is None else score_threshold
        nms_iou = config.nms_iou if nms_iou is None else nms_iou
        max_detections = config.max_detections if max_detections is None else max_detections
        for name, value in (("score_threshold", score_threshold), ("nms_iou", nms_iou)):
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"{name} is {value}; it must lie between 0 and 1")
        if max_detections < 1:
            raise ValueError(f"max_detections is {max_detections}; it must be at least 1")
        pre_nms = max(config.pre_nms, max_detections)
        return cls(score_threshold, nms_iou, pre_nms=pre_nms, max_detections=max_detections)


def detect(
    regions: Regions,
    text: Float[AnyArray, "w d"],
    text_mask: Bool[AnyArray, " w"],
    *,
    anchors: Float[AnyArray, "a 4"],
    scale: Float[Array, ""],
    bias: Float[Array, ""],
    extent: Int[AnyArray, "b 2"],
    image_scale: Float[AnyArray, "b 2"],
    original_size: Int[AnyArray, "b 2"],
    score_threshold: float,
    nms_iou: float,
    pre_nms: int,
    max_detections: int,
    word_chunk: int = WORD_CHUNK,
    class_agnostic: bool = False,
) -> Detections:
    """Returns the best boxes of every image (spec section 9, point 21).

    1. score = sigmoid(scale * region . word + bias) * sigmoid(centerness); 0 for masked words and for anchors whose
       centre lies on the padding;
    2. the best `pre_nms` (anchor, word) pairs; of equal scores the lower anchor comes first, then the lower word;
    3. their boxes in the original image, cut at its border; those without area or not above the threshold are left out;
    4. NMS within each word (over all words if `class_agnostic`), the best `max_detections`.

    Args:
      regions: of a canvas (padded network image) whose `anchors` are given.
      text: L2-normalised word embeddings; w must be a multiple of `word_chunk`, see `vocabulary.pad`.
      text_mask: which rows are words.
      anchors: of the canvas, all levels.
      scale, bias: of the logit.
      extent: valid (height, width) px of the canvas.
      image_scale: (y, x) canvas px per original px.
      original_size: (height, width) px.
      score_threshold: in [0, 1); only scores above it count.
      nms_iou: a box is removed by a better one if their IoU is above it.
      pre_nms: pairs an image that enter NMS.
      max_detections: boxes an image.
      word_chunk: words scored at once; changes memory and speed only.
      class_agnostic: boxes of different words remove each other too.
    """
    anchors = jnp.asarray(anchors)
    # 1
    center_yx = box_lib.centers(anchors)[:, ::-1]
    on_image = jnp.all(center_yx[None] < extent[:, None].astype(jnp.float32), axis=-1)
    centerness = jnp.where(on_image, jax.nn.sigmoid(regions.centerness), 0.0)
    # 2
    scores, anchor_of, words = _best_pairs(
        regions.embeddings, text, text_mask, centerness, scale=scale, bias=bias, num=pre_nms, word_chunk=word_chunk
    )
    # 3
    deltas = jnp.take_along_axis(regions.box_deltas, anchor_of[..., None], axis=1)
    boxes = box_lib.decode_deltas(anchors[anchor_of], deltas)
    boxes = box_lib.scale(boxes, 1.0 / jnp.asarray(image_scale)[:, None])
    boxes = box_lib.clip(boxes, jnp.asarray(original_size)[:, None])
    mask = (scores > score_threshold) & (box_lib.area(boxes) > 0.0)
    # 4
    keep = functools.partial(nms_lib.nms, iou_threshold=nms_iou, max_outputs=max_detections)
    classes = jnp.zeros_like(words) if class_agnostic else words
    kept, used = jax.vmap(lambda b, s, m, c: keep(b, s, mask=m, classes=c))(boxes, scores, mask, classes)
    return Detections(
        boxes=jnp.take_along_axis(boxes, kept[..., None], axis=1) * used[..., None],
        scores=jnp.take_along_axis(scores, kept, axis=1) * used,
        labels=jnp.take_along_axis(words, kept, axis=1) * used,
        mask=used,
    )


def _best_pairs(
    embeddings: Float[Array, "b a d"],
    text: Float[AnyArray, "w d"],
    text_mask: Bool[AnyArray, " w"],
    centerness: Float[Array, "b a"],
    *,
    scale: Float[Array, ""],
    bias: Float[Array, ""],
    num: int,
    word_chunk: int,
) -> tuple[Float[Array, "b k"], Int[Array, "b k"], Int[Array, "b k"]]:
    """Returns (scores, anchors, words) of the best `num` pairs of every image, in order; score 0: an empty place.

    One chunk of words after the other is scored and merged into the best pairs so far, so that no (anchors x words)
    array exists. Within a chunk the best `num` anchors, by their best word, hold the best `num` pairs: a pair of any
    other anchor has `num` better ones, one on each of these.
    """
    num_images, num_anchors, _ = embeddings.shape
    if text.shape[0] % word_chunk:
        raise ValueError(f"{text.shape[0]} words are no multiple of word_chunk={word_chunk}; use vocabulary.pad")
    chunks = (
        text.reshape(-1, word_chunk, text.shape[1]),
        text_mask.reshape(-1, word_chunk),
        jnp.arange(0, text.shape[0], word_chunk),
    )

    def merge(best, chunk):
        words, mask, first_word = chunk
        words = words.astype(embeddings.dtype)  # here, not outside the loop: no second copy of a large vocabulary
        similarity = jnp.einsum("bad,wd->baw", embeddings, words, preferred_element_type=jnp.float32)
        scores = jax.nn.sigmoid(scale * similarity + bias) * centerness[..., None] * mask[None, None]
        _, rows = jax.lax.top_k(jnp.max(scores, axis=-1), min(num, num_anchors))
        rows = jnp.sort(rows, axis=-1)  # so that positions below are in the order of (anchor, word)
        scores = jnp.take_along_axis(scores, rows[..., None], axis=1).reshape(num_images, -1)
        scores, position = jax.lax.top_k(scores, min(num, scores.shape[1]))
        found = (-scores, jnp.take_along_axis(rows, position // word_chunk, axis=1), position % word_chunk + first_word)
        both = [jnp.concatenate(pair, axis=1) for pair in zip(best, found, strict=True)]
        return tuple(x[:, :num] for x in jax.lax.sort(both, dimension=1, num_keys=3)), None

    nothing = jnp.zeros((num_images, num), jnp.int32)
    start = (jnp.zeros((num_images, num), jnp.float32), nothing, nothing)
    (negative_scores, anchor_of, words), _ = jax.lax.scan(merge, start, chunks)
    return -negative_scores, anchor_of, words


# --- a model, compiled


class Detector:
    """The compiled functions of a model; each shape is compiled once in the life of the object.

    With a mesh, photos and texts are split over its devices, parameters stay where they are, and results are whole on
    every process.
    """

    def __init__(self, model: DetCLIP, *, mesh: Mesh | None = None):
        self.model, self.mesh = model, mesh
        whole = None if mesh is None else NamedSharding(mesh, REPLICATED)
        encode = self._split(self._encode, REPLICATED, BATCH)
        predict = self._split(self._predict, REPLICATED, BATCH, REPLICATED, REPLICATED, REPLICATED)
        self._compiled_encode = jax.jit(encode, out_shardings=whole)
        self.compiled_predict = jax.jit(predict, out_shardings=whole)
        self._compiled_align = jax.jit(self._align, out_shardings=whole)
        self._compiled_ground = jax.jit(self._ground, out_shardings=whole)

    def _split(self, method: Callable, *specs: PartitionSpec) -> Callable:
        """Returns the method computed by every device for its own rows, arguments and results laid out by `specs`.

        Left to the partitioner, every top_k would gather the scores of all images.
        """
        if self.mesh is None:
            return method
        return jax.shard_map(method, mesh=self.mesh, in_specs=specs, out_specs=BATCH, check_vma=False)

    def to_global(self, batch: Batch) -> Photos:
        """Returns the photos of the global batch, of which this process holds `batch`."""
        photos = Photos(batch.image, batch.extent, batch.scale, batch.original_size)
        if self.mesh is None:
            return photos
        sharding = NamedSharding(self.mesh, BATCH)
        return Photos(*(jax.make_array_from_process_local_data(sharding, np.asarray(array)) for array in photos))

    def encode_vocabulary(self, params: Any, texts: Sequence[str]) -> Float[np.ndarray, "w d"]:
        """Returns the L2-normalised embeddings of texts."""
        return self.encode_tokens(params, tokenizer.tokenize(texts, max_length=self.model.text["context_length"]))

    def encode_tokens(self, params: Any, tokens: Int[np.ndarray, "w l"]) -> Float[np.ndarray, "w d"]:
        """Returns the L2-normalised embeddings of rows of tokens, encoded in batches of few sizes."""
        size = min(TEXT_BATCH, 1 << max(3, (len(tokens) - 1).bit_length()))  # a power of two from 8
        num_shards = 1 if self.mesh is None else self.mesh.size
        size = -(-size // num_shards) * num_shards
        padded = np.pad(tokens, ((0, -len(tokens) % size), (0, 0)))
        batches = np.split(padded, len(padded) // size)
        return np.concatenate([np.asarray(self._compiled_encode(params, batch)) for batch in batches])[: len(tokens)]

    def predict(
        self,
        params: Any,
        photos: Photos,
        text: Float[AnyArray, "w d"],
        text_mask: Bool[AnyArray, " w"],
        limits: Limits,
    ) -> Detections:
        """Returns what `detect` finds; text and mask come from `vocabulary.pad`."""
        return self.compiled_predict(params, photos, text, text_mask, limits)

    def align(
        self, params: Any, photos: Photos, phrases: Float[AnyArray, "p m d"], index: Int[AnyArray, " p"]
    ) -> alignment.Alignment:
        """Returns what `alignment.align` finds for the m phrases of each of the p photos `index`, stacked."""
        return self._compiled_align(params, photos, phrases, index)

    def ground(self, params: Any, photos: Photos, phrases: Float[AnyArray, "p d"], limits: Limits) -> Detections:
        """Returns what `detect` finds for each phrase alone on one photo; arrays begin with [p]."""
        return self._compiled_ground(params, photos, phrases, limits)

    # what is compiled

    def _apply(self, params: Any, *arguments: Any, method: str, **options: Any) -> Any:
        return self.model.apply({"params": params}, *arguments, method=method, **options)

    def _encode(self, params: Any, tokens: Int[Array, "t l"]) -> Float[Array, "t d"]:
        return self._apply(params, tokens, method="encode_text")

    def _regions(self, params: Any, photos: Photos) -> Regions:
        return self._apply(params, photos.image, photos.extent, method="encode_image", train=False)

    def _predict(
        self, params: Any, photos: Photos, text: Float[Array, "w d"], text_mask: Bool[Array, " w"], limits: Limits
    ) -> Detections:
        return self._detect(params, self._regions(params, photos), photos, text, text_mask, limits)

    def _ground(self, params: Any, photos: Photos, phrases: Float[Array, "p d"], limits: Limits) -> Detections:
        regions = self._regions(params, photos)

        def find(phrase: Float[Array, " d"]) -> Detections:
            return self._detect(params, regions, photos, phrase[None], jnp.ones(1, bool), limits, word_chunk=1)

        return jax.tree.map(lambda array: array[:, 0], jax.lax.map(find, phrases))

    def _detect(
        self,
        params: Any,
        regions: Regions,
        photos: Photos,
        text: Float[Array, "w d"],
        text_mask: Bool[Array, " w"],
        limits: Limits,
        *,
        word_chunk: int = WORD_CHUNK,
    ) -> Detections:
        scale, bias = self._apply(params, method="logit_parameters")
        _, height, width, _ = photos.image.shape
        return detect(
            regions,
            text,
            text_mask,
            anchors=anchor_lib.grid((height, width)).boxes,
            scale=scale,
            bias=bias,
            extent=photos.extent,
            image_scale=photos.scale,
            original_size=photos.original_size,
            score_threshold=limits.score_threshold,
            nms_iou=limits.nms_iou,
            pre_nms=limits.pre_nms,
            max_detections=limits.max_detections,
            word_chunk=word_chunk,
            class_agnostic=limits.class_agnostic,
        )

    def _align(
        self, params: Any, photos: Photos, phrases: Float[Array, "p m d"], index: Int[Array, " p"]
    ) -> alignment.Alignment:
        scale, _ = self._apply(params, method="logit_parameters")
        regions = self._split(self._regions, REPLICATED, BATCH)(params, photos)
        _, height, width, _ = photos.image.shape

        def align(pair: tuple[Array, Array]) -> alignment.Alignment:
            return alignment.align(
                regions,
                pair[0],
                index=pair[1],
                canvas=(height, width),
                scale=scale,
                extent=photos.extent,
                image_scale=photos.scale,
                original_size=photos.original_size,
            )

        return jax.lax.map(align, (phrases, index))


# --- any image, any words


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


class Predictor:
    """Finds any words on any images with a trained model, on the first device of this process.

    predictor = Predictor.from_checkpoint("runs/demo")
    found = predictor(["photo.jpg"], ["cat", "red car"])[0]
    print(found.names, found.scores, found.boxes)
    """

    def __init__(
        self, config: ConfigDict, model: DetCLIP, params: Any, *, step: int = 0, cache: str | pathlib.Path | None = None
    ):
        self.config, self.params, self.step = config, params, step
        self.detector = Detector(model)
        self._embed = vocabulary.Cache(
            functools.partial(self.detector.encode_vocabulary, params),
            text_config=config.model.text.to_dict(),
            text_params=params["text_encoder"],
            folder=cache,
        )

    @classmethod
    def from_checkpoint(cls, workdir: str | pathlib.Path) -> Predictor:
        """Returns the predictor of a training run's newest checkpoint; ValueError if there is none.

        Embeddings of vocabularies are kept in `<workdir>/vocabularies`.
        """
        config, params, step = checkpoints.load_for_inference(workdir)
        model = detclip.from_config(config.model)
        return cls(config, model, params, step=step, cache=pathlib.Path(workdir) / "vocabularies")

    def __call__(
        self,
        images: Iterable[str | os.PathLike[str] | UInt8[np.ndarray, "h w 3"]],
        words: Sequence[str] | Mapping[str, str],
        *,
        score_threshold: float | None = None,
        nms_iou: float | None = None,
        max_detections: int | None = None,
        batch_size: int = 1,
    ) -> list[Found]:
        """Returns what is found on every image, in order.

        Args:
          images: paths or RGB arrays of any size.
          words: what to look for, or name → definition.
          score_threshold: only boxes above it; None: the configuration's `eval` value, as for the next two.
          nms_iou: a box is removed by a better one of its word if their IoU is above it.
          max_detections: boxes an image.
          batch_size: images a step; a new value compiles anew.

        Raises:
          ValueError: an image cannot be read, no words, or a limit out of range.
        """
        limits = {"score_threshold": score_threshold, "nms_iou": nms_iou, "max_detections": max_detections}
        found = dict(self.iterate(images, words, batch_size=batch_size, **limits))
        return [found[i] for i in range(len(found))]

    def iterate(
        self, images: Iterable[Any], words: Sequence[str] | Mapping[str, str], *, batch_size: int = 1, **given: Any
    ) -> Iterator[tuple[int, Found]]:
        """Yields (position of the image, what is found) as batches of one canvas fill; see `__call__`.

        Holds no more than a batch of images a canvas, so `images` may be endless.
        """
        names, text, mask = self.vocabulary(words)
        limits = Limits.from_config(self.config.eval, **given)
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

    def _find(self, batch, names, text, mask, *, limits: Limits, batch_size: int) -> Iterator[tuple[int, Found]]:
        photos = [photo for _, photo in batch]
        photos += photos[-1:] * (batch_size - len(photos))  # the compiled size; the copies' results are not read
        found = self.detector.predict(self.params, _stack(photos), text, mask, limits)
        found = jax.tree.map(np.asarray, found)
        for row, (i, photo) in enumerate(batch):
            keep = found.mask[row]
            arrays = (found.boxes[row][keep], found.scores[row][keep], found.labels[row][keep])
            height, width = map(int, photo.original_size)
            yield i, Found(*arrays, names, (height, width))

    def align(self, images: Sequence[Any], phrases: Sequence[str], *, index: int = 0) -> alignment.Alignment:
        """Returns the best region of each phrase on image `index`, and the image's rank among `images` for it.

        All images are put on the canvas of that image; maps cover it without padding. `visualize.alignment` draws them.
        """
        photos = self.photos(images, index=index)
        text = self.vocabulary(phrases)[1][: len(phrases)]
        found = self.detector.align(self.params, photos, text[None], np.array([index], np.int32))
        found = jax.tree.map(lambda array: np.asarray(array)[0], found)
        return found.replace(maps=found.photo_maps(photos.extent[index]))

    def ground(self, image: Any, phrases: Float[np.ndarray, "p d"], *, max_detections: int) -> Detections:
        """Returns the best boxes of each phrase alone on one image, arrays beginning with [p].

        Args:
          image: path or RGB array.
          phrases: rows of what `vocabulary` gives; their number is padded to a multiple of 8, so that few are compiled.
          max_detections: boxes a phrase.
        """
        limits = Limits.from_config(self.config.eval, max_detections=max_detections)
        padded, _ = vocabulary.pad(phrases, multiple=8)
        found = self.detector.ground(self.params, _stack([self._photo(image)]), padded, limits)
        return jax.tree.map(lambda array: np.asarray(array)[: len(phrases)], found)

    def vocabulary(self, words: Sequence[str] | Mapping[str, str]) -> tuple[tuple[str, ...], np.ndarray, np.ndarray]:
        """Returns (names, padded embeddings, mask) of words, from the cache where it has exactly them.

        Warns of texts that are longer than the model's context and lose their end.
        """
        if isinstance(words, str) or not words:
            raise ValueError(f"words must be a list of words, or a dict name → definition, but are {words!r}")
        definitions = words if isinstance(words, Mapping) else dict.fromkeys(words, "")
        names = tuple(words)
        if not all(isinstance(name, str) and name.strip() for name in names):
            raise ValueError(f"words must be texts that are not empty, not {list(names)!r}")
        texts = [concepts.concept_text(name, definitions[name]) for name in names]
        vocabulary.warn_truncated(texts, max_length=self.config.model.text.context_length)
        return names, *vocabulary.pad(self._embed(texts), multiple=WORD_CHUNK)

    def photos(self, images: Sequence[Any], *, index: int = 0) -> Photos:
        """Returns paths or RGB arrays as a batch, on the canvas that shows image `index` largest."""
        height, width, _ = self._photo(images[index]).image.shape
        return _stack([self._photo(image, (height, width)) for image in images])

    def _photo(self, image: Any, canvas: tuple[int, int] | None = None) -> Photos:
        """Returns one image (no batch axis) on the canvas that shows it largest, or on the given one."""
        sides = {"short_side": self.config.eval.short_side, "long_side": self.config.eval.long_side}
        try:
            source, size = _open(image)
            if canvas is None:  # as data.streams assigns them: of equals the first
                canvases = self.config.eval.canvases
                canvas = max(canvases, key=lambda canvas: min(canvas[0] / size[0], canvas[1] / size[1]))
            out = np.zeros((*canvas, 3), np.uint8)
            placed = transforms.place(source, out, annotated_size=(0, 0), **sides)
        except (OSError, ValueError) as error:
            name = image if isinstance(image, (str, os.PathLike)) else "array"
            raise ValueError(f"cannot read the image {name}: {error}") from error
        extent, original_size = np.array(placed, np.int32)
        return Photos(out, extent, (extent / original_size).astype(np.float32), original_size)


def _stack(photos: Sequence[Photos]) -> Photos:
    return Photos(*(np.stack(arrays) for arrays in zip(*photos, strict=True)))


def _open(image: Any) -> tuple[bytes | np.ndarray, tuple[int, int]]:
    """Returns encoded bytes or pixels of an image, and its (height, width) as displayed."""
    if isinstance(image, (str, os.PathLike)):
        data = pathlib.Path(image).read_bytes()
        return data, transforms.read_header(data).displayed_size
    pixels = np.ascontiguousarray(image)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or not pixels.size:
        raise ValueError(f"it is {pixels.dtype}{list(pixels.shape)}, not RGB uint8 [height, width, 3]")
    return pixels, pixels.shape[:2]
