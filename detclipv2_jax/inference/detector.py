"""A model whose functions are compiled once for each shape: texts encoded, photos searched, phrases aligned."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from detclipv2_jax.chips import warn_of_unused_accelerator
from detclipv2_jax.data import tokenizer
from detclipv2_jax.data.concepts import check_classes
from detclipv2_jax.data.schema import Batch
from detclipv2_jax.geometry import anchors as anchor_lib
from detclipv2_jax.inference.detect import WORD_CHUNK, Alignment, Detections, Limits, Photos, align, describe, detect
from detclipv2_jax.models.detclip import DetCLIP, Regions
from detclipv2_jax.runs import kept
from detclipv2_jax.runs.sharding import BATCH, REPLICATED, compiler_options

TEXT_BATCH = 256  # texts encoded at once


class Detector:
    """The compiled functions of a model; each shape is compiled once in the life of the object.

    With a mesh, photos and texts are split over its devices, parameters stay where they are, and results are whole on
    every process.

    Attributes:
      predict: (params, photos, text, text_mask, limits) → what `detect` finds; text and mask are of `vocabulary.pad`.
      align: (params, photos, phrases [p, m, d], index [p]) → what `align` finds for the m phrases of each of the p
        photos `index`, stacked.
      ground: (params, photos, phrases [p, d], limits) → what `detect` finds for each phrase alone on one photo, arrays
        beginning with [p].
      describe: (params, photos, boxes [b, 4]) → what `describe` says of one box of every photo.
    """

    def __init__(self, model: DetCLIP, *, mesh: Mesh | None = None):
        warn_of_unused_accelerator()
        self.model, self.mesh = model, mesh
        whole = None if mesh is None else NamedSharding(mesh, REPLICATED)
        if mesh is None:
            self._compiled_encode = kept.jit(self._encode, of=model)
            self.predict = kept.jit(self._predict, of=model, result=Detections)
        else:
            encode = self._split(self._encode, REPLICATED, BATCH)
            predict = self._split(self._predict, REPLICATED, BATCH, REPLICATED, REPLICATED, REPLICATED)
            self._compiled_encode = jax.jit(encode, out_shardings=whole)
            self.predict = jax.jit(predict, out_shardings=whole, compiler_options=compiler_options(mesh))
        self.align = jax.jit(self._align, out_shardings=whole)
        self.ground = jax.jit(self._ground, out_shardings=whole)
        self.describe = jax.jit(self._describe, out_shardings=whole)

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
        """Returns the L2-normalised embeddings of texts; ValueError if a closed vocabulary lacks some."""
        check_classes(texts, self.model.text, where="words")
        return self.encode_tokens(params, tokenizer.tokenize(texts, max_length=self.model.text["context_length"]))

    def encode_tokens(self, params: Any, tokens: Int[np.ndarray, "w l"]) -> Float[np.ndarray, "w d"]:
        """Returns the L2-normalised embeddings of rows of tokens, encoded in batches of few sizes."""
        size = min(TEXT_BATCH, 1 << max(3, (len(tokens) - 1).bit_length()))  # a power of two from 8
        num_shards = 1 if self.mesh is None else self.mesh.size
        size = -(-size // num_shards) * num_shards
        padded = np.pad(tokens, ((0, -len(tokens) % size), (0, 0)))
        batches = np.split(padded, len(padded) // size)
        return np.concatenate([np.asarray(self._compiled_encode(params, batch)) for batch in batches])[: len(tokens)]

    def query_length(self, params: Any) -> float:
        """Returns the length of the embedding of an example: its own region then has the logit 0.

        Regions resemble each other more than any word. With length 1, as words have, scores would all be near 1 and
        centerness alone would order them (docs/decisions.md: example boxes as queries).
        """
        scale, bias = self._apply(params, method="logit_parameters")
        return float(jnp.clip(-bias / scale, 0.1, 1.0))

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

    def _describe(self, params: Any, photos: Photos, boxes: Float[Array, "b 4"]) -> Float[Array, "b d"]:
        _, height, width, _ = photos.image.shape
        return describe(self._regions(params, photos), boxes, photos, canvas=(height, width))

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
        given: dict[str, Any] = {"anchors": anchor_lib.grid((height, width)).boxes, "limits": limits}
        return detect(regions, text, text_mask, photos, scale=scale, bias=bias, word_chunk=word_chunk, **given)

    def _align(self, params: Any, photos: Photos, phrases: Float[Array, "p m d"], index: Int[Array, " p"]) -> Alignment:
        scale, _ = self._apply(params, method="logit_parameters")
        regions = self._split(self._regions, REPLICATED, BATCH)(params, photos)
        _, height, width, _ = photos.image.shape

        def align_one(pair: tuple[Array, Array]) -> Alignment:
            return align(regions, pair[0], photos, index=pair[1], canvas=(height, width), scale=scale)

        return jax.lax.map(align_one, (phrases, index))
