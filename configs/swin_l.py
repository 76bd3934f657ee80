"""The paper's large run: DetCLIPv2 with Swin-L (Table 9), 12 epochs of Objects365, GoldG and CC15M.

  python -m detclipv2_jax.main --config=configs/swin_l.py[:variant]

Paper: 44.7 zero-shot LVIS minival (fixed AP) with `full`, the default, on 64 V100. Here: not run. Data, variants and
text tower as for configs/swin_t.py.
The backbone starts from swin_large_patch4_window12_384_22k.pth of the Swin repository (ImageNet-22k), converted by
`python -m detclipv2_jax.convert`:
https://github.com/SwinTransformer/storage/releases/download/v1.0.0/swin_large_patch4_window12_384_22k.pth
"""

from ml_collections import ConfigDict

from detclipv2_jax import config as config_lib


def get_config(variant: str = "") -> ConfigDict:
    c = config_lib.base()
    c.name = "swin_l"
    c.model = config_lib.model("swin_l")
    c.init_from.swin = "weights/swin_large.safetensors"
    config_lib.pretraining(c, variant)
    c.name = c.name.removesuffix("_full")  # runs/swin_l, as ever
    c.detection.batch_size = c.grounding.batch_size = 256
    c.eval.batch_size = 64  # an image a device
    c.optimizer.learning_rate = 4e-4
    return c
