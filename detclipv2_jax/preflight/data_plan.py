"""What the data of a run comes to: steps of every kind, rows of the concept tables, what is wrong with the files."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path, PurePath

from ml_collections import ConfigDict

from detclipv2_jax import buckets, train
from detclipv2_jax.data import canvases
from detclipv2_jax.data.batches import table_capacity
from detclipv2_jax.data.box_json import BoxSource
from detclipv2_jax.data.built import REPORT, BuiltSource
from detclipv2_jax.data.catalog import DATASETS
from detclipv2_jax.data.concepts import read_dictionary
from detclipv2_jax.data.definitions import defined, evaluation_notes, training_notes
from detclipv2_jax.data.leakage import held_out_photos, photo_of
from detclipv2_jax.data.schema import Kind
from detclipv2_jax.data.sources import PairSource
from detclipv2_jax.data.streams import Stream, eval_streams, train_streams
from detclipv2_jax.inference import vocabulary
from detclipv2_jax.models.by_length import num_rows
from detclipv2_jax.runs import pretrained
from detclipv2_jax.runs.optimizer import learning_rate, named_shapes
from detclipv2_jax.runs.order import mixed
from detclipv2_jax.runs.state import make_model, param_shapes

LVIS_NAMES = 1203
DICTIONARY_NAMES = 14_000  # of the paper's, and of `prepare dictionary`
MAX_MISSING_SHARE = 0.1  # of the examples that a published data set should have


@dataclasses.dataclass
class Plan:
    """Steps of the whole run by step program, sizes by kind, and what there is to say."""

    num_steps: dict[str, float] = dataclasses.field(default_factory=dict)
    table_rows: dict[str, int] = dataclasses.field(default_factory=dict)  # of all hosts
    num_concepts: dict[str, int] = dataclasses.field(default_factory=dict)  # distinct ones of a global batch, at most
    num_words: int = LVIS_NAMES  # of the evaluation's vocabulary
    notes: list[str] = dataclasses.field(default_factory=list)
    problems: list[str] = dataclasses.field(default_factory=list)


def expected(config: ConfigDict, *, num_hosts: int, num_devices: int) -> Plan:
    """Returns the plan of a run whose folders hold what the published data sets of their names have."""
    plan = Plan()
    by_kind = {
        kind: [
            DATASETS[PurePath(folder).name] for folder in config[kind.value].data if PurePath(folder).name in DATASETS
        ]
        for kind in Kind
    }
    by_kind = {kind: known for kind, known in by_kind.items() if known}
    examples = {kind: sum(dataset.num_examples for dataset in known) for kind, known in by_kind.items()}
    passes = config.image_text.class_weight - 1.0  # of class names beside that of all
    named = (data.num_examples for data in by_kind.get(Kind.IMAGE_TEXT, ()) if data.num_names)
    extra = {Kind.IMAGE_TEXT: passes * sum(named)}
    batches = [
        config[kind.value].weight * (num + extra.get(kind, 0)) / config[kind.value].batch_size
        for kind, num in examples.items()
    ]
    factors = mixed(batches, list(by_kind), mixture=config.mixing[0], value=config.mixing[1])
    for (kind, known), num_batches, factor in zip(by_kind.items(), batches, factors, strict=True):
        section, num_examples = config[kind.value], examples[kind]
        for canvas in section.canvases:
            num_steps = (config.epochs - section.from_epoch) * num_batches * factor / len(section.canvases)
            short_side, num_scales = section.short_side, section.num_scales
            _add_steps(plan, kind, canvases.sizes(canvas, short_side=short_side, num_scales=num_scales), num_steps)
        num_names = sum(dataset.num_names for dataset in known) if all(dataset.num_names for dataset in known) else 0
        rows = table_capacity(
            section, kind, num_images=section.batch_size // num_hosts, table_multiple=num_devices // num_hosts,
            num_known=num_names,
        )  # fmt: skip
        _set_table(plan, config, kind, rows * num_hosts, num_names)
        plan.notes.append(
            f"{kind}: {num_examples:,} examples as published, evenly on its canvases; the files were not looked at"
        )
        plan.notes += _names_as_published(kind, section)
    return plan


def _names_as_published(kind: Kind, section: ConfigDict) -> list[str]:
    """Returns lines on definitions and negatives of published data sets, counted where the dictionary is there."""
    path, notes = section.dictionary, []
    known = read_dictionary(path) if path and Path(path).is_file() else None
    state = f"{path} does not exist yet" if path else f"config.{kind}.dictionary is empty"
    for name in [PurePath(folder).name for folder in section.data] if section.definitions else []:
        if known and name in vocabulary.NAMED:
            names = vocabulary.named(name).names
            notes.append(f"{kind}, {name}: in {path} {defined(names, [known.definition(text) for text in names])}")
        elif name in DATASETS and (num_names := DATASETS[name].num_names):
            notes.append(f"{kind}, {name}: {num_names:,} names, whose definitions were not counted ({state})")
    if kind is Kind.GROUNDING:
        num = f"{len(known):,}" if known else f"{DICTIONARY_NAMES:,} planned" if path else "its own phrases as"
        notes.append(f"{kind}: {num} names to draw negatives from" + ("" if known else f" ({state})"))
    return notes


def _add_steps(plan: Plan, kind: Kind, sizes: Sequence[canvases.Canvas], num_steps: float) -> None:
    """Adds steps of a stream to the plan, evenly over the sizes of its canvas."""
    for height, width in sizes:
        name = f"{kind}/{height}x{width}"
        plan.num_steps[name] = plan.num_steps.get(name, 0) + num_steps / len(sizes)


def _set_table(plan: Plan, config: ConfigDict, kind: Kind, rows: int, num_names: int) -> None:
    if rows > plan.table_rows.get(kind, 0):  # the larger of streams' tables, whose step is the larger one
        groups = config.optimizer.text_lengths[kind]
        held = sum(num for _, num in num_rows(groups, rows)) if groups else rows  # without a second pass
        plan.table_rows[kind], plan.num_concepts[kind] = rows, min(held, num_names or held)


def check(config: ConfigDict, *, num_hosts: int, num_devices: int) -> Plan:
    """Returns the plan of a run from its files, every problem among them listed: missing files, canvases without
    examples, numbers far from the published ones, photos of the evaluation, and a schedule that ends elsewhere."""
    plan, config = Plan(), buckets.localized(config)
    streams: list[Stream] = []
    with train.listed(plan.problems):
        streams = train_streams(config, process_count=num_hosts, table_multiple=num_devices // num_hosts)
    with train.listed(plan.problems):
        evaluated = eval_streams(config.eval, input_config=config.input)
        if evaluated:
            plan.num_words = len(evaluated[0].ground_truth.texts)
            plan.notes += [f"{stream.name}: {stream.num_examples:,} images" for stream in evaluated]
            plan.notes += evaluation_notes(evaluated[0].ground_truth)
        else:
            plan.notes.append("no evaluation: config.eval.annotations is empty")
    with train.listed(plan.problems):
        if not config.init_from.checkpoint:
            context_length = config.model.text.context_length
            shapes = param_shapes(make_model(config.model), context_length=context_length)
            plan.notes += pretrained.load_all(config.init_from, named_shapes(shapes))[1]
    if not streams:
        return plan
    order = train.make_order(config, streams)
    positions = order.next_positions(order.num_steps)
    for stream, num_steps in zip(streams, positions, strict=True):
        _add_steps(plan, stream.kind, stream.canvases, num_steps)
        names = {id(source): len(source.vocabulary) for source in stream.sources if stream.kind is Kind.DETECTION}
        _set_table(plan, config, stream.kind, stream.capacities["table"] * num_hosts, sum(names.values()))
        passes = num_steps * stream.batch_size / stream.num_examples
        plan.notes.append(
            f"{stream.name}: {stream.num_examples:,} images, {stream.num_batches:,} batches an epoch, {num_steps:,} "
            f"steps = {passes:.2f} passes, concept table {stream.capacities['table']:,} rows a host"
        )
        with train.listed(plan.problems):
            stream.batch(0)  # decodes a host's photos
    for kind in Kind:
        kind_streams = [stream for stream in streams if stream.kind is kind]
        missing = {tuple(canvas) for canvas in config[kind.value].canvases} - {stream.canvas for stream in kind_streams}
        if kind_streams and missing:
            plan.notes.append(f"{kind}: no image is largest on the canvas {', '.join(map(str, sorted(missing)))}")
    plan.notes += training_notes(streams)
    _check_sources(config, streams, plan)
    rate = learning_rate(config.optimizer, order.total_steps)
    end = float(rate(order.num_steps)) / config.optimizer.learning_rate
    plan.notes.append(
        f"order: {order.num_steps:,} of {order.total_steps:,} steps; the learning rate ends at {end:.3g} of its peak"
    )
    if order.num_steps < order.total_steps:
        plan.notes.append(f"config.num_steps={config.num_steps} ends the run early")
    if order.total_steps <= config.optimizer.warmup_steps:
        plan.problems.append(
            f"config.optimizer.warmup_steps is {config.optimizer.warmup_steps}, but the run has only "
            f"{order.total_steps} steps: the learning rate never reaches its peak"
        )
    return plan


def _check_sources(config: ConfigDict, streams: list[Stream], plan: Plan) -> None:
    """Notes the counts of every source, and photos of the evaluation in it."""
    held_out = held_out_photos([config.eval.annotations] if Path(config.eval.annotations).is_file() else [])
    for source in {id(source): source for stream in streams for source in stream.sources}.values():
        found = 0
        if isinstance(source, BuiltSource):
            report = json.loads((source.folder / REPORT).read_bytes())
            published = DATASETS.get(source.folder.name)
            if published and report["examples"] < (1 - MAX_MISSING_SHARE) * published.num_examples:
                plan.problems.append(
                    f"{source.folder} has {report['examples']:,} examples; {published.title} has "
                    f"{published.num_examples:,}"
                )
            photos = report["validation photos"]
            found = 0 if photos["left out"] else photos["found"]
            if held_out and not photos["compared with"]:
                plan.notes.append(
                    f"{source.folder} was not compared with photos of validation sets; build it again with "
                    f"--validation={config.eval.annotations} --drop_validation"
                )
        elif isinstance(source, BoxSource | PairSource):
            names = (source.describe(i).removesuffix(f" of {source.path}") for i in range(len(source)))
            found = len(held_out & {photo_of(name) for name in names})
        if found:
            plan.problems.append(f"{source.name}: {found:,} photos of the evaluation are among its {len(source):,}")
