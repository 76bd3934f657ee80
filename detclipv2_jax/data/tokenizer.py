"""CLIP's byte-pair tokenizer: texts to padded int32 rows.

The merges are OpenAI CLIP's (`bpe_simple_vocab_16e6.txt.gz`, see BPE_NOTICE.txt); ids equal those of the public CLIP
tokenizers, including the repair of broken Unicode (ftfy), HTML entities, white space and lower case. The one
exception is deliberate: the special tokens cannot be written in a text (a caption holding "<|endoftext|>" is read as
plain characters), because the text tower finds its sentence feature at the largest id.
"""

from __future__ import annotations

import functools
import gzip
import html
import importlib.resources
import itertools
import re
from collections.abc import Sequence

import numpy as np
import tokenizers
from jaxtyping import Int, Int32

SOS_ID, EOS_ID, VOCABULARY_SIZE = 49406, 49407, 49408
# words: contractions, runs of letters, single digits, runs of anything else
WORDS = r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""
_ASCII_WORDS = re.compile(r"'(?:s|t|re|ve|m|ll|d)|[a-z]+|[0-9]|[^\sa-z0-9]+")  # the same, in lower-case ASCII


def _printable_bytes() -> list[int]:
    """Returns the bytes that stand for themselves in CLIP's vocabulary."""
    return [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]


def byte_ids() -> Int32[np.ndarray, " 256"]:
    """Returns the token of each byte within a word; at the end of a word it is 256 more."""
    printable = _printable_bytes()
    others = [byte for byte in range(256) if byte not in printable]
    return np.argsort([*printable, *others]).astype(np.int32)


def _words() -> tuple[list[str], list[tuple[str, str]]]:
    """Returns (pieces of words by token, merges in order); reads the merges file."""
    packed = importlib.resources.files(__package__).joinpath("bpe_simple_vocab_16e6.txt.gz").read_bytes()
    lines = gzip.decompress(packed).decode().split("\n")
    # the first line is a header; CLIP uses the merges that fill the vocabulary up to the two special tokens
    merges = [(left, right) for left, right in (line.split() for line in lines[1 : VOCABULARY_SIZE - 512 - 2 + 1])]
    printable = _printable_bytes()
    characters = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    return [*characters, *(c + "</w>" for c in characters), *(left + right for left, right in merges)], merges


def merges() -> Int32[np.ndarray, "n 2"]:
    """Returns the pairs of tokens that are merged, first merges first; the n-th becomes token 512 + n."""
    words, pairs = _words()
    id_of = {word: i for i, word in enumerate(words)}
    return np.array([[id_of[left], id_of[right]] for left, right in pairs], np.int32)


@functools.cache
def _bpe() -> tokenizers.Tokenizer:
    """Returns the encoder of cleaned text, without [SOS] and [EOS]; reads the merges file once a process."""
    words, merges = _words()
    model = tokenizers.models.BPE(
        vocab={word: i for i, word in enumerate(words)}, merges=merges, end_of_word_suffix="</w>"
    )
    bpe = tokenizers.Tokenizer(model)
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(tokenizers.Regex(WORDS), behavior="removed", invert=True),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return bpe


def clean(text: str) -> str:
    """Returns the text as CLIP encodes it: Unicode repaired, HTML entities resolved, single spaces, lower case."""
    # what follows changes nothing in printable ASCII without entities, and ftfy is slower than the encoding itself
    if not (text.isascii() and text.isprintable()) or "&" in text:
        import ftfy  # here: few texts need it

        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split()).lower()


@functools.lru_cache(1 << 16)
def _word(word: str) -> list[int]:
    return _bpe().encode(word).ids


def _encode(texts: Sequence[str]) -> list[list[int]]:
    # words are encoded one by one, so those that recur need no second look; only in ASCII can `re` tell them apart
    return [
        list(itertools.chain.from_iterable(map(_word, _ASCII_WORDS.findall(text))))
        if text.isascii()
        else _bpe().encode(text).ids
        for text in map(clean, texts)
    ]


def num_tokens(texts: Sequence[str]) -> Int32[np.ndarray, " n"]:
    """Returns how many tokens each text has, [SOS] and [EOS] included, before any truncation."""
    return np.array([len(ids) + 2 for ids in _encode(texts)], np.int32)


def tokenize(texts: str | Sequence[str], *, max_length: int = 16) -> Int32[np.ndarray, "n max_length"]:
    """Returns one row `[SOS] … [EOS] 0 … 0` a text.

    Longer texts lose their end but keep [EOS] as the last token; `num_tokens` tells which.

    Args:
      texts: one text or several.
      max_length: tokens a row, [SOS] and [EOS] included; at least 2.
    """
    if max_length < 2:
        raise ValueError(f"max_length is {max_length}; at least 2 are needed for [SOS] and [EOS]")
    texts = [texts] if isinstance(texts, str) else texts
    tokens = np.zeros((len(texts), max_length), np.int32)
    for row, ids in zip(tokens, _encode(texts), strict=True):
        ids = [SOS_ID, *ids[: max_length - 2], EOS_ID]
        row[: len(ids)] = ids
    return tokens


def decode(tokens: Int[np.ndarray, "t l"]) -> list[str]:
    """Returns the text of every row of `tokenize`, as it was cleaned and cut; "" for padding."""
    piece_of, decoder = _bpe().id_to_token, tokenizers.decoders.ByteLevel()
    # between [SOS] and [EOS], the largest id
    pieces = [[piece_of(int(token)) or "" for token in row[1 : np.argmax(row)]] for row in tokens]
    return [decoder.decode(row).replace("</w>", " ").strip() for row in pieces]
