"""The paper's large run: DetCLIPv2 with Swin-L (Table 9), 12 epochs of Objects365, GoldG and CC15M.

  python -m detclipv2_jax.main --config=configs/swin_l.py

Paper: 44.7 zero-shot LVIS minival (fixed AP) on 64 V100. Here: not run. Data and text tower as for configs/swin_t.py.
The backbone starts from swin_large_patch4_window12_384_22k.pth of the Swin repository (ImageNet-22k), converted by
`python -m detclipv2_jax.convert`:
https://github.com/SwinTransformer/storage/releases/download/v1.0.0/swin_large_patch4_window12_384_22k.pth
"""

from ml_collections import ConfigDict

from detclipv2_jax import config as config_lib


def get_config() -> ConfigDict:
    c = config_lib.base()
    c.name = "swin_l"
    c.model = config_lib.model("swin_l")
    c.init_from.swin = "weights/swin_large.safetensors"
    c.init_from.text = "weights/clip_text_vit_b32.safetensors"
    c.detection.data = ("data/objects365",)
    c.grounding.data = ("data/gqa", "data/flickr30k")
    c.image_text.data = ("data/cc3m", "data/cc12m")
    c.detection.batch_size = c.grounding.batch_size = 256
    c.eval.batch_size = 64  # an image a device
    c.loss.selection_scope = "device"
    c.optimizer.learning_rate = 4e-4
    c.chips.h100 = (("loss.chunk_bytes", 1 << 30),)  # as in configs/swin_t.py
    c.eval.annotations = "data/lvis/lvis_v1_minival_inserted_image_name.json"
    c.eval.images = "data/coco"
    return c
