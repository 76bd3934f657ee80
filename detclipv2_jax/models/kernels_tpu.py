"""What kernels for TPUs share (Pallas, Mosaic)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float32


def dot(a: Array, b: Array, a_axis: int, b_axis: int) -> Float32[Array, "m n"]:
    """Returns the float32 product, summed over an axis of each; float32 factors are not rounded to bfloat16."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    axes = (((a_axis,), (b_axis,)), ((), ()))
    return jax.lax.dot_general(a, b, axes, precision=precision, preferred_element_type=jnp.float32)
