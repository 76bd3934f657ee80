"""Memory and least time of the recipes for one GPU, from programs compiled for GPUs that are not there.

    python -m tests.benchmarks.one_gpu --output=docs/tables/one_gpu.md

needs `pip install jax-cuda13-plugin jax-cuda13-pjrt`, and about two CPU minutes a program; those that are in the cache
are not compiled again. `--only=rtx4090` compiles the programs of one GPU, and its table has no other.
"""

from __future__ import annotations

import datetime
import importlib
import os
import pathlib
import sys
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from detclipv2_jax import commands
from detclipv2_jax.chips import CHIPS, GIB
from detclipv2_jax.data.schema import Kind
from detclipv2_jax.preflight.compile_step import GPUS

PHOTOS, EPOCHS, NAMES = 1000, 12, 80
BOXES = "detection/800x1344"
# GPU → the one whose programs stand for it: of 203 and 204 GB of traffic on the RTX 4090 and the A10G
COMPILED = dict.fromkeys(GPUS, "rtx4090") | {"a10g": "a10g"}
SMALLEST = {
    "coco_json:swin_t_24gb": "l4", "coco_json:swin_t_16gb": "rtx4080", "coco_json:swin_t_frozen_text": "rtx4080",
    "swin_t_one_gpu": "l4",
}  # fmt: skip
# (recipe, GPU compiled for, step); a canvas on its side takes the same, and the recipes for one GPU share the others
PROGRAMS = (
    *(("coco_json:swin_t_24gb", gpu, BOXES) for gpu in dict.fromkeys(COMPILED.values())),
    ("coco_json:swin_t_16gb", "rtx4080", BOXES),
    ("coco_json:swin_t_frozen_text", "rtx4080", BOXES),
    *(
        ("coco_json:swin_t_16gb", "rtx4090", step)
        for step in ("grounding/800x1344", "image_text/320x320", "prediction/800x1344")
    ),
    *(
        ("swin_t_one_gpu", "rtx4090", step)
        for step in ("detection/512x768", "grounding/512x768", "image_text/320x320", "prediction/512x768")
    ),
)


class Row(NamedTuple):
    """A compiled step."""

    recipe: str
    gpu: str
    step: str
    result: dict[str, Any]

    @property
    def memory(self) -> float:
        return self.result["memory"]["total"]

    def seconds(self, gpu: str) -> tuple[float, float]:
        """Returns the least time of the program on a GPU by arithmetic and by memory."""
        chip = CHIPS[gpu]
        return self.result["flops"]["executed"] / chip.peak, self.result["bytes"] / chip.bandwidth


def configuration(recipe: str) -> ConfigDict:
    name, _, variant = recipe.partition(":")
    config = importlib.import_module(f"configs.{name}").get_config(variant)
    if name == "coco_json":
        for kind in Kind:  # of none the files are looked at
            config[kind.value].update({"pairs" if kind is Kind.IMAGE_TEXT else "annotations": "given"})
    return config


def compiled(recipe: str, gpu: str, step: str, cache: pathlib.Path) -> Row:
    """Returns a step of a recipe compiled for a GPU; ValueError if it cannot be."""
    from detclipv2_jax.data.batches import table_capacity
    from detclipv2_jax.preflight import data_plan, report
    from detclipv2_jax.preflight.compile_step import Sizes, Topology

    config, kind = configuration(recipe), step.split("/")[0]
    if kind == "prediction":
        sizes = Sizes(0, 0, NAMES)
    elif recipe == "swin_t_one_gpu":
        plan = data_plan.expected(config, num_hosts=1, num_devices=1)
        sizes = report._sizes_of(plan, step)
    else:
        section, num_names = config[kind], NAMES if kind == Kind.DETECTION else 0
        rows = table_capacity(section, Kind(kind), num_images=section.batch_size, table_multiple=1, num_known=num_names)
        sizes = Sizes(rows, rows, NAMES)
    result = report.measure(config, Topology.parse(f"{gpu}:1"), step, sizes, cache)
    print(recipe, gpu, step, result.get("error") or f"{result['memory']['total'] / GIB:.2f} GiB", file=sys.stderr)
    if "error" in result:
        raise ValueError(f"{recipe} for {gpu}: {step}: {result['error']}")
    return Row(recipe, gpu, step, result)


def tables(rows: list[Row]) -> str:
    """Returns the memory of every program, hours of fine-tunes, and hours of pretraining by GPU."""
    versions = rows[0].result["versions"]
    lines = [
        "<!-- --8<-- [start:memory] -->",
        f"{datetime.date.today()}, jax {versions['jax']} and its compiler for CUDA 13.",
        "",
        "| recipe | step | compiled for | GiB | of | fits | traffic, GB |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        smallest = SMALLEST[row.recipe]
        limit = CHIPS[smallest].memory
        fits = "yes" if row.memory <= limit else "**no**"
        traffic = f"{row.result['bytes'] / 1e9:.0f}"
        cells = [f"{row.memory / GIB:.1f}", f"{limit / GIB:.1f} ({smallest})", fits, traffic]
        lines.append(f"| {' | '.join([row.recipe, row.step, row.gpu, *cells])} |")
    lines += ["<!-- --8<-- [end:memory] -->", "", "<!-- --8<-- [start:hours] -->"]
    lines += [f"| GPU | recipe | ms a step: by arithmetic, by memory | {PHOTOS:,} photos x {EPOCHS} epochs, hours |"]
    lines += ["|---|---|---|---|"]
    for gpu, compiled_for in COMPILED.items():
        for row in (row for row in rows if row.step == BOXES):
            if row.gpu != (gpu if gpu == "rtx4080" else compiled_for):
                continue
            num_steps = PHOTOS * EPOCHS / configuration(row.recipe).detection.batch_size
            times = row.seconds(gpu)
            shown = ", ".join(f"{1000 * seconds:.0f}" for seconds in times)
            lines.append(f"| {gpu} | {row.recipe} | {shown} | {num_steps * max(times) / 3600:.2f} |")
    lines += ["<!-- --8<-- [end:hours] -->", "", "<!-- --8<-- [start:pretraining] -->"]
    return "\n".join([*lines, *pretraining([row for row in rows if row.recipe == "swin_t_one_gpu"])])


def pretraining(rows: list[Row]) -> list[str]:
    """Returns the table of the least hours of `swin_t_one_gpu`; other sizes of a canvas are in proportion by FLOPs."""
    from detclipv2_jax.models import flops
    from detclipv2_jax.preflight import data_plan, report

    kinds = [kind for kind in Kind if any(row.step.startswith(kind) for row in rows)]
    lines = [f"| GPU | {' | '.join(kinds)} | all |", "|---" * (len(kinds) + 2) + "|"]
    config = configuration("swin_t_one_gpu")
    plan = data_plan.expected(config, num_hosts=1, num_devices=1)

    def work(step: str) -> float:
        kind, canvas = step.split("/")
        height, width = map(int, canvas.split("x"))
        sizes = report._sizes_of(plan, step)
        counts = {"table_rows": sizes.table_rows, "num_concepts": sizes.num_concepts}
        return flops.formula(config, Kind(kind), (height, width), num_devices=1, **counts)

    for gpu in (gpu for gpu in COMPILED if rows and CHIPS[gpu].memory >= CHIPS[SMALLEST["swin_t_one_gpu"]].memory):
        hours = dict.fromkeys(kinds, 0.0)
        for step, num_steps in plan.num_steps.items():
            kind = Kind(step.split("/")[0])
            if kind not in hours:
                continue
            row = next(row for row in rows if row.step.startswith(kind))
            hours[kind] += num_steps * max(row.seconds(gpu)) * work(step) / work(row.step) / 3600
        lines.append(f"| {gpu} | {' | '.join(f'{x:.1f}' for x in hours.values())} | {sum(hours.values()):.1f} |")
    return [*lines, "<!-- --8<-- [end:pretraining] -->"]


def main(
    *,
    output: pathlib.Path,
    only: str = "",
    cache: pathlib.Path = pathlib.Path("~/.cache/detclipv2_jax/preflight"),
) -> None:
    """Writes the tables.

    Args:
      output: file.
      only: name of a GPU
      cache: folder of results
    """
    os.environ["JAX_PLATFORMS"] = "cpu"
    cache = cache.expanduser()
    programs = [program for program in PROGRAMS if only in ("", program[1])]
    output.write_text(tables([compiled(*program, cache) for program in programs]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    commands.run(main, about=__doc__)
