"""The check of a whole configuration, before a device is touched and a file is read.

The allowed values of an option stand where it is implemented and are asked for here, which is why the check is no part
of `config`: that imports nothing of the package.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from detclipv2_jax import bucket_store, files
from detclipv2_jax.config import KINDS, base, flat, for_chip
from detclipv2_jax.data import canvases
from detclipv2_jax.data.concepts import class_tokens
from detclipv2_jax.eval import result
from detclipv2_jax.inference import detect
from detclipv2_jax.losses import contrastive, proposals
from detclipv2_jax.models import atss_head, deform_conv, detclip, window_attention
from detclipv2_jax.runs import optimizer, order, trackers
from detclipv2_jax.train import NONFINITE


class Rule(NamedTuple):
    """What is allowed as the value of a key."""

    key: str
    holds: Callable[[Any], bool]
    allowed: str


def _one_of(key: str, values: tuple[str, ...]) -> Rule:
    return Rule(key, lambda value: value in values, " | ".join(values))


def _at_least(smallest: float, *keys: str) -> list[Rule]:
    return [Rule(key, lambda value: value >= smallest, f"{smallest} or more") for key in keys]


def _above_zero(*keys: str) -> list[Rule]:
    return [Rule(key, lambda value: value > 0, "above 0") for key in keys]


def _share(key: str, *, lowest: bool) -> Rule:
    """Returns the rule of a number below 1, from 0 on (`lowest`) or above 0."""
    text = "0 <= value < 1" if lowest else "0 < value < 1"
    return Rule(key, lambda value: (value >= 0 if lowest else value > 0) and value < 1, text)


def _numbers(value: Any, length: int | None = None) -> bool:
    """Returns whether a value holds numbers, `length` of them."""
    numbers = isinstance(value, tuple | list) and all(isinstance(x, int | float) for x in value)
    return numbers and length in (None, len(value))


def _are_texts(value: Any) -> bool:
    return isinstance(value, tuple | list) and all(isinstance(text, str) and text.strip() for text in value)


def _texts(key: str) -> Rule:
    return Rule(key, _are_texts, 'texts, e.g. ("a", "b")')


def _is_mixture(value: Any) -> bool:
    pair = isinstance(value, tuple | list) and len(value) == 2
    return pair and value[0] in order.MIXTURES and _numbers(value[1:]) and value[1] > 0


def _are_lengths(value: Any, *, longest: int) -> bool:
    pairs = isinstance(value, tuple | list) and all(_numbers(pair, 2) for pair in value)
    lengths, shares = zip(*value, strict=True) if pairs and value else ((), ())
    fits = all(isinstance(x, int) and 3 <= x <= longest for x in lengths) and all(share > 0 for share in shares)
    return pairs and fits and list(lengths) == sorted(set(lengths), reverse=True) and sum(shares) < 1 + 1e-6


def _is_regex(value: str) -> bool:
    try:
        re.compile(value)
    except re.error:
        return False
    return True


# each looks at one key alone
RULES = (
    _one_of("model.dtype", detclip.DTYPES),
    _one_of("model.remat", detclip.REMATS),
    *(_one_of(f"optimizer.remat.{kind}", ("", *detclip.REMATS)) for kind in KINDS),
    _one_of("model.swin.attention_impl", window_attention.IMPLS),
    _one_of("model.head.deform_impl", deform_conv.IMPLS),
    _one_of("model.head.objectness", atss_head.OBJECTNESS),
    _one_of("loss.selection", proposals.SELECTIONS),
    _one_of("loss.selection_scope", proposals.SCOPES),
    _one_of("loss.interaction", contrastive.INTERACTIONS),
    _one_of("loss.matching", contrastive.MATCHINGS),
    _one_of("loss.side", contrastive.SIDES),
    _one_of("optimizer.schedule", optimizer.SCHEDULES),
    _one_of("eval.score", detect.SCORES),
    _one_of("eval.monitor", result.MONITORS),
    _one_of("nonfinite", NONFINITE),
    *_at_least(1, "epochs", "log_every_steps", "checkpoint.every_steps", "checkpoint.keep", "mesh.fsdp"),
    *_at_least(1, "optimizer.patience", "timeout_s", "input.timeout_s", "model.text.num_heads"),
    *_at_least(1, "model.head.num_groups", "detection.max_box_concepts", "grounding.max_box_concepts"),
    *_at_least(1, "loss.class_proposals"),
    *_at_least(0, "loss.class_weight", "image_text.class_weight"),
    *_at_least(0, *(f"{kind}.num_scales" for kind in KINDS)),
    *_at_least(0, "detection.num_shots", "optimizer.stop_patience", "eval.every_steps", "eval.every_epochs"),
    *_above_zero("loss.temperature", "loss.matching_temperature", "optimizer.learning_rate"),
    _share("loss.label_smoothing", lowest=True),
    _share("optimizer.ema_decay", lowest=True),
    _share("optimizer.decay_factor", lowest=False),
    Rule(
        "optimizer.decay_at",
        lambda value: _numbers(value) and all(0 < share < 1 for share in value),
        "shares of the run, 0 < value < 1",
    ),
    *(Rule(f"{part}.max_bad_share", lambda value: 0 <= value <= 1, "0 to 1") for part in (*KINDS, "eval")),
    _texts("model.text.classes"),
    *map(_texts, (f"{kind}.unflippable_words" for kind in KINDS)),
    *map(_texts, (f"{section}.drop_categories" for section in ("detection", "eval", "forgetting"))),
    Rule("trackers", lambda value: set(value) <= trackers.TRACKERS.keys(), f"some of {', '.join(trackers.TRACKERS)}"),
    Rule("mixing", _is_mixture, f'({" | ".join(order.MIXTURES)}, a number above 0), e.g. ("capped", 4.0)'),
    Rule("optimizer.frozen", _is_regex, "a regular expression"),
    *(
        Rule(
            f"init_from.{tower}",
            lambda value: not value or value.endswith(".safetensors"),
            "a .safetensors file that `python -m detclipv2_jax.convert` made, or nothing",
        )
        for tower in ("swin", "text")
    ),
)


def validate(config: ConfigDict, *, num_devices: int) -> None:
    """Raises a ValueError that lists every problem of a configuration; looks at no file and no device."""
    if missing := sorted(flat(base()).keys() - flat(config).keys()):
        raise ValueError(
            f"the configuration lacks {', '.join(f'config.{key}' for key in missing)}; set keys of a section one by "
            "one: --config.detection={} leaves none of them"
        )
    problems = [
        f"config.{rule.key} is {value!r}; allowed: {rule.allowed}"
        for rule in (*RULES, *_rules_of(config))
        if not rule.holds(value := functools.reduce(lambda part, name: part[name], rule.key.split("."), config))
    ]
    problems += [
        *_of_places(config),
        *_of_scenes(config),
        *_of_chips(config),
        *_of_model(config),
        *_of_scores(config),
        *_of_sizes(config, num_devices),
    ]
    if problems:
        raise ValueError(f"{len(problems)} problem(s) in the configuration:\n" + "\n".join(f"  {p}" for p in problems))


def _rules_of(config: ConfigDict) -> Iterator[Rule]:
    """Yields rules of one key that other keys decide."""
    last = config.epochs - 1
    longest = config.model.text.context_length
    of_text = functools.partial(_are_lengths, longest=longest)
    allowed = f"(tokens, share of rows) pairs: 3 to {longest} tokens, the longest first; shares of 1 in all at most"
    for kind in KINDS:
        yield Rule(f"{kind}.from_epoch", lambda value: 0 <= value <= last, f"0 to {last}, the last of config.epochs")
        yield Rule(f"optimizer.text_lengths.{kind}", of_text, allowed)
    if _is_mixture(config.mixing) and config.mixing[0] == "capped" and _has_steps(config, "image_text"):
        first = config.image_text.from_epoch
        for kind in ("detection", "grounding"):
            if _has_steps(config, kind):  # the cap counts the steps of all boxes in every epoch
                allowed = f"at most image_text.from_epoch ({first}) with config.mixing capped: pairs begin after boxes"
                yield Rule(f"{kind}.from_epoch", lambda value: value <= first, allowed)
    annotated = bool(config.detection.annotations or config.scenes.num_detection)
    allowed = "0 without detection.annotations, whose images are chosen"
    yield Rule("detection.num_shots", lambda value: not value or annotated, allowed)
    optimizer = config.optimizer
    allowed = "0 or more, below optimizer.learning_rate"
    yield Rule("optimizer.min_learning_rate", lambda value: 0 <= value < optimizer.learning_rate, allowed)
    if optimizer.schedule == "plateau":
        allowed = "above 0 with optimizer.schedule plateau, e.g. 1e-8"
        yield Rule("optimizer.min_learning_rate", lambda value: value > 0, allowed)


def _has_steps(config: ConfigDict, kind: str) -> bool:
    section = config[kind]
    raw = section.pairs if kind == "image_text" else section.annotations
    return section.weight > 0 and bool(raw or section.data or config.scenes[f"num_{kind}"])


def _of_places(config: ConfigDict) -> Iterator[str]:
    for key, value in flat(config).items():
        for text in value if isinstance(value, tuple | list) else (value,):
            try:
                if isinstance(text, str) and key not in ("closing", "name"):
                    files.check_here(text, where=f"config.{key}")
                    if bucket_store.place(text) and key == "scenes.folder":
                        yield f"config.{key} is {text}; scenes are generated into a folder of this machine"
            except ValueError as error:
                yield str(error)


def _of_chips(config: ConfigDict) -> Iterator[str]:
    locked = config.copy_and_resolve_references().lock()  # or a wrong key would be a new one
    for chip in config.chips:
        try:
            for_chip(locked, chip)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            yield f"config.chips.{chip} is {config.chips[chip]}; allowed: (key, value) pairs ({error.args[0]})"


def _of_model(config: ConfigDict) -> Iterator[str]:
    selection, head = config.loss.selection, config.model.head.objectness
    if selection in atss_head.OBJECTNESS[1:] and head != selection:
        yield (
            f"config.loss.selection is {selection!r} but config.model.head.objectness is {head!r}; that selection "
            "needs the head of the same name"
        )
    if (config.loss.interaction, config.loss.matching) == ("tokens", "max_size"):
        yield "config.loss.matching max_size takes the caption as a whole; it needs config.loss.interaction phrases"
    classes = config.model.text.classes
    try:
        class_tokens(classes if _are_texts(classes) else (), context_length=config.model.text.context_length)
    except ValueError as error:
        yield str(error)
    for section, size, parts in (("text", "width", "num_heads"), ("head", "channels", "num_groups")):
        values = config.model[section]
        if values[size] % max(values[parts], 1):
            yield f"config.model.{section}.{size} {values[size]} must be a multiple of {parts} {values[parts]}"


def _of_scenes(config: ConfigDict) -> Iterator[str]:
    """Yields files of a kind whose scenes are generated, which would take their place."""
    for kind in (*KINDS, "eval"):
        for key in ("pairs" if kind == "image_text" else "annotations", "images"):
            if (num := config.scenes[f"num_{kind}"]) and (given := config[kind][key]):
                yield (
                    f"config.{kind}.{key} is {given!r}, but config.scenes.num_{kind} generates {num} scenes in its "
                    f"place; set config.scenes.num_{kind} to 0, or leave out the files"
                )


def _of_scores(config: ConfigDict) -> Iterator[str]:
    """Yields problems of keys that depend on the scores of evaluations."""
    users = {
        "optimizer.schedule plateau": config.optimizer.schedule == "plateau",
        "optimizer.stop_patience": config.optimizer.stop_patience > 0,
        "checkpoint.keep_best": config.checkpoint.keep_best,
    }
    wanting = " and ".join(name for name, used in users.items() if used)
    if wanting and not (config.eval.every_steps or config.eval.every_epochs):
        yield f"{wanting} need scores along the way: set config.eval.every_epochs or config.eval.every_steps"
    if wanting and not (config.eval.annotations or config.scenes.num_eval):
        yield f"{wanting} need config.eval.annotations and config.eval.images"


def _of_sizes(config: ConfigDict, num_devices: int) -> Iterator[str]:
    """Yields batch sizes that the devices do not divide, and canvases and sides that make no sense."""
    if config.mesh.fsdp >= 1 and num_devices % config.mesh.fsdp:
        yield f"config.mesh.fsdp is {config.mesh.fsdp}; it must divide the number of devices, {num_devices}"
    for kind in (*KINDS, "eval"):
        section = config[kind]
        chunks = 1 if kind == "eval" else config.optimizer.accumulate[kind]
        if section.batch_size < 1 or chunks < 1 or section.batch_size % (num_devices * chunks):
            name = "" if kind == "eval" else f" x config.optimizer.accumulate.{kind} {chunks}"
            parts = num_devices * max(chunks, 1)
            yield (
                f"config.{kind}.batch_size is {section.batch_size}, which is not divisible by {num_devices} devices"
                f"{name} = {parts}; the nearest that is: {max(1, round(section.batch_size / parts)) * parts}"
            )
        short = section.short_side if kind != "eval" else (section.short_side,) * 2
        scales = 0 if kind == "eval" else max(section.num_scales, 0)
        if not _numbers(short, 2) or not 0 < short[0] <= short[1]:
            yield f"config.{kind}.short_side is {short}; allowed: (smallest, largest) in px"
            scales = 0
        for canvas in section.canvases:
            if not _numbers(canvas, 2) or min(canvas) < 1 or any(side % 32 for side in canvas):
                yield (
                    f"config.{kind}.canvases has {canvas}; allowed: (height, width) in multiples of 32, "
                    "the stride of the backbone"
                )
                continue
            some = min(scales, sum(canvas) // 32)  # there are no more that differ
            if len(found := canvases.sizes(canvas, short_side=short, num_scales=some)) > len(set(found)):
                yield (
                    f"config.{kind}.num_scales is {scales}, but in multiples of 32 that makes {canvas} to "
                    f"{', '.join(map(str, found))}; allowed: 0, fewer, or a wider range of config.{kind}.short_side, "
                    f"now {tuple(short)}"
                )
