"""The head against one in torch written after mmdetection's: outputs and all gradients on two levels."""

import dataclasses

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
