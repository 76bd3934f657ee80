"""Suppression of 5,000 boxes down to 300 against torchvision."""

import measure
import numpy as np


def arrays():
    """Returns boxes and scores."""
    rng = np.random.default_rng(0)
    center, size = rng.uniform(0, 1000, (5000, 2)), rng.uniform(10, 150, (5000, 2))
    boxes = np.concatenate([center - size / 2, center + size / 2], axis=1).astype(np.float32)
    return boxes, rng.uniform(size=5000).astype(np.float32)


def ours():
    """Yields the compiled function; ten calls, because one is too short to be timed."""
    import jax

    from detclipv2_jax.geometry.nms import nms

    boxes, scores = map(jax.device_put, arrays())
    run = jax.jit(lambda b, s: nms(b, s, iou_threshold=0.6, max_outputs=300))
    yield "10 x 5000 -> 300", lambda: [jax.block_until_ready(run(boxes, scores)) for _ in range(10)]


def reference():
    """Yields torchvision's, which cannot stop at 300."""
    import torch
    from torchvision.ops import nms

    torch.set_num_threads(1)
    boxes, scores = map(torch.from_numpy, arrays())
    yield "10 x 5000 -> 300", lambda: [nms(boxes, scores, 0.6)[:300] for _ in range(10)]


if __name__ == "__main__":
    measure.main(ours, reference)
