"""ODinW13, ODinW35, Roboflow20-VL and 100-VL: COCO AP of every member, and the means, zero-shot and fine-tuned.

    python -m detclipv2_jax.eval.odinw --checkpoint=DIR --data=DIR [--suite=odinw|roboflow] [--finetuned=DIR]

--data holds the members as GLIP publishes them (`odinw.json` beside this file has folder and prompts of each), or as
<name>/test with an annotations.json or _annotations.coco.json among the photos, as Roboflow exports them; a category
without boxes that is the supercategory of all others is left out. --checkpoint is one run scored on all of them,
--finetuned a folder with a run of each, named after it. Zero-shot prompts are GLIP's, where it has one for a category,
else the category's name; --plain_names leaves them out. A fine-tuned run is asked with the names it was trained with. A
mean is given only over all of its members; what is missing is listed.

Writes <output>/<zero_shot|finetuned>/<name>/eval and, as the last line and to <output>/scores.json, one JSON object of
fractions. A command that was killed continues; what is scored is not scored again. `python -m detclipv2_jax.transfer`
fine-tunes on all members, with few shots and with all, and gives one table.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import sys
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from ml_collections import ConfigDict

from detclipv2_jax import commands
from detclipv2_jax.eval import coco
from detclipv2_jax.files import read_json, write_json

if TYPE_CHECKING:
    from detclipv2_jax.data.streams import EvalStream
    from detclipv2_jax.eval import loop

Groups = dict[str, "list[Member]"]  # the members that means are of
FILES = (
    "annotations_without_background.json",
    "{}_annotations_without_background.json",
    "annotations.json",
    "_annotations.coco.json",
)
LAYOUT = (
    "<name>/{test,train,valid}/annotations.json or _annotations.coco.json, each among its photos, or GLIP's folders"
)


@dataclasses.dataclass(frozen=True, eq=False)
class Member:
    """One data set."""

    name: str
    folder: str  # of its test photos in GLIP's layout
    odinw13: bool = False
    prompts: dict[str, str] = dataclasses.field(default_factory=dict)  # of categories that are not called by their name

    def find(self, data: pathlib.Path, split: str = "test") -> pathlib.Path | None:
        """Returns the annotations of a split (train, valid, test) in a folder of members, None without them."""
        folder = data / self.folder
        if split == "test":
            split = "valid" if folder.name == "valid" else "test"
        if folder.name != "export":  # all splits in one folder
            folder = folder.with_name(split)
        names = [name.format("val" if split == "valid" else split) for name in FILES]
        paths = (parent / name for parent in (folder, data / self.name / split) for name in names)
        return next((path for path in paths if path.is_file()), None)


def members() -> list[Member]:
    """Returns the 35 members; 13 of them are ODinW13."""
    return [Member(**row) for row in json.loads(pathlib.Path(__file__).with_name("odinw.json").read_text())]


def groups(suite: str) -> Groups:
    """Returns the members of which means are given, by the name of the mean; the last group holds all of them."""
    if suite == "odinw":
        return {"mean_13": [m for m in members() if m.odinw13], "mean_35": members()}
    names = json.loads(pathlib.Path(__file__).with_name("roboflow.json").read_text())
    known = {name: Member(name, f"{name}/test") for name in names["mean_100"]}
    return {mean: [known[name] for name in listed] for mean, listed in names.items()}


def parents(annotations: pathlib.Path) -> tuple[str, ...]:
    """Returns the name of the category without boxes that is the supercategory of all others, if there is one."""
    content = read_json(annotations)
    used, categories = {row["category_id"] for row in content["annotations"]}, content["categories"]
    unused = [category["name"] for category in categories if category["id"] not in used]
    above = (name for name in unused if all(name in (c["name"], c.get("supercategory")) for c in categories))
    return tuple(above) if len(categories) > 1 else ()


def setup(
    config: ConfigDict, member: Member, annotations: pathlib.Path, *, plain_names: bool
) -> tuple[ConfigDict, list[EvalStream]]:
    """Returns what `evaluate` needs of a member, for a run with a configuration: that of its evaluation, and photos.

    Raises:
      ValueError: its files are not what they should be.
    """
    import jax

    from detclipv2_jax.data.concepts import Vocabulary
    from detclipv2_jax.eval import loop

    config = config.copy_and_resolve_references()
    config.eval.update({"annotations": str(annotations), "images": str(annotations.parent), "dictionary": ""})
    config.eval.update({"definitions": False, "max_examples": 0, "drop_categories": parents(annotations)})
    config.eval.batch_size = -(-config.eval.batch_size // jax.device_count()) * jax.device_count()
    streams = loop.make_streams(config)
    for stream in streams:
        vocabulary = stream.ground_truth.vocabulary
        names = tuple(vocabulary.names if plain_names else (member.prompts.get(x, x) for x in vocabulary.names))
        prompts = Vocabulary(names, vocabulary.definitions, vocabulary.category_ids)
        stream.ground_truth = dataclasses.replace(stream.ground_truth, vocabulary=prompts)
    return config, streams


def _setup_all(
    found: dict[Member, pathlib.Path], *, checkpoint: str, finetuned: str, plain_names: bool
) -> dict[str, dict[Member, tuple[ConfigDict, list[EvalStream]]]]:
    """Returns what is scored, by kind and member, all of it checked before the first photo is looked at.

    Raises:
      ValueError: runs or files of members are not what they should be; all of them are listed.
    """
    from detclipv2_jax.runs import checkpoints, remote

    opened: dict[str, dict[Member, tuple[ConfigDict, list[EvalStream]]]] = {}
    problems: list[str] = []
    if checkpoint:
        config, opened["zero_shot"] = checkpoints.read_config(remote.here(checkpoint)), {}
    if finetuned:
        opened["finetuned"] = {}
    for kind, by_member in opened.items():
        for member, path in found.items():
            workdir = pathlib.Path(finetuned) / member.name
            if kind == "finetuned" and not workdir.is_dir():
                continue
            try:
                run_config = config if kind == "zero_shot" else checkpoints.read_config(workdir)
                by_member[member] = setup(run_config, member, path, plain_names=plain_names or kind == "finetuned")
            except ValueError as error:
                problems.append(f"{member.name}: {error}")
    if problems:
        raise ValueError("\n".join(problems))
    return opened


def evaluate(
    checkpoint: loop.Checkpoint, opened: tuple[ConfigDict, list[EvalStream]], *, output: pathlib.Path
) -> dict[str, float]:
    """Returns the COCO scores of a member, see `coco.evaluate`; writes them to `output`/eval, or finds them there."""
    from detclipv2_jax.eval import loop

    config, streams = opened
    evaluator = loop.Evaluator(config, checkpoint.detector, streams=streams, workdir=output)
    known = evaluator.recorded(checkpoint.step, params=checkpoint.params)
    return known or evaluator(checkpoint.params, step=checkpoint.step)


def run(
    *,
    data: pathlib.Path,
    output: pathlib.Path,
    checkpoint: str = "",
    finetuned: str = "",
    plain_names: bool = False,
    suite: str = "odinw",
    only: str = "",
) -> dict[str, Any]:
    """Returns {"zero_shot" | "finetuned": {member: AP, "mean_13", "mean_35"}}; a mean that lacks a member is None.

    Raises:
      ValueError: no member in `data`, or no checkpoint.
    """
    means = groups(suite)
    *_, everyone = means.values()
    wanted = only.split(",") if only else [member.name for member in everyone]
    found = {member: path for member in everyone if member.name in wanted and (path := member.find(data))}
    if not found:
        raise ValueError(f"{data} holds no member of {suite} as {LAYOUT}: {', '.join(wanted)}")
    if not checkpoint and not finetuned:
        raise ValueError("give --checkpoint, a run scored on all members, or --finetuned, a folder with a run of each")
    from detclipv2_jax.eval import loop

    result = {}
    opened = _setup_all(found, checkpoint=checkpoint, finetuned=finetuned, plain_names=plain_names)
    for kind, members_of_kind in opened.items():
        loaded = loop.Checkpoint.load(checkpoint) if kind == "zero_shot" else None
        scores: dict[str, float | None] = {}
        for member, scored in members_of_kind.items():
            trained = loaded or loop.Checkpoint.load(pathlib.Path(finetuned) / member.name)
            scores[member.name] = evaluate(trained, scored, output=output / kind / member.name)["AP"]
        for name, group in means.items():
            values = [score for member in group if (score := scores.get(member.name)) is not None]
            scores[name] = float(np.mean(values)) if len(values) == len(group) else None
        result[kind] = scores
    return result


def table(result: dict[str, dict[str, float | None]], means: Groups) -> str:
    """Returns the scores of every member that has one, in percent, and the means."""
    *_, everyone = means.values()
    names = [m.name for m in everyone if any(m.name in scores for scores in result.values())]
    lines = [f"{'':24}" + "".join(f"{kind:>12}" for kind in result)]
    for name in (*names, *means):
        values = (scores.get(name) for scores in result.values())
        lines.append(f"{name:24}" + "".join(f"{'-' if x is None else format(100 * x, '.1f'):>12}" for x in values))
    missing = [m.name for m in everyone if m.name not in names]
    return "\n".join(lines) + (f"\nnot scored ({len(missing)}): {', '.join(missing)}" if missing else "")


def main(
    *,
    data: str,
    checkpoint: str = "",
    finetuned: str = "",
    output: str = "runs/odinw",
    plain_names: bool = False,
    suite: Literal["odinw", "roboflow"] = "odinw",
    only: str = "",
) -> None:
    """Scores the members; prints a table and one JSON object.

    Args:
      data: folder of the members
      checkpoint: workdir of a run, scored on all members
      finetuned: folder with a workdir of each member
      output: where results go
      plain_names: category names alone, without GLIP's prompts
      suite: whose members
      only: names of some of them, separated by commas
    """
    scored: dict[str, Any] = {"checkpoint": checkpoint, "finetuned": finetuned}
    options: dict[str, Any] = {"plain_names": plain_names, "suite": suite, "only": only}
    result = run(data=pathlib.Path(data), output=pathlib.Path(output), **scored, **options)
    protocol = {
        "ap": coco.AP_KIND,
        "prompts": "category names" if plain_names else "GLIP's; of fine-tuned runs category names",
        "suite": suite,
        "data": data,
        **scored,
        "of each member": f"{output}/<zero_shot|finetuned>/<name>/eval",
    }
    write_json(pathlib.Path(output, "scores.json"), result | {"protocol": protocol}, indent=2)
    print(table(result, groups(suite)))
    print(json.dumps(result | {"protocol": protocol}))


if __name__ == "__main__":
    sys.exit(commands.run(main, about=__doc__))
