"""LVIS v1 with any checkpoint: standard and fixed AP, by frequency and size, and AR@300.

  python -m detclipv2_jax.main --mode=eval --config=configs/eval_lvis.py[:val] \\
    --config.init_from.checkpoint=runs/swin_t_full

| variant               | images | annotations (in data/lvis)                  | photos (in data/coco) |
|-----------------------|--------|---------------------------------------------|-----------------------|
| minival (the default) | 4,809  | lvis_v1_minival_inserted_image_name.json    | val2017               |
| val                   | 19,809 | lvis_v1_val.json                            | train2017, val2017    |

Results go to runs/eval_lvis_<variant>/eval; give each checkpoint its --workdir. A killed evaluation continues.
The paper's fixed AP with Swin-T is 40.4 on minival and 32.8 on val; not run here.
"""

from ml_collections import ConfigDict

from detclipv2_jax import config as config_lib

ANNOTATIONS = {"minival": "lvis_v1_minival_inserted_image_name.json", "val": "lvis_v1_val.json"}


def get_config(variant: str = "") -> ConfigDict:
    variant = variant or "minival"
    if variant not in ANNOTATIONS:
        raise ValueError(
            f"variant {variant!r} of configs/eval_lvis.py is unknown; allowed are {', '.join(ANNOTATIONS)}"
        )
    c = config_lib.base()
    c.name = f"eval_lvis_{variant}"
    config_lib.lvis(c.eval, ANNOTATIONS[variant])
    return c
