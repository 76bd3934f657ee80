"""The paper's large run: DetCLIPv2 with Swin-L (Table 9), 12 epochs of Objects365, GoldG and CC15M.

  python -m detclipv2_jax.main --config=configs/swin_l.py

Paper: 44.7 zero-shot LVIS minival (fixed AP) on 64 V100. Here: not run.
"""

from ml_collections import ConfigDict

from configs import swin_t
from detclipv2_jax import config as config_lib


def get_config(variant: str = "") -> ConfigDict:
    c = swin_t.get_config(variant)
    c.name = c.name.replace("swin_t", "swin_l")
    c.model = config_lib.model("swin_l")
    c.init_from.swin = (
        "data/weights/swin_l.safetensors"  # ImageNet-22k at 384 px: swin_large_patch4_window12_384_22k.pth
    )
    c.detection.batch_size = c.grounding.batch_size = 256
    c.optimizer.learning_rate = 4e-4
    return c
