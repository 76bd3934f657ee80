"""The pyramid against torchvision's: levels and all gradients, from maps with odd sides."""

from golden_gradients import check, seeded_params

from detclipv2_jax.models.fpn import FPN

import cases  # isort: skip  (beside the fixtures; golden_gradients adds their folder)


def test_levels_and_gradients_equal_torch():
    case = cases.PARTS["classification"]
    model, features = FPN(case.head.channels), case.features()
    check(
        "pyramid",
        lambda params, inputs: {
            f"level{i}": x for i, x in enumerate(model.apply({"params": params["fpn"]}, list(inputs.values())), start=3)
        },
        params={"fpn": seeded_params("fpn/", model, features)},
        inputs={f"feature{i}": x for i, x in enumerate(features, start=3)},
    )
