"""The report of a preflight: every step compiled by a process of its own, what does not fit, the hours of the run."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import json
import math
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ml_collections import ConfigDict

from detclipv2_jax import config as config_lib
from detclipv2_jax import config_json, validation
from detclipv2_jax.chips import CHIPS, GIB
from detclipv2_jax.data.schema import Kind
from detclipv2_jax.models import flops
from detclipv2_jax.preflight import data_plan
from detclipv2_jax.preflight.compile_step import Sizes, Topology, step_names

GB = 1e9
COLUMNS = (
    "step", "arguments", "temporaries", "all", "fits", "model TFLOP (by formula)", "recomputed", "memory traffic",
    "network", "ms at least: by compute, memory, network", "utilization at most", "compiling",
)  # fmt: skip
MAX_ALTERNATIVES = 4  # programs compiled to find values that fit


@dataclasses.dataclass(frozen=True)
class Row:
    """A step on a topology: what was measured, or why nothing could be."""

    topology: Topology
    step: str
    result: dict[str, Any]
    remedy: str = ""  # values with which it fits

    @property
    def needed(self) -> float:
        return self.result.get("memory", {}).get("total", 0.0)

    @property
    def fits(self) -> bool:
        return "error" not in self.result and self.needed <= CHIPS[self.topology.chip].memory

    @property
    def least_seconds(self) -> tuple[float, float, float]:
        """Seconds at the full rate of arithmetic, of memory and of the network; a step takes the longest or more."""
        chip, result = CHIPS[self.topology.chip], self.result
        return (
            result["flops"]["executed"] / (self.topology.num_devices * chip.peak),
            result.get("bytes", 0.0) / chip.bandwidth,
            sum(result.get("network", {}).values()) / chip.network if chip.network else 0.0,
        )


def measure(config: ConfigDict, topology: Topology, step: str, sizes: Sizes, cache: pathlib.Path) -> dict[str, Any]:
    """Returns `compile_step.measure` of a step, in a process of its own; {"error": …} if that ends otherwise."""
    job = {
        "config": config_json.to_json(config),
        "topology": topology.name,
        "step": step,
        "sizes": sizes._asdict(),
        "cache": str(cache),
    }
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(job, file)
        file.flush()
        command = [sys.executable, "-m", "detclipv2_jax.preflight.compile_step", file.name]
        done = subprocess.run(command, env=os.environ | topology.environment, capture_output=True, text=True)
    if done.returncode:
        return {"error": failure(done.returncode, done.stderr)}
    return json.loads(done.stdout.splitlines()[-1])


def failure(status: int, stderr: str) -> str:
    """Returns why a process ended, from its exit status and what it wrote."""
    if status < 0:
        return f"killed by signal {-status}" + " (this machine ran out of memory: compiling takes 8 GB and more)" * (
            status == -signal.SIGKILL
        )
    lines = [line for line in stderr.splitlines() if line.strip()]
    return f"exit status {status}: {lines[-1] if lines else 'without a message'}"


def alternatives(config: ConfigDict, step: str, num_devices: int) -> Iterator[dict[str, Any]]:
    """Yields values to try for a step that does not fit, the cheapest in FLOPs first."""
    kind = step.split("/")[0]
    if kind == "prediction":
        size = config.eval.batch_size
        while size > num_devices:
            size //= 2
            yield {"eval.batch_size": size}
        return
    accumulate = config.optimizer.accumulate[kind]
    chunks = []
    while config[kind].batch_size % (num_devices * 2 * accumulate) == 0:
        accumulate *= 2
        chunks.append({f"optimizer.accumulate.{kind}": accumulate})
    remat = {"model.remat": "all"} if config.model.remat != "all" else {}
    # chunks cost nothing but for pairs, which are embedded twice
    yield from [remat] * bool(remat) if kind == Kind.IMAGE_TEXT else chunks
    yield from (chunk | remat for chunk in chunks) if kind == Kind.IMAGE_TEXT or remat else []


def _with_values(config: ConfigDict, values: dict[str, Any]) -> ConfigDict:
    """Returns the configuration with some of its values replaced, by dotted name."""
    config = config.copy_and_resolve_references()
    config.update_from_flattened_dict(values)
    return config


def run(
    config: ConfigDict,
    topologies: Sequence[str],
    *,
    only: Sequence[str] = (),
    cache: pathlib.Path,
    check_data: bool = True,
    by_module: bool = False,
) -> tuple[str, bool]:
    """Returns (the report in Markdown, whether all is well).

    Args:
      config: of the run.
      topologies: see the module.
      only: beginnings of the names of the steps to compile; empty: all.
      cache: folder of results.
      check_data: look at the files; else the run is planned from what the published data sets have.
      by_module: add a table of every step's traffic.

    Raises:
      ValueError: a topology or the configuration makes no sense, or `only` names no step.
    """
    parsed = [Topology.parse(name) for name in topologies]
    for topology in parsed:
        validation.validate(config_lib.for_chip(config, topology.chip), num_devices=topology.num_devices)
    steps = [step for step in step_names(config) if not only or step.startswith(tuple(only))]
    if not steps:
        raise ValueError(f"--only={','.join(only)} names no step; there are {', '.join(step_names(config))}")
    make_plan = data_plan.check if check_data else data_plan.expected
    sections, well = [], True
    for i, topology in enumerate(parsed):
        plan = make_plan(config, num_hosts=topology.num_hosts, num_devices=topology.num_devices)
        if i == 0:
            lines = [*(f"- {note}" for note in plan.notes), *(f"- **{problem}**" for problem in plan.problems)]
            sections.append("### Data\n\n" + "\n".join(lines))
            well = not plan.problems
        rows, chip_config = [], config_lib.for_chip(config, topology.chip)
        for step in steps:
            rows.append(_measured_row(chip_config, topology, step, plan, cache))
            print(f"{topology.name} {step}: {status(rows[-1])}", file=sys.stderr, flush=True)
        sections.append(_topology_report(chip_config, topology, rows, plan))
        sections += [_module_report(row) for row in rows if by_module and "modules" in row.result]
        well = well and all(row.fits for row in rows)
    return "\n\n".join(sections), well


def _sizes_of(plan: data_plan.Plan, step: str) -> Sizes:
    """Returns the sizes of a step; a kind without data has the smallest table."""
    kind = step.split("/")[0]
    return Sizes(plan.table_rows.get(kind, 0), plan.num_concepts.get(kind, 0), plan.num_words)


def _measured_row(config: ConfigDict, topology: Topology, step: str, plan: data_plan.Plan, cache: pathlib.Path) -> Row:
    """Returns a measured step and, if it does not fit, the first of the alternatives that does."""
    sizes = _sizes_of(plan, step)
    row = Row(topology, step, measure(config, topology, step, sizes, cache))
    if row.fits or "error" in row.result:
        return row
    tried = []
    for values in _likely(row, list(alternatives(config, step, topology.num_devices))):
        other = Row(topology, step, measure(_with_values(config, values), topology, step, sizes, cache))
        flags_of = " ".join(f"--config.{key}={value}" for key, value in values.items())
        if other.fits:
            more = other.result["flops"]["executed"] / row.result["flops"]["executed"] - 1
            return dataclasses.replace(row, remedy=f"{flags_of} ({other.needed / GIB:.1f} GiB, {more:+.0%} FLOPs)")
        tried.append(flags_of)
    return dataclasses.replace(
        row, remedy=f"nothing that was tried: {'; '.join(tried)}; use more devices, or mesh.fsdp"
    )


def _likely(row: Row, values: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the alternatives to compile: those that cut a batch by less than the excess cannot be enough."""
    excess = row.needed / CHIPS[row.topology.chip].memory
    unknown = math.isinf(excess)
    enough = [v for v in values if unknown or "model.remat" in v or max(v.values()) >= excess]
    return enough[:MAX_ALTERNATIVES]


def status(row: Row) -> str:
    """Returns in a few words whether a step fits."""
    if "error" in row.result:
        return row.result["error"]
    memory = CHIPS[row.topology.chip].memory
    fits = "fits" if row.fits else f"DOES NOT FIT; would: {row.remedy}"
    if math.isinf(row.needed):
        return f"more than {memory / GIB:.1f} GiB (the compiler does not say how much), {fits}"
    return f"{row.needed / GIB:.1f} of {memory / GIB:.1f} GiB, {fits}"


def _topology_report(config: ConfigDict, topology: Topology, rows: Sequence[Row], plan: data_plan.Plan) -> str:
    """Returns the table of the steps of a topology, what does not fit, and the least chip-hours of the run."""
    chip = CHIPS[topology.chip]
    measured = [row for row in rows if "error" not in row.result]
    versions = measured[0].result["versions"] if measured else {}
    made_with = f"jax {versions.get('jax')}, {versions.get('compiler')}"
    lines = [
        f"### {topology.name}: {topology.num_devices} × {chip.memory / GIB:.1f} GiB",
        "",
        f"{datetime.date.today()}, {made_with}. Memory in GiB, traffic in GB, a device; TFLOP of the batch.",
        "",
        f"| {' | '.join(COLUMNS)} |",
        "|---" * len(COLUMNS) + "|",
        *map(_line, rows),
    ]
    for row in rows:
        if not row.fits:
            lines += ["", f"**{row.step}**: {status(row)}"]
    least = {row.step: max(row.least_seconds) for row in measured}
    trained = {step: num for step, num in plan.num_steps.items() if num}
    if trained:
        formula = functools.partial(_by_formula, config, topology, plan=plan)
        seconds = sum(num * _least_of(step, least, topology, formula) for step, num in trained.items())
        steps = ", ".join(f"{step} {num:,.0f}" for step, num in trained.items())
        how = "; where not compiled, by FLOPs beside its kind's largest, or by compute alone" * bool(
            trained.keys() - least.keys()
        )
        lines += [
            "",
            f"The whole run ({steps} steps, each at the longest of its times{how}): at least "
            f"{seconds / 3600 * topology.num_devices:,.0f} chip-hours, {seconds / 3600:.1f} hours.",
        ]
    return "\n".join(lines)


def _least_of(step: str, least: dict[str, float], topology: Topology, formula: Callable[[str], float]) -> float:
    """Returns the least seconds of a step: compiled, or in proportion to the largest of its kind that was."""
    if step in least:
        return least[step]
    alike = [name for name in least if name.split("/")[0] == step.split("/")[0]]
    if not alike:
        return formula(step) / (topology.num_devices * CHIPS[topology.chip].peak)
    largest = max(alike, key=formula)
    return least[largest] * formula(step) / formula(largest)


def _module_report(row: Row) -> str:
    """Returns the table of what each module moves in a step, forward, computed again and backward."""
    bandwidth = CHIPS[row.topology.chip].bandwidth
    lines = [
        f"#### {row.topology.name} {row.step}: traffic of a device by module",
        "",
        "| module | pass | GB | ms at least |",
        "|---|---|---|---|",
    ]
    for module, direction, size in row.result["modules"]:
        lines.append(f"| {module} | {direction} | {size / GB:.2f} | {1000 * size / bandwidth:.2f} |")
    return "\n".join(lines)


def _by_formula(config: ConfigDict, topology: Topology, step: str, plan: data_plan.Plan) -> float:
    """Returns the model FLOPs of a training step that was not compiled."""
    kind, canvas = step.split("/")
    height, width = map(int, canvas.split("x"))
    sizes = _sizes_of(plan, step)
    return flops.formula(
        config,
        Kind(kind),
        (height, width),
        table_rows=sizes.table_rows,
        num_devices=topology.num_devices,
        num_concepts=sizes.num_concepts,
    )


def _line(row: Row) -> str:
    if "error" in row.result:
        return f"| {row.step} | {row.result['error']} |" + " |" * (len(COLUMNS) - 2)
    memory, counts = row.result["memory"], row.result["flops"]
    parts = [f"{memory[key] / GIB:.2f}" if key in memory else "" for key in ("arguments", "temporaries", "total")]
    network = ", ".join(f"{kind} {size / GB:.2f}" for kind, size in row.result.get("network", {}).items()) or "none"
    moved = f"{row.result['bytes'] / GB:.0f}" if "bytes" in row.result else ""
    chip, longest = CHIPS[row.topology.chip], max(row.least_seconds)
    times = ", ".join(f"{1000 * seconds:.0f}" for seconds in row.least_seconds)
    cells = [
        row.step,
        *parts,
        "yes" if row.fits else "**no**",
        f"{counts['model'] / 1e12:.1f} ({counts['formula'] / 1e12:.1f})",
        f"{counts['executed'] / counts['model'] - 1:+.0%}",
        moved,
        network,
        f"{1000 * longest:.0f}: {times}",
        f"{counts['model'] / (longest * row.topology.num_devices * chip.peak):.0%}",
        f"{row.result['compile_cpu_s'] / 60:.1f} CPU min",
    ]
    return f"| {' | '.join(cells)} |"
