"""What a fine-tune on new shapes keeps of the others, with and without each means against forgetting.

    python -m tests.benchmarks.finetune --run=runs/demo --output=runs/kept

The demo's run had boxes of 16 shapes and captions of 8 more. It is tuned on boxes of 4 of these 8, in photos where
nothing else is annotated; scored are those 4 and, on the same photos, the other 20. Recipes that have run already are
not run again; `--only=NAME` runs one. Rows named "… , α = …" are walked back by `python -m detclipv2_jax.interpolate`.
"""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
from typing import Any

from detclipv2_jax import commands
from detclipv2_jax.data import scenes

NEW = ("heart", "key", "moon", "boat")
REPLAY = {
    "detection.data": "('{data}/replay',)",
    "detection.source_weights": "(1.0, 0.07)",  # of 260 batches: 18 an epoch beside 35 of the new data
    "image_text.pairs": "{run}/data/pairs.tsv",
    "image_text.images": "{run}/data",
    "image_text.weight": "0.04",
}
LOW = {"optimizer.learning_rate": "1e-4"}
RECIPES: dict[str, dict[str, str]] = {
    "plain": {},
    "frozen text tower": {"optimizer.frozen": "text_encoder/.*"},
    "a tenth of the learning rate": LOW,
    "replay": REPLAY,
    "replay, a tenth of the learning rate": REPLAY | LOW,
    "thrice the replay, a third of the learning rate": REPLAY
    | {"detection.source_weights": "(1.0, 0.2)", "optimizer.learning_rate": "3e-4", "epochs": "4"},
    "four times the replay, half the learning rate": REPLAY
    | {"detection.source_weights": "(1.0, 0.3)", "optimizer.learning_rate": "5e-4", "epochs": "5"},
}
WALKED_BACK = ("plain", "replay")


def write_data(run: pathlib.Path, data: pathlib.Path) -> None:
    """Writes photos with boxes of the new shapes to tune on, photos to score on, and a tenth of the run's boxes."""
    counts = dict.fromkeys(("num_detection", "num_grounding", "num_image_text"), 0)
    for part, num, seed in (("train", 1600, 11), ("test", 300, 12)):
        scenes.write(data / part, **counts, num_eval=num, size_px=96, seed=seed)
        content = json.loads((data / part / "eval.json").read_text())
        for kind in ("new", "old"):
            chosen = select(content, new=kind == "new", with_boxes=part == "train")
            (data / part / f"{kind}.json").write_text(json.dumps(chosen))
    if not (data / "replay").exists():
        python("detclipv2_jax.prepare", "coco_json", f"--input={run}/data/detection.json", f"--output={data}/replay")


def select(content: dict[str, Any], *, new: bool, with_boxes: bool) -> dict[str, Any]:
    """Returns the categories of the new shapes or of the others, with their boxes; images may need one."""
    categories = [one for one in content["categories"] if (one["supercategory"] in NEW) == new]
    ids = {one["id"] for one in categories}
    boxes = [one for one in content["annotations"] if one["category_id"] in ids]
    shown = {one["image_id"] for one in boxes}
    images = [
        image | {"neg_category_ids": [one for one in image["neg_category_ids"] if one in ids]}
        for image in content["images"]
        if image["id"] in shown or not with_boxes
    ]
    return {"images": images, "annotations": boxes, "categories": categories}


def python(*line: str) -> None:
    """Runs a module."""
    print("python -m", *line, flush=True)
    subprocess.run([sys.executable, "-m", *line], check=True)


def tune(run: pathlib.Path, output: pathlib.Path, name: str, *, mode: str = "train") -> None:
    """Trains a recipe, or scores the run as it is, unless its workdir has scores."""
    workdir, data = place(output, name), output / "data"
    if list((workdir / "forgetting").rglob("*_scores.json")) or (mode == "eval" and (workdir / "eval").exists()):
        return
    values = {f"scenes.num_{part}": "0" for part in ("detection", "grounding", "image_text", "eval")}
    for section, file in (("detection", "train/new"), ("eval", "test/new"), ("forgetting", "test/old")):
        values |= {f"{section}.annotations": f"{data}/{file}.json", f"{section}.images": str((data / file).parent)}
    values |= {"init_from.checkpoint": str(run), "epochs": "6", "image_text.from_epoch": "0", "closing": ""}
    values |= {"forgetting.definitions": "False", "eval.num_pictures": "0", "pictures_every_steps": "0"}
    values |= {"grounding.from_epoch": "0", "checkpoint.keep": "1", "checkpoint.every_steps": "1000"}
    values |= {key: value.format(run=run, data=data) for key, value in RECIPES.get(name, {}).items()}
    line = ["--config=configs/demo.py", f"--workdir={workdir}", f"--mode={mode}"]
    line += [f"--config.{key}={value}" for key, value in values.items()]
    python("detclipv2_jax.main", *line)


def place(output: pathlib.Path, name: str) -> pathlib.Path:
    """Returns the workdir of a recipe."""
    return output / name.replace(",", "").replace(" ", "_")


def walk_back(output: pathlib.Path, name: str) -> None:
    """Interpolates between a recipe's fine-tune and its start, unless that was done."""
    target = output / f"kept_{place(output, name).name}"
    if not target.exists():
        python("detclipv2_jax.interpolate", f"--checkpoint={place(output, name)}", f"--output={target}")


def table(output: pathlib.Path) -> str:
    """Returns the scores of what has run; those of α are without the column of shapes that never had boxes."""
    first = read(output / "before" / "eval")[0]["AP"]
    rows: dict[str, list[float]] = {}
    for name in RECIPES:
        if others := read(place(output, name) / "forgetting" / "eval"):
            rows["before"] = [first, others[0]["AP"], others[0]["APr"]]
            rows[name] = [read(place(output, name) / "eval")[-1]["AP"], others[-1]["AP"], others[-1]["APr"]]
        kept = output / f"kept_{place(output, name).name}" / "interpolation.json"
        if kept.exists():
            found = json.loads(kept.read_text())
            (best,) = (point for point in found["points"] if point["alpha"] == found["best"])
            rows[f"{name}, α = {found['best']:g}"] = [best["new"], best["old"]]
    gain, whole = rows["plain"][0] - first, rows["before"][1]
    lines = ["| means | share of plain's gain | others kept | new shapes | others | never with boxes |"]
    lines.append("|---" * 6 + "|")
    for name, scores in rows.items():
        cells = [f"{100 * value:.1f}" for value in ((scores[0] - first) / gain, scores[1] / whole, *scores)]
        lines.append(f"| {' | '.join([name, *cells, *[''] * (6 - 1 - len(cells))])} |")
    return "\n".join(lines)


def read(folder: pathlib.Path) -> list[dict[str, float]]:
    """Returns the scores of the evaluations in a folder, by step."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*_scores.json"))]


def main(*, run: str, output: str, only: str = "") -> str:
    """Trains the recipes; returns the table.

    Args:
      run: workdir of the demo
      output: folder for data and workdirs
      only: the recipe to run; default: all
    """
    source, folder = pathlib.Path(run), pathlib.Path(output)
    write_data(source, folder / "data")
    tune(source, folder, "before", mode="eval")
    for name in [only] if only else RECIPES:
        tune(source, folder, name)
        if name in WALKED_BACK:
            walk_back(folder, name)
    return table(folder)


if __name__ == "__main__":
    sys.exit(commands.run(main, about=__doc__))
