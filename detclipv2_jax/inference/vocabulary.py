"""Words from flags, files and ready lists; their embeddings, kept on disk under a hash of all they depend on."""

from __future__ import annotations

import difflib
import functools
import hashlib
import importlib.resources
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from jaxtyping import Bool, Float

from detclipv2_jax import atomic, files
from detclipv2_jax.data import concepts, tokenizer
from detclipv2_jax.data.box_json import read_vocabulary

Embeddings = Float[np.ndarray, "w d"]
NAMED = ("lvis", "coco", "objects365")  # data/vocabularies


def named(name: str) -> concepts.Vocabulary:
    """Returns the names of the categories of LVIS v1, COCO or Objects365, in order of their ids."""
    if name not in NAMED:
        near = difflib.get_close_matches(name.lower(), NAMED, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"--vocabulary is {name!r}; there are {', '.join(NAMED)}{hint}")
    with importlib.resources.as_file(importlib.resources.files(concepts.__package__) / "vocabularies") as folder:
        return concepts.read_dictionary(folder / f"{name}.tsv")


def parse_words(words: str, *, words_file: str = "", vocabulary: str = "") -> dict[str, str]:
    """Returns name → definition ("" without one) of a vocabulary, a file and words on the line, each name once.

    Of several definitions of a name the last counts.

    Args:
      words: separated by commas, each "name" or "name: definition".
      words_file: one word a line ("name", "name: definition" or "name <tab> definition"), or the categories of a .json
        in COCO's format.
      vocabulary: one of `NAMED`, or "".

    Raises:
      ValueError: no word, or the file cannot be read.
    """
    listed = [named(vocabulary)] if vocabulary else []
    listed += [read_vocabulary(words_file)] if words_file.endswith(".json") else []
    parsed = {name: text for known in listed for name, text in zip(known.names, known.definitions, strict=True)}
    lines = []
    if words_file and not words_file.endswith(".json"):
        try:
            lines = files.read_lines(words_file)
        except (OSError, ValueError) as error:
            raise ValueError(f"--words_file: cannot read {words_file}: {error}") from error
    for line in [*lines, *words.split(",")]:
        name, _, definition = line.partition("\t") if "\t" in line else line.partition(":")
        name = concepts.display_name(name)
        if name:
            parsed[name] = definition.strip() or parsed.get(name, "")
    if not parsed:
        raise ValueError(f'no words: give --words="cat, red car", --words_file=FILE or --vocabulary={"|".join(NAMED)}')
    return parsed


def pad(text: Embeddings, *, multiple: int) -> tuple[Float[np.ndarray, "v d"], Bool[np.ndarray, " v"]]:
    """Returns (embeddings, mask) padded to a multiple of rows, so that few vocabulary sizes are compiled."""
    padding = -len(text) % multiple
    return np.pad(text, ((0, padding), (0, 0))), np.arange(len(text) + padding) < len(text)


def warn_truncated(texts: Sequence[str], *, max_length: int) -> None:
    """Logs one warning that names the texts longer than `max_length` tokens; they lose their end."""
    long = [text for text, num in zip(texts, tokenizer.num_tokens(texts), strict=True) if num > max_length]
    if long:
        examples = "; ".join(f"“{text}”" for text in long[:3]) + (" …" if len(long) > 3 else "")
        message = "%d of %d concepts have more than %d tokens and lose their end: %s"
        logging.warning(message, len(long), len(texts), max_length, examples)


def weights_key(params: Any) -> str:
    """Returns a hash of names and values of a tree of parameters."""
    hasher = hashlib.sha256()
    for path, value in jax.tree_util.tree_leaves_with_path(params):
        value = np.ascontiguousarray(value)
        hasher.update(f"{jax.tree_util.keystr(path)} {value.dtype} {value.shape}".encode())
        hasher.update(value.tobytes())
    return hasher.hexdigest()


def save(path: str | pathlib.Path, embeddings: Embeddings, *, key: str) -> None:
    """Writes embeddings with the key of what they were made of, at once or not at all."""
    with atomic.whole(path) as partial:
        np.savez(partial, embeddings=embeddings, key=np.array(key))


def load(path: str | pathlib.Path, *, key: str) -> Embeddings:
    """Returns stored embeddings; ValueError if they cannot be read or were made of something else than `key` says."""
    try:
        stored = files.read_arrays(path, ("key", "embeddings"))
    except (OSError, ValueError) as error:
        raise ValueError(f"the vocabulary {path} cannot be read: {error}") from error
    if str(stored["key"]) != key:
        raise ValueError(f"the vocabulary {path} is stale: its words, template, tokenizer or text weights were others")
    return stored["embeddings"]


class Cache:
    """Encodes texts, or finds their embeddings in a folder; the last vocabulary is kept in memory too.

    A stored vocabulary is named by its key and holds it. So one that was made of other words, template, tokenizer or
    text weights is not found, and one under a wrong name is refused with a warning.
    """

    def __init__(
        self,
        encode: Callable[[Sequence[Any]], Embeddings],
        *,
        config: Mapping[str, Any],
        params: Any,
        folder: str | pathlib.Path | None,
    ):
        self._encode = encode
        self._config, self._params = dict(config), params  # of what encodes them
        self._folder = None if folder is None else pathlib.Path(folder)
        self._last_key, self._last = "", np.zeros((0, 0), np.float32)

    @functools.cached_property
    def _weights(self) -> str:
        return weights_key(self._params)

    def key(self, texts: Sequence[Any]) -> str:
        """Returns a hash of all that the embeddings of texts (words in their template) depend on."""
        hasher = hashlib.sha256(json.dumps([list(texts), self._config, self._weights]).encode())
        # the tokens stand for the tokenizer's version: whatever changes in it and matters is seen here
        hasher.update(tokenizer.tokenize(texts, max_length=self._config["context_length"]).tobytes())
        return hasher.hexdigest()

    def path(self, texts: Sequence[Any]) -> pathlib.Path | None:
        """Returns where the embeddings of texts are kept; None without a folder."""
        return None if self._folder is None else self._folder / f"{self.key(texts)[:16]}.npz"

    def __call__(self, texts: Sequence[Any]) -> Embeddings:
        """Returns the embeddings of texts."""
        key, path = self.key(texts), self.path(texts)
        if key != self._last_key:
            self._last_key, self._last = key, self._find(texts, key, path)
        return self._last

    def remember(self, texts: Sequence[Any], embeddings: Embeddings) -> None:
        """Takes the embeddings of texts from elsewhere, as the last vocabulary."""
        self._last_key, self._last = self.key(texts), embeddings

    def _find(self, texts: Sequence[Any], key: str, path: pathlib.Path | None) -> Embeddings:
        if path is not None and path.exists():
            try:
                return load(path, key=key)
            except ValueError as error:
                logging.warning("%s; encoding the words anew", error)
        embeddings = self._encode(texts)
        if path is not None:
            try:
                save(path, embeddings, key=key)
            except OSError as error:
                logging.warning("the vocabulary is not kept: %s", error)
        return embeddings
