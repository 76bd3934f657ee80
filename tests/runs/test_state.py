"""What a run carries: fresh parameters and their average, the place of each array, the model of a configuration."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from detclipv2_jax.data.tokenizer import tokenize
from detclipv2_jax.runs import sharding, state
from detclipv2_jax.runs.optimizer import make_optimizer, named_shapes


def test_a_model_has_the_closed_vocabulary_of_its_configuration(micro):
    assert state.make_model(micro.model).class_tokens == ()
    micro.model.text.classes = ("dog", "red car")
    model = state.make_model(micro.model)
    assert model.class_tokens == tuple(map(tuple, tokenize(["dog", "red car"], max_length=16).tolist()))
    shapes = named_shapes(state.param_shapes(model, context_length=16))
    assert {name for name in shapes if name.startswith("text_encoder/")} == {"text_encoder/classes"}
    micro.model.text.classes = ("dog", "Dog")
    with pytest.raises(ValueError, match="Dog"):
        state.make_model(micro.model)


def test_shapes_are_those_of_the_length_of_texts(micro):
    micro.model.text.context_length = 48
    shapes = named_shapes(state.param_shapes(state.make_model(micro.model), context_length=48))
    assert shapes["text_encoder/position_embedding"] == (48, micro.model.text.width)


def test_the_average_is_not_the_parameters_themselves():
    params = {"a": jnp.arange(3.0)}
    begun = state.create(params, optax.sgd(0.1), ema=True)
    assert begun.ema["a"] is not begun.params["a"]  # a step is given both to overwrite
    np.testing.assert_array_equal(begun.ema["a"], params["a"])


@pytest.mark.parametrize("frozen", ["", "a/.*"])
def test_every_array_of_the_state_has_a_place_and_what_is_frozen_has_none(micro, frozen):
    micro.optimizer.frozen, micro.optimizer.groups, micro.optimizer.schedule = frozen, ((".*", 1.0, True),), "plateau"
    params = {"a": {"kernel": jnp.ones((8, 3))}, "b": {"kernel": jnp.ones((5, 16)), "bias": jnp.ones(3)}}
    tx, mesh = make_optimizer(micro.optimizer, params, 10), sharding.make_mesh(fsdp=4)
    begun = state.create(params, tx, ema=True)
    placed = state.state_shardings(mesh, tx, params, ema=True)
    assert jax.tree.structure(placed) == jax.tree.structure(begun)
    for array, place in zip(*map(jax.tree.leaves, (begun, placed)), strict=True):
        assert place.spec == sharding.param_spec(array.shape, fsdp=4), array.shape
    assert sum(array.shape == (8, 3) for array in jax.tree.leaves(begun)) == (2 if frozen else 4)  # moments
    moved = jax.device_put(begun, placed)
    assert moved.ema["b"]["kernel"].sharding.shard_shape((5, 16)) == (5, 4)
