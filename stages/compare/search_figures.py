"""Figures of a search: scatter, parallel coordinates, importance, best score by budget, fronts.

SVG, in the colours of the other figures. Objectives are shown as they were measured; axes of
objectives that are better when lower are turned only where a sentence says so.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from stages.compare.figures import COLOURS, NAMES, STYLE, WIDTH_INCHES, save
from stages.compare.search_results import best_so_far, importance, oriented, pareto_front
from stages.compare.search_spec import Knob, SearchContent, SearchedModel

_LOOK = STYLE | {"axes.grid.axis": "both", "axes.spines.left": True}
_MARKERS = {"moe": "o", "dense": "D"}
_COLUMNS = 3


def draw(content: SearchContent, folder: Path) -> dict[str, Path]:
    """Every figure that the trials allow, by name, in the order of the report."""
    figures = {}
    for name, function in (
        ("budget", _budget), ("fronts", _fronts), ("scatter", _scatter),
        ("parallel", _parallel), ("importance", _importance),
    ):
        with matplotlib.rc_context(_LOOK):
            figure = function(content)
            if figure is not None:
                figures[name] = folder / f"search_{name}.svg"
                save(figure, figures[name])
    return figures


def _budget(content: SearchContent) -> Figure:
    """Best so far against trials and training tokens, mean and 95 % of random orders."""
    figure = Figure(figsize=(WIDTH_INCHES, 3.1 * len(content.goals)), layout="constrained")
    panels = figure.subplots(len(content.goals), 2, squeeze=False, sharey="row")
    for goal, row in zip(content.goals, panels, strict=True):
        sign = 1 if goal.maximize else -1
        for each in content.models:
            colour, scores = COLOURS[each.side], sign * each.table[goal.column]
            for axes, costs in zip(row, (None, each.table["tokens"]), strict=True):
                curve = best_so_far(scores, costs)
                axes.fill_between(curve["budget"], sign * curve["ci_low"], sign * curve["ci_high"],
                                  color=colour, alpha=0.15, lw=0)
                axes.plot(curve["budget"], sign * curve["mean"], color=colour, lw=1.8,
                          marker=_MARKERS[each.side], markersize=3.5, label=each.model)
        for axes, unit in zip(row, ("trials", "training tokens"), strict=True):
            axes.set_title(f"best {goal.title} by {unit}", loc="left", fontsize=10, weight="bold")
            axes.set_xlabel(unit)
            axes.set_xlim(left=0)
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
            axes.xaxis.set_major_formatter("{x:,.0f}")
        row[0].legend(frameon=False)
    return figure


def _fronts(content: SearchContent) -> Figure | None:
    """The first objective against each other one, with the front of each model."""
    if len(content.goals) < 2:
        return None
    first, *others = content.goals
    figure = Figure(figsize=(WIDTH_INCHES, 3.6), layout="constrained")
    panels = figure.subplots(1, len(others), squeeze=False)[0]
    for goal, axes in zip(others, panels, strict=True):
        for each in content.models:
            rows, colour = each.finished, COLOURS[each.side]
            if rows.empty:
                continue
            points = rows[[first.column, goal.column]].to_numpy()
            front = points[pareto_front(oriented(points, [first.maximize, goal.maximize]))]
            front = front[np.argsort(front[:, 0], kind="stable")]
            axes.plot(*points.T, _MARKERS[each.side], color=colour, alpha=0.35, markersize=4)
            axes.plot(*front.T, _MARKERS[each.side], ls="-", color=colour, markersize=5,
                      label=each.model)
        axes.set_xlabel(first.title)
        axes.set_ylabel(goal.title)
        if axes.lines:
            axes.legend(frameon=False, title="front", alignment="left")
    return figure


def _scatter(content: SearchContent) -> Figure:
    """The first objective against each knob, a panel per knob."""
    goal = content.goals[0]
    knobs = [k for k in content.knobs if any(k.column in each.table for each in content.models)]
    lines = -(-len(knobs) // _COLUMNS)
    figure = Figure(figsize=(WIDTH_INCHES, 2.7 * lines), layout="constrained")
    panels = figure.subplots(lines, _COLUMNS, squeeze=False, sharey=True).ravel()
    for knob, axes in zip(knobs, panels, strict=False):
        ticks = _ticks(knob, content.models)
        for each in content.models:
            if knob.column not in each.table:
                continue
            rows = each.finished.dropna(subset=[knob.column])
            places = _places(rows[knob.column], ticks)
            if ticks:  # side by side, not on one line
                places = places + (-0.08 if each.side == "moe" else 0.08)
            axes.plot(places, rows[goal.column], _MARKERS[each.side], color=COLOURS[each.side],
                      markersize=4, alpha=0.6, label=each.model)
            best = rows[rows["number"].isin(each.chosen)]
            axes.plot(places[best.index], best[goal.column], "o", mfc="none",
                      color=COLOURS[each.side], markersize=10)
        axes.set_xlabel(knob.field)
        if ticks:
            axes.set_xticks(range(len(ticks)), [_short(t) for t in ticks])
            axes.set_xlim(-0.5, len(ticks) - 0.5)
        elif knob.log:
            axes.set_xscale("log")
    for axes in panels[len(knobs):]:
        axes.set_visible(False)
    figure.supylabel(goal.title, fontsize=9)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper left", ncols=2,
                  frameon=False, fontsize=8)
    return figure


def _parallel(content: SearchContent) -> Figure:
    """A line per finished trial over all knobs to the objectives; the better, the darker."""
    figure = Figure(figsize=(WIDTH_INCHES, 2.9 * len(content.models)), layout="constrained")
    panels = figure.subplots(len(content.models), 1, squeeze=False)[:, 0]
    for each, axes in zip(content.models, panels, strict=True):
        knobs = [knob for knob in content.knobs if knob.column in each.table]
        names = [knob.field for knob in knobs] + [goal.title for goal in content.goals]
        rows = each.finished
        columns = [_scaled(rows[knob.column], knob, content.models) for knob in knobs]
        ends = [_ends(knob, content.models) for knob in knobs]
        for goal in content.goals:
            low, high = rows[goal.column].min(), rows[goal.column].max()
            columns.append((rows[goal.column] - low) / ((high - low) or 1.0))
            ends.append((f"{low:.3g}", f"{high:.3g}"))
        axes.set_xlim(-0.1, len(names) - 0.9)
        axes.set_ylim(-0.22, 1.14)
        for index, (low, high) in enumerate(ends):
            axes.axvline(index, 0.16, 0.9, color="#9CA3AF", lw=0.8)
            for place, text, align in ((-0.05, low, "top"), (1.03, high, "bottom")):
                axes.text(index, place, text, ha="center", va=align, fontsize=8, color="#4B5563")
        if len(rows):
            goal = content.goals[0]
            ranks = (rows[goal.column] * (1 if goal.maximize else -1)).rank(pct=True)
            lines = np.column_stack(columns)
            for index in np.argsort(ranks.to_numpy(), kind="stable"):
                share = float(ranks.iloc[index])
                chosen = rows["number"].iloc[index] in each.chosen
                axes.plot(range(len(names)), lines[index], color=COLOURS[each.side],
                          alpha=0.12 + 0.7 * share**3, lw=2.6 if chosen else 1.1)
        axes.set_xticks(range(len(names)), [_broken(name) for name in names])
        axes.tick_params(axis="x", length=0)
        axes.set_yticks([])
        axes.grid(False)
        for spine in axes.spines.values():
            spine.set_visible(False)
        axes.set_title(f"{NAMES[each.side]}: {each.model}", loc="left", fontsize=10, weight="bold",
                       color=COLOURS[each.side])
    return figure


def _importance(content: SearchContent) -> Figure | None:
    """Each knob's share of the variance of the objectives over the trials, with 95 % interval."""
    found = [
        (goal, [(each, importance(each.table[_knob_columns(each, content.knobs)],
                                  each.table[goal.column])) for each in content.models])
        for goal in content.goals
    ]
    if all(table.empty for _, tables in found for _, table in tables):
        return None
    fields = [knob.field for knob in content.knobs]
    figure = Figure(figsize=(WIDTH_INCHES, (0.42 * len(fields) + 1.0) * len(found)),
                    layout="constrained")
    panels = figure.subplots(len(found), 1, squeeze=False)[:, 0]
    for (goal, tables), axes in zip(found, panels, strict=True):
        for each, table in tables:
            shift = -0.13 if each.side == "moe" else 0.13
            places = [fields.index(name.removeprefix("value:")) + shift for name in table["field"]]
            axes.hlines(places, table["ci_low"], table["ci_high"], color=COLOURS[each.side], lw=1.6)
            axes.plot(table["importance"], places, _MARKERS[each.side], color=COLOURS[each.side],
                      markersize=5, label=each.model)
        axes.axvline(0, color="#111827", lw=1)
        axes.set_yticks(range(len(fields)), fields)
        axes.set_ylim(len(fields) - 0.5, -0.5)
        axes.set_title(f"share of the variance of {goal.label}", loc="left", fontsize=10,
                       weight="bold")
        axes.grid(axis="y", visible=False)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower left", ncols=2,
                  frameon=False, fontsize=8)
    return figure


def _knob_columns(each: SearchedModel, knobs: Sequence[Knob]) -> list[str]:
    return [knob.column for knob in knobs if knob.column in each.table]


def _ticks(knob: Knob, models: Sequence[SearchedModel]) -> list | None:
    """The values of a knob that takes no numbers, or few of them; None for a numeric axis."""
    values = pd.concat([m.table[knob.column] for m in models if knob.column in m.table]).dropna()
    numbers = pd.api.types.is_numeric_dtype(values) and values.dtype != bool
    found = sorted(values.unique().tolist(), key=lambda v: v if numbers else str(v))
    return None if numbers and len(found) > 6 else found


def _places(values: pd.Series, ticks: list | None) -> pd.Series:
    return values.astype(float) if ticks is None else values.map(ticks.index).astype(float)


def _scaled(values: pd.Series, knob: Knob, models: Sequence[SearchedModel]) -> pd.Series:
    """A knob's values brought to [0, 1] over all models; switched off is NaN, a gap in the line."""
    ticks = _ticks(knob, models)
    if ticks is not None:
        return values.map(lambda v: ticks.index(v) if v in ticks else np.nan).astype(float) / max(
            len(ticks) - 1, 1)
    every = pd.concat([m.table[knob.column] for m in models if knob.column in m.table])
    scale = np.log10 if knob.log else np.asarray
    low, high = scale(every.min()), scale(every.max())
    return (pd.Series(scale(values.astype(float)), values.index) - low) / ((high - low) or 1.0)


def _ends(knob: Knob, models: Sequence[SearchedModel]) -> tuple[str, str]:
    ticks = _ticks(knob, models)
    if ticks is not None:
        return _short(ticks[0]), _short(ticks[-1])
    every = pd.concat([m.table[knob.column] for m in models if knob.column in m.table])
    return f"{every.min():.3g}", f"{every.max():.3g}"


def _broken(name: str, width: int = 14) -> str:
    """A dotted name over several lines, broken after its signs."""
    lines = [""]
    for part in re.split(r"(?<=[._/ ])", name):
        if lines[-1] and len(lines[-1]) + len(part) > width:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)


def _short(value: object) -> str:
    text = f"{value:.3g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 18 else text[:17] + "…"
