"""Every configuration key, its unit and its consequence.

`configs/*.py` start from `base()`, set values and return it. Sizes that follow from others (steps, capacities) are
derived after the command line is read, so that it reaches all that depends on it. `validation.validate` checks all.
"""

from __future__ import annotations

import functools
import math
import operator
from typing import Any

from ml_collections import ConfigDict

from detclipv2_jax.chips import CHIPS

LANDSCAPE, PORTRAIT = (800, 1344), (1344, 800)
KINDS = ("detection", "grounding", "image_text")
DICTIONARY = "data/dictionary.tsv"  # of the paper's configurations; `prepare dictionary` writes it
# folders of grounding and of pairs beside Objects365
PRETRAINING = {
    "o365": ((), ()),
    "o365_cc3m": ((), ("data/cc3m",)),
    "o365_goldg_cc3m": (("data/gqa", "data/flickr30k"), ("data/cc3m",)),
    "full": (("data/gqa", "data/flickr30k"), ("data/cc3m", "data/cc12m")),
    "o365_in1k": ((), ("data/imagenet1k",)),  # Table 13
    "full_in1k": (("data/gqa", "data/flickr30k"), ("data/cc3m", "data/cc12m", "data/imagenet1k")),
    "paper_canvases": (("data/gqa", "data/flickr30k"), ("data/cc3m", "data/cc12m")),  # full, on Table 9's canvases
}


def model(size: str) -> ConfigDict:
    """Returns the architecture keys of one size: "nano" (laptops), "swin_t", "swin_s", "swin_b" or "swin_l"."""
    sizes = {  # width, depths, heads, window
        "nano": (32, (1, 1, 2, 1), (1, 2, 4, 8), 4),
        "swin_t": (96, (2, 2, 6, 2), (3, 6, 12, 24), 7),
        "swin_s": (96, (2, 2, 18, 2), (3, 6, 12, 24), 7),
        "swin_b": (128, (2, 2, 18, 2), (4, 8, 16, 32), 7),
        "swin_l": (192, (2, 2, 18, 2), (6, 12, 24, 48), 12),
    }
    if size not in sizes:
        raise ValueError(f"model size {size!r} is unknown; allowed are {', '.join(sizes)}")
    embed_dim, depths, num_heads, window = sizes[size]
    nano = size == "nano"
    c = ConfigDict()
    c.dtype = "float32" if nano else "bfloat16"  # compute type; parameters and losses are float32
    c.remat = "none" if nano else "blocks"  # computed again: none | blocks_but_attention | blocks | heads | all
    c.embed_dim = 64 if nano else 512  # D: size of region and concept embeddings
    # Swin Transformer; its stages 2-4 feed the pyramid
    c.swin = ConfigDict()
    c.swin.embed_dim = embed_dim  # channels of the first stage; each later one has twice as many
    c.swin.depths = depths  # blocks of each stage
    c.swin.num_heads = num_heads  # attention heads of each stage
    c.swin.window_size = window  # side of an attention window in tokens
    c.swin.drop_path_rate = 0.0 if nano else 0.2  # stochastic depth of the last block, linear from 0 (Table 9)
    c.swin.attention_impl = "auto"  # auto | xla | pallas: how windows are computed; auto: kernels on GPUs, TPUs
    # FPN (P3-P7) and the ATSS head shared over its levels
    c.head = ConfigDict()
    c.head.channels = 64 if nano else 256  # of the pyramid and of both towers
    c.head.num_convs = 2 if nano else 4  # 3x3 convolutions in each tower
    c.head.num_groups = 8 if nano else 32  # groups of group norm
    c.head.deformable = True  # modulated deformable layer before the classification tower (Table 3)
    c.head.deform_impl = "auto"  # auto | xla | gather | banded | pallas: how samples are taken; see deform_conv2d
    c.head.objectness = "none"  # none | classification | iou: extra head, needed by loss.selection of that name
    # text tower: CLIP's transformer
    c.text = ConfigDict()
    c.text.width = 64 if nano else 512  # channels
    c.text.num_layers = 2 if nano else 12  # transformer blocks
    c.text.num_heads = 2 if nano else 8  # attention heads
    c.text.context_length = 16  # tokens a concept, [SOS] and [EOS] included (Table 9)
    # names of a closed vocabulary, each with a learned embedding in place of the tower's; (): any words
    c.text.classes = ()
    # logit = scale * f_region . f_text + bias (docs/decisions.md: logits)
    c.logit = ConfigDict()
    c.logit.normalize_regions = nano  # L2-normalise region embeddings too (concept embeddings always are)
    c.logit.scale = 10.0 if nano else 1.0  # initial value
    c.logit.bias = -math.log(99.0)  # initial value: probability 0.01, the focal loss's prior; learnable
    return c


def parameter_groups(*, text_factor: float) -> tuple[tuple[str, float, bool], ...]:
    """Returns `optimizer.groups`: (regex over the parameter's name, factor on the learning rate, weight decay?).

    The first match holds, and every parameter must match one. `text_factor` is the text tower's: 0.1 in the paper,
    whose tower is pre-trained; 1 for one that starts from scratch.
    """
    return (
        (r"text_encoder/.*(embedding|bias|scale)$", text_factor, False),
        (r"text_encoder/.*", text_factor, True),
        (r".*(bias|relative_position_table|logit_scale|logit_bias|level_scales)$", 1.0, False),
        (r".*(norm|norm\w+)/scale$", 1.0, False),
        (r".*", 1.0, True),
    )


def init_from() -> ConfigDict:
    """Returns the keys of `config.init_from`: what a run starts from, where its workdir has no checkpoint."""
    c = ConfigDict()
    # a workdir of ours: start from its parameters (the best ones if it keeps them), step and optimizer anew; or
    # evaluate it. Words and canvases may be others, config.model may not
    c.checkpoint = ""
    # .safetensors file of the backbone, made by `python -m detclipv2_jax.convert`; "": random values. Fitted to
    # model.swin.window_size (the text tower: to model.text.context_length). Not read where there is a checkpoint
    c.swin = ""
    c.text = ""  # the same for the text tower
    return c


def _data_section(kind: str) -> ConfigDict:
    """Returns the keys of one kind of data. A kind without files is left out of the run."""
    c = ConfigDict()
    c.data = ()  # folders built by `python -m detclipv2_jax.prepare`
    c.images = ""  # image folder for the raw files below
    c.batch_size = 6144 if kind == "image_text" else 128  # images a step over all devices
    c.canvases = ((320, 320),) if kind == "image_text" else (LANDSCAPE, PORTRAIT)  # (height, width) px
    # (smallest, largest) px: the short side is drawn from this range, then the long side bounded; aspect ratio is kept
    c.short_side = (320, 320) if kind == "image_text" else (480, 800)
    c.long_side = 320 if kind == "image_text" else 1333  # px at most
    # sizes of a canvas, evenly over short_side, a compiled step each: a batch has one, which its photos fill. 0, the
    # paper: each photo has a short side of its own
    c.num_scales = 0
    c.flip_prob = 0.5  # share of images that are mirrored left to right
    # words of other languages that mirroring makes wrong, e.g. ("links", "rechts"): photos with a category, phrase or
    # caption that has one stay as they are, as those with left, right or clockwise do in detection and grounding
    c.unflippable_words = ()
    c.max_examples = 0  # use the first n images of the source; 0: all
    c.definitions = kind == "detection"  # "name, definition" instead of the name (docs/decisions.md)
    c.dictionary = ""  # TSV `name <tab> definition`: definitions, and negatives for grounding
    c.weight = 1.0  # multiplies the number of steps drawn from this kind; small sets: passes an epoch
    # the first of the epochs (from 0) that draws from this kind. The paper's towers are pre-trained; random ones
    # learn from pairs when boxes have told them what regions are
    c.from_epoch = 0
    # () mixes the sources of a kind by size; else a factor on `weight` for each, the raw files first, then `data`:
    # (1.0, 0.01) adds a hundredth of a pretraining set to every epoch, other images each time
    c.source_weights = ()
    c.max_bad_share = 0.01  # an error above this share of unusable images or boxes
    c.follow_links = False  # True: photos of `images` may be links to files elsewhere (DVC, git-annex, hub caches)
    if kind == "image_text":
        # a factor on `weight` for folders of class names (`prepare classes`): ImageNet is repeated 3 times (Table 13)
        c.class_weight = 3.0
        c.pairs = ""  # TSV `image <tab> caption [<tab> JSON list of noun phrases]`
        c.max_phrases = 8  # noun phrases a caption, beside the caption itself
    else:
        c.annotations = ""  # COCO json (detection) or MDETR-style json with tokens_positive (grounding)
        c.max_boxes = 300 if kind == "detection" else 100  # an image; more are cut, the smallest, equal ones together
        # concepts a box, all of them positives: those of its phrases and of boxes identical to it; more are counted and
        # cut. 1: "each box carries the label of one concept" (section 3.1), its others are negatives there
        c.max_box_concepts = 8
        c.num_concepts = 150 if kind == "detection" else 100  # M: positives + sampled negatives an image
    if kind == "detection":
        # of a json with LVIS's neg_category_ids or not_exhaustive_category_ids a name is a negative only of the images
        # that say so, in the whole batch. False: of all images that do not have it, as elsewhere
        c.federated = True
        c.num_shots = 0  # of the raw json take images until each category is on so many, as GLIP does; 0: all
        c.few_shot_seed = 3  # GLIP's are 3, 30, 300
        # categories left out with their boxes, such as the parent of Roboflow's exports; the log says which have none
        c.drop_categories = ()
    # rows of the concept table a host; 0: derived so that nothing can overflow. Fewer save memory where batches seldom
    # fill the table; negatives without a row are counted in metrics
    c.max_concepts = 0
    return c


def scenes() -> ConfigDict:
    """Returns the keys of `config.scenes`: a generated world (data/scenes.py), for the demo, the claims and tests."""
    c = ConfigDict()
    c.num_detection = 0  # images with boxes and names; all four numbers zero: no generated data
    c.num_grounding = 0  # images with phrases and boxes
    c.num_image_text = 0  # images with captions
    c.num_eval = 0  # images to evaluate on
    c.size_px = 128  # width and height of a scene
    c.seed = 0  # of the world
    c.novel_captions = True  # captions name novel shapes, too; False: nothing does
    c.named_share = 0.5  # of the objects of a pair, by its caption
    c.wrong_share = 0.0  # of the captions, which are those of other images
    c.folder = ""  # where they are written once, to be read like real data; "": <workdir>/data
    return c


def _input_section() -> ConfigDict:
    """Returns the keys of `config.input`: how the host reads, which changes no value."""
    c = ConfigDict()
    c.num_workers = 0  # processes a stream; 0: threads of the main process
    c.num_threads = 2  # threads a stream, when num_workers is 0
    c.prefetch_batches = 2  # finished batches a stream that wait for their step
    c.timeout_s = 300  # s without a batch after which the run ends and says what it waited for
    return c


def loss() -> ConfigDict:
    """Returns the keys of `config.loss` (paper section 3)."""
    c = ConfigDict()
    c.focal_alpha = 0.25  # weight of positives in the focal loss; negatives have 1 - alpha
    c.focal_gamma = 2.0  # how much the focal loss leaves out what is easy
    c.box_weight = 2.0  # of the GIoU loss; detection only
    c.centerness_weight = 1.0  # of the centerness loss; detection only
    c.objectness_weight = 1.0  # of the extra head's loss; only with model.head.objectness
    c.contrastive_weight = 0.1  # lambda: of the contrastive loss (Table 2f)
    c.class_weight = 0.1  # of the cross-entropy over class names, in place of the contrast (appendix C)
    c.class_proposals = 1  # k: regions an image in it
    c.temperature = 0.5  # tau of the contrastive loss (Table 2e)
    c.label_smoothing = 0.1  # of the contrastive loss
    c.num_proposals = 100  # k: regions an image in the contrastive loss (Table 2d)
    # what chooses these regions (Table 2a): classification | iou | centerness | text_sample | text_batch |
    # text_batch_centerness
    c.selection = "text_batch"
    c.selection_scope = "global"  # device: the paper's per-GPU batch; global: independent of the device count
    c.selection_pre_nms = 1000  # anchors that enter the selection's NMS
    c.selection_nms_iou = 0.6  # of that NMS: a region that overlaps a better one by more is left out
    # what of a caption is matched with regions: phrases (it and its noun phrases, an embedding each) | tokens (all of
    # its tokens: FILIP's late interaction)
    c.interaction = "phrases"
    c.matching = "one_to_one"  # of a phrase with regions: max_size | one_to_one | one_to_many (Table 2b)
    c.matching_temperature = 0.1  # tau_t of one_to_many (Eq. 4); the paper gives no value
    c.side = "text_to_image"  # of the contrast: text_to_image | image_to_text | bilateral (Table 2c)
    c.chunk_bytes = 128 << 20  # a device: similarities held at once by the losses; smaller: less memory, slower
    return c


def optimizer() -> ConfigDict:
    """Returns the keys of `config.optimizer` (Table 9)."""
    c = ConfigDict()
    c.learning_rate = 2.8e-4  # after the warmup
    # after the warmup: cosine | step (falls at decay_at) | plateau (falls when eval.monitor does not rise) | constant
    c.schedule = "cosine"
    c.warmup_steps = 1000  # linear from 0; evaluations before its end are not held against the run
    c.min_learning_rate = 0.0  # where cosine ends, and the smallest of plateau
    c.decay_at = (2 / 3, 11 / 12)  # shares of all epochs
    c.decay_factor = 0.1  # that step and plateau multiply the rate by
    c.patience = 5  # evaluations that plateau waits for a better score
    # evaluations without a better score (plateau: at min_learning_rate) after which the run ends; 0: it does not
    c.stop_patience = 0
    c.weight_decay = 0.05  # AdamW's, times the learning rate
    c.b1 = 0.9  # AdamW's decay of the mean of gradients
    c.b2 = 0.999  # AdamW's decay of the mean of their squares
    c.clip_norm = 35.0  # global gradient norm (docs/decisions.md); 0: no clipping
    # (regex over the parameter's name, factor on the learning rate, weight decay?); the first match holds
    c.groups = parameter_groups(text_factor=0.1)
    # regex over the whole name of parameters that stay as they are, without moments: r"text_encoder/.*"; "": none
    c.frozen = ""
    c.text_once = False  # a frozen text tower encodes a concept when it is first met (2 KB), not in every step
    c.ema_decay = 0.0  # of a moving average of the parameters, used for evaluation; 0: none
    c.accumulate, c.remat, c.text_lengths = ConfigDict(), ConfigDict(), ConfigDict()
    for kind in KINDS:
        c.accumulate[kind] = 1  # chunks a step whose gradients are summed exactly; more save memory
        c.remat[kind] = ""  # model.remat of this kind of step; "": as it is
        # (tokens, share of a device's rows), the longest first: so many texts are encoded so long; those that find no
        # room, in a second pass (metric text_overflow), which costs nothing but time. (): all at full length
        c.text_lengths[kind] = ()
    return c


def _eval_section() -> ConfigDict:
    """Returns the keys of `config.eval`: evaluation and prediction (docs/decisions.md)."""
    c = ConfigDict()
    c.annotations = ""  # COCO json; "" trains without evaluation
    c.images = ""  # image folder of the json
    c.max_examples = 0  # use the first n images; 0: all
    c.batch_size = 32  # images over all devices
    c.canvases = (LANDSCAPE, PORTRAIT)  # (height, width) px
    c.short_side = 800  # px
    c.long_side = 1333  # px at most
    c.definitions = True  # "name, definition" as in detection training
    c.dictionary = ""  # TSV `name <tab> definition`
    c.max_bad_share = 0.0  # an error above this share of unusable images or boxes
    c.drop_categories = ()  # names of categories that are neither asked for nor scored
    c.follow_links = False  # as for training data
    c.every_steps = 0  # steps between evaluations; 0: only at the end
    c.every_epochs = 0  # the same in passes over the data; 0: not
    c.monitor = "AP"  # the score that plateau, early stop and checkpoint.keep_best go by
    # what ranks boxes: words (times centerness), or by whatever is an object, as OLN, and named by its best word:
    # centerness | objectness (the head of model.head.objectness) | centerness_objectness (their geometric mean)
    c.score = "words"
    c.score_threshold = 0.0  # boxes at or below are left out
    c.nms_iou = 0.6  # a box that overlaps a better one of its word by more is left out
    # best (anchor, word) pairs an image that enter NMS: where it keeps max_detections of them, more change nothing
    c.pre_nms = 3000
    c.max_detections = 300  # boxes an image
    c.num_pictures = 8  # images drawn into pictures/
    return c


def lvis(section: ConfigDict, annotations: str = "lvis_v1_minival_inserted_image_name.json") -> None:
    """Sets an evaluation to LVIS, minival by default, by one protocol for all configurations (docs/decisions.md)."""
    section.annotations = f"data/lvis/{annotations}"
    section.images = "data/coco"
    section.dictionary = DICTIONARY
    section.pre_nms = 10_000
    section.max_detections = 1000  # fixed AP counts them all, standard AP the best 300 of them


def forgetting() -> ConfigDict:
    """Returns the keys of `config.forgetting`: a second set, scored before and after a fine-tune, else as in eval."""
    c = ConfigDict()
    c.annotations = ""  # COCO json; "": none
    c.images = ""  # image folder of the json
    c.max_examples = 0  # use the first n images; 0: all
    c.definitions = True  # "name, definition" instead of the name
    c.dictionary = ""  # TSV `name <tab> definition`
    c.drop_categories = ()  # names of categories that are neither asked for nor scored
    return c


def mesh() -> ConfigDict:
    """Returns the keys of `config.mesh`."""
    return ConfigDict({"fsdp": 1})  # devices over which parameters and moments are split; the rest is data parallel


def chips() -> ConfigDict:
    """Returns the keys of `config.chips`, one an accelerator."""
    c = ConfigDict()
    for chip in CHIPS:
        c[chip] = ()  # (key, value) pairs that hold on it, with only the command line above; `preflight` finds them
    return c


def checkpoint() -> ConfigDict:
    """Returns the keys of `config.checkpoint`."""
    c = ConfigDict()
    c.every_steps = 1000  # steps between checkpoints
    c.keep = 3  # newest ones that stay
    c.keep_best = False  # also keep the one with the best eval.monitor, with which the workdir then predicts
    return c


def pretraining(c: ConfigDict, variant: str = "") -> None:
    """Sets data of the paper's pretraining (Tables 1, 4) and its evaluation; ValueError for an unknown variant."""
    variant = variant or "full"
    if variant not in PRETRAINING:
        raise ValueError(f"variant {variant!r} of configs/{c.name}.py is unknown; allowed are {', '.join(PRETRAINING)}")
    c.name = f"{c.name}_{variant}"
    c.init_from.text = "weights/clip_text_vit_b32.safetensors"
    c.detection.data = ("data/objects365",)
    c.grounding.data, c.image_text.data = PRETRAINING[variant]
    c.detection.dictionary = c.grounding.dictionary = DICTIONARY  # definitions and negatives (section 3.1)
    if variant != "paper_canvases":  # photos fill nine tenths of these (docs/decisions.md)
        for section in (c.detection, c.grounding):
            section.canvases, section.num_scales = ((800, 1216), (1216, 800)), 3
        c.image_text.canvases = ((320, 320), (256, 320), (320, 256))
    # in 9 rows a pair has 5.3 texts: a caption of 13 tokens in the mean, and phrases of 4 or 5, as grounding has
    c.optimizer.text_lengths.image_text = ((16, 0.16), (6, 0.54))
    c.optimizer.text_lengths.grounding = ((16, 0.125), (8, 0.875))
    c.loss.selection_scope = "device"  # the paper chooses proposals by the texts of the local batch
    # 80 GB hold it; each chunk reads all regions of its 16 images: without the kernels 802 GB of grounding, not 1,423
    c.chips.h100 = c.chips.h200 = c.chips.b200 = (
        *(("loss.chunk_bytes", 1 << 30), ("optimizer.remat.detection", "none"), ("optimizer.remat.grounding", "none")),
        ("optimizer.remat.image_text", "blocks_but_attention"),
    )
    lvis(c.eval)


def base() -> ConfigDict:
    """Returns the configuration with the paper's Swin-T values wherever the paper has one (Table 9)."""
    c = ConfigDict()
    c.name = "base"  # without --workdir the run lives in runs/<name>
    c.seed = 0  # parameters, order of steps, augmentation
    c.epochs = 12  # passes over every source
    c.num_steps = 0  # caps the run (steps); 0: all epochs
    # how kinds of data share the steps: ("proportional", 1.0): by their numbers of batches | ("capped", 4.0): at most 4
    # steps of pairs a step of boxes | ("temperature", 2.0): by the square roots of their numbers, epochs as long
    c.mixing = ("proportional", 1.0)
    c.model = model("swin_t")
    c.init_from = init_from()
    for kind in KINDS:
        c[kind] = _data_section(kind)
    c.scenes = scenes()
    c.input = _input_section()
    c.loss = loss()
    c.optimizer = optimizer()
    c.mesh = mesh()
    c.timeout_s = 600  # s that processes wait for a late one (hosts compile at their own pace), then the run ends
    c.chips = chips()
    c.eval = _eval_section()
    c.forgetting = forgetting()
    c.closing = ""  # what is printed after the scores; "{APr:.1f}" stands for a score in %
    c.nonfinite = "stop"  # stop | skip: what a loss or gradient that is not finite does; such a step is never applied
    c.trackers = ()  # services that get the scalars, too: mlflow, wandb, which find server and key by their variables
    c.log_every_steps = 50  # every n-th step of a kind is logged: detection, grounding, image-text
    # a stream's first batch is drawn and every n-th after it, pairs with each phrase's best region; 0: only the first
    c.pictures_every_steps = 1000
    c.profile_steps = 0  # traced by jax's profiler into profile/, from the tenth on, for TensorBoard or xprof; 0: none
    c.checkpoint = checkpoint()
    return c


def for_chip(config: ConfigDict, chip: str | None) -> ConfigDict:
    """Returns the configuration with the values of `config.chips` for a chip; None has none."""
    config = config.copy_and_resolve_references()
    for key, value in config.chips[chip] if chip else ():
        *path, last = key.split(".")
        functools.reduce(operator.getitem, path, config)[last] = value
    return config


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Returns the values of a configuration by dotted name."""
    if isinstance(value, ConfigDict):
        return {name: leaf for key in value for name, leaf in flat(value[key], f"{prefix}.{key}").items()}
    return {prefix[1:]: value}
