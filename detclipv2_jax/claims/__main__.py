"""Tests the paper's claims on the generated world: `python -m detclipv2_jax.claims [--jobs=2]`.

Every (row, seed) is a run of configs/demo.py with a few keys changed, a process of its own on one core. All rows of a
seed start from one detector trained on boxes alone, in place of the paper's pre-trained towers. A run that is done
leaves a small file in results/claims; what has one is not run again, so the table continues where it stopped, and a run
that was stopped continues at its last checkpoint. At the end docs/claims.md (the table, with a verdict a claim) and
docs/claims.png (novel AP over steps) are written from the files there are; --jobs=0 does that alone.

A claim is judged by the mean difference over paired seeds (same start, same order) and its 95% interval: reproduced,
contradicted or undecided. Rows have five seeds, and up to ten where these do not decide. No value is tuned for a row.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import json
import operator
import os
import pathlib
import platform
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from detclipv2_jax import commands, config_json
from detclipv2_jax import config as config_lib
from detclipv2_jax.claims import ablations
from detclipv2_jax.data import scenes
from detclipv2_jax.eval import detections, lvis, names, proposals
from detclipv2_jax.files import only_writer, read_json, read_json_lines, write_json, write_text

COLUMNS = {  # of the table: score → heading
    "AP": "AP",
    "base_AP": "base AP",
    "novel_AP": "novel AP",
    "novel_AP50": "novel AP50",
    "novel_AR": "novel AR",
    "held_out_AP": "held-out AP",
    "base_top1": "base names right",
    "novel_top1": "novel names right",
}
LOSSES = 2  # raise when the same configuration would compute other losses or choose other regions
NOT_RUN = "not run yet | – | 0"


def configuration(recipe: str, row: str, seed: int) -> ConfigDict:
    """Returns the configuration of a run."""
    config = runpy.run_path(recipe)["get_config"]()
    changes = ablations.STARTS.get(row) or ablations.ROWS[row]
    # other steps than the start's draw other boxes and flips
    seeds = {"seed": seed if row in ablations.STARTS else 100 + seed, "scenes.seed": seed}
    config.update_from_flattened_dict(ablations.GOING_ON | changes | seeds)
    return config


def stored(folder: pathlib.Path, row: str, seed: int) -> dict[str, Any] | None:
    """Returns the result of a finished run, None of another."""
    path = folder / f"{row}_{seed}.json"
    if not path.exists():
        return None
    result = read_json(path)
    if not isinstance(result, dict) or not {"recipe", "scores", "seconds", "cpu_seconds"} <= result.keys():
        raise ValueError(f"{path} is damaged; delete it, and the run is done again")
    return result


def score(truth: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, float]:
    """Returns the scores of a run in %: AP of all, base, novel shapes and held-out combinations; AR and right names.

    AR, of novel shapes, is class-agnostic, of the best 300 boxes of an image, see `eval.proposals`; top1 is the share
    of found objects whose best name is right, see `eval.names`.
    """
    frequency = {category["id"]: category["frequency"] for category in truth["categories"]}
    parts: dict[str, Callable[[dict[str, Any]], bool]] = {
        "": lambda box: True,
        "base_": lambda box: frequency[box["category_id"]] == "f",
        "novel_": lambda box: frequency[box["category_id"]] == "r",
        "held_out_": lambda box: box["held_out"],
    }
    scores: dict[str, float] = {}
    for lead, counts in parts.items():
        # finding any of the boxes that do not count is neither right nor wrong
        boxes = [row | {"ignore": int(not counts(row))} for row in truth["annotations"]]
        subset = lvis.evaluate(truth | {"annotations": boxes}, rows)
        scores |= {f"{lead}{name}": round(100 * subset[name], 2) for name in ("AP", "AP50")}
    more = {"novel_AR": proposals.evaluate(truth, rows)["agnostic_ARr@300"]}
    named = names.evaluate(truth, rows)
    more |= {"base_top1": named["top1f"], "novel_top1": named["top1r"]}
    return scores | {name: round(100 * value, 2) for name, value in more.items()}


def _result_of(workdir: pathlib.Path, config: ConfigDict) -> dict[str, Any]:
    """Returns what is stored of a finished run beside its name and times."""
    last = max((workdir / "eval").glob("step_*_detections.json"))
    truth = json.loads((pathlib.Path(config.scenes.folder) / "eval.json").read_text())
    lines, _ = read_json_lines(workdir / "metrics.jsonl")
    curves = {
        f"{name}_by_step": {str(line["step"]): round(100 * line[key], 2) for line in lines if key in line}
        for name, key in (("base_AP", "eval/APf"), ("novel_AP", "eval/APr"))
    }
    return {
        "scores": score(truth, detections.load(last)),
        **curves,
        "steps": int(last.name.split("_")[1]),
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "flax", "optax")}
        | {"python": platform.python_version()},
    }


def recipe_of(recipe: str, row: str, seed: int) -> list[str]:
    """Returns how a run differs from the defaults (but for folders), its formats, and the same of its start."""
    changed = config_json.differences(config_lib.base(), configuration(recipe, row, seed))
    lines = [*changed, f"world {scenes.FORMAT}", f"losses {LOSSES}"]
    if row in ablations.PREPARED:
        lines.append(f"prepared by {' '.join(ablations.PREPARED[row].arguments)}")
    return lines + [f"after {line}" for needed in ablations.needs(row) for line in recipe_of(recipe, needed, seed)]


def pending_runs(recipe: str, results: pathlib.Path, work: pathlib.Path) -> list[tuple[str, int]]:
    """Returns the runs that have no result yet, and those that they need and whose weights are gone.

    Raises:
      ValueError: a stored result was made by another recipe.
    """
    found = all_results(results)
    for (row, seed), result in found.items():
        if result["recipe"] != (now := recipe_of(recipe, row, seed)):
            changed = sorted(set(result["recipe"]) ^ set(now))
            raise ValueError(f"{results}/{row}_{seed}.json is of another recipe ({'; '.join(changed)}); delete it")
    queue = ablations.queue(found)
    pending = [run for run in queue if run not in found]
    needed = {(other, seed) for row, seed in pending for other in ablations.needs(row)}
    needed |= {(other, seed) for row, seed in needed for other in ablations.needs(row)}
    return [run for run in queue if run in pending or (run in needed and not _is_done(work, *run))]


def _is_done(work: pathlib.Path, row: str, seed: int) -> bool:
    """Returns whether the weights of a finished run are there."""
    return (work / f"{row}_{seed}" / "done").exists()


def _run_table(recipe: str, *, results: pathlib.Path, work: pathlib.Path, jobs: int) -> None:
    """Runs what has no result yet, `jobs` at a time, each on one core; says after each how long the rest will take.

    Raises:
      ValueError: a stored result was made by another recipe, a run failed, or another process runs the table.
    """
    if not pending_runs(recipe, results, work):
        return
    durations = [run["seconds"] for run in all_results(results).values()]
    cores = sorted(os.sched_getaffinity(0))[-jobs:]
    running: dict[int, tuple[subprocess.Popen, str, int, ConfigDict, float]] = {}
    with contextlib.ExitStack() as stack:
        stack.enter_context(only_writer(work))
        pending = pending_runs(recipe, results, work)
        while pending or running:
            for core in [core for core in cores if core not in running]:
                waits = [[not _is_done(work, other, seed) for other in ablations.needs(row)] for row, seed in pending]
                ready = (run for run, missing in zip(pending, waits, strict=True) if not any(missing))
                if (run := next(ready, None)) is None:
                    break
                pending.remove(run)
                config = configuration(recipe, *run)
                process = start(recipe, *run, config, work=work, core=core)
                running[core] = (process, *run, config, time.monotonic())
                stack.callback(stop, process, work / f"{run[0]}_{run[1]}", since=running[core][-1])
                print(f"{run[0]}, seed {run[1]}, begins: {work / f'{run[0]}_{run[1]}'}/log.txt", flush=True)
            time.sleep(0.2)
            for core, (process, row, seed, config, since) in list(running.items()):
                done, status, usage = os.wait4(process.pid, os.WNOHANG)
                if not done:
                    continue
                process.returncode = os.waitstatus_to_exitcode(status)
                workdir = work / f"{row}_{seed}"
                spent = account(workdir, since=since, usage=usage)
                if process.returncode:
                    raise ValueError(f"the run {row}, seed {seed}, failed; see {workdir}/log.txt")
                del running[core]
                result = {
                    "row": row,
                    "seed": seed,
                    **_result_of(workdir, config),
                    "recipe": recipe_of(recipe, row, seed),
                    **spent,
                }
                write_json(results / f"{row}_{seed}.json", result, indent=1)
                if any(row in ablations.needs(other) for other in ablations.ROWS):
                    (workdir / "done").touch()
                else:
                    shutil.rmtree(workdir / "checkpoints")
                durations.append(spent["seconds"])
                if not pending:  # what is undecided wants more seeds
                    busy = [run[1:3] for run in running.values()]
                    pending = [run for run in pending_runs(recipe, results, work) if run not in busy]
                left, total = len(pending) + len(running), len(ablations.queue(all_results(results)))
                shown = ", ".join(f"{heading} {result['scores'][name]:.1f}" for name, heading in COLUMNS.items())
                print(
                    f"[{total - left}/{total}] {row}, seed {seed}: {shown}; {spent['seconds'] / 60:.1f} minutes, about "
                    f"{left * float(np.mean(durations)) / 3600 / len(cores):.1f} hours left",
                    flush=True,
                )


def start(
    recipe: str, row: str, seed: int, config: ConfigDict, *, work: pathlib.Path, core: int
) -> subprocess.Popen[bytes]:
    """Writes the world of a run and returns its process, whose output goes to log.txt of its workdir."""
    workdir = work / f"{row}_{seed}"
    workdir.mkdir(parents=True, exist_ok=True)
    config.scenes.folder = _world(recipe, row, seed, work=work)
    if row in ablations.ROWS:
        config.init_from.checkpoint = str(work / f"{ablations.start_of(row)}_{seed}")
    environment = {"JAX_COMPILATION_CACHE_DIR": str(work / "compiled"), **os.environ}
    with open(workdir / "log.txt", "ab") as log:
        output: dict[str, Any] = {"stdout": log, "stderr": subprocess.STDOUT, "env": environment}
        if row in ablations.PREPARED:
            _prepare(recipe, row, seed, config, work=work, output=output)
        process = subprocess.Popen(command(recipe, config, workdir), **output)
    with contextlib.suppress(ProcessLookupError):  # it may have failed at once
        os.sched_setaffinity(process.pid, {core})  # threads, which come later, inherit it
    return process


def _world(recipe: str, row: str, seed: int, *, work: pathlib.Path) -> str:
    """Writes the world of a row, unless it is there; returns its folder."""
    values = configuration(recipe, row, seed).scenes
    changed = [key.split(".")[1] for key in ablations.ROWS.get(row, {}) if key.startswith("scenes.")]
    values.folder = "_".join([str(work / f"world_{seed}"), *(f"{key}_{values[key]}" for key in changed)])
    scenes.write(**values.to_dict())
    return values.folder


def _prepare(
    recipe: str, row: str, seed: int, config: ConfigDict, *, work: pathlib.Path, output: dict[str, Any]
) -> None:
    """Prepares the data of a row, if they are not there, and writes their places into its configuration."""
    plan, prepared = ablations.PREPARED[row], work / f"{row}_{seed}" / "prepared"
    places = {"prepared": str(prepared), "run": str(work / f"{plan.run}_{seed}")}
    places["world"] = _world(recipe, plan.world, seed, work=work)
    if not (prepared / "report.json").exists():
        if plan.arguments[0] == "classes":
            options = {"num_images": ablations.NUM_CLASS_NAMES, "size_px": config.scenes.size_px, "seed": seed}
            scenes.write_class_names(f"{places['world']}_classes", **options)
        arguments = [argument.format(**places) for argument in plan.arguments]
        if subprocess.run([sys.executable, "-m", "detclipv2_jax.prepare", *arguments], **output).returncode:
            raise ValueError(f"preparing {row}, seed {seed}, failed; see {prepared.parent}/log.txt")
    for key, value in ablations.ROWS[row].items():
        if isinstance(value, str):
            config.update_from_flattened_dict({key: value.format(**places)})
        elif isinstance(value, tuple) and all(isinstance(part, str) for part in value):
            config.update_from_flattened_dict({key: tuple(part.format(**places) for part in value)})


def command(recipe: str, config: ConfigDict, workdir: pathlib.Path) -> list[str]:
    """Returns the command that trains a configuration, which differs from the recipe in some keys."""
    changed = config_json.differences(runpy.run_path(recipe)["get_config"](), config)
    keys = [line.split(":")[0] for line in changed]
    values = [functools.reduce(operator.getitem, key.split("."), config) for key in keys]
    flags = [f"--config.{key}={value}" for key, value in zip(keys, values, strict=True)]
    return [sys.executable, "-m", "detclipv2_jax.main", f"--config={recipe}", f"--workdir={workdir}", *flags]


def stop(process: subprocess.Popen[bytes], workdir: pathlib.Path, *, since: float) -> None:
    """Ends a process that still runs; it saves its state first."""
    if process.poll() is None:
        process.terminate()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        account(workdir, since=since, usage=usage)


def account(workdir: pathlib.Path, *, since: float, usage: resource.struct_rusage) -> dict[str, int]:
    """Adds the time of a process to spent.json of its workdir; returns the sum over all processes of the run."""
    path = workdir / "spent.json"
    before = read_json(path) if path.exists() else {}
    now = {"seconds": time.monotonic() - since, "cpu_seconds": usage.ru_utime + usage.ru_stime}
    spent = {name: round(before.get(name, 0) + value) for name, value in now.items()}
    write_json(path, spent, indent=None)
    return spent


def all_results(folder: pathlib.Path) -> ablations.Results:
    """Returns the stored results of the table by (row, seed)."""
    runs = [(row, seed) for seed in ablations.SEEDS for row in (*ablations.STARTS, *ablations.ROWS)]
    found = {run: stored(folder, *run) for run in runs}
    return {run: result for run, result in found.items() if result is not None}


def markdown(results: ablations.Results) -> Iterator[str]:
    """Yields the verdicts, and below the scores they are made of: in %, mean ± half of the range over the seeds.

    Scores are means over the seeds that every row of a finding has; rows without any result do not count. The first
    score is that of the detectors they start from, which differ between seeds and models.
    """
    minutes = [result["cpu_seconds"] / 60 for result in results.values()]
    queue = ablations.queue(results)
    yield f"{len(results.keys() & queue)} of {len(queue)} runs are done" + (
        f"; a run takes {np.mean(minutes):.1f} minutes of one core, at most {max(minutes):.1f}.\n" if minutes else ".\n"
    )
    yield "\n| claim | verdict | margin, points of AP | seeds |\n|---|---|---|---|\n"
    for finding in ablations.FINDINGS:
        for claim in finding.claims:
            found = ablations.judge(claim, finding, results)
            shown = f"**{found.word}** | {found.mean:+.1f} ± {found.half:.1f} | {found.num_seeds}" if found else NOT_RUN
            yield f"| {finding.title.partition(' ')[0]} {claim.text} | {shown} |\n"
    # results of older versions have no share of right names
    columns = [score for score in COLUMNS if any(score in result["scores"] for result in results.values())]
    for finding in ablations.FINDINGS:
        yield f"\n**{finding.title}**\n\n"
        headings = " | ".join(COLUMNS[score] for score in columns)
        yield f"| | seeds | AP at the start | {headings} |\n|---|---|---|{'---|' * len(columns)}\n"
        seeds = ablations.common_seeds(finding, results)
        for title, row in finding.rows.items():
            row_seeds = [seed for seed in seeds if (row, seed) in results]
            before = [results.get((ablations.start_of(row), seed)) for seed in row_seeds]
            cells = [_cell([start["scores"]["AP"] for start in before if start])]
            row_scores = [results[row, seed]["scores"] for seed in row_seeds]
            cells += [_cell([scores[name] for scores in row_scores if name in scores]) for name in columns]
            yield f"| {title} | {len(row_seeds)} | {' | '.join(cells)} |\n"


def _cell(values: list[float]) -> str:
    return f"{np.mean(values):.1f}" + f" ± {np.ptp(values) / 2:.1f}" * (len(values) > 1) if values else "–"


def write_report(recipe: str, results: pathlib.Path, output: pathlib.Path) -> None:
    """Writes claims.md and, where there is something to show, claims.png."""
    found = all_results(results)
    write_text(output / "claims.md", markdown(found))
    lines: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    shared = 0.0  # steps that the rows have in common
    for name, row in ablations.FINDINGS[0].rows.items():
        for (other, seed), result in found.items():
            before = found.get((ablations.start_of(row), seed))
            if other == row and before:
                steps, values = zip(_novel_curve(recipe, before), _novel_curve(recipe, result), strict=True)
                shared = float(steps[0][-1])
                steps = (steps[0], shared + steps[1])
                lines.setdefault(name, []).append((np.concatenate(steps), np.concatenate(values)))
    if lines:
        x = "detection steps so far (steps on grounding and pairs are not counted)"
        y = "AP of the shapes that never had a box, % (higher is better)"
        mark = (shared, "left: the start, trained on boxes alone\nright: each row goes on with its own data")
        from detclipv2_jax.visualize import charts  # takes a second: only where there is a plot

        charts.lines(lines, x=x, y=y, mark=mark, path=output / "claims.png")


def _novel_curve(recipe: str, result: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the AP of novel shapes in % over the detection steps of a run."""
    config = configuration(recipe, result["row"], result["seed"])
    num_steps = config.epochs * round(
        config.scenes.num_detection / config.detection.batch_size * config.detection.weight
    )
    steps = np.array([int(step) for step in result["novel_AP_by_step"]])
    return steps / steps[-1] * num_steps, np.array([*result["novel_AP_by_step"].values()])


def main(
    *,
    jobs: int = 2,
    config: str = "demo",
    results: pathlib.Path = pathlib.Path("results/claims"),
    work: pathlib.Path = pathlib.Path("runs/claims"),
    output: pathlib.Path = pathlib.Path("docs"),
) -> None:
    """Runs what is missing of the table, and writes and prints it.

    Args:
      jobs: runs side by side; 0: only write table and plot
      config: the recipe, which the runs change: a file, or a configuration that comes with the package
      results: folder of the runs' results
      work: folder of worlds and workdirs
      output: folder of table and plot
    """
    config = commands.config_file(config)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that runs are stopped, too
    try:
        if jobs:
            _run_table(config, results=results, work=work, jobs=jobs)
    finally:
        write_report(config, results, output)
    print("".join(markdown(all_results(results))))


if __name__ == "__main__":
    sys.exit(commands.run(main, about=__doc__))
