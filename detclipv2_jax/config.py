"""Every configuration key, its unit and its consequence; and the check of a whole configuration.

`configs/*.py` start from `base()`, set values and return it. Sizes that follow from other values
(batches per epoch, total steps, capacities) are derived in code after command-line overrides, so an
override always reaches everything that depends on it. `validate` lists all problems at once and touches
no device and no data.
"""

from __future__ import annotations

import functools
import json
import math
import operator
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

from absl import app, flags
from ml_collections import ConfigDict, config_flags

LANDSCAPE, PORTRAIT = (800, 1344), (1344, 800)
KINDS = ("detection", "grounding", "image_text")
SELECTIONS = ("classification", "iou", "centerness", "text_sample", "text_batch", "text_batch_centerness")
MATCHINGS = ("max_size", "one_to_one", "one_to_many")
SIDES = ("text_to_image", "image_to_text", "bilateral")
SCOPES = ("device", "global")
REMATS = ("none", "blocks", "heads", "all")
DTYPES = ("float32", "bfloat16")
DEFORMS = ("auto", "gather", "banded")
ATTENTIONS = ("auto", "xla", "pallas")
IMPLS = ("xla", "pallas")
SCHEDULES = ("cosine", "step", "plateau", "constant")
ORDERS = ("shuffled", "cycle")
NONFINITE = ("stop", "skip")
MONITORS = tuple(f"{lead}AP{of}" for lead in ("", "fixed_") for of in ("", "50", "75", *"smlrcf"))
OBJECTNESS = ("none", "classification", "iou")
# accelerators by the beginning of their `device_kind`; the first fits
CHIPS = {"TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v6 lite": "v6e", "NVIDIA H100": "h100"}


def model(size: str) -> ConfigDict:
    """Returns the architecture keys of one size: "nano" (laptops), "swin_t", "swin_s", "swin_b" or "swin_l"."""
    sizes = {
        # width, depths, heads, window
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
    c.remat = "none" if nano else "blocks"  # what is recomputed in the backward pass: none | blocks | heads | all
    c.embed_dim = 64 if nano else 512  # D: size of region and concept embeddings
    # Swin Transformer; stages 2-4 feed the pyramid
    c.swin = ConfigDict()
    c.swin.embed_dim = embed_dim
    c.swin.depths = depths
    c.swin.num_heads = num_heads
    c.swin.window_size = window
    c.swin.drop_path_rate = 0.0 if nano else 0.2  # stochastic depth of the last block, linear from 0 (Table 9)
    c.swin.attention_impl = "auto"  # auto | xla | pallas: how windows are computed; auto: one kernel on NVIDIA GPUs
    # FPN (P3-P7) and the ATSS head shared over its levels
    c.head = ConfigDict()
    c.head.channels = 64 if nano else 256  # of the pyramid and of both towers
    c.head.num_convs = 2 if nano else 4  # 3x3 convolutions in each tower
    c.head.num_groups = 8 if nano else 32  # of group norm
    c.head.deformable = True  # modulated deformable layer before the classification tower (Table 3)
    c.head.deform_impl = "auto"  # auto | gather | banded: how the sampling is computed; auto: banded on TPUs
    c.head.objectness = "none"  # none | classification | iou: extra head, needed by loss.selection of that name
    # text tower: CLIP's transformer
    c.text = ConfigDict()
    c.text.width = 64 if nano else 512
    c.text.num_layers = 2 if nano else 12
    c.text.num_heads = 2 if nano else 8
    c.text.context_length = 16  # tokens a concept, [SOS] and [EOS] included (Table 9)
    # logit = scale * f_region . f_text + bias (spec section 9, point 1)
    c.logit = ConfigDict()
    c.logit.normalize_regions = nano  # L2-normalise region embeddings too (concept embeddings always are)
    c.logit.scale = 10.0 if nano else 1.0  # initial value
    c.logit.learnable_scale = True
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


def base() -> ConfigDict:
    """Returns the configuration with the paper's Swin-T values wherever the paper has one (Table 9)."""
    c = ConfigDict()
    c.name = "base"  # without --workdir the run lives in runs/<name>
    c.seed = 0  # parameters, order of steps, augmentation
    c.epochs = 12  # passes over every source
    c.num_steps = 0  # caps the run (steps); 0: all epochs
    # of the steps of an epoch: shuffled | cycle (each stream's evenly spread, the same every epoch)
    c.order = "shuffled"
    c.model = model("swin_t")
    c.init_from = ConfigDict()
    # a workdir of ours: start from its parameters (the best ones if it keeps them), step and optimizer anew; or
    # evaluate it. Words and canvases may be others, config.model may not
    c.init_from.checkpoint = ""
    # .safetensors files of the backbone and of the text tower, made by `python -m detclipv2_jax.convert`; "": random
    # values. Fitted to model.swin.window_size and model.text.context_length. Not read where there is a checkpoint
    c.init_from.swin = ""
    c.init_from.text = ""

    # --- data. A kind without files is left out of the run.
    for kind in KINDS:
        d = c[kind] = ConfigDict()
        d.data = ()  # folders built by `python -m detclipv2_jax.prepare`
        d.images = ""  # image folder for the raw files below
        d.batch_size = 6144 if kind == "image_text" else 128  # images a step over all devices
        d.canvases = ((320, 320),) if kind == "image_text" else (LANDSCAPE, PORTRAIT)  # (height, width) px
        # the short side is drawn from this range (px), then the long side bounded; aspect ratio is kept
        d.short_side = (320, 320) if kind == "image_text" else (480, 800)
        d.long_side = 320 if kind == "image_text" else 1333
        d.flip_prob = 0.5  # horizontal
        d.max_examples = 0  # use the first n images of the source; 0: all
        d.definitions = kind == "detection"  # "name, definition" instead of the name (spec section 9, point 11)
        d.dictionary = ""  # TSV `name <tab> definition`: definitions, and negatives for grounding
        d.weight = 1.0  # multiplies the number of steps drawn from this kind; small sets: passes an epoch
        # the first of the epochs (from 0) that draws from this kind. The paper's towers are pre-trained; random ones
        # learn from pairs when boxes have told them what regions are
        d.from_epoch = 0
        # () mixes the sources of a kind by size; else a factor on `weight` for each, the raw files first, then `data`:
        # (1.0, 0.01) adds a hundredth of a pretraining set to every epoch, other images each time
        d.source_weights = ()
        d.max_bad_share = 0.01  # an error above this share of unusable images or boxes
        # photos of `images` may be links to files elsewhere (DVC, git-annex, hub caches). False: only within the folder
        d.follow_links = False
        if kind == "image_text":
            d.pairs = ""  # TSV `image <tab> caption [<tab> JSON list of noun phrases]`
            d.max_phrases = 8  # noun phrases a caption, beside the caption itself
        else:
            d.annotations = ""  # COCO json (detection) or MDETR-style json with tokens_positive (grounding)
            d.max_boxes = 300 if kind == "detection" else 100  # an image; more are counted and cut, smallest first
            d.num_concepts = 150 if kind == "detection" else 100  # M: positives + sampled negatives an image
        if kind == "detection":
            d.num_shots = 0  # of the raw json take images until each category is on so many, as GLIP does; 0: all
            d.few_shot_seed = 3  # GLIP's are 3, 30, 300
        d.max_concepts = 0  # rows of the concept table a host; 0: derived so that nothing can overflow

    # a generated world instead of files (data/scenes.py): written once to <workdir>/data, then read like real data
    c.scenes = ConfigDict()
    c.scenes.num_detection = 0  # images; all zero: no generated data
    c.scenes.num_grounding = 0
    c.scenes.num_image_text = 0
    c.scenes.num_eval = 0
    c.scenes.size_px = 128  # width and height of a scene
    c.scenes.seed = 0
    c.scenes.novel_captions = True  # captions name novel shapes, too; False: nothing does
    c.scenes.folder = ""  # where they are written; "": <workdir>/data

    c.input = ConfigDict()  # how the host reads; changes no value
    c.input.num_workers = 0  # processes a stream; 0: threads of the main process
    c.input.num_threads = 2  # a stream, when num_workers is 0
    c.input.prefetch_batches = 2  # a stream
    c.input.timeout_s = 300  # s without a batch after which the run ends and says what it waited for

    # --- losses (spec section 3)
    c.loss = ConfigDict()
    c.loss.focal_alpha = 0.25
    c.loss.focal_gamma = 2.0
    c.loss.alignment_weight = 1.0
    c.loss.box_weight = 2.0  # GIoU; detection only
    c.loss.centerness_weight = 1.0  # detection only
    c.loss.objectness_weight = 1.0  # only with model.head.objectness
    c.loss.contrastive_weight = 0.1  # lambda (Table 2f)
    c.loss.temperature = 0.5  # tau (Table 2e)
    c.loss.label_smoothing = 0.1
    c.loss.num_proposals = 100  # k (Table 2d)
    c.loss.selection = "text_batch"  # Table 2a
    c.loss.selection_scope = "global"  # device: the paper's per-GPU batch; global: independent of the device count
    c.loss.selection_pre_nms = 1000  # anchors that enter the selection's NMS
    c.loss.selection_nms_iou = 0.6
    c.loss.matching = "one_to_one"  # Table 2b
    c.loss.matching_temperature = 0.1  # tau_t of one_to_many (Eq. 4); the paper gives no value
    c.loss.side = "text_to_image"  # Table 2c
    c.loss.chunk_bytes = 128 << 20  # a device: similarities held at once by the losses; smaller: less memory, slower
    c.loss.contrastive_impl = "xla"  # xla | pallas (fused kernel for TPU)

    # --- optimizer (Table 9)
    c.optimizer = ConfigDict()
    c.optimizer.learning_rate = 2.8e-4
    # after the warmup: cosine | step (x decay_factor at each of decay_at) | plateau (x decay_factor when eval.monitor
    # was not better for `patience` evaluations) | constant
    c.optimizer.schedule = "cosine"
    c.optimizer.warmup_steps = 1000  # linear from 0; evaluations before its end are not held against the run
    c.optimizer.min_learning_rate = 0.0  # where cosine ends, and the smallest of plateau
    c.optimizer.decay_at = (2 / 3, 11 / 12)  # shares of all epochs
    c.optimizer.decay_factor = 0.1
    c.optimizer.patience = 5
    # evaluations without a better score (plateau: at min_learning_rate) after which the run ends; 0: it does not
    c.optimizer.stop_patience = 0
    c.optimizer.weight_decay = 0.05
    c.optimizer.b1 = 0.9
    c.optimizer.b2 = 0.999
    c.optimizer.clip_norm = 35.0  # global gradient norm (spec section 9, point 19); 0: no clipping
    c.optimizer.groups = parameter_groups(text_factor=0.1)
    # regex over the whole name of parameters that stay as they are, without moments: r"text_encoder/.*"; "": none
    c.optimizer.frozen = ""
    c.optimizer.ema_decay = 0.0  # of an exponential moving average used for evaluation; 0: none
    c.optimizer.accumulate = ConfigDict()  # chunks a step whose gradients are summed exactly; saves memory
    for kind in KINDS:
        c.optimizer.accumulate[kind] = 1

    c.mesh = ConfigDict()
    c.mesh.fsdp = 1  # devices over which parameters and moments are split; the rest is data parallel
    # s that processes wait for one that is late, at the start, before a step, an evaluation or at the end; then the run
    # ends with its name. Longer than compiling takes on one host more than on another
    c.timeout_s = 600

    # values for accelerators with less memory than the others, which win there over all but those of the command line:
    # (key, value) pairs by chip (v4, v5e, v5p, v6e, h100); `python -m detclipv2_jax.preflight` finds them
    c.chips = ConfigDict()
    for chip in CHIPS.values():
        c.chips[chip] = ()

    # --- evaluation and prediction (spec section 5 and section 9, points 21-22)
    c.eval = ConfigDict()
    c.eval.annotations = ""  # COCO json; "" trains without evaluation
    c.eval.images = ""
    c.eval.max_examples = 0
    c.eval.batch_size = 32  # images over all devices
    c.eval.canvases = (LANDSCAPE, PORTRAIT)
    c.eval.short_side = 800
    c.eval.long_side = 1333
    c.eval.definitions = True  # "name, definition" as in detection training
    c.eval.dictionary = ""
    c.eval.max_bad_share = 0.0
    c.eval.follow_links = False
    c.eval.every_steps = 0  # 0: only at the end
    c.eval.every_epochs = 0  # the same in passes over the data; 0: not
    c.eval.monitor = "AP"  # the score that plateau, early stop and checkpoint.keep_best go by
    c.eval.score_threshold = 0.0
    c.eval.nms_iou = 0.6  # class-wise
    c.eval.pre_nms = 1000  # (anchor, word) pairs an image that enter NMS
    c.eval.max_detections = 300
    c.eval.num_pictures = 8  # images drawn into pictures/

    # a second set, evaluated before the first step and after the last, to see what a fine-tune forgets; all that is not
    # said here is as in config.eval
    c.forgetting = ConfigDict()
    c.forgetting.annotations = ""  # COCO json; "": none
    c.forgetting.images = ""
    c.forgetting.max_examples = 0
    c.forgetting.definitions = True
    c.forgetting.dictionary = ""

    c.closing = ""  # what is printed after the scores; "{APr:.1f}" stands for a score in %
    c.nonfinite = "stop"  # stop | skip: what a loss or gradient that is not finite does; such a step is never applied
    c.log_every_steps = 50  # of a kind: every n-th detection step, every n-th image-text step …
    # first batches, and every n-th batch of a stream, those of pairs with the best region of each phrase; 0: only first
    c.pictures_every_steps = 1000
    # steps traced by jax's profiler into profile/, from the tenth on; open with TensorBoard or xprof. 0: none
    c.profile_steps = 0
    c.checkpoint = ConfigDict()
    c.checkpoint.every_steps = 1000
    c.checkpoint.keep = 3
    # also save and keep the one with the best eval.monitor; then it is what the workdir predicts and is scored with
    c.checkpoint.keep_best = False
    return c


def parse_flags(argv: Sequence[str]) -> list[str]:
    """Returns what absl's parser does, for programs with --config; values of the command line win over `config.chips`.

    A wrong key or a missing config file ends in one line, not in a traceback.
    """
    try:
        rest = app.parse_flags_with_usage(list(argv))
        config = flags.FLAGS.config
        if config is not None:
            given = config_flags.get_override_values(flags.FLAGS["config"])
            # a file that could not be loaded shows only now, when something is read from it
            for chip in config.chips:
                config.chips[chip] = tuple(pair for pair in config.chips[chip] if pair[0] not in given)
        return rest
    except (AttributeError, KeyError) as error:
        words = (
            str(error.args[0]).strip("'").replace("\\n", " ").replace("\\'", "'")
        )  # it may hold another error's repr
        sys.exit(f"error: unknown configuration key: {' '.join(words.split())}")
    except (OSError, ValueError, TypeError) as error:
        # ml_collections puts a whole traceback into the message; its last line says what was wrong
        sys.exit(f"error: the configuration cannot be loaded: {str(error).strip().splitlines()[-1]}")


def to_json(config: ConfigDict) -> str:
    """Returns the configuration as JSON text."""
    return json.dumps(config.to_dict(), indent=1) + "\n"


def from_json(text: str) -> ConfigDict:
    """Returns the locked configuration that `to_json` wrote."""

    def tuples(value):
        if isinstance(value, dict):
            return {key: tuples(entry) for key, entry in value.items()}
        return tuple(tuples(entry) for entry in value) if isinstance(value, list) else value

    return ConfigDict(tuples(json.loads(text))).lock()


def for_chip(config: ConfigDict, chip: str | None) -> ConfigDict:
    """Returns the configuration with the values of `config.chips` for a chip; None has none."""
    config = config.copy_and_resolve_references()
    for key, value in config.chips[chip] if chip else ():
        *path, last = key.split(".")
        functools.reduce(operator.getitem, path, config)[last] = value
    return config


def chip_of(device_kind: str) -> str | None:
    """Returns the name of an accelerator in `config.chips`, None where it has none."""
    return next((chip for kind, chip in CHIPS.items() if device_kind.startswith(kind)), None)


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Returns the values of a configuration by dotted name."""
    if isinstance(value, ConfigDict):
        return {name: leaf for key in value for name, leaf in _flat(value[key], f"{prefix}.{key}").items()}
    return {prefix[1:]: value}


def differences(old: ConfigDict, new: ConfigDict) -> list[str]:
    """Returns "key: old -> new" for every key in which two configurations differ."""

    a, b = _flat(old), _flat(new)
    return [
        f"{key}: {a.get(key)!r} -> {b.get(key)!r}" for key in sorted(a.keys() | b.keys()) if a.get(key) != b.get(key)
    ]


def validate(config: ConfigDict, *, num_devices: int) -> None:
    """Raises a ValueError that lists every problem of a configuration; looks at no file and no device."""
    if missing := sorted(_flat(base()).keys() - _flat(config).keys()):
        raise ValueError(
            f"the configuration lacks {', '.join(f'config.{key}' for key in missing)}; set keys of a section one by "
            "one: --config.detection={} leaves none of them"
        )
    problems: list[str] = []

    def value_of(key: str) -> Any:
        return functools.reduce(lambda value, part: value[part], key.split("."), config)

    def check(ok: bool, key: str, allowed: str) -> None:
        if not ok:
            problems.append(f"config.{key} is {value_of(key)!r}; allowed: {allowed}")

    def choice(key: str, allowed: tuple[str, ...]) -> None:
        check(value_of(key) in allowed, key, " | ".join(allowed))

    choice("model.dtype", DTYPES)
    choice("model.remat", REMATS)
    choice("model.swin.attention_impl", ATTENTIONS)
    choice("model.head.deform_impl", DEFORMS)
    choice("model.head.objectness", OBJECTNESS)
    choice("loss.selection", SELECTIONS)
    choice("loss.selection_scope", SCOPES)
    choice("loss.matching", MATCHINGS)
    choice("loss.side", SIDES)
    choice("loss.contrastive_impl", IMPLS)
    choice("optimizer.schedule", SCHEDULES)
    choice("order", ORDERS)
    choice("eval.monitor", MONITORS)
    choice("nonfinite", NONFINITE)
    for chip in config.chips:
        try:
            for_chip(config, chip)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            problems.append(
                f"config.chips.{chip} is {config.chips[chip]}; allowed: (key, value) pairs ({error.args[0]})"
            )
    for key in (
        "epochs", "log_every_steps", "checkpoint.every_steps", "checkpoint.keep", "mesh.fsdp", "optimizer.patience",
        "timeout_s", "input.timeout_s", "model.text.num_heads", "model.head.num_groups",
    ):  # fmt: skip
        check(value_of(key) >= 1, key, "1 or more")
    for kind in KINDS:
        last = config.epochs - 1
        check(0 <= config[kind].from_epoch <= last, f"{kind}.from_epoch", f"0 to {last}, the last of config.epochs")
    for key in ("detection.num_shots", "optimizer.stop_patience", "eval.every_steps", "eval.every_epochs"):
        check(value_of(key) >= 0, key, "0 or more")
    for key in ("loss.temperature", "loss.matching_temperature", "optimizer.learning_rate"):
        check(value_of(key) > 0, key, "above 0")
    shots = not config.detection.num_shots or config.detection.annotations or config.scenes.num_detection
    check(bool(shots), "detection.num_shots", "0 without detection.annotations, whose images are chosen")
    check(0 <= config.loss.label_smoothing < 1, "loss.label_smoothing", "0 <= value < 1")
    check(0 <= config.optimizer.ema_decay < 1, "optimizer.ema_decay", "0 <= value < 1")
    _validate_schedule(config, check, problems)
    for key in ("init_from.swin", "init_from.text"):
        check(
            not value_of(key) or value_of(key).endswith(".safetensors"), key,
            "a .safetensors file that `python -m detclipv2_jax.convert` made, or nothing",
        )  # fmt: skip
    if config.loss.selection in OBJECTNESS[1:] and config.model.head.objectness != config.loss.selection:
        problems.append(
            f"config.loss.selection is {config.loss.selection!r} but config.model.head.objectness is "
            f"{config.model.head.objectness!r}; that selection needs the head of the same name"
        )
    if config.model.text.width % max(config.model.text.num_heads, 1):
        problems.append(
            f"config.model.text.width {config.model.text.width} must be a multiple of num_heads "
            f"{config.model.text.num_heads}"
        )
    if config.model.head.channels % max(config.model.head.num_groups, 1):
        problems.append(
            f"config.model.head.channels {config.model.head.channels} must be a multiple of num_groups "
            f"{config.model.head.num_groups}"
        )
    if config.mesh.fsdp >= 1 and num_devices % config.mesh.fsdp:
        problems.append(f"config.mesh.fsdp is {config.mesh.fsdp}; it must divide the number of devices, {num_devices}")
    for kind in (*KINDS, "eval"):
        section = config[kind]
        chunks = 1 if kind == "eval" else config.optimizer.accumulate[kind]
        if section.batch_size < 1 or chunks < 1 or section.batch_size % (num_devices * chunks):
            name = "" if kind == "eval" else f" x config.optimizer.accumulate.{kind} {chunks}"
            parts = num_devices * max(chunks, 1)
            problems.append(
                f"config.{kind}.batch_size is {section.batch_size}, which is not divisible by {num_devices} devices"
                f"{name} = {parts}; the nearest that is: {max(1, round(section.batch_size / parts)) * parts}"
            )
        short = section.short_side if kind != "eval" else (section.short_side,) * 2
        if not _numbers(short, 2) or not 0 < short[0] <= short[1]:
            problems.append(f"config.{kind}.short_side is {short}; allowed: (smallest, largest) in px")
        problems.extend(
            f"config.{kind}.canvases has {canvas}; allowed: (height, width) in multiples of 32, "
            "the stride of the backbone"
            for canvas in section.canvases
            if not _numbers(canvas, 2) or min(canvas) < 1 or any(side % 32 for side in canvas)
        )
    if problems:
        raise ValueError(f"{len(problems)} problem(s) in the configuration:\n" + "\n".join(f"  {p}" for p in problems))


def _numbers(value: Any, length: int | None = None) -> bool:
    """Returns whether a value holds numbers, `length` of them."""
    numbers = isinstance(value, tuple | list) and all(isinstance(x, int | float) for x in value)
    return numbers and length in (None, len(value))


def _validate_schedule(config: ConfigDict, check: Callable[[bool, str, str], None], problems: list[str]) -> None:
    """Adds what is wrong with the learning rate and with what goes by the scores of evaluations."""
    optimizer = config.optimizer
    check(0 < optimizer.decay_factor < 1, "optimizer.decay_factor", "0 < value < 1")
    smallest_allowed = 0 <= optimizer.min_learning_rate < optimizer.learning_rate
    check(smallest_allowed, "optimizer.min_learning_rate", "0 or more, below optimizer.learning_rate")
    shares = _numbers(optimizer.decay_at) and all(0 < share < 1 for share in optimizer.decay_at)
    check(shares, "optimizer.decay_at", "shares of the run, 0 < value < 1")
    try:
        re.compile(optimizer.frozen)
    except re.error as error:
        check(False, "optimizer.frozen", f"a regular expression ({error})")
    if optimizer.schedule == "plateau":
        smallest = optimizer.min_learning_rate > 0
        check(smallest, "optimizer.min_learning_rate", "above 0 with optimizer.schedule plateau, e.g. 1e-8")
    users = {
        "optimizer.schedule plateau": optimizer.schedule == "plateau",
        "optimizer.stop_patience": optimizer.stop_patience > 0,
        "checkpoint.keep_best": config.checkpoint.keep_best,
    }
    wanting = " and ".join(name for name, used in users.items() if used)
    if wanting and not (config.eval.every_steps or config.eval.every_epochs):
        problems.append(f"{wanting} need scores along the way: set config.eval.every_epochs or config.eval.every_steps")
    if wanting and not (config.eval.annotations or config.scenes.num_eval):
        problems.append(f"{wanting} need config.eval.annotations and config.eval.images")
