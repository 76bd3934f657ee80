"""Weights between a model and its fine-tune, which keep what the fine-tune forgot and most of what it learnt.

    python -m detclipv2_jax.interpolate --checkpoint=RUN --output=DIR

RUN is the workdir of a fine-tune with an evaluation and a second one (config.forgetting), started from another run
(config.init_from.checkpoint). For α = 0, 0.1, … 1 the weights (1 - α) before + α after are scored on both sets. An α is
judged by the smaller of two shares: of the old score that is kept, and of the gain on the new data. The best one's
weights become DIR, a folder that every --checkpoint takes, with interpolation.json and the picture trade_off.png. These
scores chose the α: report those of other data.
"""

from __future__ import annotations

import pathlib
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from detclipv2_jax import commands
from detclipv2_jax.files import check_empty, write_json

if TYPE_CHECKING:
    from ml_collections import ConfigDict

    from detclipv2_jax.eval.loop import Checkpoint


class Point(NamedTuple):
    """Scores of the weights at one α."""

    alpha: float  # 0: before the fine-tune, 1: after
    new: float  # on the data of the fine-tune
    old: float  # on the second set


def run(
    *,
    checkpoint: str,
    output: str,
    before: str = "",
    steps: int = 10,
    new_annotations: str = "",
    new_images: str = "",
    old_annotations: str = "",
    old_images: str = "",
) -> str:
    """Scores the weights between two models and saves the best; returns the table.

    Args:
      checkpoint: workdir of the fine-tune
      output: folder to write, new or empty
      before: what it started from, a workdir or an export; default: its config.init_from.checkpoint
      steps: from before to after
      new_annotations: COCO json of the new data; default: the fine-tune's config.eval.annotations
      new_images: folder of its photos; default: config.eval.images
      old_annotations: COCO json of what must not be forgotten; default: config.forgetting.annotations
      old_images: folder of its photos; default: config.forgetting.images

    Raises:
      ValueError: models of other shapes, no data to score on, or a fine-tune that gained nothing.
    """
    from detclipv2_jax.eval import loop
    from detclipv2_jax.runs import exported, state
    from detclipv2_jax.visualize import charts

    folder = pathlib.Path(output)
    check_empty(folder)
    if not 2 <= steps <= 100:
        raise ValueError(f"--steps={steps} must be 2 to 100")
    tuned = loop.Checkpoint.load(checkpoint)
    config = tuned.config.copy_and_resolve_references()
    start = before or config.init_from.checkpoint
    if not start:
        raise ValueError(f"{checkpoint} was not started from another run; say which weights to mix in: --before=RUN")
    new, old = config.eval, config.forgetting
    new.annotations, new.images = new_annotations or new.annotations, new_images or new.images
    old.annotations, old.images = old_annotations or old.annotations, old_images or old.images
    first = loop.Checkpoint.load(start)
    state.report_differences(first.params, tuned.params, what=f"--before={start}")
    score = _scorer(config, tuned)
    points = walk(lambda alpha: Point(alpha, *score(mix(first.params, tuned.params, alpha))), steps)
    chosen = best(points)
    exported.save(folder, config=tuned.config, params=mix(first.params, tuned.params, chosen.alpha), step=tuned.step)
    write_json(
        folder / "interpolation.json",
        {
            "before": start,
            "after": checkpoint,
            "new_annotations": new.annotations,
            "old_annotations": old.annotations,
            "score": new.monitor,
            "best": chosen.alpha,
            "points": [point._asdict() for point in points],
        },
        indent=1,
    )
    charts.trade_off(points, chosen=points.index(chosen), score=new.monitor, path=folder / "trade_off.png")
    return table(points, chosen)


def mix(before: Any, after: Any, alpha: float) -> Any:
    """Returns the tree of (1 - alpha) before + alpha after."""
    import jax

    return jax.tree.map(lambda first, last: (1 - alpha) * first + alpha * last, before, after)


def walk(score: Callable[[float], Point], steps: int) -> list[Point]:
    """Returns the points of α = 0, 1 / steps, … 1; ValueError after both ends if there is nothing between them."""
    ends = [score(0.0), score(1.0)]
    shares(ends)
    return [ends[0], *(score(round(i / steps, 4)) for i in range(1, steps)), ends[1]]


def shares(points: Sequence[Point]) -> list[tuple[float, float]]:
    """Returns, for every point, the share of the old score that is kept and the share of the gain on the new data.

    Raises:
      ValueError: there is nothing to keep, or no gain.
    """
    first, last = points[0], points[-1]
    if first.old <= 0:
        raise ValueError(
            f"the weights before the fine-tune score {100 * first.old:.1f} on the old data: nothing to keep"
        )
    if last.new <= first.new:
        raise ValueError(
            f"the fine-tune gained nothing on the new data: {100 * first.new:.1f} before, {100 * last.new:.1f} after"
        )
    return [(point.old / first.old, (point.new - first.new) / (last.new - first.new)) for point in points]


def best(points: Sequence[Point]) -> Point:
    """Returns the point whose smaller share is largest, of equals the one nearer to the start."""
    return max(zip(points, shares(points), strict=True), key=lambda pair: min(pair[1]))[0]


def table(points: Sequence[Point], chosen: Point) -> str:
    """Returns the points as a Markdown table, in %."""
    lines = ["| α | new data | old data | share of the gain | share kept |", "|---|---|---|---|---|"]
    for point, (kept, gained) in zip(points, shares(points), strict=True):
        mark = " (best)" if point == chosen else ""
        cells = (100 * value for value in (point.new, point.old, gained, kept))
        lines.append(f"| {point.alpha:g}{mark} | {' | '.join(f'{cell:.1f}' for cell in cells)} |")
    return "\n".join(lines)


def _scorer(config: ConfigDict, tuned: Checkpoint) -> Callable[[Any], tuple[float, float]]:
    """Returns the function from parameters to their scores on the new data and the old."""
    from detclipv2_jax.eval import loop

    config.eval.num_pictures = 0
    second = loop.second(config)
    if second is None:
        raise ValueError("no data that must not be forgotten: give --old_annotations=FILE and --old_images=DIR")
    both = [(config, loop.make_streams(config)), (second, loop.make_streams(second, prefix="config.forgetting"))]

    def score(params: Any) -> tuple[float, float]:
        found = []
        for scored, streams in both:
            with tempfile.TemporaryDirectory() as folder:  # detections of every α would fill a disk
                evaluator = loop.Evaluator(scored, tuned.detector, streams=streams, workdir=folder)
                scores = evaluator(params, step=tuned.step)
            found.append(scores.get(config.eval.monitor, scores["AP"]))
        return found[0], found[1]

    return score


if __name__ == "__main__":
    sys.exit(commands.run(run, about=__doc__))
