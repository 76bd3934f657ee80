"""Fine-tunes on LVIS v1 by the paper's recipe (Table 10): 24 epochs, cosine.

  python -m detclipv2_jax.main --config=configs/finetune_lvis.py --config.init_from.checkpoint=runs/swin_t_full

| variant            | model  | paper: fixed AP on minival, val after fine-tuning | here    |
|--------------------|--------|----------------------------------------------------|---------|
| swin_t (default)   | Swin-T | 50.7, 43.7                                         | not run |
| swin_l             | Swin-L | 60.1, 53.1                                         | not run |

Hardware of the paper: 16 V100. data/lvis is built by `python -m detclipv2_jax.prepare lvis`, which the run tells; it is
scored on minival, and by configs/eval_lvis.py:val on val. --config.optimizer.schedule=step instead takes a tenth of the
rate after epochs 16 and 22, the usual 2x schedule.
"""

from ml_collections import ConfigDict

from detclipv2_jax import config as config_lib

VARIANTS = ("swin_t", "swin_l")


def get_config(variant: str = "") -> ConfigDict:
    variant = variant or "swin_t"
    if variant not in VARIANTS:
        raise ValueError(
            f"variant {variant!r} of configs/finetune_lvis.py is unknown; allowed are {', '.join(VARIANTS)}"
        )
    c = config_lib.base()
    c.name = f"finetune_lvis_{variant}"
    c.model = config_lib.model(variant)
    c.epochs = 24
    c.detection.data = ("data/lvis",)
    c.detection.batch_size = 64
    c.optimizer.learning_rate = 4e-5
    c.detection.dictionary = config_lib.DICTIONARY
    config_lib.lvis(c.eval)
    return c
