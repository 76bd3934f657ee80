"""Ids of the tokenizer in the graph against data/tokenizer.py, whose ids are those of the public tokenizer."""

import pathlib
import sys
import warnings

import numpy as np
import pytest

from detclipv2_jax.data import tokenizer

sys.path.append(str(pathlib.Path(__file__).parents[1] / "data"))
import make_golden_tokenizer as golden

LENGTH = 40
ODD = [
    *golden.ODD,
    "Cafe\u0301 nai\u0308ve ÅNGSTRÖM \u212b",  # accents apart, and one that is a character of its own
    "ΟΔΟΣ Ὀδυσσεύς J\u030c 𐕰",  # final sigma; a capital without composed form; a capital of a young script
    "Ελλάδα, Россия; 中文（全角）, ｶﾀｶﾅ, 한국어",
    "a\u00a0b\u3000c\u2009d",
    "rock'n'roll it's 3.14% (co-op) a_b",
    "words of a name" * 20,
]
# what takes more than one character to see; after `tokenizer.clean` the ids are equal
DIFFERENT = {ODD[8], ODD[9], ODD[11]}


@pytest.fixture(scope="module")
def tokens_of():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TensorFlow's own
        import tensorflow as tf

        from detclipv2_jax.export.saved_model import Tokenizer
    module = Tokenizer(max_length=LENGTH)
    function = tf.function(module.__call__, input_signature=[tf.TensorSpec([None], tf.string)])
    return lambda texts: function(tf.constant(texts, tf.string)).numpy()


@pytest.mark.slow
def test_odd_texts(tokens_of):
    found, expected = tokens_of(ODD), tokenizer.tokenize(ODD, max_length=LENGTH)
    wrong = {text for text, *rows in zip(ODD, found, expected, strict=True) if not np.array_equal(*rows)}
    assert wrong == DIFFERENT
    cleaned = [tokenizer.clean(text) for text in sorted(DIFFERENT)]
    np.testing.assert_array_equal(tokens_of(cleaned), tokenizer.tokenize(sorted(DIFFERENT), max_length=LENGTH))
    assert tokens_of([]).shape == (0, LENGTH)


@pytest.mark.slow
def test_names_and_definitions_of_lvis_objects365_and_coco(tokens_of, shared_data):
    texts = golden.lines(shared_data)
    np.testing.assert_array_equal(tokens_of(texts), tokenizer.tokenize(texts, max_length=LENGTH))
