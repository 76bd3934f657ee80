"""COCO val2017 with any checkpoint: the 12 COCO numbers.

  python -m detclipv2_jax.main --mode=eval --config=configs/eval_coco.py --config.init_from.checkpoint=runs/swin_t_full

Reads data/coco/annotations/instances_val2017.json and data/coco/val2017; results go to runs/eval_coco/eval. COCO's
categories have no definitions; --config.eval.dictionary=FILE with --config.eval.definitions=True gives them some.
The paper has no COCO number; not run here.
"""

from ml_collections import ConfigDict

from detclipv2_jax import config as config_lib


def get_config() -> ConfigDict:
    c = config_lib.base()
    c.name = "eval_coco"
    c.eval.annotations = "data/coco/annotations/instances_val2017.json"
    c.eval.images = "data/coco/val2017"
    c.eval.definitions = False
    return c
