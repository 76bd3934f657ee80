"""Assignment of 22,400 anchors to 100 boxes an image; there is no reference library without a framework of its own."""

import measure
import numpy as np


def ours():
    """Yields one image and a batch of eight."""
    import jax

    from detclipv2_jax.geometry import anchors, atss

    rng = np.random.default_rng(0)
    grid = anchors.grid((800, 1344))
    size = np.exp(rng.uniform(np.log(8), np.log(700), (8, 100, 2)))
    corner = rng.uniform(size=(8, 100, 2)) * (np.array([1344, 800]) - size)
    boxes = jax.device_put(np.concatenate([corner, corner + size], axis=-1).astype(np.float32))
    mask = jax.device_put(np.ones((8, 100), bool))

    def one(boxes, mask):
        return atss.assign(grid.boxes, grid.levels, boxes, mask)

    single, batch = jax.jit(one), jax.jit(jax.vmap(one))
    yield "1 image", lambda: jax.block_until_ready(single(boxes[0], mask[0]))
    yield "8 images", lambda: jax.block_until_ready(batch(boxes, mask))


def reference():
    """Yields nothing."""
    yield from ()


if __name__ == "__main__":
    measure.main(ours, reference)
