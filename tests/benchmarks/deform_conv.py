"""Deformable convolution, forward and backward, against torchvision's C++ operator: 1 x 100 x 168 x 256 -> 256."""

import measure
import numpy as np

HEIGHT, WIDTH, CHANNELS = 100, 168, 256


def arrays():
    """Returns features, offsets, mask, kernel and the gradient from above."""
    rng = np.random.default_rng(0)
    shapes = ((1, HEIGHT, WIDTH, CHANNELS), (1, HEIGHT, WIDTH, 9, 2), (1, HEIGHT, WIDTH, 9), (3, 3, CHANNELS, CHANNELS))
    features, offsets, mask, kernel = (rng.standard_normal(shape, dtype=np.float32) for shape in shapes)
    return features, offsets.clip(-3.9, 3.9), mask, kernel, rng.standard_normal(shapes[0], dtype=np.float32)


def ours():
    """Yields both forms."""
    import jax

    from detclipv2_jax.models.deform_conv import deform_conv2d

    *arguments, gradient = map(jax.device_put, arrays())
    for impl in ("gather", "banded"):

        def forward(*a, impl=impl):
            return deform_conv2d(*a, impl=impl)

        @jax.jit
        def both(gradient, *a, forward=forward):
            output, vjp = jax.vjp(forward, *a)
            return output, vjp(gradient)

        compiled = jax.jit(forward)
        yield f"forward, {impl}", lambda f=compiled: jax.block_until_ready(f(*arguments))
        yield f"forward + backward, {impl}", lambda f=both: jax.block_until_ready(f(gradient, *arguments))


def reference():
    """Yields torchvision's operator under both names."""
    import torch
    from torchvision.ops import deform_conv2d

    torch.set_num_threads(1)
    features, offsets, mask, kernel, gradient = map(torch.from_numpy, arrays())
    features, gradient = features.permute(0, 3, 1, 2).contiguous(), gradient.permute(0, 3, 1, 2).contiguous()
    offsets = offsets.reshape(1, HEIGHT, WIDTH, 18).permute(0, 3, 1, 2).contiguous()
    mask, kernel = mask.permute(0, 3, 1, 2).contiguous(), kernel.permute(3, 2, 0, 1).contiguous()
    leaves = [x.requires_grad_() for x in (features, offsets, kernel, mask)]

    def forward():
        return deform_conv2d(leaves[0], leaves[1], leaves[2], padding=1, mask=leaves[3])

    for impl in ("gather", "banded"):
        yield f"forward, {impl}", forward
        yield f"forward + backward, {impl}", lambda: torch.autograd.grad(forward(), leaves, gradient)


if __name__ == "__main__":
    measure.main(ours, reference)
