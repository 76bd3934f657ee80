"""The text tower and its gradients against transformers and open_clip (whose layout is OpenAI's)."""

import functools
import pathlib
import sys

import flax
import golden_gradients
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from detclipv2_jax.data import tokenizer
from detclipv2_jax.models.text_encoder import ClassTable, TextEncoder

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
sys.path.insert(0, str(GOLDEN))
import cases  # noqa: E402  (lives beside the fixtures, which are made in another environment)
import seeded  # noqa: E402


def build(size, **options):
    """Returns (model, parameters seeded as for the references, with the first 16 of their 77 positions)."""
    width, layers, heads, joint = cases.TEXT_SIZES[size]
    model = TextEncoder(width, layers, heads, context_length=16, embed_dim=joint, **options)
    shapes = jax.eval_shape(model.init, jax.random.key(0), cases.text_tokens())["params"]

    def fill(path, leaf):
        return seeded.parameter("text_encoder/" + jax.tree_util.keystr(path, simple=True, separator="/"), leaf.shape)

    params = jax.tree_util.tree_map_with_path(fill, shapes)
    position = seeded.parameter("text_encoder/position_embedding", (cases.TEXT_POSITIONS, width))
    return model, {"params": params | {"position_embedding": position[:16]}}


@pytest.mark.parametrize("size", ["nano", pytest.param("base", marks=pytest.mark.slow)])
def test_equal_to_the_libraries(size):
    golden = np.load(GOLDEN / "text.npz")
    model, variables = build(size)
    embeddings = jax.jit(model.apply)(variables, cases.text_tokens())
    for library in ("transformers", "open_clip"):
        np.testing.assert_allclose(embeddings, golden[f"{size}/{library}"], atol=1e-5, err_msg=library)


def test_gradients_equal_open_clip():
    model, variables = build("nano")

    def run(params, inputs):
        return {"embeddings": model.apply({"params": params["text_encoder"]}, cases.text_tokens())}

    # most rows of the token embedding have no gradient, so that its root mean square is small beside the others
    golden_gradients.check("text", run, params={"text_encoder": variables["params"]}, tolerance=3e-4)


def test_nothing_after_the_end_matters():
    model, variables = build("nano")
    tokens = cases.text_tokens()
    after = np.arange(16)[None] > tokens.argmax(axis=1)[:, None]
    changed = np.where(after, 1234, tokens)
    run = jax.jit(model.apply)
    np.testing.assert_allclose(run(variables, tokens), run(variables, changed), atol=1e-6)
    np.testing.assert_allclose(run(variables, tokens[:8, :9]), run(variables, tokens)[:8], atol=1e-5)


def test_of_every_token_that_of_the_end_is_the_sentence_and_later_words_change_no_earlier_one():
    model, variables = build("nano")
    tokens = cases.text_tokens()
    each = jax.jit(functools.partial(model.apply, every_token=True))
    ends = np.take_along_axis(np.asarray(each(variables, tokens)), tokens.argmax(axis=1)[:, None, None], axis=1)[:, 0]
    np.testing.assert_allclose(ends, jax.jit(model.apply)(variables, tokens), atol=1e-5)
    changed = np.where(np.arange(16)[None] > 3, 1234, tokens)
    np.testing.assert_allclose(each(variables, changed)[:, :4], each(variables, tokens)[:, :4], atol=1e-5)


def test_an_empty_row_is_finite_and_long_rows_are_an_error():
    model, variables = build("nano")
    assert np.isfinite(jax.jit(model.apply)(variables, np.zeros((2, 16), np.int32))).all()
    with pytest.raises(ValueError, match="17 positions"):
        model.apply(variables, np.zeros((1, 17), np.int32))


def test_the_gradient_of_words_in_every_row_is_not_lost_in_bfloat16():
    # sums of thousands of rows in bfloat16 were 96 % too small for [SOS]
    tokens = np.tile(np.int32([[49406, 5, 49407, 0]]), (4096, 1))
    grads = {}
    for dtype in (jnp.float32, jnp.bfloat16):
        encoder = TextEncoder(width=16, num_layers=1, num_heads=2, context_length=4, embed_dim=8, dtype=dtype)
        params = encoder.init(jax.random.key(0), tokens[:1])
        run = jax.jit(jax.grad(lambda params, encoder=encoder: jnp.sum(encoder.apply(params, tokens)[:, 0])))
        grads[dtype] = run(params)["params"]["token_embedding"]["embedding"]
    assert grads[jnp.bfloat16].dtype == jnp.float32
    for token in (49406, 5, 49407):
        exact, rounded = grads[jnp.float32][token], grads[jnp.bfloat16][token]
        assert np.linalg.norm(rounded - exact) < 0.05 * np.linalg.norm(exact)


def test_initial_values_have_the_sizes_of_clip():
    width, layers = 64, 3
    model = TextEncoder(width, layers, 2, context_length=16, embed_dim=128)
    params = jax.jit(model.init)(jax.random.key(0), cases.text_tokens())["params"]
    sizes = {
        "token_embedding/embedding": 0.02, "position_embedding": 0.01, "projection/kernel": width**-0.5,
        "block1/qkv/kernel": width**-0.5, "block1/mlp_in/kernel": (2 * width) ** -0.5,
        "block1/projection/kernel": width**-0.5 * (2 * layers) ** -0.5,
        "block1/mlp_out/kernel": width**-0.5 * (2 * layers) ** -0.5,
    }  # fmt: skip
    found = flax.traverse_util.flatten_dict(params, sep="/")
    assert all(x.dtype == np.float32 for x in found.values())
    for name, size in sizes.items():
        assert np.std(found[name]) == pytest.approx(size, rel=0.08), name  # of 1,024 values or more


def test_classes_have_rows_of_a_table_and_other_texts_none():
    classes = ("cat", "traffic light", "traffic cone", "dog")
    table = ClassTable(tuple(map(tuple, tokenizer.tokenize(classes).tolist())), embed_dim=6)
    texts = ["dog", "Traffic  LIGHT", "zebra", "cat", "dog", "traffic", "cat, an animal"]
    rows, tokens = [3, 1, None, 0, 3, None, None], tokenizer.tokenize(texts)
    tokens = np.concatenate([tokens, np.zeros((1, 16), np.int32)])  # padding of the concept table
    weights = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)
    bars = np.random.default_rng(1).normal(size=(8, 6)).astype(np.float32)
    embeddings, pull = jax.vjp(lambda x: table.apply({"params": {"classes": x}}, tokens), weights)
    expected = [np.zeros(6) if row is None else weights[row] for row in (*rows, None)]
    np.testing.assert_array_equal(embeddings, expected)
    gradient = np.zeros((4, 6))
    for row, bar in zip(rows, bars, strict=False):
        if row is not None:
            gradient[row] += bar
    np.testing.assert_allclose(pull(jnp.asarray(bars))[0], gradient, rtol=1e-6)
    fresh = table.init(jax.random.key(0), tokens)["params"]
    assert jax.tree.map(jnp.shape, fresh) == {"classes": (4, 6)}
