"""Memory and least time of the recipes for one GPU, from programs compiled for GPUs that are not there.

    python -m tests.benchmarks.one_gpu --output=docs/tables/one_gpu.md

needs `pip install jax-cuda13-plugin jax-cuda13-pjrt`, and about two CPU minutes a program; those that are in the cache
are not compiled again, so that a run that was stopped goes on. Exit status 1: a step does not fit, or was not compiled.
With --nocompile the tables are of the programs in the cache.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import hashlib
import importlib
import json
import os
import pathlib
import sys
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

import detclipv2_jax
from detclipv2_jax import commands, config_json, files
from detclipv2_jax import config as config_lib
from detclipv2_jax.chips import CHIPS, GIB, GPUS
from detclipv2_jax.data.schema import Kind
from detclipv2_jax.preflight.compile_step import step_names

PHOTOS, EPOCHS, NAMES = 1000, 12, 80
BOXES = "detection/800x1344"
# recipe → the smallest GPU that it is for
SMALLEST = {
    "coco_json:swin_t_24gb": "l4", "coco_json:swin_t_16gb": "rtx4080", "coco_json:swin_t_frozen_text": "rtx4080",
    "swin_t_one_gpu": "l4",
}  # fmt: skip
FIRST = "rtx4090"  # every step of every recipe is compiled for its architecture, which is also that of `SMALLEST`
OTHERS = ("a100_40gb", "h100", "b200", "a10g", "rtx5090")  # one of each other architecture
SAME = "l4"  # of the architecture of `FIRST`: how far programs of one differ is seen in one step


class Row(NamedTuple):
    """A compiled step."""

    recipe: str
    gpu: str
    step: str
    result: dict[str, Any]

    @property
    def limit(self) -> tuple[str, float]:
        """The GPU with the least memory that the program has to fit, and what it has."""
        name = self.gpu if self.gpu in OTHERS else SMALLEST[self.recipe]
        return name, CHIPS[name].memory

    @property
    def fits(self) -> bool:
        return self.result.get("memory", {"total": float("inf")})["total"] <= self.limit[1]

    def seconds(self, gpu: str) -> tuple[float, float]:
        """Returns the least time of the program on a GPU by arithmetic and by memory."""
        chip = CHIPS[gpu]
        return self.result["flops"]["executed"] / chip.peak, self.result["bytes"] / chip.bandwidth

    def cells(self) -> list[str]:
        """Returns its line of the table of memory."""
        name, memory = self.limit
        found = [self.recipe, self.step, self.gpu]
        if "error" in self.result:
            return [*found, self.result["error"]]
        needed = f"{self.result['memory']['total'] / GIB:.1f}"
        fits = "yes" if self.fits else "**no**"
        moved = f"{self.result['bytes'] / 1e9:.0f}"
        return [*found, needed, f"{memory / GIB:.1f} ({name})", fits, moved, str(self.result["unknown_loops"])]


def programs() -> list[tuple[str, str, str]]:
    """Returns (recipe, GPU, step) of all that is compiled, what most depends on first.

    Of the recipes of configs/coco_json.py a step is listed once where their programs are the same: they differ in
    detection, and with a frozen tower in all that is trained.
    """
    every = [(recipe, step) for recipe in SMALLEST for step in step_names(configuration(recipe))]
    same = {
        "coco_json:swin_t_24gb": ("grounding", "image_text", "prediction"),
        "coco_json:swin_t_frozen_text": ("prediction",),
    }
    every = [(recipe, step) for recipe, step in every if not step.startswith(same.get(recipe, ()))]
    largest = {(recipe, step.split("/")[0]): (recipe, step) for recipe, step in reversed(every)}
    first = [program for program in every if program in largest.values()]

    def of_first(program: tuple[str, str]) -> tuple[str, str, str]:
        recipe, step = program
        return recipe, SMALLEST[recipe] if SMALLEST[recipe] == "rtx4080" and step.startswith("det") else FIRST, step

    return [
        *map(of_first, first),
        *(("coco_json:swin_t_24gb", gpu, BOXES) for gpu in (*OTHERS, SAME)),
        *(of_first(program) for program in every if program not in first),
        *((recipe, gpu, step) for gpu in OTHERS for recipe, step in first if is_pretraining((recipe, gpu, step))),
    ]


def stands_for(compiled_for: str, gpu: str) -> bool:
    """Returns whether programs for one GPU are those for another, nearly: of one architecture they differ by 0.2%."""
    return GPUS[compiled_for].capability == GPUS[gpu].capability


def is_pretraining(row: tuple[str, str, str] | Row) -> bool:
    return row[0] == "swin_t_one_gpu" and not row[2].startswith("prediction")


def configuration(recipe: str) -> ConfigDict:
    name, _, variant = recipe.partition(":")
    config = importlib.import_module(f"configs.{name}").get_config(variant)
    if name == "coco_json":
        for kind in Kind:  # of none the files are looked at
            config[kind.value].update({"pairs" if kind is Kind.IMAGE_TEXT else "annotations": "given"})
    return config


def compiled(recipe: str, gpu: str, step: str, cache: pathlib.Path, *, compile: bool = True) -> Row:
    """Returns a step of a recipe compiled for a GPU, or why it could not be."""
    from detclipv2_jax.data.batches import table_capacity
    from detclipv2_jax.preflight import data_plan, report
    from detclipv2_jax.preflight.compile_step import Sizes, Topology

    config, kind = config_lib.for_chip(configuration(recipe), gpu), step.split("/")[0]
    if kind == "prediction":
        sizes = Sizes(0, 0, NAMES)
    elif recipe == "swin_t_one_gpu":
        plan = data_plan.expected(config, num_hosts=1, num_devices=1)
        sizes = report._sizes_of(plan, step)
    else:
        section, num_names = config[kind], NAMES if kind == Kind.DETECTION else 0
        rows = table_capacity(section, Kind(kind), num_images=section.batch_size, table_multiple=1, num_known=num_names)
        sizes = Sizes(rows, rows, NAMES)
    known = [recipe, gpu, step, config_json.to_json(config), sizes, jax.__version__, source()]
    path = cache / f"one_gpu_{hashlib.sha256(json.dumps(known).encode()).hexdigest()}.json"
    with contextlib.suppress(OSError, ValueError):  # it is not there, or damaged
        return Row(recipe, gpu, step, json.loads(path.read_text()))
    if not compile:
        return Row(recipe, gpu, step, {"error": "not compiled"})
    result = report.measure(config, Topology.parse(f"{gpu}:1"), step, sizes, cache)
    if "error" not in result:
        files.write_json(path, result)
    return Row(recipe, gpu, step, result)


@functools.cache
def source() -> str:
    """Returns a hash of the package, with which a program need not be lowered to know that it was compiled before."""
    package = pathlib.Path(detclipv2_jax.__file__).parent
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(package.rglob("*.py")))).hexdigest()


def tables(rows: list[Row]) -> str:
    """Returns the memory of every program, hours of fine-tunes, and hours of pretraining by GPU."""
    measured = [row for row in rows if "error" not in row.result]
    versions = measured[0].result["versions"]
    lines = [
        "<!-- --8<-- [start:memory] -->",
        f"{datetime.date.today()}, jax {versions['jax']} and its compiler for CUDA 13.",
        "",
        "| recipe | step | compiled for | GiB | of | fits | traffic, GB | loops counted once |",
        "|---" * 8 + "|",
        *(f"| {' | '.join(row.cells())} |" for row in measured),
    ]
    if missing := [": ".join(row.cells()) for row in rows if row not in measured]:
        lines += ["", f"{len(missing)} of {len(rows)} programs are not there:", "", *(f"- {line}" for line in missing)]
    lines += ["<!-- --8<-- [end:memory] -->", "", "<!-- --8<-- [start:hours] -->"]
    lines += [f"| GPU | recipe | ms a step: by arithmetic, by memory | {PHOTOS:,} photos x {EPOCHS} epochs, hours |"]
    lines += ["|---|---|---|---|"]
    for gpu in GPUS:
        whole = CHIPS[gpu].memory >= CHIPS[SMALLEST["coco_json:swin_t_24gb"]].memory
        recipes = ("coco_json:swin_t_24gb",) if whole else ("coco_json:swin_t_16gb", "coco_json:swin_t_frozen_text")
        for recipe in recipes:
            alike = [row for row in measured if (row.recipe, row.step) == (recipe, BOXES) and stands_for(row.gpu, gpu)]
            if not alike:
                continue
            row = min(alike, key=lambda row: row.gpu != gpu)  # its own, or the first
            num_steps = PHOTOS * EPOCHS / configuration(row.recipe).detection.batch_size
            times = row.seconds(gpu)
            shown = ", ".join(f"{1000 * seconds:.0f}" for seconds in times)
            lines.append(f"| {gpu} | {row.recipe} | {shown} | {num_steps * max(times) / 3600:.2f} |")
    lines += ["<!-- --8<-- [end:hours] -->", "", "<!-- --8<-- [start:pretraining] -->"]
    return "\n".join([*lines, *pretraining([row for row in measured if is_pretraining(row)])])


def pretraining(rows: list[Row]) -> list[str]:
    """Returns the table of the least hours of `swin_t_one_gpu`; other sizes of a canvas are in proportion by FLOPs."""
    from detclipv2_jax.models import flops
    from detclipv2_jax.preflight import data_plan, report

    lines = [f"| GPU | programs of | {' | '.join(Kind)} | all |", "|---" * (len(Kind) + 3) + "|"]
    config = configuration("swin_t_one_gpu")
    plan = data_plan.expected(config, num_hosts=1, num_devices=1)

    def work(step: str) -> float:
        kind, canvas = step.split("/")
        height, width = map(int, canvas.split("x"))
        sizes = report._sizes_of(plan, step)
        counts = {"table_rows": sizes.table_rows, "num_concepts": sizes.num_concepts}
        return flops.formula(config, Kind(kind), (height, width), num_devices=1, **counts)

    for gpu in GPUS:
        row_of: dict[str, Row] = {}
        for row in (row for other in (gpu, FIRST) for row in rows if stands_for(row.gpu, other)):
            row_of.setdefault(row.step.split("/")[0], row)  # its own before those of others, the largest before others
        if len(row_of) < len(Kind) or CHIPS[gpu].memory < CHIPS[SMALLEST["swin_t_one_gpu"]].memory:
            continue
        hours = dict.fromkeys(Kind, 0.0)
        for step, num_steps in plan.num_steps.items():
            row = row_of[kind := Kind(step.split("/")[0])]
            hours[kind] += num_steps * max(row.seconds(gpu)) * work(step) / work(row.step) / 3600
        used = ", ".join(dict.fromkeys(row.gpu for row in row_of.values()))
        lines.append(
            f"| {gpu} | {used} | {' | '.join(f'{x:.1f}' for x in hours.values())} | {sum(hours.values()):.1f} |"
        )
    return [*lines, "<!-- --8<-- [end:pretraining] -->"]


def main(
    *,
    output: pathlib.Path,
    cache: pathlib.Path = pathlib.Path("~/.cache/detclipv2_jax/preflight"),
    compile: bool = True,
) -> int:
    """Writes the tables; returns 1 unless every step was compiled and fits.

    Args:
      output: file.
      cache: folder of results
      compile: what is not in the cache; --nocompile leaves it out
    """
    os.environ["JAX_PLATFORMS"] = "cpu"
    listed, rows = programs(), list[Row]()
    for i, program in enumerate(listed):
        rows.append(row := compiled(*program, cache.expanduser(), compile=compile))
        print(f"{i + 1} of {len(listed)}: {', '.join(row.cells())}", file=sys.stderr, flush=True)
    output.write_text(tables(rows) + "\n", encoding="utf-8")
    return int(not all(row.fits for row in rows))


if __name__ == "__main__":
    sys.exit(commands.run(main, about=__doc__))
