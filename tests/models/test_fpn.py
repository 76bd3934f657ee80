"""The pyramid against torchvision's: levels and all gradients, from maps with odd sides; its first values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
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


def test_kernels_begin_uniform_and_levels_have_the_compute_type():
    model = FPN(32, dtype=jnp.bfloat16)
    features = [jnp.zeros((1, 8 >> i, 12 >> i, 16), jnp.float32) for i in range(3)]
    levels, variables = jax.jit(model.init_with_output)(jax.random.key(0), features)
    assert [(x.shape, x.dtype) for x in levels] == [
        ((1, h, w, 32), jnp.bfloat16) for h, w in ((8, 12), (4, 6), (2, 3), (1, 2), (1, 1))
    ]
    for name, layer in variables["params"].items():
        kernel = np.asarray(layer["kernel"])
        height, width, inputs, outputs = kernel.shape
        bound = (6 / (height * width * (inputs + outputs))) ** 0.5  # Xavier's
        assert kernel.dtype == np.float32
        assert np.abs(kernel).max() == pytest.approx(bound, rel=0.02), name
        assert kernel.std() == pytest.approx(bound / 3**0.5, rel=0.1), name
        assert not layer["bias"].any()
