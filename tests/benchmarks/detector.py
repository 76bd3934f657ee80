"""The whole T detector, text cached, at 800 x 1344 against transformers' Grounding DINO-T with random weights.

Ours with 80 and 1,203 words; theirs with 80 (it reads the words together with every image, 256 tokens at most).
"""

import measure
import numpy as np

CANVAS = (800, 1344)


def ours():
    """Yields image to boxes for both vocabularies, in float32 like the reference."""
    import jax
    import jax.numpy as jnp

    from detclipv2_jax import config, inference
    from detclipv2_jax.geometry import anchors
    from detclipv2_jax.inference.detect import detect as find
    from detclipv2_jax.models import detclip

    model_config = config.model("swin_t")
    model_config.dtype = "float32"
    model = detclip.from_config(model_config)
    image = np.random.default_rng(0).integers(0, 256, (1, *CANVAS, 3), np.uint8)
    extent, tokens = np.array([CANVAS], np.int32), np.zeros((1, 16), np.int32)
    variables = jax.jit(lambda key: model.init(key, image[:, :64, :64], extent, tokens, train=False))(jax.random.key(0))
    grid = anchors.grid(CANVAS).boxes

    @jax.jit
    def detect(variables, image, text, text_mask):
        regions = model.apply(variables, image, extent, train=False, method="encode_image")
        scale, bias = model.apply(variables, method="logit_parameters")
        photos = inference.Photos(image, extent, np.ones((1, 2), np.float32), extent)
        limits = inference.Limits(score_threshold=0.0, nms_iou=0.6, pre_nms=1000, max_detections=300)
        return find(regions, text, text_mask, photos, anchors=grid, scale=scale, bias=bias, limits=limits)

    for words in (80, 1203):
        padded = -(-words // inference.WORD_CHUNK) * inference.WORD_CHUNK
        text = detclip.l2_normalize(jax.random.normal(jax.random.key(1), (padded, 512)))
        mask = jnp.arange(padded) < words
        yield f"{words} words", lambda t=text, m=mask: jax.block_until_ready(detect(variables, image, t, m))


def reference():
    """Yields one forward pass with as many tokens as 80 COCO names take (195 with separators)."""
    import torch
    from transformers import GroundingDinoConfig, GroundingDinoForObjectDetection

    torch.set_num_threads(1)
    model = GroundingDinoForObjectDetection(GroundingDinoConfig()).eval()
    pixels = torch.randn(1, 3, *CANVAS)
    tokens = torch.full((1, 195), 2003)
    tokens[:, 0], tokens[:, -1] = 101, 102
    tokens[:, 2:-1:2] = 1012  # a full stop ends a name

    def forward():
        with torch.inference_mode():
            return model(pixel_values=pixels, input_ids=tokens).logits

    yield "80 words", forward


if __name__ == "__main__":
    measure.main(ours, reference)
