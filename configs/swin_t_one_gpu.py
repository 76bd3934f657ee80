"""Pretraining on a budget: Swin-T on one GPU with 24 GB, photos of 512 px, 3 epochs of Objects365, GoldG and CC3M.

  python -m detclipv2_jax.main --config=configs/swin_t_one_gpu.py[:variant]

Variants, data and weights are those of configs/swin_t.py, o365_goldg_cc3m by default. Not run; docs/pretraining.md
has the least hours by GPU. The short side of a photo is 512 px at most, the paper's 800. 1,024 pairs are contrasted at
once, embedded in chunks; the paper has 6,144.
"""

from ml_collections import ConfigDict

from detclipv2_jax import config as config_lib


def get_config(variant: str = "") -> ConfigDict:
    c = config_lib.base()
    c.name = "swin_t_one_gpu"
    c.init_from.swin = "weights/swin_tiny.safetensors"
    config_lib.pretraining(c, variant or "o365_goldg_cc3m")
    c.epochs = 3
    for section in (c.detection, c.grounding, c.eval):
        section.canvases, section.long_side = ((512, 768), (768, 512)), 768
    for section in (c.detection, c.grounding):
        section.short_side, section.num_scales, section.batch_size = (320, 512), 2, 32
    c.image_text.batch_size = 1024
    c.optimizer.learning_rate = 1.4e-4  # the paper's rule: 1e-4 * sqrt(detection batch / 16)
    c.optimizer.accumulate.update({"detection": 2, "grounding": 4, "image_text": 8})
    c.optimizer.remat.detection = "none"  # chunks save memory for nothing; of grounding the text tower has none
    c.eval.short_side, c.eval.batch_size = 512, 8
    return c
