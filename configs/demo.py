"""Everything in ten minutes on two CPU cores, with nothing to download.

  python -m detclipv2_jax.main --config=configs/demo.py

Generates a small world (data/scenes.py), trains a nano model on its three kinds of data, evaluates, draws pictures.
Boxes exist for base shapes only; novel shapes are named only in the captions of image-text pairs. Somewhat longer runs
of the same recipe are the table of the paper's claims: `python -m detclipv2_jax.claims`.
"""

import json
import pathlib

from ml_collections import ConfigDict

from detclipv2_jax import config as config_lib

RESULTS = pathlib.Path(__file__).parents[1] / "results" / "claims"


def closing(num_steps: int) -> str:
    """Returns what the scores mean, beside those of boxes alone after at most `num_steps`, from the table of claims."""
    text = (
        "What this means: base shapes had boxes, AP {APf:.1f}; of those found, {top1f:.1f} % get the right one "
        "of 240 names. Novel shapes had none, captions alone name them: AP {APr:.1f}, right names {top1r:.1f} %; their "
        "colours, which base shapes have too, are part of it (4 % of names are right by chance if the colour is)."
    )
    starts = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("start_[0-9].json"))]
    if starts:
        num_steps = max(steps for steps in map(int, starts[0]["base_AP_by_step"]) if steps <= num_steps)
        alone = [[start[f"{name}_AP_by_step"][str(num_steps)] for start in starts] for name in ("base", "novel")]
        base, novel = (sum(scores) / len(scores) for scores in alone)
        text += f" {num_steps} steps on boxes alone end at {base:.1f} and {novel:.1f} (python -m detclipv2_jax.claims)."
    return text


def get_config(variant: str = "") -> ConfigDict:
    if variant:
        raise ValueError(f"configs/demo.py has no variant {variant!r}")
    c = config_lib.base()
    c.name = "demo"
    c.model = config_lib.model("nano")
    c.scenes.num_detection = 4160  # many, each seen a few times: 1,600 seen 16 times are learnt by heart
    c.scenes.num_grounding = 704
    c.scenes.num_image_text = 3440
    c.scenes.num_eval = 200
    c.scenes.size_px = 96
    c.epochs = 9
    # when boxes have taught what words mean, and the rate is low: pairs from the first step on make all words alike
    c.grounding.from_epoch = c.image_text.from_epoch = 6
    for section in (c.detection, c.grounding, c.image_text, c.eval):
        section.canvases = ((96, 96),)
        section.long_side = 96
        if section is c.eval:
            section.short_side = 96
            section.batch_size = 40
        else:
            section.short_side = (96, 96)
            section.batch_size = 16
    c.detection.definitions = c.eval.definitions = False  # scenes have none
    c.detection.max_boxes = c.grounding.max_boxes = 16
    c.detection.num_concepts = c.grounding.num_concepts = 40
    c.loss.num_proposals = 12  # of 194 anchors; the paper's 100 of 2,134
    c.optimizer.learning_rate = 1e-3
    c.optimizer.groups = config_lib.parameter_groups(text_factor=1.0)  # nothing here is pre-trained
    c.optimizer.warmup_steps = 50
    c.log_every_steps = 20
    c.pictures_every_steps = 300  # also of pairs: the best region of each phrase
    c.checkpoint.every_steps = 500
    c.closing = closing(c.epochs * c.scenes.num_detection // c.detection.batch_size)
    return c
