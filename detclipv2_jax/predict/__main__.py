"""Finds any words on any images, with a checkpoint of ours.

    python -m detclipv2_jax.predict --checkpoint=DIR --images=GLOB --words="cat, red car" --output=DIR

Words need not occur in training; --vocabulary=lvis is a ready list of them, and --words_file may be a json with
categories, whose definitions it takes. What has no word is shown by --exemplars=FILE, a json of 1 to 5 boxes a name

    {"this mug": [{"image": "photo.jpg", "box": [x1, y1, x2, y2]}]}

in pixels of the photo as displayed, which is relative to the file; --exemplars_from takes them from a COCO json.
Writes <output>/detections.json (COCO results with the name and the file of every box; image ids count the files and
category ids the words, then the examples' names, from 1) and a picture of every image in <output>/pictures, and with
--formats=coco,yolo,label_studio,fiftyone labels for those tools (docs/predicting.md). The same command goes on where it
was killed.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import tqdm

from detclipv2_jax import commands
from detclipv2_jax.files import write_text

if TYPE_CHECKING:
    from detclipv2_jax.inference.exemplars import Example
    from detclipv2_jax.predict.record import Record
    from detclipv2_jax.predict.search import Search

RECORD = ".found.jsonl"  # in the output, until all is written


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
    thresholds: str = "",
    thresholds_from: str = "",
    threshold_images: str = "",
    min_precision: float | None = None,
    batch_size: int = 1,
    score: str | None = None,
    tile: int = 0,
    tile_overlap: float = 0.2,
    every_nth_frame: int = 10,
    draw_threshold: float = 0.2,
    max_drawn: int = 20,
    formats: tuple[str, ...] = (),
) -> int:
    """Finds words and examples on images and writes what was found; returns 1 if an image could not be read, else 0.

    Args:
      checkpoint: workdir of a training run
      images: photos and videos: pattern, folder, file, or - for paths on stdin
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
      thresholds: json of a threshold for every word, which --thresholds_from wrote
      thresholds_from: COCO json of a few photos whose boxes are known; every word gets the threshold with the best F1
        on them, and they are written to thresholds.json in the output
      threshold_images: folder of its photos
      min_precision: in place of the best F1, most boxes with at least this share of right ones
      score: words, or centerness, objectness, centerness_objectness: boxes of whatever is an object, each called by its
        best word; default: the run's config.eval.score
      batch_size: images (or tiles) a step; more is faster on a GPU or TPU
      tile: side in px; larger photos are also looked at in overlapping tiles of this size, for small objects
      tile_overlap: share of a tile's side that it shares with the next one at least
      every_nth_frame: of a video, from its first one on; they become photos in frames/ in the output
      draw_threshold: boxes with at least this score are drawn, or the best few of a photo that has none
      max_drawn: boxes a picture at most, a place once, with its best word
      formats: labels for other tools: coco, yolo, label_studio, fiftyone

    Raises:
      ValueError: no images, words or examples, checkpoint, or a limit that makes no sense.
    """
    from detclipv2_jax.inference import Predictor, parse_words, tiles
    from detclipv2_jax.predict import formats as formats_lib
    from detclipv2_jax.predict import inputs
    from detclipv2_jax.predict.record import Record
    from detclipv2_jax.predict.search import Search
    from detclipv2_jax.visualize import figures

    folder = pathlib.Path(output)
    if batch_size < 1 or max_drawn < 0:
        raise ValueError(f"--batch_size={batch_size} must be 1 or more, --max_drawn={max_drawn} 0 or more")
    if min_precision is not None and not thresholds_from:
        raise ValueError("--min_precision needs --thresholds_from, the annotated photos it is reached on")
    if tile:
        tiles.check(tile=tile, overlap=tile_overlap)
    formats_lib.check(formats, folder)
    shown = _examples(exemplars, exemplars_from, images=exemplar_images, per_class=per_class)
    by_word = words or words_file or vocabulary or not shown
    asked = parse_words(words, words_file=words_file, vocabulary=vocabulary) if by_word else {}
    if every_nth_frame < 1:
        raise ValueError(f"--every_nth_frame={every_nth_frame} must be 1 or more")
    paths = inputs.with_frames(inputs.list_images(images, output=output), output=folder, every=every_nth_frame)
    pictures = inputs.name_pictures(paths, folder / "pictures")
    limits = {"score_threshold": score_threshold, "nms_iou": nms_iou, "max_detections": max_detections}
    size = batch_size if tile else min(batch_size, len(paths))
    settings = {"batch_size": size, "tile": tile, "tile_overlap": tile_overlap, "score": score, **limits}
    search = Search[int](Predictor.from_checkpoint(checkpoint), asked, shown, settings)
    if thresholds_from or thresholds:
        chosen = _thresholds(
            search, thresholds, thresholds_from, images=threshold_images, min_precision=min_precision, folder=folder
        )
        search = dataclasses.replace(search, thresholds=chosen)
    searched = search.described() | {"pictures": [draw_threshold, max_drawn]}
    record = Record(folder / RECORD, searched=searched, paths=paths, names=search.names)
    # None: shown on a terminal only
    with tqdm.tqdm(total=len(paths), initial=len(record), desc="predicting", unit="image", disable=None) as progress:
        left = [(i, path) for i, path in enumerate(paths) if path not in record]
        for i, photo, found in search.find(inputs.read(left, progress)):
            figures.detections(
                photo.pixels,
                found.boxes * photo.scale[None],
                found.labels,
                found.vocabulary,
                scores=found.scores,
                min_score=draw_threshold,
                max_drawn=max_drawn,
                title=os.fsencode(paths[i].name).decode(errors="replace"),
                path=pictures[i],
            )
            record.add(paths[i], found)
            progress.update()
    num_boxes = _write(folder, paths, record)
    formats_lib.write(formats, folder, record, names=search.names)
    done = f"{len(record)} of {len(paths)} images, {num_boxes} boxes"
    print(f"{done}: {folder / 'detections.json'}, pictures in {folder / 'pictures'}")
    num_unreadable = len(paths) - len(record)
    record.remove()
    if num_unreadable:
        print(f"error: images that could not be read: {num_unreadable}; see above", file=sys.stderr)
    return int(num_unreadable > 0)


def _write(output: pathlib.Path, paths: Sequence[pathlib.Path], record: Record) -> int:
    """Writes detections.json, a photo after the other; returns the number of boxes."""
    id_of, num = {path: i + 1 for i, path in enumerate(paths)}, 0

    def pieces() -> Iterator[str]:
        nonlocal num
        yield "["
        for path, found in record:
            for row in found.to_coco(image_id=id_of[path]):
                yield ", " * (num > 0) + json.dumps(row | {"file_name": str(path)}, ensure_ascii=False)
                num += 1
        yield "]\n"

    write_text(output / "detections.json", pieces())
    return num


def _thresholds(
    search: Search, path: str, annotations: str, *, images: str, min_precision: float | None, folder: pathlib.Path
) -> np.ndarray:
    """Returns the threshold of every word, read from a json or chosen on annotated photos."""
    from detclipv2_jax.eval import thresholds as thresholds_lib
    from detclipv2_jax.predict import thresholds as from_photos

    if path and annotations:
        raise ValueError("--thresholds and --thresholds_from exclude each other: give one of them")
    if path:
        return thresholds_lib.of_words(thresholds_lib.read(path), search.names)
    target = folder / "thresholds.json"
    return from_photos.choose(search, annotations, images=images, min_precision=min_precision, path=target)


def _examples(path: str, drawn_from: str, *, images: str, per_class: int) -> dict[str, list[Example]]:
    """Returns the examples of a json and those of a data set; "" where there is none."""
    from detclipv2_jax.inference import exemplars

    shown = exemplars.read(path) if path else {}
    drawn = exemplars.from_coco(drawn_from, images=images, per_class=per_class) if drawn_from else {}
    if both := sorted(shown.keys() & drawn.keys()):
        raise ValueError(f"--exemplars and --exemplars_from both have examples of {both[0]!r}; name one otherwise")
    return shown | drawn


if __name__ == "__main__":
    sys.exit(commands.run(run, about=__doc__))
