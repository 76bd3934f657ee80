"""Phrase grounding: Recall@1/5/10 of the phrases of captions, or accuracy of referring expressions, at IoU 0.5.

    python -m detclipv2_jax.eval.grounding --checkpoint=DIR --annotations=FILE --images=DIR [--task=referring]

Reads MDETR-format json: `images` with a caption, `annotations` with bbox and tokens_positive (character spans). With
--split also the folder of Flickr30k Entities (<split>.txt, Sentences/, Annotations/), whose phrases have the boxes of
their chain, and `refs(unc).p` of RefCOCO with instances.json beside it, of which every sentence is an expression.

* phrases (Flickr30k Entities): the annotations of a caption with the same spans are one phrase with one or more boxes.
  The text is the phrase alone, as it stands in the caption. R@k: one of the k best boxes overlaps any box of the
  phrase ("any box"); merged_R@k: it overlaps the smallest box around all of them ("merged boxes").
* referring (RefCOCO, RefCOCO+, RefCOCOg): the text is the whole caption; accuracy: the best box overlaps its box.

Every phrase is looked for on its own, NMS included. The last line is one JSON object: scores as fractions and protocol.
A command that was killed continues: until it is done, what it has found lies beside --output or in <checkpoint>/eval.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import itertools
import json
import os
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import tqdm
from absl import logging
from jaxtyping import Float
from pycocotools import mask as boxes_lib

from detclipv2_jax import commands
from detclipv2_jax.data import box_json, truth
from detclipv2_jax.data.annotations import boxes_of, flags_of, usable_id
from detclipv2_jax.data.checks import documented, missing_paths, photo_facts, resolve
from detclipv2_jax.data.schema import DataError
from detclipv2_jax.data.selection import file_name, with_fitting_ids
from detclipv2_jax.data.spans import oddities_of, phrase_of, problem_of
from detclipv2_jax.eval import published
from detclipv2_jax.eval.result import Parts, Rows
from detclipv2_jax.files import sha256, write_json

RANKS = (1, 5, 10)
MIN_IOU = 0.5


@dataclasses.dataclass(frozen=True)
class Query:
    """A text to be found on an image."""

    file: str
    text: str
    boxes: Float[np.ndarray, "n 4"]  # xywh


@documented
def read_queries(
    annotations: str, *, task: str, max_bad_share: float = 0.0, odd: collections.Counter[str] | None = None
) -> list[Query]:
    """Returns the phrases or expressions of an MDETR-format json in its order; counts in `odd` what is repaired there.

    Raises:
      ValueError: it is another file, an image has no caption or the id of another, or more than a share of the
        annotations cannot be used; the message names the first entries.
    """
    content = box_json.load_json(pathlib.Path(annotations))
    odd = collections.Counter() if odd is None else odd
    images, ids = truth.in_order(content["images"], f"{annotations}: images", odd)
    entries = content["annotations"]
    content, repaired = with_fitting_ids(content)
    rows = content["annotations"]
    xywh, odd["box taken from the outline for want of a bbox"] = boxes_of(rows)
    crowd = flags_of(rows, "iscrowd", odd, where=annotations)
    by_id = {usable_id(image["id"]): image for image in images}
    reasons: dict[str, np.ndarray] = {}
    boxes: dict[tuple[Any, str], list[np.ndarray]] = collections.defaultdict(list)
    texts = {}
    for i, (row, box) in enumerate(zip(rows, xywh, strict=True)):
        image, spans = by_id.get(row.get("image_id"), {}), row.get("tokens_positive")
        reason = _problem(image, box, spans, task=task)
        if reason:
            reasons.setdefault(reason, np.zeros(len(rows), bool))[i] = True
        elif crowd[i]:
            odd["crowd box left out"] += 1
        else:
            if task == "phrases":
                odd.update(oddities_of(image["caption"], spans))
            key = row["image_id"], "" if task == "referring" else json.dumps(spans)
            boxes[key].append(box)
            texts[key] = image["caption"].strip() if task == "referring" else phrase_of(image["caption"], spans)
    bad = truth.refuse(reasons, entries, annotations, max_bad_share=max_bad_share, odd=odd)
    if not boxes:
        raise DataError(f"{annotations} has no usable annotation: there is nothing to be found")
    kept = np.flatnonzero(~bad)
    places, _ = ids.find([rows[i]["image_id"] for i in kept])
    truth.check_form(xywh[kept], images, places, annotations, max_bad_share=max_bad_share, odd=odd)
    names = {image_id: file_name(image) for image_id, image in by_id.items()}
    odd.update(repaired)
    return [Query(names[key[0]], texts[key], np.array(text_boxes, np.float64)) for key, text_boxes in boxes.items()]


def read_any(
    annotations: str, *, task: str, split: str, max_bad_share: float, odd: collections.Counter[str]
) -> list[Query]:
    """Returns what is asked in an MDETR-format json, or in a split of what a data set publishes, see `published`.

    Raises:
      ValueError: as `read_queries`; the split or the task is of another format.
    """
    path = pathlib.Path(annotations)
    kind = "phrases" if path.is_dir() else "referring" if path.suffix in (".p", ".pkl", ".pickle") else ""
    if bool(split) != bool(kind) or task != (kind or task):
        needs = f"needs --split and --task={kind}" if kind else "has no --split"
        raise ValueError(f"{annotations} {needs}; given are --split={split} and --task={task}")
    if not kind:
        return read_queries(annotations, task=task, max_bad_share=max_bad_share, odd=odd)
    rows = (
        published.read_flickr30k(path, split=split, odd=odd)
        if path.is_dir()
        else published.read_refcoco(path, split=split)
    )
    return [Query(*row) for row in rows]


def _problem(image: dict[str, Any], box: np.ndarray, spans: Any, *, task: str) -> str:
    """Returns why an annotation cannot be used, "" if it can."""
    if not image:
        return "image_id is not listed"
    if not np.isfinite(box).all():
        return "bbox is not four numbers in px"
    if (box[2:] <= 0).any():
        return "bbox has no area"
    caption = image.get("caption")
    if not isinstance(caption, str) or not caption.strip():
        return "caption of its image is no text"
    return f"tokens_positive: {problem}" if task == "phrases" and (problem := problem_of(caption, spans)) else ""


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

    `find` is (file, texts) → boxes (xywh) of each text, best first.
    """
    files = collections.defaultdict(list)
    for query in queries:
        files[query.file].append(query)
    counts: collections.Counter[str] = collections.Counter()
    for file, file_queries in tqdm.tqdm(files.items(), desc="grounding", unit="image", disable=None, leave=False):
        texts = list(dict.fromkeys(query.text for query in file_queries))
        found = dict(zip(texts, find(file, texts), strict=True))
        for query in file_queries:
            for kind, boxes in (("", query.boxes), ("merged_", merged(query.boxes))):
                rank = first_hit(found[query.text], boxes)
                counts.update({f"{kind}R@{k}": int(rank <= k) for k in RANKS})
    names = (
        {"accuracy": "R@1"}
        if task == "referring"
        else {f"{x}R@{k}": f"{x}R@{k}" for x in ("", "merged_") for k in RANKS}
    )
    return {name: int(counts[key]) / len(queries) for name, key in names.items()}


def run(
    *,
    checkpoint: str,
    annotations: str,
    images: str,
    task: str,
    folder: str | pathlib.Path,
    max_bad_share: float = 0.0,
    split: str = "",
) -> dict[str, Any]:
    """Returns scores and protocol of a checkpoint; `folder` holds what is found until that is done.

    Raises:
      ValueError: a file is missing or another one.
    """
    from detclipv2_jax.inference import Predictor, vocabulary

    kind = "folder" if os.path.isdir(annotations) else "file"
    if problems := missing_paths({"--annotations": (annotations, kind), "--images": (images, "folder")}):
        raise ValueError("\n".join(problems))
    odd: collections.Counter[str] = collections.Counter()
    queries = read_any(annotations, task=task, split=split, max_bad_share=max_bad_share, odd=odd)
    repaired = {what: int(num) for what, num in odd.items() if num}
    for what, num in repaired.items():
        logging.warning("%s: %d × %s", annotations, num, what)
    folder_of_photos = os.path.realpath(images)
    paths = [f"{folder_of_photos}/{name}" for name in dict.fromkeys(query.file for query in queries)]
    photos = photo_facts(paths, where=annotations, folder=folder_of_photos)
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
        "split": split,
        "annotations_sha256": _digest(queries) if split else sha256(annotations),
        "repaired": repaired,
        "images_evaluated": len({query.file for query in queries}),
        "num_texts": len(queries),
        "score_threshold": config.eval.score_threshold,
        "nms_iou": config.eval.nms_iou,
        "short_side": config.eval.short_side,
        "long_side": config.eval.long_side,
    }
    weights = vocabulary.weights_key(predictor.params)
    changeable = {"annotations", "annotations_sha256", "repaired"}  # boxes may be repaired: nothing is found anew
    fingerprint = {key: value for key, value in protocol.items() if key not in changeable}
    fingerprint |= {"photos": photos, "weights": weights, "asked": [(query.file, query.text) for query in queries]}
    parts = Parts(pathlib.Path(folder), fingerprint=fingerprint)
    known, files = parts.all_rows(), itertools.count()

    def find(file: str, texts: list[str]) -> list[np.ndarray]:
        numbers, image = np.array([number_of[text] for text in texts]), next(files)
        rows = known
        if image >= parts.done:
            path = resolve(folder_of_photos, file)
            found = predictor.ground(path, embeddings[numbers], max_detections=max(RANKS))
            boxes = np.asarray(found.boxes, np.float64)
            boxes[..., 2:] -= boxes[..., :2]
            labels = np.broadcast_to(numbers[:, None], found.mask.shape)[found.mask]
            scores = np.asarray(found.scores)[found.mask]
            rows = Rows(np.full(len(labels), image), labels, boxes[found.mask], scores)
            parts.add(rows)
        return [rows.boxes[(rows.image_ids == image) & (rows.category_ids == number)] for number in numbers]

    scores = evaluate(queries, find, task=task)
    parts.remove()
    return scores | {"protocol": protocol}


def _digest(queries: Sequence[Query]) -> str:
    """Returns a hash of what is asked, where that is in many files."""
    asked = [(query.file, query.text, query.boxes.tolist()) for query in queries]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()


def main(
    *,
    checkpoint: str,
    annotations: str,
    images: str,
    split: str = "",
    task: Literal["phrases", "referring"] = "phrases",
    max_bad_share: float = 0.0,
    output: pathlib.Path | None = None,
) -> None:
    """Scores a checkpoint; prints the scores and one JSON object.

    Args:
      checkpoint: workdir of a training run
      annotations: MDETR-format json, folder of Flickr30k Entities, or refs(…).p of RefCOCO
      images: folder its file names are relative to
      split: of Flickr30k Entities or RefCOCO, such as val, test, testA
      task: what the texts are
      max_bad_share: share of the annotations that may be left out because they cannot be used, 0 to 1
      output: also write the JSON object to this file
    """
    folder = output.parent if output else pathlib.Path(checkpoint, "eval")
    options: dict[str, Any] = {"task": task, "max_bad_share": max_bad_share, "folder": folder, "split": split}
    result = run(checkpoint=checkpoint, annotations=annotations, images=images, **options)
    if output:
        write_json(output, result, indent=2)
    print(f"{result['protocol']['num_texts']} texts on {result['protocol']['images_evaluated']} images, in %")
    print("   ".join(f"{name} {100 * value:.1f}" for name, value in result.items() if name != "protocol"))
    print(json.dumps(result))


if __name__ == "__main__":
    sys.exit(commands.run(main, about=__doc__))
