"""AP of example boxes as queries beside that of words, on the demo's run.

    python -m tests.benchmarks.exemplars --run=runs/demo

Examples of all names come from scenes that neither training nor evaluation has; each number of them is drawn anew for
every seed. Scores are those of the evaluation's scenes, in %, mean over the seeds and half of their range.
`--regions=NAME,…` compares ways to choose the region of an example (`REGIONS`); the package has the first.
"""

from __future__ import annotations

import pathlib
import sys
import tempfile
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from detclipv2_jax import commands
from detclipv2_jax.data import scenes, truth
from detclipv2_jax.eval import lvis, names
from detclipv2_jax.geometry import anchors as anchor_lib
from detclipv2_jax.geometry import atss
from detclipv2_jax.geometry import boxes as box_lib
from detclipv2_jax.inference import Predictor, detect, detector, exemplars

SHOWN = {"novel AP": "APr", "base AP": "APf", "novel name right": "top1r", "base name right": "top1f"}


def _weighted(weigh: Any) -> Any:
    """Returns a `describe` that averages the unit embeddings of anchors by weights."""

    def describe(regions: Any, boxes: Any, photos: Any, *, canvas: tuple[int, int]) -> Any:
        grid = anchor_lib.grid(canvas)
        boxes = box_lib.scale(jnp.asarray(boxes), jnp.asarray(photos.scale))

        def one(embeddings: Any, deltas: Any, centerness: Any, on_photo: Any, box: Any) -> Any:
            given = jnp.broadcast_to(box, grid.boxes.shape)
            overlap = box_lib.iou(box_lib.decode_deltas(jnp.asarray(grid.boxes), deltas), given)
            weights = weigh(grid, box, overlap, jax.nn.sigmoid(centerness)) * on_photo
            units = embeddings / jnp.linalg.norm(embeddings, axis=-1, keepdims=True)
            mean = jnp.sum(weights[:, None] * units.astype(jnp.float32), axis=0)
            return mean / jnp.maximum(jnp.linalg.norm(mean), 1e-6)

        on_photo = anchor_lib.on_photo(grid.boxes, photos.extent)
        return jax.vmap(one)(regions.embeddings, regions.box_deltas, regions.centerness, on_photo, boxes)

    return describe


def _positive(grid: Any, box: Any, overlap: Any, centerness: Any) -> Any:
    found = atss.assign(grid.boxes, grid.levels, box[None], jnp.ones(1, bool)).positive
    return found * (overlap + 1e-3)


def _own_cell(grid: Any, box: Any, overlap: Any, centerness: Any) -> Any:
    anchors = jnp.asarray(grid.boxes)
    return jax.nn.one_hot(jnp.argmax(box_lib.iou(anchors, jnp.broadcast_to(box, anchors.shape))), len(anchors))


REGIONS = {
    "overlap times centerness": detect.describe,
    "largest overlap": _weighted(
        lambda grid, box, overlap, centerness: jax.nn.one_hot(jnp.argmax(overlap), len(overlap))
    ),
    "positive anchors by overlap": _weighted(_positive),
    "all of overlap above half": _weighted(
        lambda grid, box, overlap, centerness: (overlap - 0.5 * jnp.max(overlap)).clip(0) * centerness
    ),
    "anchor nearest to the box": _weighted(_own_cell),
}


def score(predictor: Predictor, known: truth.Truth, folder: pathlib.Path, **asked: Any) -> dict[str, float]:
    """Returns the scores of what is found on the images of a truth by words or examples named like its categories."""
    category_of = {category["name"]: category["id"] for category in known.categories}
    paths = [str(folder / image["file_name"]) for image in known.images]
    rows: list[dict[str, Any]] = []
    for i, found in predictor.iterate(paths, batch_size=20, **asked):
        listed = found.to_coco(image_id=known.images[i]["id"])
        rows += [row | {"category_id": category_of[row["name"]]} for row in listed]
    return lvis.evaluate(known, rows) | names.evaluate(known, rows)


def line(title: str, scores: list[dict[str, float]]) -> str:
    """Returns a row of the table."""
    cells = [title]
    for key in SHOWN.values():
        values = [100 * one[key] for one in scores]
        spread = f" ± {(max(values) - min(values)) / 2:.1f}" if len(values) > 1 else ""
        cells.append(f"{np.mean(values):.1f}{spread}")
    return f"| {' | '.join(cells)} |"


def main(
    *, run: str, numbers: tuple[str, ...] = ("1", "3", "5"), seeds: int = 3, regions: tuple[str, ...] = ()
) -> None:
    """Prints the table.

    Args:
      run: workdir of the demo
      numbers: of examples
      seeds: draws of examples
      regions: ways to choose the region of an example; default: the package's
    """
    chosen: Mapping[str, Any] = {name: REGIONS[name] for name in regions or list(REGIONS)[:1]}
    data = pathlib.Path(run) / "data"
    known = truth.read(data / "eval.json")
    print(f"| asked by | {' | '.join(SHOWN)} |\n|{'---|' * (len(SHOWN) + 1)}", flush=True)
    words = [category["name"] for category in known.categories]
    print(line("words", [score(Predictor.from_checkpoint(run), known, data, words=words)]), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        counts = dict.fromkeys(("num_detection", "num_grounding", "num_image_text"), 0)
        scenes.write(folder, **counts, num_eval=3000, size_px=96, seed=1)  # the demo's seed is 0
        for region, describe in chosen.items():
            detector.describe = describe
            predictor = Predictor.from_checkpoint(run)
            predictor._show._folder = None  # what is stored is of the package's way
            for number in map(int, numbers):
                scores = []
                for seed in range(seeds):
                    given = {"images": folder, "per_class": number, "seed": seed}
                    shown = exemplars.from_coco(f"{folder}/eval.json", **given)
                    scores.append(score(predictor, known, data, exemplars=shown))
                title = f"{number} example{'s' * (number > 1)} a name"
                print(line(title if len(chosen) == 1 else f"{title}, {region}", scores), flush=True)


if __name__ == "__main__":
    sys.exit(commands.run(main, about=__doc__))
