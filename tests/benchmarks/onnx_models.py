"""AP, size and latency of ONNX models of a run, with weights in float32 and int8, beside JAX.

    python -m tests.benchmarks.onnx_models --run=runs/demo

Photos and names are those of an LVIS json; AP is in %, base and novel names apart; ms are the median of one call for
one photo that is on its canvas. JAX runs the program of `Predictor`; the words are an input of all.
"""

from __future__ import annotations

import json
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from detclipv2_jax import commands
from detclipv2_jax.eval import lvis
from detclipv2_jax.export import __main__ as export
from detclipv2_jax.export.scripts.onnx_detector import Detector
from detclipv2_jax.inference import Limits, Photos, Predictor


def measure(
    find: Callable[..., dict[str, Any]], photos: list[tuple[int, Photos]], annotations: dict[str, Any]
) -> tuple[float, dict[str, float]]:
    """Returns (median ms a photo, scores) of a function of image, extent and original size."""
    rows, seconds = [], []
    for image_id, photo in photos:
        arrays = [np.asarray(array)[None] for array in (photo.image, photo.extent, photo.original_size)]
        start = time.perf_counter()
        found = {name: np.asarray(array)[0] for name, array in find(*arrays).items()}
        seconds.append(time.perf_counter() - start)
        boxes = found["boxes"].astype(float)
        for box, score, label, used in zip(boxes, found["scores"], found["labels"], found["mask"], strict=True):
            if used:
                bbox = [*box[:2], *(box[2:] - box[:2])]
                category = annotations["categories"][label]["id"]
                rows.append({"image_id": image_id, "category_id": category, "bbox": bbox, "score": float(score)})
    return 1e3 * statistics.median(seconds), lvis.evaluate(annotations, rows)


def run(*, run: str, annotations: str = "", max_photos: int = 0) -> None:
    """Prints a table, a row for JAX and each of the exports.

    Args:
      run: workdir of a run
      annotations: LVIS json; default: RUN/data/eval.json
      max_photos: the first ones only; 0: all
    """
    path = pathlib.Path(annotations or pathlib.Path(run) / "data" / "eval.json")
    truth = json.loads(path.read_text())
    if max_photos:
        truth["images"] = truth["images"][:max_photos]
        kept = {image["id"] for image in truth["images"]}
        truth["annotations"] = [row for row in truth["annotations"] if row["image_id"] in kept]
    predictor = Predictor.from_checkpoint(run, keep_vocabularies=False)
    photos = [(image["id"], predictor._photo(str(path.parent / image["file_name"]))) for image in truth["images"]]
    words = dict.fromkeys(row["name"] for row in truth["categories"])
    _, text, mask = predictor.vocabulary(list(words))
    limits = Limits.from_config(predictor.config.eval)

    def with_jax(image: np.ndarray, extent: np.ndarray, size: np.ndarray) -> dict[str, Any]:
        placed = Photos(image, extent, (extent / size).astype(np.float32), size)
        return jax.device_get(vars(predictor.detector.predict(predictor.params, placed, text, mask, limits)))

    row = "{:14} {:>9} {:>8} {:>7} {:>7} {:>7}".format
    print(row("", "size, MB", "ms", "AP", "base", "novel"))

    def show(name: str, size: str, find: Callable[..., dict[str, Any]]) -> None:
        milliseconds, scores = measure(find, photos, truth)
        aps = (f"{100 * scores[key]:.2f}" for key in ("AP", "APf", "APr"))
        print(row(name, size, f"{milliseconds:.1f}", *aps), flush=True)

    show("jax", "", with_jax)
    with tempfile.TemporaryDirectory() as temporary:
        listed = pathlib.Path(temporary) / "words.txt"
        listed.write_text("\n".join(words))
        for weights in ("float32", "int8"):
            folder = pathlib.Path(temporary) / weights
            export.run(checkpoint=run, format="onnx", output=str(folder), words_file=str(listed), weights=weights)
            size = sum(file.stat().st_size for file in folder.glob("*.onnx")) / 1e6
            show(f"onnx {weights}", f"{size:.1f}", Detector(folder))


if __name__ == "__main__":
    sys.exit(commands.run(run, about=__doc__))
