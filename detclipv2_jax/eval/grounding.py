"""Phrase grounding: Recall@1/5/10 of the phrases of captions, or accuracy of referring expressions, at IoU 0.5.

    python -m detclipv2_jax.eval.grounding --checkpoint=DIR --annotations=FILE --images=DIR [--task=referring]

Reads MDETR-format json: `images` with a caption, `annotations` with bbox and tokens_positive (character spans).

* phrases (Flickr30k Entities): the annotations of a caption with the same spans are one phrase with one or more boxes.
  The text is the phrase alone, as it stands in the caption. R@k: one of the k best boxes overlaps any box of the
  phrase ("any box"); merged_R@k: it overlaps the smallest box around all of them ("merged boxes").
* referring (RefCOCO, RefCOCO+, RefCOCOg): the text is the whole caption; accuracy: the best box overlaps its box.

Every phrase is looked for on its own, NMS included. The last line is one JSON object: scores as fractions and protocol.
A command that was killed continues: until it is done, what it has found lies beside --output or in <checkpoint>/eval.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import itertools
import json
import os
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tqdm
from jaxtyping import Float
from pycocotools import mask as boxes_lib

from detclipv2_jax.data import box_json
from detclipv2_jax.data.checks import missing_paths, resolve
from detclipv2_jax.eval import coco
from detclipv2_jax.eval.result import Parts, Rows
from detclipv2_jax.files import write_json
from detclipv2_jax.inference import Predictor, vocabulary

TASKS = ("phrases", "referring")
RANKS = (1, 5, 10)
MIN_IOU = 0.5


@dataclasses.dataclass(frozen=True)
class Query:
    """A text to be found on an image."""

    file: str
    text: str
    boxes: Float[np.ndarray, "n 4"]  # xywh


def read_queries(annotations: str, *, task: str) -> list[Query]:
    """Returns the phrases or expressions of an MDETR-format json in its order; ValueError if it is another file."""
    content = box_json.load_json(pathlib.Path(annotations))
    images = {image["id"]: image for image in content["images"]}
    boxes: dict[tuple[Any, str], list[list[float]]] = collections.defaultdict(list)
    texts = {}
    for row in content["annotations"]:
        image = images.get(row.get("image_id"), {})
        caption, spans = str(image.get("caption") or ""), row.get("tokens_positive")
        text = caption.strip() if task == "referring" else box_json.phrase_of(caption, spans)
        if not text or "bbox" not in row:
            raise ValueError(
                f"{annotations}: annotation {row.get('id')} has no box, no caption or no tokens_positive within it;"
                " an MDETR-format json is needed"
            )
        key = row["image_id"], "" if task == "referring" else json.dumps(spans)
        boxes[key].append(row["bbox"])
        texts[key] = text
    names = {image_id: box_json.file_name(image) for image_id, image in images.items()}
    return [Query(names[key[0]], texts[key], np.array(rows, np.float64)) for key, rows in boxes.items()]


def first_hit(found: Float[np.ndarray, "k 4"], boxes: Float[np.ndarray, "n 4"]) -> float:
    """Returns the rank, from 1, of the first of the found boxes (xywh) that overlaps any of the given ones, or inf."""
    overlaps = np.asarray(boxes_lib.iou(found, boxes, [0] * len(boxes))).reshape(len(found), len(boxes))
    ranks = np.flatnonzero((overlaps >= MIN_IOU).any(axis=1))
    return int(ranks[0]) + 1 if len(ranks) else np.inf


def merged(boxes: Float[np.ndarray, "n 4"]) -> Float[np.ndarray, "1 4"]:
    """Returns the smallest box (xywh) around all boxes."""
    low, high = boxes[:, :2].min(axis=0), (boxes[:, :2] + boxes[:, 2:]).max(axis=0)
    return np.concatenate([low, high - low])[None]


def evaluate(
    queries: Sequence[Query], find: Callable[[str, list[str]], list[Float[np.ndarray, "k 4"]]], *, task: str
) -> dict[str, float]:
    """Returns the scores of the task as fractions.

    Args:
      queries: what is to be found.
      find: (file, texts) → boxes (xywh) of each text, best first.
      task: phrases | referring.
    """
    files = collections.defaultdict(list)
    for query in queries:
        files[query.file].append(query)
    counts: collections.Counter[str] = collections.Counter()
    for file, own in tqdm.tqdm(files.items(), desc="grounding", unit="image", disable=None, leave=False):
        texts = list(dict.fromkeys(query.text for query in own))
        found = dict(zip(texts, find(file, texts), strict=True))
        for query in own:
            for kind, boxes in (("", query.boxes), ("merged_", merged(query.boxes))):
                rank = first_hit(found[query.text], boxes)
                counts.update({f"{kind}R@{k}": int(rank <= k) for k in RANKS})
    names = (
        {"accuracy": "R@1"}
        if task == "referring"
        else {f"{x}R@{k}": f"{x}R@{k}" for x in ("", "merged_") for k in RANKS}
    )
    return {name: int(counts[key]) / len(queries) for name, key in names.items()}


def run(*, checkpoint: str, annotations: str, images: str, task: str, folder: str | pathlib.Path) -> dict[str, Any]:
    """Returns scores and protocol of a checkpoint; `folder` holds what is found until that is done.

    Raises:
      ValueError: a file is missing or another one.
    """
    if problems := missing_paths({"--annotations": (annotations, "file"), "--images": (images, "folder")}):
        raise ValueError("\n".join(problems))
    queries = read_queries(annotations, task=task)
    predictor = Predictor.from_checkpoint(checkpoint)
    number_of = {text: i for i, text in enumerate(dict.fromkeys(query.text for query in queries))}
    embeddings = predictor.vocabulary(list(number_of))[1]
    config = predictor.config
    protocol = {
        "task": task,
        "text": "the whole caption" if task == "referring" else "the phrase alone, as it stands in the caption",
        "boxes": "R@k: any box; merged_R@k: the box around all of a phrase",
        "iou": MIN_IOU,
        "checkpoint": checkpoint,
        "checkpoint_step": predictor.step,
        "ema": config.optimizer.ema_decay > 0,
        "annotations": annotations,
        "annotations_sha256": coco.sha256(annotations),
        "images_evaluated": len({query.file for query in queries}),
        "num_texts": len(queries),
        "score_threshold": config.eval.score_threshold,
        "nms_iou": config.eval.nms_iou,
        "short_side": config.eval.short_side,
        "long_side": config.eval.long_side,
    }
    weights = vocabulary.weights_key(predictor.params)
    parts = Parts(pathlib.Path(folder), fingerprint={"protocol": protocol, "images": images, "weights": weights})
    known, files = parts.all_rows(), itertools.count()

    def find(file: str, texts: list[str]) -> list[np.ndarray]:
        numbers, image = np.array([number_of[text] for text in texts]), next(files)
        rows = known
        if image >= parts.done:
            path = resolve(os.path.realpath(images), file)
            found = predictor.ground(path, embeddings[numbers], max_detections=max(RANKS))
            boxes = found.boxes.astype(np.float64)
            boxes[..., 2:] -= boxes[..., :2]
            labels = np.broadcast_to(numbers[:, None], found.mask.shape)[found.mask]
            rows = Rows(np.full(len(labels), image), labels, boxes[found.mask], found.scores[found.mask])
            parts.add(rows)
        return [rows.boxes[(rows.image_ids == image) & (rows.category_ids == number)] for number in numbers]

    scores = evaluate(queries, find, task=task)
    parts.remove()
    return scores | {"protocol": protocol}


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m detclipv2_jax.eval.grounding",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="workdir of a training run")
    parser.add_argument("--annotations", required=True, metavar="FILE", help="MDETR-format json")
    parser.add_argument("--images", required=True, metavar="DIR", help="folder its file names are relative to")
    parser.add_argument("--task", choices=TASKS, default=TASKS[0])
    parser.add_argument("--output", metavar="FILE", help="also write the JSON object to this file")
    options = parser.parse_args(arguments)
    try:
        result = run(
            checkpoint=options.checkpoint,
            annotations=options.annotations,
            images=options.images,
            task=options.task,
            folder=pathlib.Path(options.output or f"{options.checkpoint}/eval/{options.task}").parent,
        )
        if options.output:
            write_json(pathlib.Path(options.output), result, indent=2)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{result['protocol']['num_texts']} texts on {result['protocol']['images_evaluated']} images, in %")
    print("   ".join(f"{name} {100 * value:.1f}" for name, value in result.items() if name != "protocol"))
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
