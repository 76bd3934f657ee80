"""What kernels for TPUs share."""

import jax.numpy as jnp
import numpy as np
import pytest

from detclipv2_jax.models.kernels_tpu import dot


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("a_axis", "b_axis"), [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_the_product_is_summed_over_the_axes_in_float32(dtype, a_axis, b_axis):
    rng = np.random.default_rng(0)
    a, b = (jnp.asarray(rng.normal(size=(64, 64)), dtype) for _ in range(2))
    expected = np.tensordot(np.asarray(a, np.float64), np.asarray(b, np.float64), ((a_axis,), (b_axis,)))
    found = dot(a, b, a_axis, b_axis)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, atol=1e-4)
