"""The head against one in torch written after mmdetection's: outputs and all gradients on two levels."""

import dataclasses

import jax
import numpy as np
import pytest
from golden_gradients import check, seeded_params

from detclipv2_jax.models.atss_head import AtssHead

import cases  # isort: skip  (beside the fixtures; golden_gradients adds their folder)


@pytest.mark.parametrize("objectness", cases.PARTS)
def test_outputs_and_gradients_equal_torch(objectness):
    case = cases.PARTS[objectness]
    model, levels = AtssHead(**case.head._asdict()), case.levels()

    def run(params, inputs):
        outputs = {}
        for i in levels:
            output = model.apply({"params": params["head"]}, inputs[f"level{i}"], i)
            outputs |= {f"{field.name}{i}": getattr(output, field.name) for field in dataclasses.fields(output)}
        return outputs

    check(
        f"head_{objectness}",
        run,
        params={"head": seeded_params("head/", model, levels[1], 1)},
        inputs={f"level{i}": x for i, x in levels.items()},
    )


def test_a_fresh_head_samples_where_a_plain_convolution_does():
    case = cases.PARTS["classification"]
    model, feature = AtssHead(**case.head._asdict()), case.levels()[1]
    head = jax.jit(lambda key: model.init(key, feature, 1))(jax.random.key(0))["params"]
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(head["deformable"]["steering"]))
    for kernel in (head["box_tower"]["conv0"]["kernel"], head["deformable"]["kernel"], head["embedding"]["kernel"]):
        assert np.std(kernel) == pytest.approx(0.01, rel=0.15)
    np.testing.assert_array_equal(head["level_scales"], np.ones(5))


def test_parameters_and_what_is_not_an_embedding_are_float32():
    case = cases.PARTS["iou"]
    model, feature = AtssHead(**case.head._asdict(), dtype="bfloat16"), case.levels()[1]
    output, variables = jax.eval_shape(lambda key: model.init_with_output(key, feature, 1), jax.random.key(0))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(variables)} == {"float32"}
    types = {field.name: getattr(output, field.name).dtype.name for field in dataclasses.fields(output)}
    assert types.pop("embeddings") == "bfloat16"
    assert set(types.values()) == {"float32"}
