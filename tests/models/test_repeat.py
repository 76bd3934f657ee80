"""Blocks in a loop against the same blocks written out."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from detclipv2_jax.models import repeat
from detclipv2_jax.models.swin import ATTENTION, Swin
from detclipv2_jax.models.text_encoder import TextEncoder

TOKENS = np.arange(1, 49, dtype=np.int32).reshape(3, 16)
IMAGE = np.random.default_rng(0).normal(size=(2, 64, 64, 3)).astype(np.float32)


class Affine(nn.Module):
    factor: float

    @nn.compact
    def __call__(self, x, amount):
        return self.factor * x * self.param("scale", nn.initializers.ones, ()) + amount


class Many(nn.Module):
    num: int

    @nn.compact
    def __call__(self, x):
        blocks = [Affine(factor, parent=None) for factor in (2.0, 3.0)]
        names = [f"block{i}" for i in range(self.num)]
        return repeat.repeat(self, blocks, names, x, [np.arange(self.num, dtype=np.float32)], remat=False)


@pytest.mark.parametrize(("num", "loops"), [(3, 0), (6, 0), (7, 0), (8, 1), (9, 0), (10, 1)])
def test_blocks_take_turns_and_whole_turns_alone_are_a_loop(num, loops):
    params = {"params": {f"block{i}": {"scale": 1.0 + i / 8} for i in range(num)}}
    expected = 1.0
    for i in range(num):
        expected = (2.0, 3.0)[i % 2] * expected * (1.0 + i / 8) + i
    assert float(Many(num).apply(params, 1.0)) == pytest.approx(expected, rel=1e-6)
    assert str(jax.make_jaxpr(lambda x: Many(num).apply(params, x))(1.0)).count("scan[") == loops


MODELS = {
    "text": (TextEncoder(16, 4, 2, context_length=16, embed_dim=8), (TOKENS,), {}),
    "swin": (Swin(8, (1, 1, 6, 1), (1, 1, 2, 2), 4, drop_path_rate=0.5), (IMAGE,), {"train": True}),
    "swin, attention kept": (
        Swin(8, (1, 1, 6, 1), (1, 1, 2, 2), 4, drop_path_rate=0.5, kept=(ATTENTION,)),
        (IMAGE,),
        {"train": True},
    ),
}


def value_and_gradient(name, params, *, remat, min_repeats, monkeypatch):
    model, inputs, options = MODELS[name]
    monkeypatch.setattr(repeat, "MIN_REPEATS", min_repeats)

    def loss(params):
        outputs = model.clone(remat=remat).apply(params, *inputs, **options, rngs={"dropout": jax.random.key(1)})
        return sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(outputs))

    function = jax.value_and_grad(loss)
    return jax.jit(function)(params), str(jax.make_jaxpr(function)(params)).count(" scan[")


@pytest.mark.parametrize("name", MODELS)
def test_a_loop_changes_no_value_and_no_gradient(name, monkeypatch):
    model, inputs, options = MODELS[name]
    params = jax.jit(lambda key: model.init({"params": key, "dropout": key}, *inputs, **options))(jax.random.key(0))
    expected, none = value_and_gradient(name, params, remat=False, min_repeats=100, monkeypatch=monkeypatch)
    found, loops = value_and_gradient(name, params, remat=True, min_repeats=3, monkeypatch=monkeypatch)
    assert none == 0
    assert loops == 2  # forward and backward
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(expected), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * np.abs(a).max() + 1e-7, err_msg=str(path))
