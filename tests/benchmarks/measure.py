"""Times two implementations side by side: ours here, the reference in another environment with torch.

Every script beside this file defines `ours()` and `reference()`, each a generator of (name, function of nothing), and
calls `main`. Both sides run in their own process on one core with one thread, one after the other:

    python tests/benchmarks/deform_conv.py --torch=/path/to/torch-env/bin/python

CPU seconds are the fair measure on a machine that does other work too; wall seconds are printed beside them.
"""

import argparse
import json
import os
import pathlib
import resource
import subprocess
import sys
import time

REPEATS = 5
PACKAGE = pathlib.Path(__file__).parents[2]


def main(ours, reference) -> None:
    """Runs one side (`--side`) or both and prints a table: minimum and median of `REPEATS` runs, and the ratio."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--torch", default=sys.executable, help="Python with torch and the reference libraries")
    parser.add_argument("--only", default="", help="rows in whose name this stands")
    parser.add_argument("--side", choices=("both", "ours", "reference"), default="both")
    arguments = parser.parse_args()
    if arguments.side != "both":
        # before a framework starts its threads, which inherit it; flags alone do not keep XLA's to one
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        if arguments.side == "ours":
            from detclipv2_jax import main as training

            training.keep_memory()  # as the command does
            training.give_back_after_compiling()
        for name, run in {"ours": ours, "reference": reference}[arguments.side]():
            if arguments.only in name:
                print(json.dumps({"name": name, **_measure(run)}), flush=True)
        return
    results = {}
    for side, python in (("reference", arguments.torch), ("ours", sys.executable)):
        lines = subprocess.run(
            [python, sys.argv[0], f"--side={side}", f"--only={arguments.only}"],
            env=_one_thread(),
            check=True,
            text=True,
            stdout=subprocess.PIPE,
        ).stdout.splitlines()
        results[side] = {row.pop("name"): row for row in map(json.loads, lines)}
    print(f"{'':36}{'ours, CPU s':>20}{'reference, CPU s':>20}{'ratio':>8}   wall s    first call s   peak GB")
    for name, row in results["ours"].items():
        other = results["reference"].get(name)
        ratio = f"{other['cpu_min'] / row['cpu_min']:8.2f}" if other else f"{'':8}"
        other_text = f"{other['cpu_min']:.4f} / {other['cpu_median']:.4f}" if other else ""
        print(
            f"{name:36}{row['cpu_min']:>11.4f} / {row['cpu_median']:.4f}{other_text:>20}{ratio}"
            f"{row['wall_min']:9.4f}{row['first']:12.1f}     {row['peak_gb']:.1f}"
            + (f", {other['peak_gb']:.1f}" if other else "")
        )


def _one_thread() -> dict[str, str]:
    """Returns an environment in which both frameworks use one thread."""
    flags = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    changes = {"OMP_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": str(PACKAGE)}
    return {**os.environ, **changes}


def _measure(run) -> dict[str, float]:
    """Returns seconds of the first call (it compiles) and of the following ones."""
    start = time.perf_counter()
    run()
    first = time.perf_counter() - start
    cpu, wall = [], []
    for _ in range(REPEATS):
        start, cpu_start = time.perf_counter(), time.process_time()
        run()
        wall.append(time.perf_counter() - start)
        cpu.append(time.process_time() - cpu_start)
    middle = REPEATS // 2
    peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9  # of the process until now
    return {
        "first": first,
        "wall_min": min(wall),
        "cpu_min": min(cpu),
        "cpu_median": sorted(cpu)[middle],
        "peak_gb": peak_gb,
    }
