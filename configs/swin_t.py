"""The paper's main run: DetCLIPv2 with Swin-T (Table 9), 12 epochs of Objects365, GoldG and CC15M.

  python -m detclipv2_jax.main --config=configs/swin_t.py[:variant]

| variant            | data                        | paper: zero-shot LVIS minival, fixed AP | here    |
|--------------------|-----------------------------|-----------------------------------------|---------|
| o365               | Objects365                  | 28.6                                    | not run |
| o365_cc3m          | Objects365, CC3M            | 31.3                                    | not run |
| o365_goldg_cc3m    | Objects365, GoldG, CC3M     | 38.4                                    | not run |
| full (the default) | Objects365, GoldG, CC15M    | 40.4                                    | not run |
| o365_in1k          | Objects365, ImageNet-1k     | 30.4                                    | not run |
| full_in1k          | full, ImageNet-1k           | 40.6                                    | not run |
| paper_canvases     | full, on Table 9's canvases | 40.4                                    | not run |

All but paper_canvases train on canvases that photos fill (docs/decisions.md). Hardware and time of the paper: 32 V100,
about 2,100 V100-hours for `full`. Data folders and the dictionary are made by `python -m detclipv2_jax.prepare`; the
run says which are missing and the command that builds each.

It starts from two public checkpoints, converted by `python -m detclipv2_jax.convert`:
* backbone: swin_tiny_patch4_window7_224.pth of the Swin repository (ImageNet-1k),
  https://github.com/SwinTransformer/storage/releases/download/v1.0.0/swin_tiny_patch4_window7_224.pth
* text tower: OpenAI's CLIP ViT-B/32, open_clip_model.safetensors of
  https://huggingface.co/timm/vit_base_patch32_clip_224.openai (605 MB with the image tower; any other file of these
  weights will do). The paper starts from FILIP's text tower, of the same architecture, which was never published.
With `--config.init_from.swin= --config.init_from.text=` both start from random values.
"""

from ml_collections import ConfigDict

from detclipv2_jax import config as config_lib


def get_config(variant: str = "") -> ConfigDict:
    c = config_lib.base()  # the defaults are the paper's Swin-T values
    c.name = "swin_t"
    c.init_from.swin = "weights/swin_tiny.safetensors"
    config_lib.pretraining(c, variant)
    # 6,144 pairs at once, 192 on each of 32 v5e, fit so under the compilers of jax 0.10.2 and of 0.12.0
    kept = {"detection": "blocks_but_attention", "grounding": "blocks_but_attention", "image_text": "all"}
    c.chips.v5e = c.chips.v6e = tuple((f"optimizer.remat.{kind}", remat) for kind, remat in kept.items())
    return c
