"""Boxes for the phrases of captions, as a trained detector finds them: image-text pairs become grounding data.

DetCLIP (v1) trains on such pseudo labels; `configs/detclip_v1.py` does. For each pair:

1. Its noun phrases, found as for training, that stand in the caption. Each is looked for by itself, as in grounding.
2. Boxes above a score. Of boxes that overlap the better one stays, whatever their phrases: a place has one label. Of
   each phrase the best few stay.
3. With a dictionary, its other names are looked for where nothing was found yet, with a score of their own: any of
   thousands is a weaker guess than what the caption says. They follow the caption, ". " before each, and complete the
   labels of what it does not mention.

| file | content |
|---|---|
| `grounding.json` | MDETR's format (`data/box_json.py`), with the score of a box and whether step 3 `completed` it |
| `images/` | photos of .tar files that have a box; others stay where they are |
| `report.json` | counts, frequent phrases with a box and without, examples |
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import itertools
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import numpy as np
from pycocotools import mask as coco_mask

from detclipv2_jax import atomic, files
from detclipv2_jax.data.checks import refuse_above_share
from detclipv2_jax.data.concepts import Vocabulary, key
from detclipv2_jax.data.spans import span_of
from detclipv2_jax.inference.detect import WORD_CHUNK, Limits, Photos
from detclipv2_jax.inference.vocabulary import pad
from detclipv2_jax.prepare import model_passes
from detclipv2_jax.prepare.record_builder import Reader

GROUNDING, REPORT, IMAGES = "grounding.json", "report.json", "images"
NOT_IN_CAPTION = "phrases that do not stand in their caption"
_TOGETHER = 256  # pairs whose phrases are encoded at once
_NUM_SHOWN = 20


class Box(NamedTuple):
    """A box that was found."""

    word: int
    xywh: list[float]  # px of the photo
    score: float


class Labeller:
    """Finds the phrases of pairs, and names of a dictionary."""

    def __init__(
        self,
        checkpoint: str,
        *,
        dictionary: Vocabulary | None,
        score_threshold: float,
        completion_threshold: float,
        nms_iou: float | None,
        max_boxes: int,
    ):
        self._predictor, run = model_passes.open_run(checkpoint)
        config = self._predictor.config.eval
        thresholds = {"score_threshold": score_threshold, "completion_threshold": completion_threshold}
        self._limits, self._completing = (
            dataclasses.replace(
                Limits.from_config(config, score_threshold=threshold, nms_iou=nms_iou, score="words"),
                class_agnostic=True,
            )
            for threshold in thresholds.values()
        )
        self._max_boxes = max_boxes
        self._names = dictionary.names if dictionary else ()
        texts = dictionary.texts(definitions=config.definitions) if dictionary else []
        self._keys = [key(name) for name in self._names]
        self._dictionary = pad(self._encode(texts), multiple=WORD_CHUNK) if texts else None
        sizes = {name: config[name] for name in ("canvases", "short_side", "long_side", "pre_nms", "max_detections")}
        names = hashlib.sha256("\n".join(texts).encode()).hexdigest()
        self.plan: dict[str, Any] = {**run, **sizes, **thresholds, "nms_iou": self._limits.nms_iou}
        self.plan |= {"max_boxes": max_boxes, "names": names}

    def _encode(self, texts: Sequence[str]) -> np.ndarray:
        return self._predictor.detector.encode_vocabulary(self._predictor.params, texts)

    def label(self, pairs: model_passes.Pairs, store: Callable[[int, bytes], str] | None) -> dict[str, Any]:
        """Returns images with their boxes, and counts.

        `store` is (number, encoded photo) → its file, for photos that are no files yet.
        """
        images: list[dict[str, Any]] = []
        counts: collections.Counter[str] = collections.Counter()
        with_box, without = collections.Counter[str](), collections.Counter[str]()
        while chunk := list(itertools.islice(pairs, _TOGETHER)):
            texts = list(dict.fromkeys(phrase for _, record in chunk for phrase in record.concepts[1:]))
            embeddings = dict(zip(texts, self._encode(texts), strict=True)) if texts else {}
            for name, record in chunk:
                spans = _spans(record.caption, record.concepts[1:])
                counts["phrases"] += len(record.concepts) - 1
                counts[NOT_IN_CAPTION] += len(record.concepts) - 1 - len(spans)
                try:
                    photo = self._predictor.photos([record.image])
                except ValueError:
                    counts["photos that cannot be read"] += 1
                    continue
                text = np.stack([embeddings[phrase] for phrase in spans]) if spans else None
                caption, rows = self._boxes(photo, record.caption, list(spans.items()), text)
                found = {row["phrase"] for row in rows if not row["completed"]}
                with_box.update(found)
                without.update(spans.keys() - found)
                if not rows:
                    continue
                if store is not None:
                    name = store(len(images), cast("bytes", record.image))
                height, width = map(int, photo.original_size[0])
                images.append({"file_name": name, "height": height, "width": width, "caption": caption, "boxes": rows})
        return {"images": images, "counts": counts, "with a box": with_box, "without": without}

    def _boxes(
        self, photo: Photos, caption: str, phrases: list[tuple[str, tuple[int, int]]], text: np.ndarray | None
    ) -> tuple[str, list[dict[str, Any]]]:
        """Returns the caption, with the names that complete it, and a row for every box."""
        rows, boxes = [], list[Box]()
        if text is not None:
            boxes = self._find(photo, *pad(text, multiple=WORD_CHUNK), self._limits)
            rows = [_row(*phrases[box.word], box, completed=False) for box in boxes]
        if self._dictionary is None:
            return caption, rows
        names, mask = self._dictionary
        named = {key(phrase) for phrase, _ in phrases}
        mask = mask.copy()
        mask[[i for i, name in enumerate(self._keys) if name in named]] = False
        found = self._find(photo, names, mask, self._completing)
        overlap = _overlaps(found, boxes)
        spans: dict[int, tuple[int, int]] = {}
        for box in (box for box, iou in zip(found, overlap, strict=True) if iou <= self._limits.nms_iou):
            if box.word not in spans:
                caption = f"{caption.rstrip(' .')}. {self._names[box.word]}"
                spans[box.word] = len(caption) - len(self._names[box.word]), len(caption)
            rows.append(_row(self._names[box.word], spans[box.word], box, completed=True))
        return caption, rows

    def _find(self, photo: Photos, text: np.ndarray, mask: np.ndarray, limits: Limits) -> list[Box]:
        """Returns the boxes of words on a photo, best first."""
        predictor, of_word = self._predictor, collections.Counter[int]()
        found = predictor.detector.predict(predictor.params, photo, text, mask, limits)
        found = jax.tree.map(lambda array: np.asarray(array)[0], found)
        boxes = []
        columns = (array[found.mask].tolist() for array in (found.boxes, found.scores, found.labels))
        for (x1, y1, x2, y2), score, word in zip(*columns, strict=True):
            of_word[word] += 1
            if of_word[word] <= self._max_boxes:
                boxes.append(Box(word, [round(side, 2) for side in (x1, y1, x2 - x1, y2 - y1)], round(score, 4)))
        return boxes


def _spans(caption: str, phrases: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Returns where each phrase stands in its caption, longer ones first: "red star" is not the end of another."""
    spans: dict[str, tuple[int, int]] = {}
    for phrase in sorted(dict.fromkeys(phrases), key=len, reverse=True):
        if span := span_of(caption, phrase, taken=tuple(spans.values())):
            spans[phrase] = span
    return {phrase: spans[phrase] for phrase in phrases if phrase in spans}


def _overlaps(boxes: Sequence[Box], others: Sequence[Box]) -> list[float]:
    """Returns the largest IoU of each box with any of the others."""
    if not boxes or not others:
        return [0.0] * len(boxes)
    both = [np.array([box.xywh for box in some]) for some in (boxes, others)]
    return np.asarray(coco_mask.iou(*both, [0] * len(others))).max(axis=1).tolist()


def _row(phrase: str, span: tuple[int, int], box: Box, *, completed: bool) -> dict[str, Any]:
    return {"phrase": phrase, "span": span, "bbox": box.xywh, "score": box.score, "completed": completed}


def make(
    reader: Reader,
    output: Path,
    labeller: Labeller,
    *,
    images: str,
    max_bad_share: float,
    command: str,
    read_by: dict[str, Any],
) -> dict[str, Any]:
    """Writes the files of a folder, see the module; returns the report.

    A killed one goes on where it was, one that is done writes nothing.

    `images` is the folder of the photos, "" where they are no files yet and are written; `read_by` are the reader's
    options.

    Raises:
      ValueError: too many pairs cannot be used, nothing was found, or another process writes to the folder.
    """
    plan = model_passes.plan_of(reader, read_by, labeller.plan)
    if (report := _finished(plan, output)) is not None:
        return report
    with files.only_writer(output):
        return _finished(plan, output) or _make(
            reader, output, labeller, images=images, max_bad_share=max_bad_share, command=command, plan=plan
        )


def _finished(plan: Any, output: Path) -> dict[str, Any] | None:
    """Returns the report of a folder that is done by a plan, None of another."""
    if not (output / REPORT).is_file() or not (output / GROUNDING).is_file():
        return None
    report = files.read_json(output / REPORT)
    return report if isinstance(report, dict) and report.get("plan") == plan else None


def _make(
    reader: Reader, output: Path, labeller: Labeller, *, images: str, max_bad_share: float, command: str, plan: Any
) -> dict[str, Any]:
    def work(shard: int, pairs: model_passes.Pairs) -> dict[str, Any]:
        def store(number: int, photo: bytes) -> str:
            name = f"{IMAGES}/{shard:06d}/{number:06d}.jpg"
            with atomic.whole(output / name) as path:
                path.write_bytes(photo)
            return name

        return labeller.label(pairs, None if images else store)

    folder = output / "parts"
    totals = {name: collections.Counter[str]() for name in ("counts", "dropped", "noted", "with a box", "without")}
    found, seen = list[dict[str, Any]](), 0
    for part in model_passes.over_shards(reader, folder, plan=plan, work=work, what="looking for phrases"):
        seen += part["seen"]
        found += part["images"]
        for name, total in totals.items():
            total.update(part[name])
    unreadable = {"photos that cannot be read": totals["counts"]["photos that cannot be read"]}
    refuse_above_share(
        totals["dropped"] + collections.Counter(unreadable), seen, max_bad_share, what="pairs", where=output
    )
    boxes = [row for image in found for row in image["boxes"]]
    if not boxes:
        raise ValueError(f"{output}: no phrase of {seen} pairs has a box; lower --score_threshold")
    files.write_json(output / GROUNDING, _content(found))
    scores = np.histogram([row["score"] for row in boxes], bins=10, range=(0.0, 1.0))[0].tolist()
    report = {
        "pairs": seen,
        "photos with a box": len(found),
        "boxes": len(boxes),
        "of them completed from the dictionary": sum(row["completed"] for row in boxes),
        **totals["counts"],
        "phrases with a box": totals["with a box"].total(),
        "phrases without a box": totals["without"].total(),
        "boxes by score, in tenths": scores,
        "dropped": totals["dropped"],
        "repaired": totals["noted"],
        "frequent phrases with a box": dict(totals["with a box"].most_common(_NUM_SHOWN)),
        "frequent phrases without a box": dict(totals["without"].most_common(_NUM_SHOWN)),
        "examples": found[:: max(len(found) // _NUM_SHOWN, 1)][:_NUM_SHOWN],
        "images": images or str(output),
        "command": command,
        "plan": plan,
    }
    files.write_json(output / REPORT, report, indent=1)
    shutil.rmtree(folder)
    return report


def _content(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns a grounding json."""
    images = [
        {"id": i} | {name: value for name, value in image.items() if name != "boxes"} for i, image in _numbered(found)
    ]
    rows = ((i, row) for i, image in _numbered(found) for row in image["boxes"])
    annotations = [
        {
            "id": number,
            "image_id": i,
            "category_id": 1,
            "iscrowd": 0,
            "bbox": row["bbox"],
            "area": round(row["bbox"][2] * row["bbox"][3], 2),
            "tokens_positive": [row["span"]],
            "score": row["score"],
            "completed": row["completed"],
        }
        for number, (i, row) in _numbered(list(rows))
    ]
    return {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "object"}]}


def _numbered(values: Sequence[Any]) -> Iterator[tuple[int, Any]]:
    return enumerate(values, start=1)
