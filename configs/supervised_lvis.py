"""Supervised rows of Tables 6 and 14: the same detector with a learned classifier of LVIS's 1,203 classes, on LVIS.

  python -m detclipv2_jax.main --config=configs/supervised_lvis.py[:variant]

| variant          | paper: fixed AP on minival | on val (Table 14) | here    |
|------------------|----------------------------|-------------------|---------|
| swin_t (default) | 33.6                       | 28.4              | not run |
| swin_l           | 43.9                       | 38.3              | not run |

Data are those of configs/finetune_lvis.py, backbones those of configs/swin_t.py and swin_l.py; there is no text tower.
The paper says nothing of this training: here it is 24 epochs, a tenth of the rate after 16 and 22 (2x), and Table 9's
rate for this batch. On val: --mode=eval with --config.eval.annotations=data/lvis/lvis_v1_val.json. Another closed set:
--config.model.text.classes="('cat','dog')", the names of its categories, with definitions=False as here.
"""

from ml_collections import ConfigDict

from detclipv2_jax import config as config_lib
from detclipv2_jax.inference import vocabulary

BACKBONES = {"swin_t": "weights/swin_tiny.safetensors", "swin_l": "weights/swin_large.safetensors"}


def get_config(variant: str = "") -> ConfigDict:
    variant = variant or "swin_t"
    if variant not in BACKBONES:
        raise ValueError(
            f"variant {variant!r} of configs/supervised_lvis.py is unknown; allowed are {', '.join(BACKBONES)}"
        )
    c = config_lib.base()
    c.name = f"supervised_lvis_{variant}"
    c.model = config_lib.model(variant)
    c.model.text.classes = vocabulary.named("lvis").names
    c.init_from.swin = BACKBONES[variant]
    c.epochs = 24
    c.detection.data = ("data/lvis",)
    c.detection.batch_size = 64
    c.optimizer.learning_rate = 1.4e-4
    c.optimizer.schedule = "step"
    c.optimizer.groups = config_lib.parameter_groups(text_factor=1.0)  # the classifier starts from random values
    config_lib.lvis(c.eval)
    for section in (c.detection, c.eval):
        section.definitions = False
    c.eval.dictionary = ""
    return c
