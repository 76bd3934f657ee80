"""Cross-entropy over class names by hand; tests/test_train_step_losses.py holds it against the oracle of a step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from detclipv2_jax.losses.class_names import class_name_loss
from detclipv2_jax.losses.concept_table import Captions, Table
from detclipv2_jax.losses.contrastive import ContrastiveSettings, Proposed


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_images_of_one_class_are_no_negatives_of_each_other(smoothing):
    """Three images of a fox, one of a shark: two columns, whatever rows of the table hold the names."""
    text = np.array([[1, 0], [0, 1], [1, 0], [9, 9]], np.float32)
    table = Table(jnp.array([True, True, True, False]), jnp.array([0, 1, 0, 3], jnp.int32))
    captions = Captions(jnp.array([[0], [2], [1], [2], [1]], jnp.int32), jnp.ones((5, 1), bool))
    regions = np.array([[[2, 1]], [[1, 1]], [[0, 3]], [[5, -1]], [[4, 4]]], np.float32)
    settings = ContrastiveSettings("one_to_one", "text_to_image", 0.5, smoothing, 0.1, 1 << 20)

    def loss(regions):
        proposed = Proposed(jnp.arange(5)[:, None] < 4, None)  # the last image has no region
        arrays = {"proposed": proposed, "table": table, "captions": captions, "image_mask": jnp.arange(5) != 3}
        return class_name_loss(regions, jnp.asarray(text), jnp.float32(1.5), **arrays, settings=settings)

    (value, metrics), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(jnp.asarray(regions))
    margins = 3.0 * np.array([2 - 1, 1 - 1, 3 - 0])  # 1.5 / 0.5 times what the own name is above the other
    # half of what is smoothed goes to the other of the two names
    assert value == pytest.approx(np.mean(np.log1p(np.exp(-margins)) + smoothing * margins / 2), rel=1e-6)
    assert metrics["accuracy"] == pytest.approx(2 / 3)  # the second is a tie
    assert metrics["similarity"] == pytest.approx(1.5 * (2 + 1 + 3) / 3)
    assert metrics["num_concepts"] == 2
    assert not np.any(gradient[3:])
