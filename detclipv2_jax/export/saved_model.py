"""The exported detector as a TensorFlow SavedModel: strings in, tokenizer in the graph."""

from __future__ import annotations

import dataclasses
import pathlib
import unicodedata
from collections.abc import Callable, Mapping
from typing import Any

import ftfy
import jax
import numpy as np
import tensorflow as tf
import tensorflow_text as tf_text
from jax.export import Exported
from jax.extend import mlir
from jax.extend.mlir.dialects import stablehlo
from jax.extend.mlir.passmanager import PassManager
from jax.interpreters.mlir import make_ir_context
from tensorflow.compiler.tf2xla.python import xla  # where jax2tf finds it too

from detclipv2_jax.data import tokenizer
from detclipv2_jax.inference import WORD_CHUNK

STABLEHLO_VERSION = "1.13.0"  # TensorFlow 2.21 reads up to 1.13.7
LONGEST_WORD = 256  # bytes; time grows with the longest word, and the first tokens do not depend on what is so far away
NOTHING = np.iinfo(np.int32).max  # the merge of a pair that has none
SAME = "\0"  # the repair of a character that needs none


class Tokenizer(tf.Module):
    """Gives the ids of `data.tokenizer.tokenize`, but for texts whose repair needs more than one character.

    These are HTML entities ("&amp;"), text in the wrong encoding ("Ã©" for "é") and terminal escapes.

    1. Repair every character as ftfy does (quotes, ligatures, widths, control characters), compose accents (NFC), lower
       case.
    2. Split into words: contractions, runs of letters, digits, runs of anything else.
    3. Merge the bytes of all different words at once: in every round each word's first pair of lowest rank becomes one
       token. Of a word, the first `LONGEST_WORD` bytes count.
    4. [SOS], tokens of the words as far as they fit, [EOS], zeros.
    """

    def __init__(self, *, max_length: int):
        super().__init__()
        self._max_length = max_length
        self._byte_ids = tokenizer.byte_ids()
        self._repairs = _table(*_repairs(), default=SAME)
        pairs = tokenizer.merges().astype(np.int64)
        merged = np.arange(512, 512 + len(pairs), dtype=np.int32)
        self._merges = _table(_pair_key(*pairs.T), merged, default=NOTHING)

    def __call__(self, texts: tf.Tensor) -> tf.Tensor:
        """Returns int32[n, max_length] of string[n]."""
        characters = tf.strings.unicode_split(texts, "UTF-8")  # 1
        repairs = self._repairs.lookup(characters.flat_values)
        repaired = tf.where(repairs == SAME, characters.flat_values, repairs)
        texts = tf.strings.reduce_join(characters.with_flat_values(repaired), axis=-1)
        texts = tf.strings.lower(tf_text.normalize_utf8(texts, "NFC"), encoding="utf-8")
        words = tf_text.regex_split(texts, tokenizer.WORDS + r"|\s", tokenizer.WORDS)  # 2
        unique, index = tf.unique(words.flat_values)  # 3
        tokens = words.with_flat_values(tf.gather(self._merge(unique), index)).merge_dims(1, 2)
        ends = tf.ones([tf.shape(texts)[0], 1], tf.int32)  # 4
        parts = [ends * tokenizer.SOS_ID, tokens[:, : self._max_length - 2], ends * tokenizer.EOS_ID]
        return tf.concat(parts, axis=1).to_tensor(shape=[None, self._max_length])

    def _merge(self, words: tf.Tensor) -> tf.RaggedTensor:
        """Returns the tokens of every word."""
        length = tf.strings.length(words)
        longest = tf.clip_by_value(tf.reduce_max(length), 2, LONGEST_WORD)
        position = tf.range(longest)[None]
        data = tf.io.decode_raw(tf.strings.substr(words, 0, LONGEST_WORD), tf.uint8, fixed_length=longest)
        tokens = tf.gather(self._byte_ids, tf.cast(data, tf.int32))
        tokens += 256 * tf.cast(position == length[:, None] - 1, tf.int32)
        tokens = tf.where(position < length[:, None], tokens, -1)

        def without_first(x: tf.Tensor, fill: int) -> tf.Tensor:
            return tf.pad(x[:, 1:], [[0, 0], [0, 1]], constant_values=fill)

        def merged(left: tf.Tensor, right: tf.Tensor) -> tf.Tensor:
            return self._merges.lookup(_pair_key(tf.cast(left, tf.int64), tf.cast(right, tf.int64)))

        def merge(tokens: tf.Tensor, pairs: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            best = tf.reduce_min(pairs, axis=1, keepdims=True)
            place = tf.argmin(pairs, axis=1, output_type=tf.int32)[:, None]
            place = tf.where(best < NOTHING, place, 2 * longest)  # out of reach: this word is done
            tokens = tf.where(position < place, tokens, without_first(tokens, -1))
            tokens = tf.where(position == place, best, tokens)
            left, token, right = (
                tf.gather(tokens, tf.clip_by_value(place + step, 0, longest - 1), batch_dims=1) for step in (-1, 0, 1)
            )
            pairs = tf.where(position < place, pairs, without_first(pairs, NOTHING))
            pairs = tf.where(position == place, merged(token, right), pairs)
            return tokens, tf.where(position == place - 1, merged(left, token), pairs)

        pairs = merged(tokens, without_first(tokens, -1))  # what each token and its right neighbour become
        tokens, _ = tf.while_loop(lambda _, pairs: tf.reduce_any(pairs < NOTHING), merge, (tokens, pairs))
        return tf.RaggedTensor.from_tensor(tokens, padding=-1)


def _table(keys: Any, values: Any, *, default: Any) -> tf.lookup.StaticHashTable:
    return tf.lookup.StaticHashTable(tf.lookup.KeyValueTensorInitializer(keys, values), default)


def _pair_key(left: Any, right: Any) -> Any:
    """Returns a number for every pair of tokens; below zero, or of [EOS], if one of them is padding (-1)."""
    return left * tokenizer.VOCABULARY_SIZE + right


def _repairs() -> tuple[list[str], list[str]]:
    """Returns (characters that ftfy repairs, what each becomes); white space becomes a space."""
    characters = [chr(i) for i in range(0x110000) if not 0xD800 <= i < 0xE000]
    # most characters, those of languages without case, need not be asked for
    plain = {c for c in characters if unicodedata.category(c) in ("Lo", "Cn", "Co")}
    asked = [c for c in characters if c not in plain or unicodedata.normalize("NFKC", c) != c]
    found = {c: "".join(" " if x.isspace() else x for x in ftfy.fix_text(c)) for c in asked}
    # TensorFlow's table of capitals is older than Python's
    lower = tf.strings.lower(asked, encoding="utf-8").numpy()
    found |= {c: c.lower() for c, text in zip(asked, lower, strict=True) if text.decode() != c.lower()}
    changed = {c: text for c, text in found.items() if c != text}
    return list(changed), list(changed.values())


class Model(tf.Module):
    """What is saved: the modules of `export` with their weights as variables, which all of them share.

    TensorFlow's XlaCallModule runs them. jax2tf uses it too, but hands over code that TensorFlow 2.21 does not read.
    """

    def __init__(self, modules: Mapping[str, Exported], weights: Mapping[str, np.ndarray]):
        super().__init__()
        self._modules = {name: _portable(module) for name, module in modules.items()}
        self._canvases = {
            name: module.in_avals[-4].shape[1:3] for name, module in modules.items() if name.startswith("detect")
        }
        *_, tokens = modules["encode_text"].in_avals
        self._tokenizer = Tokenizer(max_length=tokens.shape[1])
        self._weights = {name: tf.Variable(value, trainable=False, name=name) for name, value in weights.items()}

    def encode(self, words: tf.Tensor) -> dict[str, tf.Tensor]:
        """Returns text, float32[w, d]: the embeddings of string[w] ("name" or "name, definition")."""
        num = tf.shape(words)[0]
        tokens = self._tokenizer(tf.pad(words, [[0, -num % 8]], constant_values=""))  # few sizes are compiled
        text = _call(self._modules["encode_text"], self._weights, tokens)
        return {"text": text[:num]}

    def detect(
        self, image: tf.Tensor, extent: tf.Tensor, original_size: tf.Tensor, text: tf.Tensor
    ) -> dict[str, tf.Tensor]:
        """Returns boxes, scores, labels (rows of text) and mask; arguments as in `scripts/detector.py`."""
        text = tf.pad(text, [[0, -tf.shape(text)[0] % WORD_CHUNK], [0, 0]])
        size = tf.shape(image)[1:3]
        fits = tf.stack([tf.reduce_all(size == canvas) for canvas in self._canvases.values()])
        allowed = f"images must be of one of the sizes {list(self._canvases.values())}"
        with tf.control_dependencies([tf.debugging.Assert(tf.reduce_any(fits), [allowed, size])]):
            index = tf.argmax(fits, output_type=tf.int32)

        def branch(name: str) -> Callable[[], Any]:
            def run() -> Any:
                fitting = tf.ensure_shape(image, [None, *self._canvases[name], 3])
                return _call(self._modules[name], self._weights, fitting, extent, original_size, text)

            return run

        return tf.switch_case(index, [branch(name) for name in self._canvases])

    def __call__(
        self, image: tf.Tensor, extent: tf.Tensor, original_size: tf.Tensor, words: tf.Tensor
    ) -> dict[str, tf.Tensor]:
        """Returns what `detect` does for words string[w], and their names."""
        found = self.detect(image, extent, original_size, self.encode(words)["text"])
        return {**found, "names": tf.where(found["mask"], tf.gather(words, found["labels"]), "")}


def _call(module: Exported, weights: Mapping[str, tf.Variable], *args: tf.Tensor) -> Any:
    """Returns what an exported function gives for variables by name and tensors."""
    flat = jax.tree.leaves((dict(weights), *args))
    results = xla.call_module(
        [tf.convert_to_tensor(flat[i]) for i in module.module_kept_var_idx],
        version=module.calling_convention_version,
        module=module.mlir_module_serialized,
        Tout=[tf.as_dtype(result.dtype) for result in module.out_avals],
        Sout=[[size if isinstance(size, int) else None for size in result.shape] for result in module.out_avals],
        platforms=[platform.upper() for platform in module.platforms],
    )
    return jax.tree.unflatten(module.out_tree, results)


def _portable(module: Exported) -> Exported:
    """Returns a module in the form that TensorFlow reads.

    1. It does not look for sizes inside composite operations (erf, top_k): what they consist of takes their place.
    2. It is older than jax: the code is written as of an older version.
    """
    stablehlo.register_stablehlo_passes()
    with make_ir_context():
        code = mlir.deserialize_portable_artifact(module.mlir_module_serialized)
        PassManager.parse("builtin.module(func.func(stablehlo-legalize-composite-to-call),inline)").run(code.operation)
        portable = mlir.serialize_portable_artifact(code, STABLEHLO_VERSION)
    return dataclasses.replace(module, mlir_module_serialized=portable)


def save(folder: pathlib.Path, modules: Mapping[str, Exported], weights: Mapping[str, np.ndarray]) -> None:
    """Writes a SavedModel with the signatures serving_default (words are strings), encode and detect.

    Modules are those of `programs.make_modules`, weights their first argument.
    """
    tf.config.set_visible_devices([], "GPU")  # it would take the memory of all of them
    model = Model(modules, weights)
    image = [
        tf.TensorSpec([None, None, None, 3], tf.uint8, "image"),
        tf.TensorSpec([None, 2], tf.int32, "extent"),
        tf.TensorSpec([None, 2], tf.int32, "original_size"),
    ]
    words = tf.TensorSpec([None], tf.string, "words")
    text = tf.TensorSpec([None, modules["encode_text"].out_avals[0].shape[1]], tf.float32, "text")
    specs = {"serving_default": (model.__call__, [*image, words]), "encode": (model.encode, [words])}
    specs["detect"] = (model.detect, [*image, text])
    signatures = {
        name: tf.function(function, input_signature=spec, autograph=False) for name, (function, spec) in specs.items()
    }
    tf.saved_model.save(model, str(folder), signatures=signatures)
