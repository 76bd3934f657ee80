"""The paper's findings as rows of runs and inequalities between their scores; `claims` runs and judges them."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import scipy.special

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
PREPARED_PAIRS: dict[str, Any] = {"image_text.data": ("{prepared}",)}
NUM_CLASS_NAMES = 1600
HEADS = ("classification", "iou")  # that choose regions in place of words, trained with the boxes
# the paper's choices, one changed
OTHER_CHOICES: dict[str, dict[str, Any]] = {
    "bilateral": {"loss.side": "bilateral"},
    "image_to_text": {"loss.side": "image_to_text"},
    "centerness": {"loss.selection": "centerness"},
    **{head: {"loss.selection": head, "model.head.objectness": head} for head in HEADS},
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
    "tokens": {"loss.interaction": "tokens"},
    "all_named": {"scenes.named_share": 1.0},
    "all_named_image_to_text": {"scenes.named_share": 1.0, "loss.side": "image_to_text"},
    # as many steps in all as "pairs" has, which takes one step of pairs a step of boxes
    **{
        f"pair_steps_{n}": {"detection.weight": 2 / (1 + n), "image_text.weight": 2 * n / (1 + n)} for n in (2, 4, 8)
    },
    # the captions of "pairs", whose phrases have the boxes that the start finds
    "pseudo_boxes": {
        "grounding.weight": 1.0, "grounding.annotations": "{prepared}/grounding.json", "grounding.images": "{world}",
        "scenes.num_grounding": 0, "scenes.num_image_text": 0,
    },
    # captions of other images; without those that the row of the same captions finds wrong
    **{f"wrong_{percent}": {"scenes.wrong_share": percent / 100} for percent in (30, 60)},
    **{
        f"filtered_{percent}": PREPARED_PAIRS | {"scenes.wrong_share": percent / 100, "scenes.num_image_text": 0}
        for percent in (0, 30, 60)
    },
    # NUM_CLASS_NAMES photos of one object each, called by its name: as many as "pairs" has captions
    "class_names": PREPARED_PAIRS | {"image_text.class_weight": 1.0, "scenes.num_image_text": 0},
    "pairs_class_names": PREPARED_PAIRS | {"image_text.class_weight": 1.0},
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
    **{f"start_{head}": _START | {"model.head.objectness": head} for head in HEADS},
}


class Preparation(NamedTuple):
    """What is made of a row's world before another row runs."""

    arguments: tuple[str, ...]  # of `python -m detclipv2_jax.prepare`
    world: str = "pairs"  # the row that has it
    run: str = ""  # row of the detector that takes part


_PAIRS = ("--input={world}/pairs.tsv", "--images={world}", "--output={prepared}", "--pipeline=")
_FILTER = ("image_text", *_PAIRS, "--filter={run}", "--workers=1")
_CLASSES = ("classes", "--input={world}_classes", "--output={prepared}", "--workers=1")
PREPARED = {
    "pseudo_boxes": Preparation(("pseudo_boxes", "--checkpoint={run}", *_PAIRS), run="start"),
    "filtered_0": Preparation(_FILTER, run="pairs"),
    "filtered_30": Preparation(_FILTER, "wrong_30", run="wrong_30"),
    "filtered_60": Preparation(_FILTER, "wrong_60", run="wrong_60"),
    "class_names": Preparation(_CLASSES),
    "pairs_class_names": Preparation(_CLASSES),
}
MIN_SEEDS = 5
SEEDS = tuple(range(10))  # more than five where a claim is undecided and its rows are cheap
Results = dict[tuple[str, int], dict[str, Any]]  # by (row, seed)


class Claim(NamedTuple):
    """One sentence of the paper as inequalities between the scores of one seed."""

    text: str
    margins: Callable[[Mapping[str, dict[str, float]]], list[float]]  # in points of AP; it holds if none is negative


class Verdict(NamedTuple):
    """What paired seeds say about a claim."""

    word: str  # reproduced | contradicted | undecided
    mean: float  # of the margin that is nearest to failing
    half: float  # of its 95% interval; infinite for one seed
    num_seeds: int


@dataclasses.dataclass(frozen=True)
class Finding:
    """Rows that are compared, by the name they have in the table, and what shall hold between them."""

    title: str
    rows: dict[str, str]  # name → row
    claims: tuple[Claim, ...]
    max_seeds: int = len(SEEDS)


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
            **{head: head for head in HEADS},
        },
        (_best("pairs", "centerness", "sample_text", *HEADS),),
        max_seeds=MIN_SEEDS,  # a start of its own a seed
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
        max_seeds=MIN_SEEDS,  # a start of its own a seed
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
    Finding(
        "8. Captions rarely name everything, which hurts image to text (section 3.2)",
        {
            "half is named, text to image": "pairs",
            "half is named, image to text": "image_to_text",
            "all is named, text to image": "all_named",
            "all is named, image to text": "all_named_image_to_text",
        },
        (
            Claim(
                "text to image gains more where half is named",
                lambda m: [
                    m["pairs"]["AP"]
                    - m["image_to_text"]["AP"]
                    - m["all_named"]["AP"]
                    + m["all_named_image_to_text"]["AP"]
                ],
            ),
        ),
    ),
    Finding(
        "9. Phrases in place of tokens (FILIP)",
        {"phrases": "pairs", "tokens": "tokens"},
        (_best("pairs", "tokens"),),
    ),
    Finding(
        "10. Word-region alignment in place of pseudo labels (Table 6)",
        {"alignment": "pairs", "pseudo boxes of the same captions": "pseudo_boxes"},
        (_best("pairs", "pseudo_boxes"),),
    ),
    Finding(
        "11. Steps of pairs a step of boxes, of 400 in all",
        {"1": "pairs", "2": "pair_steps_2", "4": "pair_steps_4", "8": "pair_steps_8"},
        (),
    ),
    Finding(
        "12. Class names as captions, k = 1 (Table 13)",
        {"boxes": "detection", "names": "class_names", "captions": "pairs", "names and captions": "pairs_class_names"},
        (
            Claim("class names raise AP", lambda m: [m["class_names"]["AP"] - m["detection"]["AP"]]),
            Claim("captions raise it more", lambda m: [m["pairs"]["AP"] - m["class_names"]["AP"]]),
            Claim(
                "class names beside captions do not lower it by more than 1",
                lambda m: [m["pairs_class_names"]["AP"] - m["pairs"]["AP"] + 1.0],
            ),
        ),
    ),
    Finding(
        "13. A filter of captions, itself trained on them (BLIP)",
        {
            "none wrong": "pairs",
            "none wrong, filtered": "filtered_0",
            "30% wrong": "wrong_30",
            "30% wrong, filtered": "filtered_30",
            "60% wrong": "wrong_60",
            "60% wrong, filtered": "filtered_60",
        },
        (
            Claim(
                "it raises AP where captions are wrong",
                lambda m: [m[f"filtered_{share}"]["AP"] - m[f"wrong_{share}"]["AP"] for share in (30, 60)],
            ),
            Claim(
                "it does not lower it by more than 1 where none is",
                lambda m: [m["filtered_0"]["AP"] - m["pairs"]["AP"] + 1.0],
            ),
        ),
    ),
)


def start_of(row: str) -> str:
    """Returns the name of what a row starts from: the one with its model."""

    def model(changes: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in changes.items() if key.startswith("model.")}

    return next(name for name, changes in STARTS.items() if model(changes) == model(ROWS[row]))


def needs(row: str) -> tuple[str, ...]:
    """Returns the rows whose weights a row needs: what it starts from, and the detector that prepares its data."""
    if row in STARTS:
        return ()
    run = PREPARED[row].run if row in PREPARED else ""
    return tuple(dict.fromkeys(filter(None, (start_of(row), run))))


def queue(results: Results) -> list[tuple[str, int]]:
    """Returns every (row, seed) of the table once: the first finding, then the others, one seed after the other.

    What a row starts from stands before it. A finding that its first five seeds leave undecided has more.
    """
    every = [
        (row, seed)
        for part in (FINDINGS[:1], FINDINGS[1:])
        for seed in SEEDS
        for finding in part
        if seed < num_seeds(finding, results)
        for row in finding.rows.values()
    ]
    return list(dict.fromkeys(run for row, seed in every for run in ((start_of(row), seed), (row, seed))))


def num_seeds(finding: Finding, results: Results) -> int:
    """Returns how many seeds a finding is to have: five, and one more as long as they leave a claim undecided."""
    num = MIN_SEEDS
    while num < finding.max_seeds:
        if not all((row, seed) in results for row in finding.rows.values() for seed in SEEDS[:num]):
            return num
        first = {(row, seed): result for (row, seed), result in results.items() if seed < num}
        verdicts = [judge(claim, finding, first) for claim in finding.claims]
        if not any(verdict and verdict.word == "undecided" for verdict in verdicts):
            return num
        num += 1
    return num


def common_seeds(finding: Finding, results: Results) -> list[int]:
    """Returns the seeds that every row of a finding has; rows without any result do not count."""
    found = [{seed for seed in SEEDS if (row, seed) in results} for row in finding.rows.values()]
    return [seed for seed in SEEDS if all(seed in row_seeds for row_seeds in found if row_seeds)]


def judge(claim: Claim, finding: Finding, results: Results) -> Verdict | None:
    """Returns what the seeds that have all rows of a claim say about it; None if there is none.

    Rows of a seed have the same start and the same order, so that margins are differences of pairs. A margin's 95%
    interval is Student's: above zero for all margins, the claim is reproduced; below zero for one, contradicted.
    """
    margins = []
    for seed in SEEDS:
        scores = {row: results[row, seed]["scores"] for row in finding.rows.values() if (row, seed) in results}
        with contextlib.suppress(KeyError):  # a row is missing
            margins.append(claim.margins(scores))
    if not margins:
        return None
    values, num = np.array(margins), len(margins)
    means = values.mean(axis=0)
    halves = np.full_like(means, np.inf)
    if num > 1:
        halves = values.std(axis=0, ddof=1) / np.sqrt(num) * scipy.special.stdtrit(num - 1, 0.975)
    word = "reproduced" if np.all(means >= halves) else "contradicted" if np.any(means < -halves) else "undecided"
    nearest = int(np.argmin(means + halves if word == "contradicted" else means - halves))
    return Verdict(word, float(means[nearest]), float(halves[nearest]), num)
