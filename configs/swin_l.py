"""The paper's large run: DetCLIPv2 with Swin-L (Table 9), 12 epochs of Objects365, GoldG and CC15M.

  python -m detclipv2_jax.main --config=configs/swin_l.py

Paper: 44.7 zero-shot LVIS minival (fixed AP) on 64 V100. Here: not run. Data as for configs/swin_t.py.
"""

from ml_collections import ConfigDict

from detclipv2_jax import config as config_lib


def get_config() -> ConfigDict:
    c = config_lib.base()
    c.name = "swin_l"
    c.model = config_lib.model("swin_l")
    c.detection.data = ("data/objects365",)
    c.grounding.data = ("data/gqa", "data/flickr30k")
    c.image_text.data = ("data/cc3m", "data/cc12m")
    c.detection.batch_size = c.grounding.batch_size = 256
    c.loss.selection_scope = "device"
    c.optimizer.learning_rate = 4e-4
    c.eval.annotations = "data/lvis/lvis_v1_minival_inserted_image_name.json"
    c.eval.images = "data/coco"
    return c
