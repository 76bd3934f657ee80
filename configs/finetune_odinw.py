"""Fine-tunes on one member of ODinW by the paper's recipe (Table 11), one recipe for all of them.

  python -m detclipv2_jax.main --config=configs/finetune_odinw.py:Raccoon --config.init_from.checkpoint=runs/swin_t_full

`python -m detclipv2_jax.transfer --checkpoint=runs/swin_t_full --data=data/odinw` does so for all of them, with few
shots of three seeds and with all images, and gives one table.

The variant is the member (Packages by default), with `:swin_l` behind it for Swin-L. data/odinw/<member> has train/ and
valid/, each with an annotations.json among its photos. The rate falls to a tenth when AP on valid/ was not better for 5
epochs, and the run ends when that does not help any more; the checkpoint with the best AP is the one that is scored. 8
V100 in the paper. An epoch of the smallest sets is a step a canvas: 250 of them are over before the warmup (500 steps)
is. The paper does not say what it did; --config.detection.weight=10 passes the set ten times an epoch.

* Few shots, as GLIP: --config.detection.num_shots=1|3|5|10 --config.detection.few_shot_seed=3|30|300; GLIP passes such
  a set 8, 4, 2 or 1 times an epoch: --config.detection.weight=8 …
* What it forgets: --config.forgetting.annotations=data/lvis/lvis_v1_minival_inserted_image_name.json
  --config.forgetting.images=data/coco scores that set before and after.
* Against forgetting: --config.optimizer.frozen='text_encoder/.*' leaves the text tower as it is;
  --config.detection.data="('data/objects365',)" --config.detection.source_weights="(1.0, 0.001)", or
  --config.grounding.data="('data/gqa',)" --config.grounding.weight=0.001, mix in what it was pre-trained on.

The paper's Swin-T reaches a mean AP of 68.0 (68.5 in its Table 15) over the 13; not run here.
"""

from ml_collections import ConfigDict

from detclipv2_jax import config as config_lib
from detclipv2_jax.eval import odinw

MEMBERS = tuple(member.name for member in odinw.members())


def get_config(variant: str = "") -> ConfigDict:
    member, _, size = (variant or "Packages").partition(":")
    if member not in MEMBERS or size not in ("", "swin_t", "swin_l"):
        raise ValueError(
            f"variant {variant!r} of configs/finetune_odinw.py is unknown; allowed are {', '.join(MEMBERS)}, each also "
            "with :swin_l behind it"
        )
    c = config_lib.base()
    c.model = config_lib.model(size or "swin_t")
    c.name = f"finetune_odinw_{member}" + "_swin_l" * (size == "swin_l")
    c.epochs = 250
    for section, split in ((c.detection, "train"), (c.eval, "valid")):
        section.annotations = f"data/odinw/{member}/{split}/annotations.json"
        section.images = f"data/odinw/{member}/{split}"
        section.definitions = False  # a COCO json has none
    c.detection.batch_size = 32
    c.optimizer.learning_rate = 4e-5
    c.optimizer.groups = config_lib.parameter_groups(text_factor=0.01)
    c.optimizer.warmup_steps = 500
    c.optimizer.schedule = "plateau"
    c.optimizer.min_learning_rate = 1e-8
    c.optimizer.patience = 5
    c.optimizer.stop_patience = 8
    c.eval.every_epochs = 1
    c.checkpoint.keep_best = True
    c.checkpoint.keep = 1
    return c
