"""What a trained model adds to image-text pairs: boxes of phrases, and which captions are wrong, on the demo's run.

    python -m tests.benchmarks.pairs --run=runs/demo

* Pseudo boxes: captions of the scenes that the demo is evaluated on name half of their things, one in ten something
  absent. A box is right if its phrase is the name of a thing whose box overlaps it by more than half. Names that are
  not mentioned may be completed from a dictionary of all names.
* Filter: a share of the captions of the demo's pairs change places among each other; how many of these are dropped.
"""

from __future__ import annotations

import json
import pathlib
import sys
import tempfile
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from detclipv2_jax import commands
from detclipv2_jax.data import scenes
from detclipv2_jax.prepare import __main__ as prepare
from detclipv2_jax.prepare import filter_pairs, image_text
from detclipv2_jax.prepare.record_builder import Tally

LIMITS = (0.1, 0.15, 0.25, 0.35)


def write_captions(truth: dict[str, Any], path: pathlib.Path) -> None:
    """Writes a TSV whose captions name half of each scene's things, at least one, and now and then an absent one."""
    names = {category["id"]: category["name"] for category in truth["categories"]}
    rng = np.random.default_rng(0)
    lines = []
    for image in truth["images"]:
        present = [names[row["category_id"]] for row in truth["annotations"] if row["image_id"] == image["id"]]
        mentioned = [name for name in present if rng.random() < 0.5] or [present[rng.integers(len(present))]]
        absent = list(names.values())[rng.integers(len(names))]
        phrases = list(dict.fromkeys([*mentioned, *[absent] * (rng.random() < 0.1 and absent not in present)]))
        caption = f"a picture of {' and '.join(f'a {phrase}' for phrase in phrases)}"
        lines.append(f"{image['file_name']}\t{caption}\t{json.dumps(phrases)}\n")
    path.write_text("".join(lines))


def boxes_right(found: dict[str, Any], truth: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns for each pseudo box whether it is right, beside its score, novelty and origin."""
    category = {row["name"]: row for row in truth["categories"]}
    photo = {image["file_name"]: image["id"] for image in truth["images"]}
    images = {image["id"]: image for image in found["images"]}
    rows = []
    for row in found["annotations"]:
        image = images[row["image_id"]]
        [[start, end]] = row["tokens_positive"]
        known = category[image["caption"][start:end]]
        boxes = [
            one["bbox"]
            for one in truth["annotations"]
            if (one["image_id"], one["category_id"]) == (photo[image["file_name"]], known["id"])
        ]
        overlap = np.asarray(coco_mask.iou(np.array([row["bbox"]]), np.array(boxes), [0] * len(boxes))) if boxes else 0
        rows.append(
            {
                "right": bool(np.max(overlap) > 0.5),
                "novel": known["frequency"] == "r",
                "completed": row["completed"],
                "score": row["score"],
            }
        )
    return rows


def main(
    *, run: str, wrong_share: float = 0.3, score_thresholds: tuple[str, ...] = ("0.1", "0.2", "0.3", "0.4")
) -> None:
    """Prints the tables.

    Args:
      run: workdir of the demo
      wrong_share: of captions that are another photo's
      score_thresholds: of pseudo boxes, of phrases and of names alike
    """
    data = pathlib.Path(run) / "data"
    truth = json.loads((data / "eval.json").read_text())
    with tempfile.TemporaryDirectory() as place:
        folder = pathlib.Path(place)
        write_captions(truth, folder / "captions.tsv")
        names = [row["name"] for row in truth["categories"]]
        (folder / "names.tsv").write_text("".join(f"{name}\n" for name in names))
        options: dict[str, Any] = {"input": str(folder / "captions.tsv"), "images": str(data), "pipeline": ""}
        options |= {"checkpoint": run, "dictionary": str(folder / "names.tsv")}
        tables = [
            "| score above | boxes | right | of base names | of novel names | completed | right |\n|---|" + "---|" * 6
        ]
        for threshold in score_thresholds:
            output = folder / f"boxes_{threshold}"
            limits = dict.fromkeys(("score_threshold", "completion_threshold"), float(threshold))
            prepare.pseudo_boxes(output=str(output), **limits, **options)
            rows = boxes_right(json.loads((output / "grounding.json").read_text()), truth)
            asked = [row for row in rows if not row["completed"]]
            groups = (asked, [row for row in asked if not row["novel"]], [row for row in asked if row["novel"]])
            completed = [row for row in rows if row["completed"]]
            all_, base, novel, more = (
                f"{100 * np.mean([row['right'] for row in group]):.1f}%" if group else "-"
                for group in (*groups, completed)
            )
            tables.append(f"| {threshold} | {len(asked)} | {all_} | {base} | {novel} | {len(completed)} | {more} |")
        pairs = (data / "pairs.tsv").read_text().splitlines(keepends=True)
        lines = scenes.exchange_captions(pairs, wrong_share, seed=0)
        wrong = np.array([new != old for new, old in zip(lines, pairs, strict=True)])
        (folder / "pairs.tsv").write_text("".join(lines))
        reader = image_text.open_reader(
            str(folder / "pairs.tsv"), str(data), shard_size=4096, pipeline="", max_phrases=8
        )
        kept = filter_pairs.judge(reader, run, folder / "filter", max_misfit=LIMITS[0], group_size=64)
        misfits = np.array(json.loads((folder / "filter" / "000000.json").read_text())["misfits"])
        num_kept = sum(1 for _ in kept.read(0, Tally()))
        tables.append(f"\n{wrong.sum()} of {len(wrong)} captions are wrong\n")
        tables.append(
            "| misfit at most | wrong ones dropped | right ones kept | wrong among the kept |\n|---|---|---|---|"
        )
        for limit in LIMITS:
            keep = misfits <= limit
            shares = (1 - keep[wrong].mean(), keep[~wrong].mean(), wrong[keep].mean())
            tables.append(f"| {limit} | {' | '.join(f'{100 * share:.1f}%' for share in shares)} |")
        assert num_kept == (misfits <= LIMITS[0]).sum()
    print("\n".join(tables))


if __name__ == "__main__":
    sys.exit(commands.run(main, about=__doc__))
