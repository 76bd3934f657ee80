"""The paper's findings as rows of runs and inequalities between their scores; `claims` runs and judges them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

# what every row changes in configs/demo.py; at the start's rate of 1e-3 the first pairs undo half of what it learned
GOING_ON: dict[str, Any] = {
    # 100 steps an epoch of boxes, as many of pairs
    "scenes.num_detection": 1600,
    "scenes.num_grounding": 320,
    "scenes.num_image_text": 1600,
    "epochs": 2,
    "grounding.from_epoch": 0,
    "image_text.from_epoch": 0,
    "image_text.weight": 1.0,
    "optimizer.learning_rate": 5e-4,
    "eval.every_epochs": 1,
    "eval.num_pictures": 0,
    "checkpoint.keep": 1,
    "closing": "",
}
BOXES_ALONE: dict[str, Any] = {"grounding.weight": 0.0, "image_text.weight": 0.0}
PAIRS: dict[str, Any] = {"grounding.weight": 0.0}
# the paper's choices, one changed
OTHER_CHOICES: dict[str, dict[str, Any]] = {
    "bilateral": {"loss.side": "bilateral"},
    "image_to_text": {"loss.side": "image_to_text"},
    "centerness": {"loss.selection": "centerness"},
    "classification": {"loss.selection": "classification", "model.head.objectness": "classification"},
    "sample_text": {"loss.selection": "text_sample"},
    "one_to_many": {"loss.matching": "one_to_many"},
    "max_size": {"loss.matching": "max_size"},
    "k_3": {"loss.num_proposals": 3},
    "k_6": {"loss.num_proposals": 6},
    "temperature_1": {"loss.temperature": 1.0},
    "temperature_0.15": {"loss.temperature": 0.15},
    "weight_0.03": {"loss.contrastive_weight": 0.03},
    "weight_1": {"loss.contrastive_weight": 1.0},
    "plain_pairs": {"model.head.deformable": False},
    "plain_detection": BOXES_ALONE | {"model.head.deformable": False},
    "pairs_64": {"image_text.canvases": ((64, 64),), "image_text.short_side": (64, 64), "image_text.long_side": 64},
    "pairs_128": {
        "image_text.canvases": ((128, 128),), "image_text.short_side": (128, 128), "image_text.long_side": 128
    },
}  # fmt: skip
# what a row changes in configs/demo.py
ROWS: dict[str, dict[str, Any]] = {
    "detection": BOXES_ALONE,
    "detection_twice": BOXES_ALONE | {"detection.weight": 2.0},
    "pairs": PAIRS,
    "pairs_base_words": PAIRS | {"scenes.novel_captions": False},
    "grounding_pairs": {},
    **{name: PAIRS | changes for name, changes in OTHER_CHOICES.items()},
}
# what rows start from, in place of the paper's pre-trained towers: boxes alone, with the model of the row; the rate is
# not annealed before training goes on. With 400 steps instead of 1,200 few shapes have a word yet when pairs begin
_START: dict[str, Any] = BOXES_ALONE | {
    "epochs": 12,
    "optimizer.learning_rate": 1e-3,
    "optimizer.schedule": "constant",
    "eval.every_epochs": 4,
}
STARTS: dict[str, dict[str, Any]] = {
    "start": _START,
    "start_plain": _START | {"model.head.deformable": False},
    "start_classification": _START | {"model.head.objectness": "classification"},
}
SEEDS = (0, 1, 2)  # of the first finding; the others take the first two
Results = dict[tuple[str, int], dict[str, Any]]  # by (row, seed)


class Claim(NamedTuple):
    """One sentence of the paper as an inequality between means."""

    text: str
    margins: Callable[[Mapping[str, dict[str, float]]], list[float]]  # in points of AP; it holds if none is negative


@dataclasses.dataclass(frozen=True)
class Finding:
    """Rows that are compared, by the name they have in the table, and what shall hold between them."""

    title: str
    rows: dict[str, str]  # name → row
    claims: tuple[Claim, ...]
    num_seeds: int = 2


def _best(row: str, *others: str) -> Claim:
    """Returns the claim that no other row has a higher AP (of all shapes), the score of the paper's tables."""
    return Claim("the paper's choice is the best", lambda m: [m[row]["AP"] - m[other]["AP"] for other in others])


FINDINGS = (
    Finding(
        "1. Pairs teach words that no box was drawn for (Tables 4, 8)",
        {
            "detection": "detection",
            "+ pairs": "pairs",
            "+ grounding + pairs": "grounding_pairs",
            "detection, twice the steps": "detection_twice",
            "+ pairs that name base shapes only": "pairs_base_words",
        },
        (
            Claim(
                "pairs raise novel AP by 15 points or more, over twice the detection steps as well",
                lambda m: [
                    m["pairs"]["novel_AP"] - m[row]["novel_AP"] - 15.0 for row in ("detection", "detection_twice")
                ],
            ),
            Claim(
                "grounding and pairs raise novel AP further",
                lambda m: [m["grounding_pairs"]["novel_AP"] - m["pairs"]["novel_AP"]],
            ),
            Claim(
                "base AP does not fall by more than 1",
                lambda m: [m[row]["base_AP"] - m["detection"]["base_AP"] + 1.0 for row in ("pairs", "grounding_pairs")],
            ),
            Claim(
                "AR of novel shapes does not fall",
                lambda m: [m[row]["novel_AR"] - m["detection"]["novel_AR"] for row in ("pairs", "grounding_pairs")],
            ),
            Claim(
                "captions that name base shapes only keep novel AP within 3 points",
                lambda m: [3.0 - abs(m["pairs_base_words"]["novel_AP"] - m["detection"]["novel_AP"])],
            ),
        ),
        num_seeds=3,
    ),
    Finding(
        "2. Contrast one text with all images (Table 2c)",
        {"text to image": "pairs", "bilateral": "bilateral", "image to text": "image_to_text"},
        (
            Claim(
                "text to image ≥ bilateral ≥ image to text",
                lambda m: [m["pairs"]["AP"] - m["bilateral"]["AP"], m["bilateral"]["AP"] - m["image_to_text"]["AP"]],
            ),
        ),
    ),
    Finding(
        "3. Choose regions by the words of the batch (Table 2a)",
        {
            "words of the batch": "pairs",
            "centerness": "centerness",
            "own words": "sample_text",
            "classification": "classification",
        },
        (_best("pairs", "centerness", "sample_text", "classification"),),
    ),
    Finding(
        "4. One region a phrase (Table 2b)",
        {"one to one": "pairs", "one to many": "one_to_many", "largest box, caption": "max_size"},
        (_best("pairs", "one_to_many", "max_size"),),
    ),
    Finding(
        "5a. Regions an image (Table 2d: 100, 50, 25 of 2,134 anchors; here of 194)",
        {"k = 12": "pairs", "k = 6": "k_6", "k = 3": "k_3"},
        (_best("pairs", "k_6", "k_3"),),
    ),
    Finding(
        "5b. Temperature (Table 2e)",
        {"τ = 1": "temperature_1", "τ = 0.5": "pairs", "τ = 0.15": "temperature_0.15"},
        (_best("pairs", "temperature_1", "temperature_0.15"),),
    ),
    Finding(
        "5c. Weight of the contrastive loss (Table 2f)",
        {"λ = 0.03": "weight_0.03", "λ = 0.1": "pairs", "λ = 1": "weight_1"},
        (_best("pairs", "weight_0.03", "weight_1"),),
    ),
    Finding(
        "6. The deformable layer pays with pairs (Table 3)",
        {
            "detection, plain": "plain_detection",
            "detection, deformable": "detection",
            "+ pairs, plain": "plain_pairs",
            "+ pairs, deformable": "pairs",
        },
        (
            Claim("it raises AP with pairs", lambda m: [m["pairs"]["AP"] - m["plain_pairs"]["AP"]]),
            Claim("it does not without", lambda m: [m["plain_detection"]["AP"] - m["detection"]["AP"]]),
        ),
    ),
    Finding(
        "7. Resolution of pairs (Table 12)",
        {"64 px": "pairs_64", "96 px": "pairs", "128 px": "pairs_128"},
        (
            Claim(
                "larger is better",
                lambda m: [m["pairs"]["AP"] - m["pairs_64"]["AP"], m["pairs_128"]["AP"] - m["pairs"]["AP"]],
            ),
        ),
    ),
)


def start_of(row: str) -> str:
    """Returns the name of what a row starts from: the one with its model."""

    def model(changes: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in changes.items() if key.startswith("model.")}

    return next(name for name, changes in STARTS.items() if model(changes) == model(ROWS[row]))


def queue() -> list[tuple[str, int]]:
    """Returns every (row, seed) of the table once: the first finding, then the others, one seed after the other.

    What a row starts from stands before it.
    """
    every = [
        (row, seed)
        for part in (FINDINGS[:1], FINDINGS[1:])
        for seed in SEEDS
        for finding in part
        if seed in SEEDS[: finding.num_seeds]
        for row in finding.rows.values()
    ]
    return list(dict.fromkeys(run for row, seed in every for run in ((start_of(row), seed), (row, seed))))


def common_seeds(finding: Finding, results: Results) -> list[int]:
    """Returns the seeds that every row of a finding has; rows without any result do not count."""
    seeds = SEEDS[: finding.num_seeds]
    found = [{seed for seed in seeds if (row, seed) in results} for row in finding.rows.values()]
    return [seed for seed in seeds if all(seed in row_seeds for row_seeds in found if row_seeds)]


def verdict(claim: Claim, finding: Finding, results: Results) -> str:
    """Returns whether the means over the seeds bear a claim out, and the margin of each seed that has all rows."""
    margins: dict[int, float] = {}
    by_seed: dict[int, dict[str, dict[str, float]]] = {}
    for seed in SEEDS:
        scores = {row: results[row, seed]["scores"] for row in finding.rows.values() if (row, seed) in results}
        try:
            margins[seed], by_seed[seed] = min(claim.margins(scores)), scores
        except KeyError:
            continue  # a row is missing
    if not margins:
        return "not run yet"
    rows = set.intersection(*(set(scores) for scores in by_seed.values()))
    names = set.intersection(*(set(score) for scores in by_seed.values() for score in scores.values()))
    mean = {
        row: {name: float(np.mean([scores[row][name] for scores in by_seed.values()])) for name in names}
        for row in rows
    }
    margin = min(claim.margins(mean))
    found = "reproduced" if margin >= 0 else "**not reproduced**"
    each = ", ".join(f"{margin:+.1f}" for margin in margins.values())
    early = f"; {len(margins)} of {finding.num_seeds} seeds" if len(margins) < finding.num_seeds else ""
    split = ", which disagree" if min(margins.values()) < 0 <= max(margins.values()) else ""
    return f"{found}; smallest margin {margin:+.1f}, by seed {each}{split}{early}"
