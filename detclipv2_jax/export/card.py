"""The model card of an export: what the run says of itself, for readers and, as YAML, for the hub."""

from __future__ import annotations

import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax

from detclipv2_jax.config import KINDS
from detclipv2_jax.files import printable, read_json
from detclipv2_jax.inference import Predictor

_TASK = "zero-shot-object-detection"
_SCORES = re.compile(r"(fixed_)?AP(50|75|[rcf])?|top1|P@1|R@\d+")
_PROTOCOL = (
    *("ap", "annotations_sha256", "images_evaluated", "score", "score_threshold", "nms_iou", "max_detections"),
    *("canvases", "short_side", "definitions", "ema"),
)
_USE = """```python
from detclipv2_jax.inference import Predictor

predictor = Predictor.from_pretrained("FOLDER or USER/NAME")
print(predictor("photo.jpg", ["cat", "red car"]))
```"""


def check_license(license: str) -> None:
    """Raises a ValueError unless a licence is named as the hub does: apache-2.0, mit, cc-by-4.0, …"""
    if license in ("unknown", "none") or not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", license):
        raise ValueError(
            f"--license={license} names no licence; give its identifier on the hub in lower case (apache-2.0, mit, "
            "cc-by-4.0, other, …), or leave --license out: the card then says that none was named"
        )


def write(
    predictor: Predictor, workdir: pathlib.Path, *, license: str, weights: str, words: Mapping[str, str] | None
) -> str:
    """Returns the text of README.md.

    Args:
      predictor: of the run.
      workdir: of the run, whose eval/ has the scores of the exported step.
      license: identifier of a licence on the hub; "": none was named, and the card has no such field.
      weights: type in which they are stored.
      words: that are stored with the model.
    """
    config = predictor.config
    name, step = printable(config.name), predictor.step
    scores, protocol = _scores(workdir, step)
    about: dict[str, Any] = {"library_name": "detclipv2_jax", "pipeline_tag": _TASK}
    about |= {"license": license} if license else {}
    about["tags"] = ["detclipv2", "object-detection", "open-vocabulary", "jax"]
    dataset = printable(pathlib.PurePath(str(protocol.get("annotations", ""))).name)
    if scores:
        metrics = [{"type": key, "name": f"{key} (%)", "value": value} for key, value in scores.items()]
        result = {"task": {"type": _TASK}, "dataset": {"name": dataset, "type": dataset}, "metrics": metrics}
        about["model-index"] = [{"name": name, "results": [result]}]
    num = sum(value.size for value in jax.tree.leaves(predictor.params))
    lines = ["---", *(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in about.items()), "---"]
    lines += [f"# {name}", "", "DetCLIPv2: finds what words name, words that were not trained too.", "", _USE, ""]
    lines += ["| | |", "|---|---|", f"| model | {num:,} parameters, stored as {weights} |"]
    lines += [f"| training | {step:,} steps |", *_data(config)]
    lines += [f"| vocabulary | {len(words)} words with their embeddings |"] if words else []
    lines += [f"| licence | {license or 'none was named when this was exported: ask whoever gave it to you'} |", ""]
    if not scores:
        return "\n".join([*lines, f"No scores of step {step:,} lay beside the run when this was exported.", ""])
    rounded = "" if weights == "float32" else f", of the weights in float32 that became {weights}"
    lines += [f"Scores in % on {dataset}{rounded}:", "", f"| {' | '.join(scores)} |", "|---" * len(scores) + "|"]
    lines += [f"| {' | '.join(map(str, scores.values()))} |", "", "Protocol:", ""]
    lines += [f"* {key}: {printable(protocol[key])}" for key in _PROTOCOL if key in protocol]
    return "\n".join([*lines, ""])


def _data(config: Any) -> list[str]:
    """Returns a row of the card for each kind of data, and for what the training started from."""
    rows = []
    for kind in KINDS:
        section = config[kind]
        raw = section.pairs if kind == "image_text" else section.annotations
        sources = [raw, *([section.data] if isinstance(section.data, str) else section.data)]
        if num := config.scenes[f"num_{kind}"]:
            sources.append(f"{num:,} generated scenes")
        if listed := ", ".join(printable(source) for source in sources if source):
            rows.append(f"| {kind.replace('_', '-')} data | {listed} |")
    start = ", ".join(printable(source) for source in config.init_from.to_dict().values() if source)
    return [*rows, *([f"| started from | {start} |"] if start else [])]


def _scores(workdir: pathlib.Path, step: int) -> tuple[dict[str, float], dict[str, Any]]:
    """Returns the main scores of a step in %, and their protocol; nothing where there are none."""
    path = workdir / "eval" / f"step_{step:08d}_scores.json"
    if not path.is_file():
        return {}, {}
    content = read_json(path)
    if not isinstance(content, dict) or not isinstance(content.get("protocol"), dict):
        raise ValueError(f"{path} holds no scores with their protocol; evaluate the run again, or remove the file")
    found = {key: value for key, value in content.items() if _SCORES.fullmatch(key) and isinstance(value, float)}
    return {key: round(100 * value, 1) for key, value in found.items() if value >= 0}, content["protocol"]
