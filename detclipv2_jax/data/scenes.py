"""A generated world in the real formats: coloured shapes on natural-looking ground, written as files.

`write` makes a folder that is read like any data set:

| file | content |
|---|---|
| `detection.json` | COCO json; boxes of base shapes, categories like "red star" with LVIS-style frequency |
| `grounding.json` | MDETR-style json; captions naming every object, base shapes, `tokens_positive` spans |
| `pairs.tsv` | captions without boxes, which alone name the novel shapes (unless `novel_captions` is False: then nothing does); incomplete (of the objects `named_share`, half by default, are mentioned) and noisy (one in ten names something absent; `wrong_share`, none by default, are another image's) |
| `eval.json` | COCO json with LVIS's fields; all shapes: base "f", novel "r"; objects in a combination of colour, shape and texture that training never shows have `held_out` |
| `images/…` | file names in all of the above are relative to the folder |

`write_class_names` makes image classification data of the same world.

Scenes of detection and grounding show base shapes only, so that no novel shape is ever seen as background.
Scene i of a part depends on (seed, part, i) alone.
"""  # noqa: E501 -- a table row is one line

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from detclipv2_jax import atomic, files
from detclipv2_jax.data import workers
from detclipv2_jax.data.scene_drawing import COLORS, Scene, Thing, draw
from detclipv2_jax.data.shapes import BASE_SHAPES, NOVEL_SHAPES

_PARTS = ("detection", "grounding", "image_text", "eval")
_LATER = {"named_share": 0.5, "wrong_share": 0.0}  # worlds of before these options stay the same
FORMAT = 2  # raise when the same parameters would give other files
_MARKER = "scenes.json"
_NUM_BESIDE = 1000  # so many scenes take longer than a process needs to start


def _article(phrase: str) -> str:
    return f"an {phrase}" if phrase[0] in "aeiou" else f"a {phrase}"


def _caption(rng: np.random.Generator, phrases: Sequence[str], ground: str, *, joint: str = "") -> tuple[str, list]:
    """Returns a caption and the [start, end) span of every phrase; `joint` ("left of") links two phrases."""
    named = [_article(phrase) for phrase in phrases]
    listed = (
        f"{named[0]} {joint} {named[1]}" if joint else " and ".join(filter(None, [", ".join(named[:-1]), named[-1]]))
    )
    template = ("{} on {}", "a picture of {} on {}", "{} with {} behind", "there is {} on the {}")[rng.integers(4)]
    caption = template.format(listed, ground)
    spans, at = [], 0
    for phrase in phrases:
        at = caption.index(phrase, at)
        spans.append([at, at + len(phrase)])
        at += len(phrase)
    return caption, spans


def _phrase(rng: np.random.Generator, thing: Thing) -> str:
    """Returns how a caption names a thing: "red star", sometimes "striped red star"."""
    return f"{thing.texture} {thing.name}" if thing.texture != "plain" and rng.random() < 0.15 else thing.name


def _categories(shapes: Sequence[str]) -> list[dict[str, Any]]:
    every = (*BASE_SHAPES, *NOVEL_SHAPES)
    return [
        {
            "id": 1 + every.index(shape) * len(COLORS) + i,
            "name": f"{color} {shape}",
            "frequency": "r" if shape in NOVEL_SHAPES else "f",
            "supercategory": shape,
        }
        for shape in shapes
        for i, color in enumerate(COLORS)
    ]


class _Json:
    """Collects one annotation json."""

    def __init__(self, categories: list[dict[str, Any]]):
        self.content = {"images": [], "annotations": [], "categories": categories}

    def add(self, image: dict[str, Any], boxes: np.ndarray, fields: Sequence[dict[str, Any]]) -> None:
        self.content["images"].append(image)
        for (left, top, right, bottom), extra in zip(boxes.astype(float).round(2).tolist(), fields, strict=True):
            width, height = round(right - left, 2), round(bottom - top, 2)
            annotation = {"id": len(self.content["annotations"]) + 1, "image_id": image["id"], "iscrowd": 0}
            annotation |= {"bbox": [left, top, width, height], "area": round(width * height, 2), **extra}
            self.content["annotations"].append(annotation)


def _image_text_line(
    rng: np.random.Generator, scene: Scene, name: str, *, shapes: Sequence[str], named_share: float
) -> str:
    """Returns a TSV line whose caption names things of `shapes` only, or the ground alone where there is none.

    Each is mentioned with probability `named_share`, at least one; now and then an absent one is, too.
    """
    nameable = [thing for thing in scene.things if thing.shape in shapes]
    if not nameable:
        return f"{name}\ta picture of {scene.ground}\t[]\n"
    mentioned = [thing for thing in nameable if rng.random() < named_share] or [nameable[rng.integers(len(nameable))]]
    phrases = [_phrase(rng, thing) for thing in mentioned]
    if rng.random() < 0.1:
        absent = f"{list(COLORS)[rng.integers(len(COLORS))]} {shapes[int(rng.integers(len(shapes)))]}"
        if absent not in {thing.name for thing in scene.things}:
            phrases.append(absent)
    caption, _ = _caption(rng, phrases, scene.ground)
    return f"{name}\t{caption}\t{json.dumps(phrases)}\n"


def _grounding_caption(rng: np.random.Generator, scene: Scene) -> tuple[str, list]:
    phrases = [_phrase(rng, thing) for thing in scene.things]
    joint = ""
    if len(phrases) == 2 and rng.random() < 0.3:
        joint = "left of" if scene.things[0].center[0] < scene.things[1].center[0] else "right of"
    return _caption(rng, phrases, scene.ground, joint=joint)


def exchange_captions(lines: Sequence[str], share: float, *, seed: int | Sequence[int]) -> list[str]:
    """Returns lines of a TSV of which a share have the caption and phrases of the one of them before."""
    chosen = np.flatnonzero(np.random.default_rng(seed).random(len(lines)) < share)
    photos, captions = zip(*(line.split("\t", 1) for line in lines), strict=True)
    moved = list(captions)
    for i, j in zip(chosen, np.roll(chosen, 1), strict=True):
        moved[i] = captions[j]
    return [f"{photo}\t{caption}" for photo, caption in zip(photos, moved, strict=True)]


def _write_image(path: Path, image: np.ndarray) -> None:
    options = [cv2.IMWRITE_JPEG_QUALITY, 95, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
    with atomic.naming(path):
        path.write_bytes(cv2.imencode(".jpg", image[..., ::-1], options)[1].tobytes())


def write_class_names(folder: str | Path, *, num_images: int, size_px: int = 128, seed: int = 0) -> None:
    """Writes images of one object each, of any shape, into folders of their names, as `prepare classes` reads them."""
    cv2.ipp.setUseIPP_NotExact(False)  # as in _write_part
    for i in range(num_images):
        rng = np.random.default_rng((seed, len(_PARTS), i))
        every = (*BASE_SHAPES, *NOVEL_SHAPES)
        scene = draw(rng, shapes=every, size_px=size_px, training=True, distinct=True, alone=True)
        place = Path(folder) / scene.things[0].name
        place.mkdir(parents=True, exist_ok=True)
        _write_image(place / f"{i:06d}.jpg", scene.image)


def _write_part(
    where: str,
    part: str,
    count: int,
    *,
    size_px: int,
    seed: int,
    novel_captions: bool,
    named_share: float,
    wrong_share: float,
) -> None:
    folder = Path(where)
    (folder / "images" / part).mkdir(parents=True, exist_ok=True)
    every = (*BASE_SHAPES, *NOVEL_SHAPES)
    shapes = BASE_SHAPES if part in ("detection", "grounding") else every
    categories: list[dict[str, Any]] = [{"id": 1, "name": "object"}] if part == "grounding" else _categories(shapes)
    ids: dict[str, int] = {category["name"]: category["id"] for category in categories}
    out, lines = _Json(categories), []
    distinct = part in ("grounding", "image_text")
    cv2.ipp.setUseIPP_NotExact(False)  # which reading photos sets; each sets it as it needs it
    for i in range(count):
        rng = np.random.default_rng((seed, _PARTS.index(part), i))
        scene = draw(rng, shapes=shapes, size_px=size_px, training=part != "eval", distinct=distinct)
        name = f"images/{part}/{i:06d}.jpg"
        _write_image(folder / name, scene.image)
        image: dict[str, Any] = {"id": i + 1, "file_name": name, "height": size_px, "width": size_px}
        if part == "image_text":
            named = every if novel_captions else BASE_SHAPES
            lines.append(_image_text_line(rng, scene, name, shapes=named, named_share=named_share))
        elif part == "grounding":
            image["caption"], spans = _grounding_caption(rng, scene)
            out.add(image, scene.boxes, [{"category_id": 1, "tokens_positive": [span]} for span in spans])
        else:
            if part == "eval":
                absent = set(ids.values()) - {ids[thing.name] for thing in scene.things}
                image |= {"neg_category_ids": sorted(absent), "not_exhaustive_category_ids": []}
            out.add(
                image,
                scene.boxes,
                [
                    {"category_id": ids[thing.name], "texture": thing.texture, "held_out": thing.held_out}
                    for thing in scene.things
                ],
            )
    if part == "image_text":
        files.write_text(folder / "pairs.tsv", exchange_captions(lines, wrong_share, seed=(seed, 1 + len(_PARTS))))
    else:
        files.write_text(folder / f"{part}.json", [json.dumps(out.content)])


def write(
    folder: str | Path,
    *,
    num_detection: int,
    num_grounding: int,
    num_image_text: int,
    num_eval: int,
    size_px: int = 128,
    seed: int = 0,
    novel_captions: bool = True,
    named_share: float = 0.5,
    wrong_share: float = 0.0,
) -> None:
    """Writes the files of the module's table into a folder; a part with no images is left out.

    Does nothing if the folder already holds the same world.

    Raises:
      ValueError: the folder holds a world of other parameters, the size is too small to draw in, or a share is none.
    """
    for name, share in (("named_share", named_share), ("wrong_share", wrong_share)):
        if not 0 <= share <= 1:
            raise ValueError(f"{name} is {share}; it must be from 0 to 1")
    if size_px < 32:
        raise ValueError(f"size_px is {size_px}; shapes cannot be told apart below 32")
    folder = Path(folder)
    counts = dict(zip(_PARTS, (num_detection, num_grounding, num_image_text, num_eval), strict=True))
    options: dict[str, Any] = {"size_px": size_px, "seed": seed, "novel_captions": novel_captions}
    options |= {"named_share": named_share, "wrong_share": wrong_share}
    parameters = {"format": FORMAT, **counts, **options}
    parameters = {key: value for key, value in parameters.items() if _LATER.get(key, ...) != value}
    if _holds(folder, parameters):
        return
    with files.only_writer(folder):
        if _holds(folder, parameters):  # by another process
            return
        with contextlib.ExitStack() as stack:
            for part, count in counts.items():
                if part == "detection" and count > _NUM_BESIDE:
                    stack.enter_context(workers.beside(_write_part, str(folder), part, count, **options))
                elif count:
                    _write_part(str(folder), part, count, **options)
        files.write_json(folder / _MARKER, parameters)  # last: an interrupted run starts over


def _holds(folder: Path, parameters: dict[str, Any]) -> bool:
    """Returns whether a folder holds a world; ValueError for one of other parameters."""
    if not (folder / _MARKER).is_file():
        return False
    try:
        found = files.read_json(folder / _MARKER)
    except ValueError as error:
        raise ValueError(f"{error}; remove the folder, or choose another") from None
    if found != parameters:
        raise ValueError(f"{folder} holds generated scenes with {found}, not {parameters}; choose another folder")
    return True
