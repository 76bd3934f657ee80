"""ODinW13 and ODinW35: COCO AP of every member, and the means, zero-shot and fine-tuned.

    python -m detclipv2_jax.eval.odinw --checkpoint=DIR --data=DIR [--finetuned=DIR] [--output=DIR]

--data holds the members as GLIP publishes them (`odinw.json` beside this file has folder and prompts of each), or as
<name>/test with an annotations.json among the photos. --checkpoint is one run scored on all of them, --finetuned a
folder with a run of each, named after it. Zero-shot prompts are GLIP's, where it has one for a category, else the
category's name; --plain_names leaves them out. A fine-tuned run is asked with the names it was trained with. A mean is
given only over all of its members; what is missing is listed.

Writes <output>/<zero_shot|finetuned>/<name>/eval and, as the last line and to <output>/scores.json, one JSON object of
fractions. A command that was killed continues.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
from ml_collections import ConfigDict

from detclipv2_jax import commands
from detclipv2_jax.eval import coco
from detclipv2_jax.files import write_json

if TYPE_CHECKING:
    from detclipv2_jax.data.streams import EvalStream
    from detclipv2_jax.eval import loop

FILES = (
    "annotations_without_background.json",
    "test_annotations_without_background.json",
    "annotations.json",
    "_annotations.coco.json",
)


@dataclasses.dataclass(frozen=True, eq=False)
class Member:
    """One data set."""

    name: str
    folder: str  # of its test photos in GLIP's layout
    odinw13: bool
    prompts: dict[str, str] = dataclasses.field(default_factory=dict)  # of categories that are not called by their name

    def find(self, data: pathlib.Path) -> pathlib.Path | None:
        """Returns its annotations in a folder of members, None without them."""
        folder = data / self.folder
        split = data / self.name / ("valid" if folder.name == "valid" else "test")
        paths = (parent / name for parent in (folder, split) for name in FILES)
        return next((path for path in paths if path.is_file()), None)


def members() -> list[Member]:
    """Returns the 35 members; 13 of them are ODinW13."""
    return [Member(**row) for row in json.loads(pathlib.Path(__file__).with_name("odinw.json").read_text())]


def prepare(
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
    config.eval.update({"definitions": False, "max_examples": 0, "drop_categories": ()})
    config.eval.batch_size = -(-config.eval.batch_size // jax.device_count()) * jax.device_count()
    streams = loop.make_streams(config)
    for stream in streams:
        vocabulary = stream.ground_truth.vocabulary
        names = tuple(vocabulary.names if plain_names else (member.prompts.get(x, x) for x in vocabulary.names))
        prompts = Vocabulary(names, vocabulary.definitions, vocabulary.category_ids)
        stream.ground_truth = dataclasses.replace(stream.ground_truth, vocabulary=prompts)
    return config, streams


def _prepare_all(
    found: dict[Member, pathlib.Path], *, checkpoint: str, finetuned: str, plain_names: bool
) -> dict[str, dict[Member, tuple[ConfigDict, list[EvalStream]]]]:
    """Returns what is scored, by kind and member, all of it checked before the first photo is looked at.

    Raises:
      ValueError: runs or files of members are not what they should be; all of them are listed.
    """
    from detclipv2_jax.runs import checkpoints, remote

    prepared: dict[str, dict[Member, tuple[ConfigDict, list[EvalStream]]]] = {}
    problems: list[str] = []
    if checkpoint:
        config, prepared["zero_shot"] = checkpoints.read_config(remote.here(checkpoint)), {}
    if finetuned:
        prepared["finetuned"] = {}
    for kind, by_member in prepared.items():
        for member, path in found.items():
            workdir = pathlib.Path(finetuned) / member.name
            if kind == "finetuned" and not workdir.is_dir():
                continue
            try:
                run_config = config if kind == "zero_shot" else checkpoints.read_config(workdir)
                by_member[member] = prepare(run_config, member, path, plain_names=plain_names or kind == "finetuned")
            except ValueError as error:
                problems.append(f"{member.name}: {error}")
    if problems:
        raise ValueError("\n".join(problems))
    return prepared


def evaluate(
    checkpoint: loop.Checkpoint, prepared: tuple[ConfigDict, list[EvalStream]], *, output: pathlib.Path
) -> dict[str, float]:
    """Returns the COCO scores of a member, see `coco.evaluate`; writes them to `output`/eval."""
    from detclipv2_jax.eval import loop

    config, streams = prepared
    evaluator = loop.Evaluator(config, checkpoint.detector, streams=streams, workdir=output)
    return evaluator(checkpoint.params, step=checkpoint.step)


def run(
    *, data: pathlib.Path, output: pathlib.Path, checkpoint: str = "", finetuned: str = "", plain_names: bool = False
) -> dict[str, Any]:
    """Returns {"zero_shot" | "finetuned": {member: AP, "mean_13", "mean_35"}}; a mean that lacks a member is None.

    Raises:
      ValueError: no member in `data`, or no checkpoint.
    """
    found = {member: path for member in members() if (path := member.find(data))}
    if not found:
        names = ", ".join(member.name for member in members())
        raise ValueError(
            f"{data} holds no member of ODinW as <name>/test/annotations.json or in GLIP's layout: {names}"
        )
    if not checkpoint and not finetuned:
        raise ValueError("give --checkpoint, a run scored on all members, or --finetuned, a folder with a run of each")
    from detclipv2_jax.eval import loop

    result = {}
    prepared = _prepare_all(found, checkpoint=checkpoint, finetuned=finetuned, plain_names=plain_names)
    for kind, members_of_kind in prepared.items():
        loaded = loop.Checkpoint.load(checkpoint) if kind == "zero_shot" else None
        scores: dict[str, float | None] = {}
        for member, scored in members_of_kind.items():
            trained = loaded or loop.Checkpoint.load(pathlib.Path(finetuned) / member.name)
            scores[member.name] = evaluate(trained, scored, output=output / kind / member.name)["AP"]
        for name, group in (("mean_13", [m for m in members() if m.odinw13]), ("mean_35", members())):
            values = [score for member in group if (score := scores.get(member.name)) is not None]
            scores[name] = float(np.mean(values)) if len(values) == len(group) else None
        result[kind] = scores
    return result


def table(result: dict[str, dict[str, float | None]]) -> str:
    """Returns the scores of every member that has one, in percent, and the means."""
    names = [m.name for m in members() if any(m.name in scores for scores in result.values())]
    lines = [f"{'':24}" + "".join(f"{kind:>12}" for kind in result)]
    for name in (*names, "mean_13", "mean_35"):
        values = (scores.get(name) for scores in result.values())
        lines.append(f"{name:24}" + "".join(f"{'-' if x is None else format(100 * x, '.1f'):>12}" for x in values))
    missing = [m.name for m in members() if m.name not in names]
    return "\n".join(lines) + (f"\nnot scored ({len(missing)}): {', '.join(missing)}" if missing else "")


def main(
    *, data: str, checkpoint: str = "", finetuned: str = "", output: str = "runs/odinw", plain_names: bool = False
) -> None:
    """Scores the members; prints a table and one JSON object.

    Args:
      data: folder of the members
      checkpoint: workdir of a run, scored on all members
      finetuned: folder with a workdir of each member
      output: where results go
      plain_names: category names alone, without GLIP's prompts
    """
    result = run(
        data=pathlib.Path(data),
        output=pathlib.Path(output),
        checkpoint=checkpoint,
        finetuned=finetuned,
        plain_names=plain_names,
    )
    protocol = {
        "ap": coco.AP_KIND,
        "prompts": "category names" if plain_names else "GLIP's; of fine-tuned runs category names",
        "data": data,
        "checkpoint": checkpoint,
        "finetuned": finetuned,
        "of each member": f"{output}/<zero_shot|finetuned>/<name>/eval",
    }
    write_json(pathlib.Path(output, "scores.json"), result | {"protocol": protocol}, indent=2)
    print(table(result))
    print(json.dumps(result | {"protocol": protocol}))


if __name__ == "__main__":
    sys.exit(commands.run(main, about=__doc__))
