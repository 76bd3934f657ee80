"""Charts: the curves of a run, lines, bars, histograms.

Every function returns the picture as uint8[h, w, 3] and writes it to `path` if one is given. Colours are Okabe and
Ito's, which colour-blind readers can tell apart.
"""

from __future__ import annotations

import functools
import json
import math
import pathlib
import re
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator

from detclipv2_jax import files
from detclipv2_jax.colors import PALETTE, hex_color, nth_color
from detclipv2_jax.visualize import drawing, letters

Line = tuple[np.ndarray, np.ndarray]  # steps, values
Series = dict[str, Line]  # by name
_GROUPS = ("detection", "grounding", "image_text", "eval", "timing", "forgetting/before", "forgetting/after")


def curves(
    metrics: str | pathlib.Path, *, names: Sequence[str] = (), path: str | pathlib.Path | None = None
) -> drawing.Picture:
    """Returns the curves of a run's `metrics.jsonl`: one panel a quantity, one line a kind of data.

    Thin: every value. Thick: a moving mean. Losses come first, then scores in %, the share of right names, speed, and
    the rest; what never changes is left out. Scores of a single evaluation are bars. `names` chooses quantities
    ("loss_alignment"), of which none is left out.

    Raises:
      ValueError: the file is missing, holds something else, or has none of the names.
    """
    panels = _panels(read_metrics(metrics))
    groups = sorted({group for lines in panels.values() for group in lines} - {"", *_GROUPS})
    colors = {group: hex_color(nth_color(i)) for i, group in enumerate([*_GROUPS, *groups])} | {"": "#191919"}
    single: dict[str, Series] = {}
    bars = dict[str, tuple[float, str]]()  # value and colour
    if names:
        missing = sorted(set(names) - panels.keys())
        if missing:
            raise ValueError(f"{metrics} has no {', '.join(missing)}; it has {', '.join(sorted(panels))}")
        panels = {name: panels[name] for name in names}
    moving = {name: lines for name, lines in panels.items() if any(len(np.unique(y)) > 1 for _, y in lines.values())}
    if names or moving:
        single = {name: lines for name, lines in panels.items() if name not in moving and re.match("A[PR]|top1", name)}
        bars = {
            f"{name} {group.removeprefix('eval')}".strip(): (values[-1], colors[group])
            for name, lines in single.items()
            for group, (_, values) in lines.items()
        }
        panels = {name: lines for name, lines in panels.items() if name not in single} if names else moving
    columns = min(4, len(panels) + bool(bars))
    rows = math.ceil((len(panels) + bool(bars)) / columns)
    figure = Figure(figsize=(4.2 * columns, 2.8 * rows + 0.5), dpi=100, layout="constrained")
    places = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in places[len(panels) + bool(bars) :]:
        axes.set_axis_off()
    if bars:
        position = sum(name.startswith("loss") for name in panels)
        axes = places.pop(position)
        heights, shades = zip(*bars.values(), strict=True)
        axes.barh(list(bars)[::-1], heights[::-1], color=shades[::-1])
        axes.set_title("scores (%)", fontsize=11)
        axes.tick_params(labelsize=min(9, 90 / len(bars)))
    for axes, (quantity, lines) in zip(places, panels.items(), strict=False):
        _draw_lines(axes, lines, colors)
        axes.set_title(f"{quantity} (%)" if _is_score(quantity) else quantity, fontsize=11)
    shown = {group for lines in [*panels.values(), *single.values()] for group in lines}
    line = functools.partial(matplotlib.lines.Line2D, [], [], linewidth=3)
    handles = [line(color=color, label=group) for group, color in colors.items() if group in shown - {""}]
    figure.legend(handles=handles, loc="outside upper center", ncols=max(len(handles), 1), frameon=False, fontsize=11)
    return render(figure, path)


def _panels(series: Series) -> dict[str, Series]:
    """Returns quantity → group → (steps, values), what matters most first, scores in %."""
    panels: dict[str, Series] = {}
    for name in sorted(series, key=lambda name: _place(name.rpartition("/")[2])):
        steps, values = series[name]
        group, _, quantity = name.rpartition("/")
        scored = group == "eval" or group.startswith("forgetting")
        if scored and (values == -1).all():
            continue  # pycocotools' mark: nothing of that kind to score
        panels.setdefault(quantity, {})[group] = (steps, values * 100 if _is_score(quantity) else values)
    return panels


def _is_score(quantity: str) -> bool:
    return re.match(r"(fixed_)?A[PR]|top1|found", quantity) is not None


def _place(quantity: str) -> tuple[int, str]:
    """Returns what quantities are sorted by."""
    order = (r"loss", r"A[PR]|fixed_", r"top1|found", r"images_per|step_seconds", r"learning_rate")
    return next((i for i, pattern in enumerate(order) if re.match(pattern, quantity)), len(order)), quantity


def _draw_lines(axes: Axes, lines: Series, colors: Mapping[str, str]) -> None:
    for group, (steps, values) in lines.items():
        window = np.ones(min(1 + len(values) // 20, 51))
        mean = np.convolve(values, window, mode="same") / np.convolve(np.ones_like(values), window, mode="same")
        axes.plot(steps, values, color=colors[group], linewidth=0.6, alpha=0.45)
        axes.plot(steps, mean, color=colors[group], linewidth=1.8, marker="o" if len(steps) < 3 else "")
    top = max(np.quantile(values, 0.98) for _, values in lines.values())
    if top > 0 and top < 0.3 * axes.get_ylim()[1]:  # a first step that compiles hides no others
        axes.set_ylim(min(0.0, *(values.min() for _, values in lines.values())), 1.5 * top)
    axes.set_xlabel("step", fontsize=9)
    axes.tick_params(labelsize=9)
    axes.grid(color="0.9")
    axes.spines[["top", "right"]].set_visible(False)


def lines(
    series: Mapping[str, Sequence[tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]]],
    *,
    x: str,
    y: str,
    mark: tuple[float, str] | None = None,
    path: str | pathlib.Path | None = None,
) -> drawing.Picture:
    """Returns one panel with a colour and a marker a name: thin every line (x, y) of it, thick their mean.

    Lines of a name are of one length. `x` and `y` are what the axes are called; `mark` is an x and what happens there.
    """
    figure = Figure(figsize=(8.4, 5.2), dpi=100, layout="constrained")
    axes = figure.subplots()
    if mark:
        axes.axvline(mark[0], color="0.5", linestyle="--", linewidth=1.0)
        axes.annotate(
            mark[1], (mark[0], 0.0), xycoords=("data", "axes fraction"), xytext=(-6, 8), textcoords="offset points",
            ha="right", va="bottom", fontsize=9, color="0.3",
        )  # fmt: skip
    for i, (name, named_lines) in enumerate(series.items()):
        color = hex_color(nth_color(i))
        for places, values in named_lines:
            axes.plot(places, values, color=color, linewidth=0.6, alpha=0.5)
        mean = np.mean(np.array(named_lines), axis=0)
        axes.plot(*mean, color=color, linewidth=2.0, marker="os^Dv"[i % 5], label=f"{name} ({len(named_lines)} runs)")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_ylim(bottom=0.0)
    axes.grid(color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(title="thick: mean of the runs; thin: each run", frameon=False, fontsize=9)
    return render(figure, path)


def trade_off(
    points: Sequence[tuple[float, float, float]], *, chosen: int, score: str, path: str | pathlib.Path | None = None
) -> drawing.Picture:
    """Returns the curve of models between two: the score on old data over that on new data, `chosen` marked.

    Points are (share of the way, score on new data, score on old data), from the first model to the last.
    """
    shares, new, old = np.array(points).T
    figure = Figure(figsize=(6.0, 4.6), dpi=100, layout="constrained")
    axes = figure.subplots()
    line, mark = (hex_color(color) for color in PALETTE[:2])
    axes.plot(100 * new, 100 * old, color=line, linewidth=2.0, marker="o")
    axes.plot(100 * new[chosen], 100 * old[chosen], color=mark, marker="*", markersize=18)
    for share, x, y in zip(shares, 100 * new, 100 * old, strict=True):
        axes.annotate(f"{share:g}", (x, y), xytext=(6, 6), textcoords="offset points", fontsize=9)
    axes.set_xlabel(f"{score} on the new data (%)")
    axes.set_ylabel(f"{score} on the old data (%)")
    axes.grid(color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    return render(figure, path)


def bars(
    names: Sequence[str],
    values: Float[np.ndarray, " n"],
    *,
    x: str,
    marked: int = -1,
    path: str | pathlib.Path | None = None,
) -> drawing.Picture:
    """Returns a bar a name, the longest at the top; `x` is what the axis is called, `marked` has another colour."""
    order = np.argsort(values, kind="stable")
    figure = Figure(figsize=(9.0, 0.45 * len(names) + 0.8), dpi=100, layout="constrained")
    axes = figure.subplots()
    colors = [hex_color(PALETTE[1 if i == marked else 0]) for i in order]
    axes.barh([letters.plain(names[i]) for i in order], np.asarray(values)[order], color=colors)
    axes.set_xlabel(x)
    axes.spines[["top", "right"]].set_visible(False)
    return render(figure, path)


def histograms(
    rows: Mapping[str, Mapping[str, tuple[np.ndarray, np.ndarray]]], *, path: str | pathlib.Path | None = None
) -> drawing.Picture:
    """Returns a row a stream and a column a quantity; what is always the same in all streams is a line below.

    `rows` is title of the row → name of the quantity → (edges [n + 1] that are whole, counts [n]).
    """
    names = list(dict.fromkeys(name for panels in rows.values() for name in panels))
    constant = {
        name: {title: panels[name][0][0] for title, panels in rows.items() if name in panels}
        for name in names
        if all(len(panels[name][1]) == 1 and np.ptp(panels[name][0]) == 1 for panels in rows.values() if name in panels)
    }
    columns = [name for name in names if name not in constant] or names[:1]
    figure = Figure(figsize=(3.4 * len(columns), 2.6 * len(rows) + 0.2), dpi=100, layout="constrained")
    grid = figure.subplots(len(rows), len(columns), squeeze=False)
    for line, (title, panels) in zip(grid, rows.items(), strict=True):
        for axes, name in zip(line, columns, strict=True):
            if name not in panels:
                axes.set_axis_off()
                continue
            edges, counts = panels[name]
            axes.set_title(f"{title}\n{name}", fontsize=11)
            # a bar is centred over its whole numbers
            axes.stairs(counts, edges - 0.5, fill=True, facecolor=hex_color(PALETTE[0]), edgecolor="white")
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
            axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
            axes.set_ylabel("how many", fontsize=9)
            axes.tick_params(labelsize=9)
            axes.grid(axis="y", color="0.9")
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
    said = [
        f"{name}: always " + ", ".join(f"{value:g} ({title})" for title, value in values.items())
        if len(set(values.values())) > 1
        else f"{name}: always {next(iter(values.values())):g}"
        for name, values in constant.items()
    ]
    figure.supxlabel("\n".join(said), fontsize=10)
    return render(figure, path)


def read_metrics(path: str | pathlib.Path) -> Series:
    """Returns name → (steps, values) of a `metrics.jsonl`; of a step that was written twice the later value counts."""
    try:
        text = files.decode(files.read_bytes(path), where=path)
        rows = [json.loads(line) for line in text.splitlines() if line.strip()]
        values: dict[str, dict[int, float]] = {}
        for row in rows:
            for name, value in row.items():
                if name != "step" and value is not None:
                    values.setdefault(name, {})[int(row["step"])] = float(value)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is no metrics.jsonl (one JSON object with a step a line): {error}") from error
    if not values:
        raise ValueError(f"{path} holds no metrics yet")
    return {
        name: (np.array(sorted(points)), np.array([points[step] for step in sorted(points)]))
        for name, points in values.items()
    }


def render(figure: Figure, path: str | pathlib.Path | None) -> drawing.Picture:
    """Returns the figure as a picture, written to `path` if one is given."""
    for text in figure.findobj(Text):
        text.set_text(letters.plain(text.get_text()))
        text.set_parse_math(False)  # a $ is a $
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return drawing.save(np.ascontiguousarray(np.asarray(canvas.buffer_rgba())[..., :3]), path)
