"""Transfer to ODinW or Roboflow-VL by GLIP's protocol: zero-shot, few shots with several seeds, all data; one table.

    python -m detclipv2_jax.transfer --checkpoint=RUN --data=DIR [--suite=odinw13|odinw35|rf20|rf100] [--output=DIR]

Zero-shot apart, every (setting, seed, member) is a run of --config from the checkpoint: trained on the member's train/,
its best checkpoint on valid/ scored on test/ with category names. Few shots are GLIP's: each category is on k images or
more, drawn by seeds 3, 30, 300, and 1, 3, 5 or 10 shots are passed 8, 4, 2 or 1 times an epoch. --data is as `python -m
detclipv2_jax.eval.odinw --help` says. What is missing is listed first, and a mean is given over all members only. Of
Roboflow's FSOD download, whose train/ holds 10 shots: --settings=zero_shot,full.

What has a score is not run again, a run that was stopped continues at its last checkpoint. A run leaves its scores and
log in <output>/<setting>/seed_<seed>/<member>; its checkpoints are removed once it is scored, unless --keep. After each
run <output>/table.md and <output>/scores.json are written: AP in %, mean ± standard deviation over the seeds.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np

from detclipv2_jax import commands
from detclipv2_jax.eval import odinw
from detclipv2_jax.files import read_json, write_json, write_text

SUITES = {  # of members, the mean that is asked for, settings
    "odinw13": ("odinw", "mean_13", "zero_shot,1,3,5,10,full"),
    "odinw35": ("odinw", "mean_35", "zero_shot,1,3,5,10,full"),
    "rf20": ("roboflow", "mean_20", "zero_shot,10"),
    "rf100": ("roboflow", "mean_100", "zero_shot,10"),
}
SPLITS = ("test", "train", "valid")
PASSES = {1: 8, 3: 4, 5: 2, 10: 1}  # of a few-shot set an epoch (GLIP)
Scores = dict[tuple[str, int], dict[str, float]]  # (setting, seed; 0: none is drawn) → member → AP


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is run of what, and where."""

    checkpoint: str
    data: pathlib.Path
    suite: str
    config: str
    flags: str
    output: pathlib.Path
    keep: bool = False

    @property
    def members(self) -> list[odinw.Member]:
        """The members of the suite, whether they are there or not."""
        family, mean, _ = SUITES[self.suite]
        return odinw.groups(family)[mean]

    def folder(self, setting: str, seed: int) -> pathlib.Path:
        """Returns where the runs of a setting are, each named after its member."""
        return self.output / setting / f"seed_{seed}" if seed else self.output / setting

    def missing(self, splits: Sequence[str]) -> dict[str, list[str]]:
        """Returns the splits that members lack, by name."""
        lacking = {m.name: [split for split in splits if not m.find(self.data, split)] for m in self.members}
        return {name: listed for name, listed in lacking.items() if listed}

    def commands(self, setting: str, seed: int, names: Sequence[str]) -> tuple[list[list[str]], pathlib.Path]:
        """Returns the commands that train and score members (one, unless zero-shot), and where the scores are then."""
        folder = self.folder(setting, seed)
        flags = [f"--data={self.data}", f"--suite={SUITES[self.suite][0]}", f"--only={','.join(names)}"]
        score = [sys.executable, "-m", "detclipv2_jax.eval.odinw", *flags]
        if setting == "zero_shot":
            score += [f"--checkpoint={self.checkpoint}", f"--output={folder}/all"]
            return [score], folder / "all" / "scores.json"
        (member,) = (member for member in self.members if member.name == names[0])
        score += [f"--finetuned={folder}", f"--output={folder / member.name}/test"]
        return [self.training(member, setting, seed), score], folder / member.name / "test" / "scores.json"

    def training(self, member: odinw.Member, setting: str, seed: int) -> list[str]:
        """Returns the command that fine-tunes on a member."""
        flags = [f"--config={self.config}", f"--workdir={self.folder(setting, seed) / member.name}"]
        flags += [f"--config.init_from.checkpoint={self.checkpoint}"]
        for section, split in (("detection", "train"), ("eval", "valid")):
            path = pathlib.Path(str(member.find(self.data, split)))
            flags += [f"--config.{section}.annotations={path}", f"--config.{section}.images={path.parent}"]
            if names := odinw.parents(path):
                flags += [f"--config.{section}.drop_categories={names!r}"]
        if setting != "full":
            flags += [f"--config.detection.num_shots={setting}", f"--config.detection.few_shot_seed={seed}"]
            flags += [f"--config.detection.weight={PASSES.get(int(setting), 1)}"]
        return [sys.executable, "-m", "detclipv2_jax.main", *flags, *shlex.split(self.flags)]


def settings_of(suite: str, settings: str, seeds: str) -> list[tuple[str, int]]:
    """Returns (setting, seed) in their order; ValueError for one that there is not."""
    listed = []
    for setting in (settings or SUITES[suite][2]).split(","):
        if setting in ("zero_shot", "full"):
            listed.append((setting, 0))
        elif setting.isdecimal() and int(setting):
            listed += [(setting, int(seed)) for seed in seeds.split(",")]
        else:
            raise ValueError(f"--settings has {setting!r}; allowed: zero_shot, full and numbers of shots")
    return listed


def stored(plan: Plan, setting: str, seed: int) -> dict[str, float]:
    """Returns the AP of the members that are scored.

    Raises:
      ValueError: one was scored of another run.
    """
    found = {}
    for member in plan.members:
        path = plan.folder(setting, seed) / member.name / "score.json"
        if path.is_file():
            content = read_json(path)
            if (made := content["of"]) != (wanted := recipe(plan, setting)):
                raise ValueError(f"{path} is a score of {made}, not of {wanted}; give another --output or delete it")
            found[member.name] = content["AP"]
    return found


def recipe(plan: Plan, setting: str) -> dict[str, str]:
    """Returns what a score depends on beside its member and seed."""
    training = {} if setting == "zero_shot" else {"config": plan.config, "flags": plan.flags}
    return {"checkpoint": plan.checkpoint, "data": str(plan.data)} | training


def _run_all(plan: Plan, listed: Sequence[tuple[str, int]]) -> tuple[Scores, list[str]]:
    """Runs what is there and has no score; returns all scores, and what failed. Writes the table after each run."""
    scores = {key: stored(plan, *key) for key in listed}
    jobs: list[tuple[str, int, list[str]]] = []
    for setting, seed in listed:
        done, missing = scores[setting, seed], plan.missing(SPLITS if setting != "zero_shot" else SPLITS[:1])
        todo = [member.name for member in plan.members if member.name not in done and member.name not in missing]
        if setting == "zero_shot" and todo:  # one model for all of them
            jobs.append((setting, seed, todo))
        elif setting != "zero_shot":
            jobs += [(setting, seed, [name]) for name in todo]
    failed = []
    for i, (setting, seed, names) in enumerate(jobs, start=1):
        started, folder = time.monotonic(), plan.folder(setting, seed)
        title = f"[{i}/{len(jobs)}] {named(setting)}{f', seed {seed}' if seed else ''}, {', '.join(names)}"
        log = (folder if setting == "zero_shot" else folder / names[0]) / "log.txt"
        log.parent.mkdir(parents=True, exist_ok=True)
        print(f"{title}: {log}", flush=True)
        commands_of_job, result = plan.commands(setting, seed, names)
        if status := next(filter(None, (_call(command, log) for command in commands_of_job)), 0):
            failed.append(f"{title}: ended with status {status}, see {log}")
            print(failed[-1], file=sys.stderr, flush=True)
            continue
        (found,) = (read_json(result)[kind] for kind in ("zero_shot", "finetuned") if kind in read_json(result))
        for name in names:
            write_json(folder / name / "score.json", {"AP": found[name], "of": recipe(plan, setting)}, indent=2)
            scores[setting, seed][name] = found[name]
            if not plan.keep:
                shutil.rmtree(folder / name / "checkpoints", ignore_errors=True)
        ap = 100 * float(np.mean([found[name] for name in names]))
        print(f"{title}: AP {ap:.1f} after {(time.monotonic() - started) / 60:.1f} minutes", flush=True)
        write(plan, scores)
    return scores, failed


def _call(command: Sequence[str], log: pathlib.Path) -> int:
    """Returns the exit status of a command, whose output goes to a log; it ends with this process, its state saved."""
    with log.open("ab") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            return process.wait()
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()


def named(setting: str) -> str:
    """Returns a setting as the table calls it."""
    return setting.replace("_", "-") if not setting.isdecimal() else f"{setting} shot{'s' * (setting != '1')}"


def means_of(plan: Plan, scores: Scores) -> Scores:
    """Returns the means over all members of a group, for every (setting, seed) that has all of them."""
    groups = odinw.groups(SUITES[plan.suite][0])
    wanted = {name: [m.name for m in group] for name, group in groups.items() if len(group) <= len(plan.members)}
    return {
        key: {
            mean: float(np.mean([of_members[name] for name in names]))
            for mean, names in wanted.items()
            if of_members.keys() >= set(names)
        }
        for key, of_members in scores.items()
    }


def table(plan: Plan, scores: Scores) -> Iterator[str]:
    """Yields a markdown table of AP in %: mean ± standard deviation over the seeds (n - 1), as far as they are done."""
    means = means_of(plan, scores)
    rows = {key: scores[key] | means[key] for key in scores}
    settings = list(dict.fromkeys(setting for setting, _ in scores))
    names = dict.fromkeys([m.name for m in plan.members] + [mean for found in means.values() for mean in found])
    yield f"| AP in % | {' | '.join(map(named, settings))} |\n|---|{'---|' * len(settings)}\n"
    for name in names:
        cells = []
        for setting in settings:
            values = [100 * found[name] for (other, _), found in rows.items() if other == setting and name in found]
            spread = f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
            cells.append(f"{np.mean(values):.1f}{spread}" if values else "–")
        yield f"| {name} | {' | '.join(cells)} |\n"


def write(plan: Plan, scores: Scores) -> dict[str, Any]:
    """Writes table.md and scores.json; returns what the latter holds."""
    protocol = {"suite": plan.suite, **recipe(plan, "full"), "ap": odinw.coco.AP_KIND}
    content: dict[str, Any] = {"scores": {}, "means": {}, "protocol": protocol}
    for part, values in (("scores", scores), ("means", means_of(plan, scores))):
        for (setting, seed), found in values.items():
            content[part].setdefault(setting, {})[f"seed_{seed}" if seed else "all"] = found
    write_json(plan.output / "scores.json", content, indent=2)
    write_text(plan.output / "table.md", table(plan, scores))
    return content


def main(
    *,
    checkpoint: str,
    data: pathlib.Path,
    suite: Literal["odinw13", "odinw35", "rf20", "rf100"] = "odinw13",
    settings: str = "",
    seeds: str = "3,30,300",
    config: str = "configs/finetune_odinw.py",
    flags: str = "",
    output: pathlib.Path = pathlib.Path("runs/transfer"),
    keep: bool = False,
) -> None:
    """Runs what is missing, prints the table and, as the last line, one JSON object.

    Args:
      checkpoint: workdir of the run that is transferred
      data: folder of the members
      suite: whose members
      settings: some of zero_shot, full and numbers of shots; empty: all of the suite's protocol
      seeds: of few-shot sets
      config: recipe of fine-tuning, with a variant that has the model of the checkpoint
      flags: more flags of fine-tuning, such as "--config.detection.batch_size=8"
      output: folder of runs, table and scores
      keep: checkpoints stay
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that a run is stopped, too
    plan = Plan(checkpoint, data, suite, config, flags, output, keep)
    listed = settings_of(suite, settings, seeds)
    trained = any(setting != "zero_shot" for setting, _ in listed)
    if missing := plan.missing(SPLITS if trained else SPLITS[:1]):
        lines = "".join(f"\n  {name}: {', '.join(splits)}" for name, splits in missing.items())
        message = f"{len(missing)} of {len(plan.members)} members are not in {data} as {odinw.LAYOUT}:{lines}"
        if len(plan.missing(SPLITS[:1])) == len(plan.members):
            raise ValueError(message)
        print(message, file=sys.stderr, flush=True)
    scores, failed = _run_all(plan, listed)
    content = write(plan, scores)
    print("".join(table(plan, scores)))
    print(json.dumps(content))
    if failed:
        raise ValueError("\n".join([f"{len(failed)} runs failed; the same command tries them again:", *failed]))


if __name__ == "__main__":
    sys.exit(commands.run(main, about=__doc__))
