"""AP, size and latency of ONNX models of a run, with weights in float32 and int8, beside JAX.

    python -m tests.benchmarks.onnx_models --run=runs/demo
    python -m tests.benchmarks.onnx_models --random=swin_t --canvas=800x1344

Photos and names are those of an LVIS json; AP is in %, base and novel names apart; ms are the median of one call for
one photo that is on its canvas. JAX runs the program of `Predictor`; the words are an input of all. Of a model with
random weights, photos of noise and the names of COCO it prints by how much the results differ, in place of scores.
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
from detclipv2_jax import config as config_lib
from detclipv2_jax.eval import lvis
from detclipv2_jax.export import __main__ as export
from detclipv2_jax.export.scripts.onnx_detector import Detector
from detclipv2_jax.inference import Limits, Photos, Predictor
from detclipv2_jax.models import detclip
from detclipv2_jax.runs import exported
from detclipv2_jax.runs import state as train_state


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


def of_random_weights(size: str, canvas: tuple[int, int], num_photos: int) -> None:
    """Prints times of JAX and ONNX, and the largest differences of scores and of boxes in sides of the photo."""
    config = config_lib.base()
    config.model = config_lib.model(size)
    config.model.dtype = "float32"
    config.eval.canvases, config.eval.short_side, config.eval.long_side = (canvas,), min(canvas), max(canvas)
    model, keys = detclip.from_config(config.model), jax.random.split(jax.random.key(0), 2)
    params = train_state.init_params(model, keys[0], context_length=config.model.text.context_length)
    leaves, tree = jax.tree.flatten(params)
    noise = zip(leaves, jax.random.split(keys[1], len(leaves)), strict=True)  # else offsets of samples are zero
    params = jax.tree.unflatten(tree, [x + 0.02 * jax.random.normal(key, x.shape) for x, key in noise])
    rng, seconds, off = np.random.default_rng(0), ([], []), []
    with tempfile.TemporaryDirectory() as temporary:
        start, folder = pathlib.Path(temporary) / "start", pathlib.Path(temporary) / "onnx"
        exported.save(start, config=config, params=params, step=0)
        export.run(checkpoint=str(start), format="onnx", output=str(folder), vocabulary="coco")
        megabytes = sum(file.stat().st_size for file in folder.glob("*.onnx*")) / 1e6
        predictor, detector = Predictor.from_checkpoint(start, keep_vocabularies=False), Detector(folder)
        _, text, mask = predictor.vocabulary(detector.words)
        limits, extent = Limits.from_config(config.eval), np.array([canvas], np.int32)
        for _ in range(num_photos):
            image = rng.integers(0, 256, (1, *canvas, 3), np.uint8)
            photos, found = Photos(image, extent, np.ones((1, 2), np.float32), extent), []

            def with_jax(photos: Photos = photos) -> dict[str, Any]:
                return jax.device_get(vars(predictor.detector.predict(predictor.params, photos, text, mask, limits)))

            def with_onnx(image: np.ndarray = image) -> dict[str, Any]:
                return detector(image, extent, extent)

            for times, call in zip(seconds, (with_jax, with_onnx), strict=True):
                call()  # compiles
                begun = time.perf_counter()
                found.append(call())
                times.append(time.perf_counter() - begun)
            off.append(differences(*found, side=max(canvas)))
    print(f"{size} {canvas[0]}x{canvas[1]}: {megabytes:.0f} MB, {found[0]['mask'].sum()} boxes in the last photo")
    print("jax {:.0f} ms, onnx {:.0f} ms".format(*(1000 * statistics.median(times) for times in seconds)))
    print("scores differ by {:.1e}, boxes by {:.1e} of a side; {:.0f} boxes have none".format(*np.max(off, axis=0)))


def differences(one: dict[str, Any], other: dict[str, Any], *, side: float) -> tuple[float, float, float]:
    """Returns the largest differences of scores and boxes, and how many of one's boxes the other does not have.

    Equal scores may come in another order, and of two such boxes that overlap either may be left: a box is compared
    with that of the other's of its word and score that is nearest.
    """
    a, b = ({name: array[0][found["mask"][0]] for name, array in found.items()} for found in (one, other))
    off = np.abs(a["boxes"][:, None] - b["boxes"][None]).max(axis=2) / side
    scores = np.abs(a["scores"][:, None] - b["scores"][None])
    off[(a["labels"][:, None] != b["labels"][None]) | (scores > 1e-4)] = np.inf
    nearest = off.argmin(axis=1)
    rows = np.arange(len(nearest))
    there = off[rows, nearest] <= 1e-3
    return scores[rows, nearest][there].max(), off[rows, nearest][there].max(), np.sum(~there)


def run(
    *, run: str = "", annotations: str = "", max_photos: int = 0, random: str = "", canvas: str = "320x320"
) -> None:
    """Prints a table, a row for JAX and each of the exports.

    Args:
      run: workdir of a run
      annotations: LVIS json; default: RUN/data/eval.json
      max_photos: the first ones only; 0: all, or 3 of noise
      random: size of a model with random weights, such as swin_t, in place of a run
      canvas: height x width of its photos
    """
    if random:
        height, width = map(int, canvas.split("x"))
        return of_random_weights(random, (height, width), max_photos or 3)
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
