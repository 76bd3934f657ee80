"""Ids of the tokenizer in the graph against data/tokenizer.py, whose ids are those of the public tokenizer."""

import pathlib
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.export import export, symbolic_shape

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


def programs_of_what_they_get():
    """Returns programs for two canvases: embeddings are tokens, scores tell the canvas and the number of rows."""

    def encode_text(weights, tokens):
        return weights["factor"] * tokens[:, 1:3]

    def detect(weights, image, extent, original_size, text):
        ones = jnp.ones((image.shape[0], 2), jnp.int32)
        sizes = jnp.concatenate([extent, original_size], axis=1)[:, None] * ones[..., None]
        mask = jnp.array([[True, False]]) & (ones > 0)
        scores = ones * (image.shape[1] + 1000.0 * text.shape[0])
        return {
            "boxes": weights["factor"] * sizes,
            "scores": scores,
            "labels": ones * jnp.array([[1, 0]]),
            "mask": mask,
        }

    images, words = symbolic_shape("b, w")
    shape = jax.ShapeDtypeStruct
    weights, sizes = {"factor": shape((), jnp.float32)}, shape((images, 2), jnp.int32)
    modules = {"encode_text": export(jax.jit(encode_text))(weights, shape((words, LENGTH), jnp.int32))}
    for height, width in ((4, 6), (6, 4)):
        image = shape((images, height, width, 3), jnp.uint8)
        given = weights, image, sizes, sizes, shape((words, 2), jnp.float32)
        modules[f"detect_{height}x{width}"] = export(jax.jit(detect))(*given)
    return modules


@pytest.mark.slow
def test_photos_and_words_go_to_the_program_of_their_canvas(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import tensorflow as tf

        from detclipv2_jax.export import saved_model

        saved_model.save(tmp_path / "model", programs_of_what_they_get(), {"factor": np.float32(0.5)})
        signatures = tf.saved_model.load(str(tmp_path / "model")).signatures
    names = ["red", "blue", "a cat"]
    text = signatures["encode"](words=tf.constant(names))["text"]
    np.testing.assert_array_equal(text, 0.5 * tokenizer.tokenize(names, max_length=LENGTH)[:, 1:3])
    sizes = {name: tf.constant([numbers] * 2) for name, numbers in (("extent", [3, 4]), ("original_size", [9, 8]))}
    for height, width in ((4, 6), (6, 4)):
        image = tf.zeros((2, height, width, 3), tf.uint8)
        by_words = signatures["serving_default"](image=image, **sizes, words=tf.constant(names))
        by_text = signatures["detect"](image=image, **sizes, text=text)
        for found in (by_words, by_text):
            np.testing.assert_array_equal(found["scores"], np.full((2, 2), height + 128_000))  # rows are padded
            np.testing.assert_array_equal(found["boxes"], np.full((2, 2, 4), [1.5, 2, 4.5, 4]))
        assert by_words["names"].numpy().tolist() == [[b"blue", b""]] * 2
    with pytest.raises(tf.errors.InvalidArgumentError, match="images must be of one of the sizes"):
        signatures["detect"](image=tf.zeros((2, 4, 4, 3), tf.uint8), **sizes, text=text)
