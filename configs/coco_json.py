"""Your own data: any of a COCO json, a grounding json and a TSV of image-text pairs, from raw files.

  python -m detclipv2_jax.main --config=configs/coco_json.py \\
    --config.detection.annotations=instances.json --config.detection.images=photos \\
    --config.eval.annotations=val.json --config.eval.images=photos

| variant            | model  | photos                              | made for                    |
|--------------------|--------|-------------------------------------|-----------------------------|
| nano (the default) | nano   | 320 x 320 px                        | laptops, trying things out  |
| overfit            | nano   | 320 x 320 px, no augmentation       | the first 8 photos by heart |
| swin_t             | Swin-T | 800 x 1344 px, multi-scale          | one or more GPUs or TPUs    |
| swin_t_24gb        | Swin-T | the same, in 2 chunks a step        | one GPU with 24 GB or more  |
| swin_t_16gb        | Swin-T | the same, in 4 chunks a step        | one GPU with 16 GB          |
| swin_t_frozen_text | Swin-T | the same, in 4 chunks a step        | one GPU with 16 GB or more  |

With `--config.init_from.checkpoint=RUN`, those of Swin-T are fine-tunes; configs/finetune_odinw.py says how the rate
may follow the scores, what can be mixed in against forgetting, and how that is measured. Chunks change no gradient and
cost no arithmetic (of pairs they do: images are embedded twice). The text tower of swin_t_frozen_text stays as it is
and encodes each name once. docs/fine-tuning.md has memory and hours.

What `overfit` reached on 2 CPU cores stands in docs/benchmarks.md; those of Swin-T were not run.
"""

from ml_collections import ConfigDict

from detclipv2_jax import config as config_lib

VARIANTS = ("nano", "overfit", "swin_t", "swin_t_24gb", "swin_t_16gb", "swin_t_frozen_text")


def get_config(variant: str = "") -> ConfigDict:
    variant = variant or "nano"
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r} of configs/coco_json.py is unknown; allowed are {', '.join(VARIANTS)}")
    c = config_lib.base()
    c.name = f"coco_json_{variant}"
    c.detection.definitions = c.eval.definitions = False  # a COCO json has none
    c.checkpoint.every_steps = 500
    if variant.startswith("swin_t"):
        c.detection.batch_size = c.grounding.batch_size = 16
        c.image_text.batch_size = 256
        c.optimizer.learning_rate = 1e-4  # the paper's rule: 1e-4 * sqrt(detection batch / 16)
        if variant != "swin_t":
            num_chunks = 2 if variant == "swin_t_24gb" else 4
            c.optimizer.accumulate.update({"detection": num_chunks, "grounding": 4, "image_text": 2})
            c.optimizer.remat.detection = "none"  # chunks save memory for nothing; of grounding the text tower has none
            c.optimizer.warmup_steps = 100  # 1,000 photos are 750 steps
            c.eval.batch_size = 8
        if variant == "swin_t_frozen_text":
            c.optimizer.frozen, c.optimizer.text_once = "text_encoder/.*", True
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
