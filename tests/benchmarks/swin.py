"""Swin-T against torchvision's: 800 x 1344 forward and forward + backward, and a batch of eight at 320 x 320."""

import measure
import numpy as np

DEPTHS, HEADS = (2, 2, 6, 2), (3, 6, 12, 24)
NAMES = ("forward 1 x 800 x 1344", "forward 8 x 320 x 320", "forward + backward 1 x 800 x 1344")


def images():
    """Returns the two inputs, NHWC."""
    rng = np.random.default_rng(0)
    return (rng.standard_normal(shape, dtype=np.float32) for shape in ((1, 800, 1344, 3), (8, 320, 320, 3)))


def ours():
    """Yields the backbone with its output norms."""
    import jax

    from detclipv2_jax.models.swin import Swin

    large, small = map(jax.device_put, images())
    model = Swin(96, DEPTHS, HEADS, 7)
    variables = jax.jit(lambda key: model.init(key, large[:, :64, :64], train=False))(jax.random.key(0))

    @jax.jit
    def forward(variables, image):
        return model.apply(variables, image, train=False)

    backward = jax.jit(jax.value_and_grad(lambda v, image: sum(x.sum() for x in forward(v, image))))
    yield NAMES[0], lambda: jax.block_until_ready(forward(variables, large))
    yield NAMES[1], lambda: jax.block_until_ready(forward(variables, small))
    yield NAMES[2], lambda: jax.block_until_ready(backward(variables, large))


def reference():
    """Yields the backbone without classifier."""
    import torch
    from torchvision.models.swin_transformer import SwinTransformer

    torch.set_num_threads(1)
    large, small = (torch.from_numpy(image).permute(0, 3, 1, 2).contiguous() for image in images())
    model = SwinTransformer([4, 4], 96, list(DEPTHS), list(HEADS), [7, 7]).eval()

    def forward(image):
        with torch.inference_mode():
            return model.features(image)

    yield NAMES[0], lambda: forward(large)
    yield NAMES[1], lambda: forward(small)
    yield NAMES[2], lambda: torch.autograd.grad(model.features(large).sum(), list(model.features.parameters()))


if __name__ == "__main__":
    measure.main(ours, reference)
