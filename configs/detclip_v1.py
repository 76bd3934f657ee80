"""DetCLIP (v1) with Swin-T, the baseline of the paper's Table 6: Objects365, GoldG and pairs with pseudo boxes.

  python -m detclipv2_jax.main --config=configs/detclip_v1.py[:variant]

| variant            | data                                  | paper: zero-shot LVIS minival, fixed AP | here    |
|--------------------|---------------------------------------|-----------------------------------------|---------|
| o365_goldg         | Objects365, GoldG                     | 34.4 (as YOLO-World quotes it)          | not run |
| full (the default) | the same, 1M pairs with pseudo boxes  | 35.9                                    | not run |

`o365_goldg` trains the detector whose boxes `python -m detclipv2_jax.prepare pseudo_boxes` gives the pairs; they are
grounding data. Other than in configs/swin_t.py texts have 48 tokens, there is no deformable layer and no contrastive
loss; docs/decisions.md says what of v1's recipe is known. Weights are those of configs/swin_t.py.
"""

from ml_collections import ConfigDict

from detclipv2_jax import config as config_lib

VARIANTS = {"full": ("data/yfcc1m_boxes",), "o365_goldg": ()}


def get_config(variant: str = "") -> ConfigDict:
    variant = variant or "full"
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r} of configs/detclip_v1.py is unknown; allowed are {', '.join(VARIANTS)}")
    c = config_lib.base()
    c.init_from.swin = "weights/swin_tiny.safetensors"
    config_lib.pretraining(c)
    c.name = f"detclip_v1_{variant}"
    c.grounding.data += VARIANTS[variant]
    c.image_text.data = ()
    c.model.text.context_length = 48
    c.optimizer.text_lengths.update({"grounding": ((48, 0.125), (8, 0.875)), "image_text": ()})
    c.model.head.deformable = False
    return c
