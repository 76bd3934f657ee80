"""Times the steps of a configuration, prediction and their parts on the accelerator of this machine.

  python -m tests.benchmarks.accelerator [--minutes=8] [--config=configs/swin_t.py] [--output=results/accelerator]

It needs one GPU or TPU and jax, flax, optax, orbax-checkpoint, numpy, opencv, pillow, safetensors, tokenizers, absl-py,
jaxtyping and ml_collections; inputs are random and made in memory. Batches are those of one of eight devices, halved
until they suit a smaller memory than an H100's. `<output>/<card>.json` is written after every row, what matters most
first, so that it holds what was measured when time runs out. A row has

* seconds of compiling, and of a call: the first, the fastest and the median, each with `block_until_ready`;
* FLOPs: of steps and predictions those of the model by formula, of parts those in the traced program;
* bytes through memory, read from the compiled program by `preflight.hlo`, and its memory as the compiler counts it;
* utilization: FLOPs over time and the data sheet's peak;
* bound: the longer of FLOPs over the measured rate of a matrix product and bytes over that of a copy; and its share of
  the time;
* profile, of steps: seconds on the device and bytes of each module and pass, and of the slowest instructions, from a
  trace of one more call. A kernel inside a CUDA graph has no name: XLA_FLAGS=--xla_gpu_enable_command_buffer= gives all
  of them theirs.

After steps and predictions it trains and evaluates `configs/demo.py`, where all that `main` needs is installed.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import datetime
import gc
import json
import math
import os
import pathlib
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from detclipv2_jax import chips
from detclipv2_jax import config as config_lib
from detclipv2_jax.models import flops
from detclipv2_jax.preflight import hlo
from detclipv2_jax.runs import sharding
from tests.benchmarks import accelerator_inputs as inputs
from tests.benchmarks import accelerator_programs as programs
from tests.micro import micro_config

THREADS = 8  # that compile
CALLS = (5, 30)  # of a program that are timed, at least and at most
SECONDS = 3.0  # after which no more are
SHORTEST = 0.02  # s; shorter calls are sent one after the other and timed together
MODULES = 30  # and modules, in the table
SLOWEST = 30  # instructions of a profile that are listed
DEMO_AFTER = 1  # of the groups of programs
DEMO_SECONDS = 90  # below, the demo is not begun
DEMO_MEMORY = "0.1"  # share of the accelerator's memory: the rest is held by this process
TIMING = 5  # s that a program needs once it is compiled
MARGIN = 10  # s before the end of the time after which nothing is started
GIB = 1 << 30
MEMORY = 55 * GIB  # that batches of one of eight H100 suit
COPY, PRODUCT = 2 * GIB, 8192  # bytes copied, and rows and columns of the matrix product, that show the two ceilings
COPY_TINY, PRODUCT_TINY = 1 << 22, 256


class Report:
    """The results of a machine, in a file that is whole at any time."""

    def __init__(self, folder: pathlib.Path, device: jax.Device, deadline: float):
        name = re.sub(r"[^a-z0-9]+", "_", device.device_kind.lower()).strip("_")
        self.path, self.deadline = folder / f"{name}.json", deadline
        self.values: dict[str, Any] = {
            "card": device.device_kind,
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "driver": _driver(),
            "jax": jax.__version__,
            "compiler": " ".join(device.client.platform_version.split()),
            "xla_flags": os.environ.get("XLA_FLAGS", ""),
            "memory_limit": _memory(device).get("bytes_limit"),
            "peak_flops_per_s": flops.peak_per_second(sharding.make_mesh(devices=[device])),
            "ceilings": {},
            "rows": [],
            "complete": False,
        }
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()

    def write(self) -> None:
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.values, indent=1) + "\n")
        partial.rename(self.path)

    def add(self, row: dict[str, Any]) -> None:
        self.values["rows"].append(row)
        self.write()
        print(f"{self.seconds_left:5.0f} s left  {_line(row)}", flush=True)


def _driver() -> str:
    if not shutil.which("nvidia-smi"):
        return ""
    query = "--query-gpu=name,driver_version,memory.total,clocks.max.sm,power.limit"
    return subprocess.run(["nvidia-smi", query, "--format=csv,noheader"], capture_output=True, text=True).stdout.strip()


def _memory(device: jax.Device) -> dict[str, int]:
    return device.memory_stats() or {}


def measured(call: Callable[[], Any]) -> dict[str, float]:
    """Returns seconds of the first call and of later ones; `call` sends one and returns its results."""
    start = time.perf_counter()
    jax.block_until_ready(call())
    first = time.perf_counter() - start
    start = time.perf_counter()
    jax.block_until_ready(call())
    at_once = max(1, math.ceil(SHORTEST / (time.perf_counter() - start)))
    seconds: list[float] = []
    while len(seconds) < CALLS[0] or (len(seconds) < CALLS[1] and sum(seconds) * at_once < SECONDS):
        start = time.perf_counter()
        for _ in range(at_once):
            output = call()
        jax.block_until_ready(output)
        seconds.append((time.perf_counter() - start) / at_once)
    return {
        "first_s": first,
        "min_s": min(seconds),
        "median_s": float(np.median(seconds)),
        "calls": len(seconds) * at_once,
    }


def measure_ceilings(*, copied: int, size: int) -> dict[str, float]:
    """Returns bytes a second of a copy, read and written, and FLOP/s of a bfloat16 matrix product."""
    x = jax.random.normal(jax.random.key(0), (copied // 4,), jnp.float32)
    moved = jax.jit(lambda x: x + 1.0)
    copy = measured(lambda: moved(x))
    a, b = jax.random.normal(jax.random.key(1), (2, size, size), jnp.bfloat16)
    product = jax.jit(jnp.matmul)
    multiply = measured(lambda: product(a, b))
    return {"bytes_per_s": 2 * copied / copy["min_s"], "flops_per_s": 2 * size**3 / multiply["min_s"]}


class Compiled:
    """A program, ready to be called, and what its text says."""

    def __init__(self, program: programs.Program, lowered: Any, counted: float, lower_s: float):
        start = time.monotonic()
        self.call = lowered.compile()
        memory = self.call.memory_analysis()
        parts = {
            "arguments": memory.argument_size_in_bytes,
            "temporaries": memory.temp_size_in_bytes,
            "results": memory.output_size_in_bytes - memory.alias_size_in_bytes,  # donated arguments are results, too
            "program": memory.generated_code_size_in_bytes,
        }
        self.program = program
        self.row: dict[str, Any] = {
            "name": program.name,
            "num_images": program.num_images,
            "flops": counted,
            "lower_s": lower_s,
            "compile_s": time.monotonic() - start,
            "memory": parts | {"total": sum(parts.values())},
        }
        self.moved: list[hlo.Moved] = []
        try:
            moved = hlo.traffic(self.call.as_text())
            self.moved = moved.rows
            self.row |= {"bytes": moved.memory, "unknown_loops": moved.unknown_loops}
        except Exception as error:  # the reader may not know a newer compiler's text; times are worth more
            self.row |= {"bytes": None, "reader_error": f"{type(error).__name__}: {error}"}


def profile(call: Callable[[], Any], moved: list[hlo.Moved]) -> dict[str, Any]:
    """Returns device seconds and bytes of a call by module and pass, and by its slowest instructions.

    Args:
      call: sends the program and returns its results.
      moved: the program's instructions.
    """
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(call())
        seconds: dict[str, float] = collections.defaultdict(float)
        for path in pathlib.Path(folder).rglob("*.xplane.pb"):
            for instruction, duration in _events(jax.profiler.ProfileData.from_file(str(path))):
                seconds[instruction] += duration
    rows = {_kernel(row.instruction): row for row in moved}  # the last of several of one name, which XLA does not write
    unknown = hlo.Moved("", "unnamed/kernel", 0.0, 0.0)  # within a CUDA graph, or of another program
    timed = sorted(((time, name, rows.get(_kernel(name), unknown)) for name, time in seconds.items()), reverse=True)
    by_time = hlo.by_module((row.place, time) for time, _, row in timed)
    by_bytes = hlo.by_module((row.place, row.memory) for row in moved)
    return {
        "modules": [[*key, time, by_bytes.get(key, 0.0)] for key, time in by_time.items()],
        "instructions": [[name, row.place, row.times, time, row.memory] for time, name, row in timed[:SLOWEST]],
        "seconds": sum(seconds.values()),
    }


def _events(data: Any) -> Iterator[tuple[str, float]]:
    """Yields (instruction or kernel, seconds) of whatever ran on a device."""
    for plane in data.planes:
        on_device = plane.name.startswith("/device:")
        for line in plane.lines:
            if on_device and line.name.startswith(("XLA Modules", "Steps", "Framework")):
                continue  # sums of others
            for event in line.events:
                instruction = dict(event.stats).get("hlo_op")
                if on_device or (instruction and not re.match(r"(while|call|conditional)\b", instruction)):
                    yield str(instruction or event.name), event.duration_ns / 1e9


def _kernel(instruction: str) -> str:
    """Returns the name that XLA gives the kernel of an instruction."""
    return re.sub(r"[.\-]", "_", instruction)


class Bench:
    """Compiles and times programs, one state after the other."""

    def __init__(self, setting: programs.Setting, report: Report, only: str):
        self.setting, self.report, self.only = setting, report, only
        self.pool = concurrent.futures.ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1))
        self.device = setting.mesh.devices.flat[0]
        self.created: concurrent.futures.Future | None = None  # the program that makes a state
        self.shapes = jax.eval_shape(setting.create)
        self.state: Any = None
        self.kept: dict[str, Any] = {}  # results that others are compared with

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.shutdown(cancel_futures=True)

    def run(self, group: Callable[[], Any]) -> None:
        """Compiles all programs of a group side by side, then times each; a failure is a row, too.

        Not while others are compiled: that runs kernels to choose among them.
        """
        chosen = self._listed(group)
        compared = {program.reference for program in chosen}
        if chosen and self.created is None and self.state is None:
            self.created = self.pool.submit(jax.jit(self.setting.create).lower().compile)
        compiled = {self._compile(program): program for program in chosen}
        timeout = max(0.0, self.report.seconds_left - MARGIN - TIMING * len(chosen))
        done, _ = concurrent.futures.wait(compiled, timeout)
        for future, program in compiled.items():
            if future not in done or self.report.seconds_left < MARGIN:
                self.report.add({"name": program.name, "error": LATE})
                continue
            try:
                self.report.add(self._time(future.result(), program.name in compared))
            except Exception as error:  # whatever one program's is, the others are worth their time
                self._failed(program.name, error)
                self.state = None if self.state is not None and _deleted(self.state) else self.state
            gc.collect()

    def _listed(self, group: Callable[[], Any]) -> list[programs.Program]:
        """Returns the chosen programs of a group, as many as could be made."""
        chosen = []
        try:
            chosen.extend(program for program in group() if self.only in program.name)
        except Exception as error:
            self._failed(str(group), error)
        return chosen

    def _failed(self, name: str, error: Exception) -> None:
        first_line = (str(error).strip().splitlines() or ["time ran out"])[0]
        self.report.add({"name": name, "error": f"{type(error).__name__}: {first_line[:300]}"})

    def _compile(self, program: programs.Program) -> concurrent.futures.Future:
        """Returns the compiled program to come; tracing holds Python's lock and is done here, in order."""
        if self.report.seconds_left < MARGIN:
            return _failed(TimeoutError("time ran out"))
        try:
            with jax.set_mesh(self.setting.mesh):
                start = time.monotonic()
                arguments = jax.tree.map(inputs.shape_of, program.arguments(self.shapes))
                jitted = program.function
                if not hasattr(jitted, "lower"):
                    jitted = jax.jit(jitted, donate_argnums=0 if program.donates else ())
                lowered = jitted.lower(*arguments)
                lower_s = time.monotonic() - start
                counted = program.flops() if program.flops else flops.of(program.counted or jitted, *arguments)
        except Exception as error:
            return _failed(error)
        return self.pool.submit(Compiled, program, lowered, counted, lower_s)

    def _time(self, compiled: Compiled, keep: bool) -> dict[str, Any]:
        program = compiled.program
        if self.state is None:
            assert self.created is not None
            self.state = jax.block_until_ready(self.created.result(timeout=max(self.report.seconds_left, 1.0))())
        arguments = jax.tree.map(inputs.made, program.arguments(self.state))
        before = _memory(self.device).get("peak_bytes_in_use", 0)
        results: Any = None

        def call() -> Any:
            nonlocal results
            if program.donates:
                self.state, results = compiled.call(self.state, *arguments[1:])
            else:
                results = compiled.call(*arguments)
            return results

        if program.donates:
            arguments = (None, *arguments[1:])
        row = compiled.row | measured(call)
        row["images_per_s"] = program.num_images / row["median_s"]
        peak = _memory(self.device).get("peak_bytes_in_use", 0)
        row["peak_memory"] = peak if peak > before else None  # None: below that of an earlier row
        row |= self._compared_with_bound(row)
        if program.donates:
            row["metrics"] = {name: float(value) for name, value in results.items()}
            try:
                row["profile"] = profile(call, compiled.moved)
            except Exception as error:  # a machine may have no profiler; times are worth more
                row["profile_error"] = f"{type(error).__name__}: {error}"
        if program.reference in self.kept:
            row["differences"] = _differences(results, self.kept[program.reference])
        if keep:
            self.kept[program.name] = jax.device_get(results)
        return row

    def _compared_with_bound(self, row: dict[str, Any]) -> dict[str, Any]:
        ceilings = self.report.values["ceilings"]
        by_compute, by_memory = row["flops"] / ceilings["flops_per_s"], (row["bytes"] or 0.0) / ceilings["bytes_per_s"]
        bound = max(by_compute, by_memory)
        peak = self.report.values["peak_flops_per_s"]
        return {
            "bound_s": bound,
            "bound_by": "compute" if by_compute >= by_memory else "memory",
            "bound_share": bound / row["median_s"],
            "utilization": row["flops"] / row["median_s"] / peak if peak else None,
        }


def demo(report: Report, *, config: str = "configs/demo.py") -> dict[str, Any]:
    """Returns the scores of a run of the demo on the accelerator, and how long its steps took, as a row."""
    if report.seconds_left < DEMO_SECONDS:
        return {"name": "demo", "error": LATE}
    with tempfile.TemporaryDirectory() as folder:
        workdir = pathlib.Path(folder) / "demo"
        command = [sys.executable, "-m", "detclipv2_jax.main", f"--config={config}", f"--workdir={workdir}"]
        environment = os.environ | {
            "XLA_PYTHON_CLIENT_MEM_FRACTION": DEMO_MEMORY,
            "PYTHONPATH": os.pathsep.join(sys.path),
        }
        start = time.monotonic()
        try:
            run = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=max(report.seconds_left - MARGIN, 1.0)
            )
        except subprocess.TimeoutExpired:
            return {"name": "demo", "error": LATE}
        if run.returncode:
            return {"name": "demo", "error": " ".join(run.stderr.strip().splitlines()[-1:])[:300]}
        lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    scores = {key: value for line in lines for key, value in line.items() if key.startswith("eval/")}
    seconds = [line["timing/step_seconds"] for line in lines if "timing/step_seconds" in line]
    return {
        "name": "demo",
        "steps": max(line["step"] for line in lines),
        "seconds": time.monotonic() - start,
        "step_s": float(np.median(seconds)),
        "scores": scores,
    }


def _failed(error: Exception) -> concurrent.futures.Future:
    future: concurrent.futures.Future = concurrent.futures.Future()
    future.set_exception(error)
    return future


def _deleted(state: Any) -> bool:
    return any(isinstance(leaf, jax.Array) and leaf.is_deleted() for leaf in jax.tree.leaves(state))


def _differences(results: Any, reference: Any) -> list[float]:
    """Returns |x - reference| / |reference| of every array."""

    def difference(x: Any, y: Any) -> float:
        x, y = np.asarray(x, np.float32), np.asarray(y, np.float32)
        return float(np.linalg.norm((x - y).ravel()) / max(np.linalg.norm(y.ravel()), 1e-30))

    return [difference(x, y) for x, y in zip(jax.tree.leaves(results), jax.tree.leaves(reference), strict=True)]


LATE = "time ran out"  # the error of what was not begun or not ready
COLUMNS = (
    "program", "ms (min)", "images/s", "TFLOP", "GB moved", "bound, ms", "share of bound", "utilization", "memory, GiB",
    "compiling, s",
)  # fmt: skip


def _line(row: dict[str, Any]) -> str:
    if "error" in row:
        return f"| {row['name']} | {row['error']} |" + " |" * (len(COLUMNS) - 2)
    if "scores" in row:
        scores = ", ".join(f"{name} {100 * row['scores'][f'eval/{name}']:.1f}" for name in ("AP", "top1f", "top1r"))
        cells = [
            row["name"],
            f"{1e3 * row['step_s']:.2f}",
            "",
            f"{scores} after {row['steps']:,} steps, {row['seconds']:.0f} s",
        ]
        return f"| {' | '.join(cells)} |" + " |" * (len(COLUMNS) - len(cells))
    used = "" if row["utilization"] is None else f"{row['utilization']:.1%}"
    cells = [
        row["name"],
        f"{1e3 * row['median_s']:.2f} ({1e3 * row['min_s']:.2f})",
        f"{row['images_per_s']:.4g}",
        f"{row['flops'] / 1e12:.3g}",
        "" if row["bytes"] is None else f"{row['bytes'] / 1e9:.4g}",
        f"{1e3 * row['bound_s']:.2f} {row['bound_by']}",
        f"{row['bound_share']:.0%}",
        used,
        f"{row['memory']['total'] / GIB:.2f}",
        f"{row['compile_s']:.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def table(report: dict[str, Any]) -> str:
    """Returns the rows of a report in Markdown."""
    ceilings = ", ".join(f"{name} {value / 1e12:.4g}e12" for name, value in report["ceilings"].items())
    head = f"{report['card']}, {report['date']}, jax {report['jax']}, {report['driver']}; measured {ceilings}"
    late = [row["name"] for row in report["rows"] if row.get("error") == LATE]
    rows = [row for row in report["rows"] if row.get("error") != LATE]
    lines = [head, "", f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|", *map(_line, rows)]
    if late:
        lines += ["", f"No time was left for: {'; '.join(late)}."]
    for row in report["rows"]:
        if "profile" in row:
            lines += ["", *_profile_lines(row)]
    return "\n".join(lines)


def _profile_lines(row: dict[str, Any]) -> Iterator[str]:
    yield f"{row['name']}: {1e3 * row['profile']['seconds']:.1f} ms of kernels"
    yield "\n| module | pass | ms | GB moved | TB/s |\n|---|---|---|---|---|"
    for module, direction, seconds, moved in row["profile"]["modules"][:MODULES]:
        rate = moved / max(seconds, 1e-9) / 1e12
        yield f"| {module} | {direction} | {1e3 * seconds:.2f} | {moved / 1e9:.2f} | {rate:.2f} |"


def loaded(path: str, device: jax.Device) -> Any:
    """Returns the configuration of a file with the values of this chip, an H100's for a card that has none."""
    config = runpy.run_path(path)["get_config"]()
    chip = chips.chip_of(device.device_kind)
    known = chip is not None and (chip.platform == "tpu" or config.chips[chip.name])
    return config_lib.for_chip(config, chip.name if known else "h100")


def main() -> None:
    start = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--config", default="configs/swin_t.py")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("results/accelerator"))
    parser.add_argument("--only", default="", help="part of the names of the programs to time")
    parser.add_argument("--tiny", action="store_true", help="a model and sizes for trying this out on any machine")
    options = parser.parse_args()

    device = jax.devices()[0]
    report = Report(options.output, device, start + 60 * options.minutes)
    config = micro_config() if options.tiny else loaded(options.config, device)
    share = programs.SHARE
    while _memory(device).get("bytes_limit", MEMORY) * share < MEMORY * programs.SHARE:
        share *= 2
    if options.tiny:
        config.optimizer.accumulate.image_text, share = 2, 2
    report.values |= {"config": config.name, "share_of_batch": 1 / share}
    copied, size = (COPY_TINY, PRODUCT_TINY) if options.tiny else (COPY, PRODUCT)
    report.values["ceilings"] = measure_ceilings(copied=copied, size=size)
    report.write()
    print(f"{report.seconds_left:5.0f} s left  {report.values['ceilings']}", flush=True)

    mesh = sharding.make_mesh(devices=[device])
    setting = programs.Setting(inputs.of_one_device(config, share=share), mesh)
    bench = Bench(setting, report, options.only)
    for i, group in enumerate(programs.groups(setting)):
        if report.seconds_left > MARGIN:
            bench.run(group)
        if i == DEMO_AFTER and not options.only and not options.tiny:
            report.add(demo(report))
    report.values["complete"] = report.seconds_left > MARGIN
    report.values["seconds"] = time.monotonic() - start
    report.write()
    print(table(report.values), flush=True)
    # not sys.exit: a program that is still being compiled would be waited for
    os._exit(all("error" in row for row in report.values["rows"]))


if __name__ == "__main__":
    main()
