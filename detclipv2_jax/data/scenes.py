"""A generated world in the real formats: coloured shapes on natural-looking ground, written as files.

`write` makes a folder that is read like any data set:

| file | content |
|---|---|
| `detection.json` | COCO json; boxes of base shapes, categories like "red star" with LVIS-style frequency |
| `grounding.json` | MDETR-style json; captions naming every object, base shapes, `tokens_positive` spans |
| `pairs.tsv` | captions without boxes, which alone name the novel shapes (unless `novel_captions` is False: then nothing does); incomplete (of the objects `named_share`, half by default, are mentioned) and noisy (one in ten names something absent) |
| `eval.json` | COCO json with LVIS's fields; all shapes: base "f", novel "r"; objects in a combination of colour, shape and texture that training never shows have `held_out` |
| `images/…` | file names in all of the above are relative to the folder |

Scenes of detection and grounding show base shapes only, so that no novel shape is ever seen as background.
Scene i of a part depends on (seed, part, i) alone.
"""  # noqa: E501 -- a table row is one line

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from jaxtyping import Float32, UInt8

from detclipv2_jax import files
from detclipv2_jax.data import workers
from detclipv2_jax.data.shapes import BASE_SHAPES, BODY, BODY_ALTERNATE, DARK, NOVEL_SHAPES, outlines

COLORS = {
    "red": (214, 39, 40),
    "orange": (255, 140, 20),
    "yellow": (250, 220, 50),
    "green": (40, 160, 60),
    "blue": (40, 90, 220),
    "purple": (130, 60, 170),
    "pink": (255, 140, 190),
    "brown": (125, 75, 40),
    "black": (35, 35, 40),
    "white": (245, 245, 240),
}
TEXTURES = ("plain", "striped", "dotted", "checkered")
# ground: colours at the top and at the bottom, noise cells over the image (rows, columns), noise strength
_GROUNDS = {
    "grass": ((120, 150, 90), (80, 120, 60), (20, 64), 28),
    "sand": ((215, 195, 150), (190, 165, 120), (24, 24), 16),
    "water": ((110, 160, 185), (60, 110, 150), (48, 10), 22),
    "snow": ((225, 232, 240), (200, 208, 220), (8, 8), 12),
    "stone": ((150, 148, 145), (115, 113, 112), (28, 28), 24),
    "wood": ((165, 125, 85), (140, 100, 65), (56, 5), 22),
    "sky": ((140, 185, 225), (200, 220, 235), (5, 7), 22),
}
_PARTS = ("detection", "grounding", "image_text", "eval")
FORMAT = 2  # raise when the same parameters would give other files
_MARKER = "scenes.json"
_SUPERSAMPLING = 2
_NUM_BESIDE = 1000  # so many scenes take longer than a process needs to start


class Thing(NamedTuple):
    """One object of a scene; lengths as shares of the image's side."""

    shape: str
    color: str
    texture: str
    center: tuple[float, float]  # (x, y)
    radius: float
    angle_degrees: float

    @property
    def name(self) -> str:
        """The category, like "red star"."""
        return f"{self.color} {self.shape}"

    @property
    def held_out(self) -> bool:
        """Whether training never shows this colour, shape and texture together."""
        return _held_out(self.shape, self.color, self.texture)


class Scene(NamedTuple):
    """A picture and what is in it."""

    image: UInt8[np.ndarray, "size size 3"]
    things: tuple[Thing, ...]
    boxes: Float32[np.ndarray, "n 4"]
    ground: str


def _held_out(shape: str, color: str, texture: str) -> bool:
    if shape in NOVEL_SHAPES:
        return False
    return (BASE_SHAPES.index(shape) + list(COLORS).index(color) + TEXTURES.index(texture)) % 8 == 0


def _shades(color: str) -> UInt8[np.ndarray, "5 4"]:
    """Returns the RGBA palette of a colour: transparent, body, alternate of the texture, dark, light."""
    rgb = np.array(COLORS[color], float)
    light = rgb + 0.62 * (255 - rgb)
    is_light = rgb.mean() > 190
    alternate = rgb * 0.72 if is_light else rgb + 0.42 * (255 - rgb)
    rows = [np.zeros(3), rgb, alternate, rgb * 0.45, rgb * 0.8 if color == "white" else light]
    return np.concatenate([np.array(rows), [[0], [255], [255], [255], [255]]], axis=1).astype(np.uint8)


def _pattern(texture: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Returns where the texture shows its alternate colour; u, v are coordinates in the object's frame."""
    # the offset keeps coordinates positive, so that truncation rounds down
    columns = u * np.float32(3.2 if texture == "striped" else 2.6) + 8
    if texture == "striped":
        return columns.astype(np.uint8) & 1 == 0
    rows = v * np.float32(2.6) + 8
    if texture == "dotted":
        across, down = columns - columns.astype(np.uint8) - 0.5, rows - rows.astype(np.uint8) - 0.5
        return across * across + down * down < 0.09
    return (columns.astype(np.uint8) + rows.astype(np.uint8)) & 1 == 0


def _paint(image: np.ndarray, thing: Thing) -> Float32[np.ndarray, " 4"]:
    """Paints an object into a float32 image; returns its xyxy box, clipped to the image."""
    size_px = image.shape[0]
    center, radius = np.array(thing.center) * size_px, thing.radius * size_px
    low = np.maximum(np.floor(center - 1.45 * radius), 0).astype(int)
    high = np.minimum(np.ceil(center + 1.45 * radius), size_px).astype(int)
    width, height = (high - low) * _SUPERSAMPLING
    angle = np.radians(thing.angle_degrees)
    rotation = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    entries = np.zeros((height, width), np.uint8)
    fraction_bits = 4
    for entry, polygon in outlines()[thing.shape]:
        points = (polygon @ rotation * radius + center - low) * _SUPERSAMPLING - 0.5
        points = np.round(points * (1 << fraction_bits)).astype(np.int32)
        cv2.fillPoly(entries, [points], entry, shift=fraction_bits)
    ys, xs = np.flatnonzero(entries.any(axis=1)), np.flatnonzero(entries.any(axis=0))
    box = np.array([xs[0], ys[0], xs[-1] + 1, ys[-1] + 1], np.float32) / _SUPERSAMPLING + np.tile(low, 2)
    is_body = entries == BODY
    if thing.texture != "plain":
        x = (((np.arange(width) + 0.5) / _SUPERSAMPLING + low[0] - center[0]) / radius).astype(np.float32)[None, :]
        y = (((np.arange(height) + 0.5) / _SUPERSAMPLING + low[1] - center[1]) / radius).astype(np.float32)[:, None]
        cosine, sine = np.float32(np.cos(angle)), np.float32(np.sin(angle))
        u, v = x * cosine + y * sine, y * cosine - x * sine
        np.copyto(entries, BODY_ALTERNATE, where=is_body & _pattern(thing.texture, u, v))
    # a dark rim keeps a shape visible on ground of its own colour
    inside = cv2.erode(entries, np.ones((3, 3), np.uint8)) > 0
    np.copyto(entries, DARK, where=(entries > 0) & ~inside)
    pixels = _shades(thing.color).view(np.uint32)[:, 0][entries]  # one gather of four bytes a pixel
    colored = pixels.view(np.uint8).reshape(height, width, 4)
    patch = cv2.resize(colored, tuple(high - low), interpolation=cv2.INTER_AREA)
    view = image[low[1] : high[1], low[0] : high[0]]
    view *= 1.0 - patch[..., 3:].astype(np.float32) / 255.0
    view += patch[..., :3]
    return box.astype(np.float32)


def _ground(rng: np.random.Generator, name: str, size_px: int) -> np.ndarray:
    top, bottom, cells, strength = _GROUNDS[name]
    ramp = np.linspace(0, 1, size_px, dtype=np.float32)[:, None, None]
    image = np.array(top, np.float32) * (1 - ramp) + np.array(bottom, np.float32) * ramp
    image = np.broadcast_to(image, (size_px, size_px, 3)).copy()
    for rows, columns in (cells, (5, 5)):
        noise = rng.normal(0, strength, (rows, columns)).astype(np.float32)
        image += cv2.resize(noise, (size_px, size_px), interpolation=cv2.INTER_CUBIC)[..., None]
    return image


def draw(rng: np.random.Generator, *, shapes: Sequence[str], size_px: int, training: bool, distinct: bool) -> Scene:
    """Returns one scene.

    Args:
      rng: source of everything.
      shapes: what may appear, equally likely.
      size_px: height and width.
      training: leave out the held-out combinations.
      distinct: no name appears twice.
    """
    ground = str(rng.choice(list(_GROUNDS)))
    image = _ground(rng, ground, size_px)
    max_things = min(max(size_px // 32, 4), 8)
    smallest, largest = (0.16, 0.28) if max_things == 4 else (0.08, 0.2)
    things: list[Thing] = []
    for _ in range(rng.integers(1, max_things + 1)):
        for _ in range(20):
            radius = float(rng.uniform(smallest, largest))
            x, y = rng.uniform(0.85 * radius, 1 - 0.85 * radius, 2).tolist()
            thing = Thing(
                shape=shapes[int(rng.integers(len(shapes)))],
                color=list(COLORS)[rng.integers(len(COLORS))],
                texture=TEXTURES[rng.integers(len(TEXTURES))],
                center=(x, y),
                radius=radius,
                angle_degrees=float(rng.uniform(-30, 30)),
            )
            # neighbours may cover each other's rims, not more
            is_free = all(np.hypot(x - t.center[0], y - t.center[1]) > 0.78 * (radius + t.radius) for t in things)
            is_new = not distinct or all(thing.name != t.name for t in things)
            if is_free and is_new and not (training and thing.held_out):
                things.append(thing)
                break
    boxes = np.array([_paint(image, thing) for thing in things], np.float32).reshape(-1, 4)
    # light from one side, then the camera's noise
    slope = rng.uniform(-0.15, 0.15, 2)
    across = np.linspace(-1, 1, size_px, dtype=np.float32)
    image *= (rng.uniform(0.8, 1.12) + slope[0] * across[:, None] + slope[1] * across[None, :])[..., None]
    image += rng.standard_normal(image.shape, np.float32) * np.float32(rng.uniform(0, 6))
    return Scene(np.clip(image, 0, 255).astype(np.uint8), tuple(things), boxes, ground)


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


def _write_part(
    where: str, part: str, count: int, *, size_px: int, seed: int, novel_captions: bool, named_share: float
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
        quality = [cv2.IMWRITE_JPEG_QUALITY, 95]
        quality += [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
        with files.naming(folder / name):
            (folder / name).write_bytes(cv2.imencode(".jpg", scene.image[..., ::-1], quality)[1].tobytes())
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
        files.write_text(folder / "pairs.tsv", lines)
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
) -> None:
    """Writes the files of the module's table into a folder; a part with no images is left out.

    Does nothing if the folder already holds the same world.

    Raises:
      ValueError: the folder holds a world of other parameters, the size is too small to draw in, or the share is none.
    """
    if not 0 <= named_share <= 1:
        raise ValueError(f"named_share is {named_share}; it must be from 0 to 1")
    if size_px < 32:
        raise ValueError(f"size_px is {size_px}; shapes cannot be told apart below 32")
    folder = Path(folder)
    counts = dict(zip(_PARTS, (num_detection, num_grounding, num_image_text, num_eval), strict=True))
    options: dict[str, Any] = {"size_px": size_px, "seed": seed, "novel_captions": novel_captions}
    parameters = {"format": FORMAT, **counts, **options}
    options["named_share"] = named_share
    if named_share != 0.5:  # worlds of before this option stay the same
        parameters["named_share"] = named_share
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
