"""Concepts: what they are called, how they are encoded, which negatives join them, and the table of a host batch."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib
import itertools
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, Int, Int32, UInt64

from detclipv2_jax import files
from detclipv2_jax.data import tokenizer
from detclipv2_jax.data.catalog import dictionary_command

if TYPE_CHECKING:
    import inflect

_DETERMINER = re.compile(r"^(?:an?|the|some|his|her|its|their|this|that|these|those)\s+")
_WORD, _LAST_WORD = re.compile("[a-z]+"), re.compile("[a-z]+$")


def is_visible(text: str) -> bool:
    """Returns whether anything of a text would be seen."""
    return any(unicodedata.category(letter)[0] not in "CZ" for letter in text)


def display_name(name: str) -> str:
    """Returns a category name as words: "aerosol_can" is "aerosol can"; "" where nothing of it would be seen."""
    words = " ".join(name.replace("_", " ").split())
    return words if is_visible(words) else ""


def concept_text(name: str, definition: str = "") -> str:
    """Returns the text that is encoded: "name, definition", or the name alone where there is no definition."""
    return f"{name}, {definition}" if definition else name


@functools.cache
def _english() -> inflect.engine:
    typeguard: Any = importlib.import_module("typeguard")  # not in a process that compares no names
    # inflect compiles checks of its own types when it is imported, for seconds
    typechecked, typeguard.typechecked = typeguard.typechecked, lambda target: target
    try:
        import inflect
    finally:
        typeguard.typechecked = typechecked
    return inflect.engine()


@functools.lru_cache(1 << 16)
def _singular(word: str) -> str:
    """Returns a form that a clean word and its plural share: "bus" for "buses", "woman" for "women".

    It need not be a word: the rules are followed to their end, so that "lens" meets "lenses" at "len".
    """
    for _ in range(3):
        if len(word) > 3 or not word.endswith("s"):  # "bus", "gas"
            word = _english().singular_noun(word) or word
    return word


@functools.lru_cache(1 << 16)
def key(name: str) -> str:
    """Returns the form in which names are compared: clean, lower case, no leading determiner, last word singular."""
    return _LAST_WORD.sub(lambda match: _singular(match[0]), _DETERMINER.sub("", tokenizer.clean(name)))


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """Names with definitions ("" where unknown), in order; category ids where they come from a COCO json."""

    names: tuple[str, ...]
    definitions: tuple[str, ...]
    category_ids: tuple[int | str, ...] = ()

    def __len__(self) -> int:
        return len(self.names)

    def texts(self, *, definitions: bool) -> list[str]:
        """Returns the text of each concept as it is encoded."""
        if not definitions:
            return list(self.names)
        return [concept_text(*pair) for pair in zip(self.names, self.definitions, strict=True)]

    @functools.cached_property
    def _definition_of(self) -> dict[str, str]:
        # the first entry of a name counts; equal keys ("sock", "socks") never hide an exact name
        pairs = list(zip(self.names, self.definitions, strict=True))[::-1]
        return {key(name): text for name, text in pairs} | dict(pairs)

    def definition(self, name: str) -> str:
        """Returns the definition of a name or of its singular, "" where the vocabulary has none."""
        found = self._definition_of
        return found[name] if name in found else found.get(key(name), "")


def read_dictionary(path: str | Path) -> Vocabulary:
    """Returns the dictionary of a TSV `name <tab> definition`; further columns and a header line "name" are ignored.

    Raises:
      ValueError: the file is missing, empty or not UTF-8, or a line has no name.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(
            f"the dictionary {path} does not exist; it is a TSV `name <tab> definition`; make it with\n"
            f"    {dictionary_command(path)}"
        )
    rows = {i: line.split("\t") for i, line in enumerate(files.read_lines(path), 1) if line.strip()}
    if rows and next(iter(rows.values()))[0].lstrip().startswith(("{", "[{", '["')):
        raise ValueError(f"the dictionary {path} is a json; it is to be a TSV `name <tab> definition`")
    if rows and next(iter(rows.values()))[0].strip().lower() == "name":
        del rows[next(iter(rows))]
    if not rows:
        raise ValueError(f"the dictionary {path} is empty; it is a TSV `name <tab> definition`")
    names = {i: display_name(row[0]) for i, row in rows.items()}
    if empty := [i for i, name in names.items() if not name]:
        raise ValueError(f"the dictionary {path} has no name in line {empty[0]}: {rows[empty[0]]}")
    return Vocabulary(tuple(names.values()), tuple(row[1].strip() if len(row) > 1 else "" for row in rows.values()))


class Encoded(NamedTuple):
    """Texts as the text tower gets them."""

    tokens: Int32[np.ndarray, "n l"]
    ids: UInt64[np.ndarray, " n"]  # hash of the tokens: texts that are encoded alike are one concept
    truncated: Bool[np.ndarray, " n"]


class Encoder:
    """Encodes texts, remembering those it saw: names and phrases recur, captions do not."""

    def __init__(self, *, max_length: int = 16, cache_size: int = 200_000):
        self.max_length = max_length
        self._cache_size = cache_size
        self._cache: dict[str, tuple[bytes, int, bool]] = {}

    def _encode(self, texts: Sequence[str]) -> list[tuple[bytes, int, bool]]:
        rows = tokenizer.tokenize(texts, max_length=self.max_length + 1)
        truncated = rows[:, -1] > 0
        rows[truncated, -2] = tokenizer.EOS_ID
        encoded = []
        for row, long in zip(rows[:, :-1], truncated.tolist(), strict=True):
            tokens = row.tobytes()
            digest = hashlib.blake2b(tokens, digest_size=8).digest()
            encoded.append((tokens, int.from_bytes(digest, "big"), long))
        return encoded

    def __call__(self, texts: Sequence[str], *, remember: bool = True) -> Encoded:
        """Returns the encoded texts, in order. Safe to call from several threads."""
        if remember:
            cache = self._cache  # a local name: another thread may start a new one
            missing = [text for text in dict.fromkeys(texts) if text not in cache]
            if len(cache) + len(missing) > self._cache_size:
                cache = self._cache = {}
                missing = list(dict.fromkeys(texts))
            cache.update(zip(missing, self._encode(missing), strict=True))
            rows = [cache[text] for text in texts]
        else:
            rows = self._encode(texts)
        tokens = np.frombuffer(b"".join(row[0] for row in rows), np.int32).reshape(len(rows), self.max_length)
        return Encoded(tokens, np.array([row[1] for row in rows], np.uint64), np.array([row[2] for row in rows], bool))


def class_tokens(classes: Sequence[str], *, context_length: int) -> Int[np.ndarray, "c l"]:
    """Returns the tokens of the names of a closed vocabulary; ValueError if two of them are the same."""
    tokens = tokenizer.tokenize(classes, max_length=context_length)
    first: dict[bytes, int] = {}
    for i, row in enumerate(tokens):
        if (other := first.setdefault(row.tobytes(), i)) != i:
            raise ValueError(
                f"config.model.text.classes has {classes[other]!r} and {classes[i]!r}, which are the same "
                f"{context_length} tokens; name every class once"
            )
    return tokens


def check_classes(texts: Sequence[str], text_config: Mapping[str, Any], *, where: str) -> None:
    """Raises a ValueError that names the texts which a closed vocabulary (`config.model.text`) does not have."""
    length, classes = text_config["context_length"], text_config["classes"]
    if not classes:
        return
    known = {row.tobytes() for row in tokenizer.tokenize(classes, max_length=length)}
    rows = tokenizer.tokenize(texts, max_length=length)
    if unknown := [text for text, row in zip(texts, rows, strict=True) if row.tobytes() not in known]:
        examples = ", ".join(map(repr, unknown[:3])) + ", …" * (len(unknown) > 3)
        raise ValueError(
            f"{where}: {len(unknown)} of {len(texts)} texts are none of the {len(classes)} classes that the model has "
            f"(config.model.text.classes: {', '.join(map(repr, classes[:3]))}, …): {examples}. Of a closed vocabulary "
            "take those names, without definitions (definitions=False)"
        )


class Pool:
    """The concepts of one source that negatives are drawn from, encoded once."""

    def __init__(self, vocabulary: Vocabulary, *, definitions: bool, encoder: Encoder):
        self.encoded = encoder(vocabulary.texts(definitions=definitions))
        self._keys = [key(name) for name in vocabulary.names]
        self._named: dict[str, list[int]] = {}
        for i, name in enumerate(vocabulary.names):
            self._named.setdefault(name, []).append(i)
        same_key: dict[str, list[int]] = {}
        same_definition: dict[str, list[int]] = {}
        for i, (name, definition) in enumerate(zip(self._keys, vocabulary.definitions, strict=True)):
            same_key.setdefault(name, []).append(i)
            if definition:
                same_definition.setdefault(definition, []).append(i)
        # names with one definition are synonyms: where one is present, the other is no negative
        self._related = {
            name: sorted(
                {
                    *members,
                    *itertools.chain.from_iterable(same_definition.get(vocabulary.definitions[i], ()) for i in members),
                }
            )
            for name, members in same_key.items()
        }

    def __len__(self) -> int:
        return len(self._keys)

    def _find(self, names: Iterable[str]) -> list[int]:
        return [i for name in names for i in self._related.get(key(name), ())]

    def draw(
        self,
        num: int,
        uniform: Float64[np.ndarray, " d"],
        *,
        present: Sequence[str],
        caption: str = "",
        first: Sequence[str] = (),
        never: Sequence[str] = (),
        more: bool = True,
    ) -> Int32[np.ndarray, " k"]:
        """Returns at most `num` different indices of concepts that are not in the image.

        Args:
          num: how many are wanted.
          uniform: random numbers of [0, 1), the only source of randomness; with `num_draws(num)` of them the slow
            permutation of the whole pool is hardly ever needed.
          present: names of the positives; they and their synonyms are left out.
          caption: nothing it contains, in singular or plural, is drawn.
          first: names known to be absent; drawn before the others.
          never: names that are not drawn.
          more: whether others than exactly those of `first` are drawn.
        """
        if num <= 0:
            return np.zeros(0, np.int32)
        taken = np.zeros(len(self), bool)
        taken[self._find(present)] = taken[self._find(never)] = True
        first_places = np.empty(len(self), np.int32)
        if caption:
            text = tokenizer.clean(caption)
            text = f"{text}\n{_WORD.sub(lambda match: _singular(match[0]), text)}"

        def take(indices: np.ndarray) -> np.ndarray:
            indices = indices[~taken[indices]]
            places = np.arange(len(indices), dtype=np.int32)
            first_places[indices[::-1]] = places[::-1]  # the first place of an index is written last
            indices = indices[first_places[indices] == places]
            if caption:
                indices = np.array([i for i in indices.tolist() if self._keys[i] not in text], np.int64)
            taken[indices] = True
            return indices

        def permutation(indices: int | Sequence[int]) -> np.ndarray:
            return np.random.default_rng(uniform.view(np.uint64)).permutation(indices)

        known = self._find(first) if more else [i for name in first for i in self._named.get(name, ())]
        drawn = take(permutation(sorted(set(known)))) if known else np.zeros(0, np.int64)
        if not more:
            return drawn[:num].astype(np.int32)
        if len(drawn) < num:
            drawn = np.concatenate([drawn, take((uniform * len(self)).astype(np.int64))])
        if len(drawn) < num:
            drawn = np.concatenate([drawn, take(permutation(len(self)))])
        return drawn[:num].astype(np.int32)


def num_draws(num: int) -> int:
    """Returns how many random numbers `Pool.draw` wants for `num` concepts; a multiple of 4."""
    return 2 * num + 64 + 2 * (num % 2)


class Table(NamedTuple):
    """The de-duplicated concepts of a host batch, padded to a static number of rows."""

    tokens: Int32[np.ndarray, "t l"]
    mask: Bool[np.ndarray, " t"]
    ids: UInt64[np.ndarray, " t"]
    rows: Int32[np.ndarray, " p"]  # row of each positive that was given
    negative_rows: Int32[np.ndarray, " q"]  # the same of each negative; no row of the table if it was cut
    num_cut: int  # negatives that found no row
    num_truncated: int  # rows whose text is longer than the tokens


def build_table(positives: Encoded, negatives: Encoded, *, capacity: int) -> Table:
    """Returns the table of all concepts of a host batch: positives in their order, then negatives, equal ids once.

    Raises:
      ValueError: the positives alone do not fit; they are never cut.
    """
    ids = np.concatenate([positives.ids, negatives.ids])
    unique, first = np.unique(ids, return_index=True)
    kept = np.sort(first)
    rows = np.searchsorted(kept, first[np.searchsorted(unique, ids)]).astype(np.int32)
    rows, negative_rows = rows[: len(positives.ids)], rows[len(positives.ids) :]
    num_positive = int(rows.max()) + 1 if len(rows) else 0
    if num_positive > capacity:
        raise ValueError(
            f"a host batch has {num_positive} positive concepts but its table {capacity} rows; "
            "raise max_concepts of this kind (0 derives it)"
        )
    kept = kept[:capacity]
    tokens = np.zeros((capacity, positives.tokens.shape[1]), np.int32)
    tokens[: len(kept)] = np.concatenate([positives.tokens, negatives.tokens])[kept]
    table_ids = np.zeros(capacity, np.uint64)
    table_ids[: len(kept)] = ids[kept]
    truncated = np.concatenate([positives.truncated, negatives.truncated])[kept]
    return Table(
        tokens,
        np.arange(capacity) < len(kept),
        table_ids,
        rows,
        negative_rows,
        len(first) - len(kept),
        int(truncated.sum()),
    )
