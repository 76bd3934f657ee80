"""Finds any words on any images, with a checkpoint of ours.

    python -m detclipv2_jax.predict --checkpoint=DIR --images=GLOB --words="cat, red car" --output=DIR

Words need not occur in training; --vocabulary=lvis is a ready list of them, and --words_file may be a json with
categories, whose definitions it takes. What has no word is shown by --exemplars=FILE, a json of 1 to 5 boxes a name

    {"this mug": [{"image": "photo.jpg", "box": [x1, y1, x2, y2]}]}

in pixels of the photo as displayed, which is relative to the file; --exemplars_from takes them from a COCO json.
Writes <output>/detections.json (COCO results with the name and the file of every box; image ids count the files and
category ids the words, then the examples' names, from 1) and a picture of every image in <output>/pictures.
"""

from __future__ import annotations

import collections
import dataclasses
import glob
import os
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import tqdm
from absl import logging

from detclipv2_jax import commands
from detclipv2_jax.files import IMAGE_SUFFIXES, printable, safe_names, write_json

if TYPE_CHECKING:
    from detclipv2_jax.inference.exemplars import Example


def run(
    *,
    checkpoint: str,
    images: str,
    output: str,
    words: str = "",
    words_file: str = "",
    vocabulary: str = "",
    exemplars: str = "",
    exemplars_from: str = "",
    exemplar_images: str = "",
    per_class: int = 3,
    score_threshold: float | None = None,
    nms_iou: float | None = None,
    max_detections: int | None = None,
    batch_size: int = 1,
    draw_threshold: float = 0.2,
    max_drawn: int = 20,
) -> int:
    """Finds words and examples on images and writes what was found; returns 1 if an image could not be read, else 0.

    Args:
      checkpoint: workdir of a training run
      images: pattern, folder, file, or - for paths on stdin
      output: folder for detections.json and pictures/
      words: e.g. "cat, red car" or "ram: male sheep, red car"
      words_file: one word a line ("name", "name: definition" or "name<tab>definition"), or a COCO json with categories
      vocabulary: the names of the categories of a data set: lvis, coco or objects365
      exemplars: json of example boxes, which are looked for beside words or in place of them
      exemplars_from: COCO json, of whose boxes examples of every category are drawn
      exemplar_images: folder of its photos
      per_class: examples a category, 1 to 5
      score_threshold: only boxes above it; default: the run's config.eval.score_threshold
      nms_iou: a box is removed by a better one of its word if their IoU is above it; default: the run's
        config.eval.nms_iou
      max_detections: boxes an image; default: the run's config.eval.max_detections
      batch_size: images a step; more is faster on a GPU or TPU
      draw_threshold: boxes with at least this score are drawn, or the best few of a photo that has none
      max_drawn: boxes a picture at most, a place once, with its best word

    Raises:
      ValueError: no images, words or examples, checkpoint, or a limit that makes no sense.
    """
    from detclipv2_jax.data import transforms
    from detclipv2_jax.inference import Found, Predictor, parse_words
    from detclipv2_jax.visualize import figures

    if batch_size < 1 or max_drawn < 0:
        raise ValueError(f"--batch_size={batch_size} must be 1 or more, --max_drawn={max_drawn} 0 or more")
    shown = _examples(exemplars, exemplars_from, images=exemplar_images, per_class=per_class)
    by_word = words or words_file or vocabulary or not shown
    asked = parse_words(words, words_file=words_file, vocabulary=vocabulary) if by_word else {}
    paths = list_images(images, output=output)
    pictures = name_pictures(paths, pathlib.Path(output) / "pictures")
    predictor = Predictor.from_checkpoint(checkpoint)
    loaded: dict[int, transforms.Photo] = {}  # by position in `readable`, until they are drawn
    readable: list[int] = []
    found_of: dict[int, Found] = {}

    def load() -> Iterator[np.ndarray]:
        for i, path in enumerate(paths):
            try:
                photo = transforms.read(path)
            except (OSError, ValueError) as error:
                logging.error("cannot read %s: %s", printable(path), getattr(error, "strerror", None) or error)
                progress.update()
                continue
            loaded[len(readable)] = photo
            readable.append(i)
            yield photo.pixels

    limits = {"score_threshold": score_threshold, "nms_iou": nms_iou, "max_detections": max_detections}
    size = min(batch_size, len(paths))
    # None: shown on a terminal only
    with tqdm.tqdm(total=len(paths), desc="predicting", unit="image", disable=None) as progress:
        for row, found in predictor.iterate(load(), asked, exemplars=shown, batch_size=size, **limits):
            i, photo = readable[row], loaded.pop(row)
            found_of[i] = dataclasses.replace(found, boxes=found.boxes / photo.scale[None], size=photo.size)
            figures.detections(
                photo.pixels,
                found.boxes,
                found.labels,
                found.vocabulary,
                scores=found.scores,
                min_score=draw_threshold,
                max_drawn=max_drawn,
                title=os.fsencode(paths[i].name).decode(errors="replace"),
                path=pictures[i],
            )
            progress.update()
    rows = [row | {"file_name": str(paths[i])} for i in sorted(found_of) for row in found_of[i].to_coco(image_id=i + 1)]
    target = pathlib.Path(output) / "detections.json"
    write_json(target, rows, indent=None)
    done = f"{len(found_of)} of {len(paths)} images, {len(rows)} boxes"
    print(f"{done}: {target}, pictures in {target.parent / 'pictures'}")
    if num_unreadable := len(paths) - len(found_of):
        print(f"error: images that could not be read: {num_unreadable}; see above", file=sys.stderr)
    return int(num_unreadable > 0)


def _examples(path: str, drawn_from: str, *, images: str, per_class: int) -> dict[str, list[Example]]:
    """Returns the examples of a json and those of a data set; "" where there is none."""
    from detclipv2_jax.inference import exemplars

    shown = exemplars.read(path) if path else {}
    drawn = exemplars.from_coco(drawn_from, images=images, per_class=per_class) if drawn_from else {}
    if both := sorted(shown.keys() & drawn.keys()):
        raise ValueError(f"--exemplars and --exemplars_from both have examples of {both[0]!r}; name one otherwise")
    return shown | drawn


def list_images(images: str, *, output: str = "") -> list[pathlib.Path]:
    """Returns the files of a pattern, a folder and its sub-folders, a file or "-" (paths on stdin), without `output`.

    What a folder has beside images is said in the log.

    Raises:
      ValueError: there are none.
    """
    if images == "-":
        stdin = getattr(sys.stdin, "buffer", None)  # names need not be UTF-8
        lines = [os.fsdecode(line) for line in stdin] if stdin else list(sys.stdin)
        paths = [pathlib.Path(line.strip()) for line in lines if line.strip()]
        where = "stdin"
    elif os.path.isdir(images):
        paths = _images_of_folder(images, without=os.path.realpath(output) if output else "")
        where = f"the folder {images} (it looks for {' '.join(IMAGE_SUFFIXES)})"
    elif os.path.isfile(images):  # before the pattern: names may hold brackets
        return [pathlib.Path(images)]
    else:
        paths = sorted(path for path in map(pathlib.Path, glob.glob(images, recursive=True)) if path.is_file())
        where = f"{images!r}; quote the pattern so that the shell leaves it alone"
    if not paths:
        raise ValueError(f"--images: no image in {where}")
    return paths


def _images_of_folder(folder: str, *, without: str) -> list[pathlib.Path]:
    """Returns the images of a folder and its sub-folders; counts in the log what is left out."""
    paths: list[pathlib.Path] = []
    left_out: collections.Counter[str] = collections.Counter()
    for place, folders, names in os.walk(folder):
        linked = [name for name in folders if os.path.islink(os.path.join(place, name))]
        left_out["linked folder"] += len(linked)
        inside = os.path.realpath(place)
        folders[:] = [name for name in folders if name not in linked and os.path.join(inside, name) != without]
        for name in names:
            suffix = pathlib.Path(name).suffix.lower()
            if suffix in IMAGE_SUFFIXES:
                paths.append(pathlib.Path(place, name))
            else:
                left_out[suffix or "without suffix"] += 1
    if counts := ", ".join(f"{num} {what}" for what, num in left_out.most_common(10) if num):
        logging.warning("--images=%s: left out: %s", folder, counts)
    return sorted(paths)


def name_pictures(paths: Sequence[pathlib.Path], folder: pathlib.Path) -> list[pathlib.Path]:
    """Returns a different file in `folder` for every image; ValueError if one is itself an image of the input."""
    pictures = [folder / f"{name}.jpg" for name in safe_names(path.stem for path in paths)]
    overwritten = {path.resolve() for path in paths} & {picture.resolve() for picture in pictures}
    if overwritten:
        raise ValueError(
            f"--output: the picture {min(overwritten)} would overwrite an image of the input; choose another folder"
        )
    return pictures


if __name__ == "__main__":
    sys.exit(commands.run(run, about=__doc__))
