"""Similar names by a converted text tower."""

import jax
import numpy as np
import pytest
from flax import traverse_util
from safetensors.numpy import save_file

from detclipv2_jax.data import tokenizer
from detclipv2_jax.models.text_encoder import TextEncoder
from detclipv2_jax.prepare import text_tower

NAMES = ["red car", "a cat", "tree"]
OTHERS = ["dog", "cat", "a big tree", "red car", "tree", "red car"]


@pytest.fixture(scope="module")
def tower():
    """A tower of two heads with 77 positions, and its parameters."""
    encoder = TextEncoder(width=128, num_layers=2, num_heads=2, context_length=77, embed_dim=6)
    params = encoder.init(jax.random.key(0), np.zeros((1, 77), np.int32))["params"]
    return encoder, jax.tree.map(lambda x: np.asarray(20 * x), params)  # far from all alike


def test_cosines_of_names(tower, tmp_path, monkeypatch):
    encoder, params = tower
    flat = traverse_util.flatten_dict(params, sep="/")
    save_file(
        {f"text_encoder/{name}": value for name, value in flat.items()} | {"swin/x": np.zeros(1)}, tmp_path / "t.st"
    )
    rows = np.pad(tokenizer.tokenize(NAMES + OTHERS), ((0, 0), (0, 61)))
    embeddings = np.float64(encoder.apply({"params": params}, rows))
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    cosine = embeddings[:3] @ embeddings[3:].T
    assert np.unique(cosine.round(3)).size > 8
    for batch in (256, 4):
        monkeypatch.setattr(text_tower, "_BATCH", batch)
        found = text_tower.similarities(NAMES, OTHERS, tower=str(tmp_path / "t.st"))
        assert found.argmax(axis=1)[::2].tolist() == [3, 4]  # the names themselves
        np.testing.assert_allclose(found, cosine, atol=1e-5)


def test_a_narrow_tower_has_one_head(tmp_path, monkeypatch):
    given = {}

    def encoder(**options):
        given.update(options)
        raise InterruptedError

    arrays = {"projection/kernel": np.zeros((32, 4)), "position_embedding": np.zeros((77, 32)), "block0/x": np.zeros(1)}
    save_file({f"text_encoder/{name}": array for name, array in arrays.items()}, tmp_path / "t.st")
    monkeypatch.setattr(text_tower, "TextEncoder", encoder)
    with pytest.raises(InterruptedError):
        text_tower.similarities(["a"], ["b"], tower=str(tmp_path / "t.st"))
    assert given == {"width": 32, "num_layers": 1, "num_heads": 1, "context_length": 16, "embed_dim": 4}


def test_files_that_are_no_tower(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    save_file({"swin/x": np.zeros(1)}, tmp_path / "swin.st")
    for name, message in (("a.txt", "cannot be read"), ("absent", "cannot be read"), ("swin.st", "is no text tower")):
        with pytest.raises(ValueError, match=f"--text=.*{name}.* {message}"):
            text_tower.similarities(["a"], ["b"], tower=str(tmp_path / name))
