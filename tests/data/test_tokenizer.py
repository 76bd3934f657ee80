"""Ids against the public CLIP tokenizer (golden_tokenizer.json, written by make_golden_tokenizer.py)."""

import json
import pathlib
import subprocess
import sys

import make_golden_tokenizer as golden
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from detclipv2_jax.data import tokenizer

EXPECTED = json.loads((pathlib.Path(__file__).parent / "golden_tokenizer.json").read_text())


def ids_of(text: str, length: int = 102) -> list[int]:
    row = tokenizer.tokenize([text], max_length=length)[0]
    return row[1 : int(row.argmax())].tolist()


@pytest.mark.parametrize("index", range(len(golden.ODD)))
def test_odd_lines_have_the_public_ids(index):
    assert ids_of(golden.ODD[index]) == EXPECTED["odd"][index]


def test_ten_thousand_lines_have_the_public_ids(shared_data):
    texts = golden.lines(shared_data)
    assert len(texts) == EXPECTED["num_lines"] >= 10_000
    tokens = tokenizer.tokenize(texts, max_length=int(tokenizer.num_tokens(texts).max()))
    ids = [row[1 : int(row.argmax())].tolist() for row in tokens]
    blocks = [golden.block_hash(ids[i : i + golden.BLOCK]) for i in range(0, len(ids), golden.BLOCK)]
    assert blocks == EXPECTED["blocks"]


def test_known_row():
    row = tokenizer.tokenize("a photo of a cat")
    assert row.shape == (1, 16)
    assert row.dtype == np.int32
    assert row[0].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407] + [0] * 9


def test_truncation_keeps_eos_last_and_is_told_by_num_tokens():
    texts = ["cat", "a b c d e f g h i j k l m n", "a b c d e f g h i j k l m n o"]
    assert tokenizer.num_tokens(texts).tolist() == [3, 16, 17]
    rows = tokenizer.tokenize(texts)
    assert rows[1].tolist() == rows[2].tolist()
    assert rows[2, 0] == tokenizer.SOS_ID
    assert rows[2, -1] == tokenizer.EOS_ID
    with pytest.raises(ValueError, match="max_length is 1"):
        tokenizer.tokenize("cat", max_length=1)


def test_entities_are_resolved_twice_as_by_clip():
    assert tokenizer.clean("< &amp;lt;") == "< <"
    assert tokenizer.clean("A &amp;\tb") == "a & b"


def test_special_tokens_cannot_be_written():
    row = tokenizer.tokenize("a <|endoftext|> b <end_of_text> <|startoftext|>", max_length=64)[0]
    assert (row == tokenizer.EOS_ID).sum() == 1
    assert (row == tokenizer.SOS_ID).sum() == 1


def test_no_texts():
    assert tokenizer.tokenize([]).shape == (0, 16)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=40), st.integers(2, 20))
def test_every_text_gives_one_framed_row(text, length):
    row = tokenizer.tokenize(text, max_length=length)[0]
    end = int(row.argmax())
    assert row[0] == tokenizer.SOS_ID
    assert row[end] == tokenizer.EOS_ID
    assert (row[1:end] < tokenizer.SOS_ID).all()
    assert not row[end + 1 :].any()


def test_rows_are_read_back():
    texts = ["a red car", "café, näive", "東京", "dog's", ""]
    tokens = np.concatenate([tokenizer.tokenize(texts), np.zeros((1, 16), np.int32)])
    assert tokenizer.decode(tokens) == ["a red car", "café , näive", "東京", "dog 's", "", ""]


def test_importing_reads_nothing():
    code = (
        "import builtins, gzip; gzip.decompress = None\n"
        "import detclipv2_jax.data.tokenizer as t; assert t._bpe.cache_info().currsize == 0"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


ASCII = st.text(st.characters(max_codepoint=127) | st.sampled_from("'!? 09stremvld"), max_size=40)


@settings(max_examples=500, deadline=None)
@given(ASCII)
def test_words_of_ascii_are_those_of_the_whole_text(text):
    """The short way (words one by one) against the library's own splitting of the text."""
    assert ids_of(text) == tokenizer._bpe().encode(tokenizer.clean(text)).ids


def test_bytes_and_merges_are_those_of_the_vocabulary():
    ids = tokenizer.byte_ids()
    assert sorted(ids.tolist()) == list(range(256))
    for character in "aZ!~":  # a word of one byte ends at once: 256 more
        (token,) = tokenizer.tokenize([character.lower()])[0, 1:2]
        assert token == ids[ord(character.lower())] + 256
    merges = tokenizer.merges()
    assert merges.shape == (tokenizer.VOCABULARY_SIZE - 512 - 2, 2)
    assert (merges < 512 + np.arange(len(merges))[:, None]).all()  # of what is there already
    # "in" is the first merge of CLIP's file, "th" the second
    assert merges[:2].tolist() == [[ids[ord(a)], ids[ord(b)]] for a, b in ("in", "th")]


def test_control_characters_are_left_out():
    assert tokenizer.clean("a\x07 red\x7f \tcat\n") == "a red cat"
