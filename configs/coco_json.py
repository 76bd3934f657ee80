"""Your own data: any of a COCO json, a grounding json and a TSV of image-text pairs, from raw files.

  python -m detclipv2_jax.main --config=configs/coco_json.py \\
    --config.detection.annotations=instances.json --config.detection.images=photos \\
    --config.eval.annotations=val.json --config.eval.images=photos

| variant            | model  | photos                              | made for                    |
|--------------------|--------|-------------------------------------|-----------------------------|
| nano (the default) | nano   | 320 x 320 px                        | laptops, trying things out  |
| overfit            | nano   | 320 x 320 px, no augmentation       | the first 8 photos by heart |
| swin_t             | Swin-T | 800 x 1344 px, multi-scale          | one or more GPUs or TPUs    |

With `--config.init_from.checkpoint=RUN`, swin_t is a fine-tune; configs/finetune_odinw.py says how its learning rate
may follow the scores, what can be mixed in against forgetting, and how that is measured.

What `overfit` reached on 2 CPU cores stands in docs/benchmarks.md; swin_t was not run.
"""

from ml_collections import ConfigDict

from detclipv2_jax import config as config_lib

VARIANTS = ("nano", "overfit", "swin_t")


def get_config(variant: str = "") -> ConfigDict:
    variant = variant or "nano"
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r} of configs/coco_json.py is unknown; allowed are {', '.join(VARIANTS)}")
    c = config_lib.base()
    c.name = f"coco_json_{variant}"
    c.detection.definitions = c.eval.definitions = False  # a COCO json has none
    c.checkpoint.every_steps = 500
    if variant == "swin_t":
        c.detection.batch_size = c.grounding.batch_size = 16
        c.image_text.batch_size = 256
        c.optimizer.learning_rate = 1e-4  # the paper's rule: 1e-4 * sqrt(detection batch / 16)
        return c

    c.model = config_lib.model("nano")
    for section in (c.detection, c.grounding, c.eval):
        section.canvases = ((320, 320),)
        section.long_side = 320
    c.eval.short_side = 320
    c.eval.batch_size = 8
    for section in (c.detection, c.grounding):
        section.short_side = (240, 320)
        section.batch_size = 8
        section.max_boxes = 100
    c.image_text.canvases = ((224, 224),)
    c.image_text.short_side = (224, 224)
    c.image_text.long_side = 224
    c.image_text.batch_size = 32
    c.loss.num_proposals = 50
    c.optimizer.learning_rate = 1e-3
    c.optimizer.groups = config_lib.parameter_groups(text_factor=1.0)  # nothing here is pre-trained
    c.optimizer.warmup_steps = 50
    c.optimizer.clip_norm = 5.0
    c.log_every_steps = 5
    if variant == "overfit":
        c.epochs = 300  # one step each
        c.optimizer.groups = config_lib.parameter_groups(text_factor=0.1)  # eight photos need few words
        c.detection.max_examples = c.eval.max_examples = 8
        c.detection.short_side = (320, 320)
        c.detection.flip_prob = 0.0
        c.optimizer.learning_rate = 2e-3
        c.optimizer.weight_decay = 0.0
        c.checkpoint.every_steps = 150
    return c
