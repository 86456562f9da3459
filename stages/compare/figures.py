"""Figures of the report: one forest plot per axis, and the training curves. SVG, no display needed.

Colours are of the Okabe-Ito palette, told apart by colour-blind readers; shape tells the models
apart as well.
"""

import base64
from pathlib import Path

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from stages.compare.table import AXIS_TITLES, direction, recipe_title, scales, verdict

COLOURS = {"moe": "#0072B2", "dense": "#D55E00"}
NEUTRAL = "#6B7280"
IMPROVED, WORSENED = "#00795A", "#A3447C"
_MARKERS = {"moe": "o", "dense": "D"}
NAMES = {"moe": "MoE", "dense": "dense"}
_MOST_ROWS = 40
"""A figure with more rows than this shows the primary metrics only."""
WIDTH_INCHES = 10.4
_ROW_INCHES = 0.25
_HEAD_INCHES = 0.62
_GAP_INCHES = 0.4
"""Between panels, for the ticks of the upper one."""
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.edgecolor": "#9CA3AF",
    "axes.grid": True,
    "axes.grid.axis": "x",
    "grid.color": "#E5E7EB",
    "grid.linewidth": 0.8,
    "xtick.color": "#4B5563",
    "ytick.color": "#111827",
    "ytick.left": False,
    "svg.hashsalt": "moe-reliability",  # the same figure is the same file
}


def axis_figure(comparison: pd.DataFrame, axis: str, file: Path) -> None:
    """Levels of both models and their difference, a row per pair, metric and recipe.

    The difference is turned so that right is always better for the MoE. Shares stand together;
    other metrics have panels with a scale of their own.
    """
    rows = comparison[(comparison["axis"] == axis) & comparison["difference"].notna()]
    rows = _of_one_scale(rows)
    if len(rows) > _MOST_ROWS:
        rows = rows[rows["primary"]]
    parts = [part for _, part in rows.groupby(_panels(rows), sort=False)]
    layouts = [_layout(part) for part in parts]
    bottoms = [max(positions) + 0.7 for *_, positions in layouts]
    inches = _HEAD_INCHES + sum(bottoms) * _ROW_INCHES + _GAP_INCHES * len(parts) + 0.15
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH_INCHES, inches))
        top = _HEAD_INCHES
        for number, (part, layout, bottom) in enumerate(zip(parts, layouts, bottoms, strict=True)):
            end = top + bottom * _ROW_INCHES
            # Fixed margins, so that the panels of all axes stand in line.
            grid = figure.add_gridspec(1, 2, left=0.42, right=0.985, wspace=0.08,
                                       top=1 - top / inches, bottom=1 - end / inches)
            levels = figure.add_subplot(grid[0])
            differences = figure.add_subplot(grid[1], sharey=levels)
            _panel(levels, differences, part, layout, bottom)
            if number == 0:
                _head(levels, differences)
            top = end + _GAP_INCHES
        differences.set_xlabel("paired difference, right: MoE better")
        figure.text(
            0.005, 1 - 0.1 / inches, AXIS_TITLES[axis], weight="bold", fontsize=12, va="top"
        )
        save(figure, file)


def _panels(rows: pd.DataFrame) -> pd.Series:
    """The panel of each row: that of the shares, or its evaluation's."""
    share = scales(rows) == ""
    all_shares = share.groupby(rows["evaluation"]).transform("all")
    return rows["evaluation"].where(~all_shares, "")


def _panel(
    levels: Axes, differences: Axes, rows: pd.DataFrame, layout: tuple, bottom: float
) -> None:
    headings, labels, positions = layout
    for position, (_, row) in zip(positions, rows.iterrows(), strict=True):
        _levels(levels, row, position)
        _difference(differences, row, position)
    levels.set_yticks(positions, [""] * len(positions))
    differences.tick_params(labelleft=False)
    for position, text, weight, colour in labels:
        levels.annotate(
            text,
            (0, position),
            (-8, 0),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            ha="right",
            va="center",
            weight=weight,
            color=colour,
            fontsize=8.5,
        )
    for position, text in headings:
        levels.annotate(
            text,
            (0.005, position),
            xycoords=("figure fraction", "data"),
            va="center",
            color=NEUTRAL,
            weight="bold",
        )
    levels.set_ylim(bottom, -0.2)
    differences.axvline(0, color="#111827", linewidth=1)
    reach = max(map(abs, differences.get_xlim()))
    differences.set_xlim(-reach, reach)
    differences.locator_params(axis="x", nbins=6)


def _head(levels: Axes, differences: Axes) -> None:
    """What stands above the first panel."""
    levels.set_title("Score, with 95 % interval", fontsize=9, loc="left", color="#374151")
    for side, shift in (("moe", 0.62), ("dense", 0.81)):
        levels.annotate(
            {"moe": "● MoE", "dense": "◆ dense"}[side],
            (shift, 1),
            (0, 6),
            xycoords="axes fraction",
            textcoords="offset points",
            color=COLOURS[side],
            weight="bold",
        )
    differences.set_title("◀ dense better", fontsize=9, loc="left", color=COLOURS["dense"])
    differences.set_title("MoE better ▶", fontsize=9, loc="right", color=COLOURS["moe"])


def _of_one_scale(rows: pd.DataFrame) -> pd.DataFrame:
    """The metrics whose levels fit beside their evaluation's primary one: a perplexity of 20 would
    flatten bits per byte, and counts would flatten shares. All rows of a metric stay or go
    together."""
    level = rows[["moe", "dense"]].abs().max(axis=1)
    primary = level.where(rows["primary"]).groupby(rows["evaluation"]).transform("max")
    limit = (2 * primary).where(primary > 1, 1)
    largest = level.groupby([rows["evaluation"], rows["metric"]]).transform("max")
    return rows[(largest <= limit) | rows["primary"]]


def _layout(rows: pd.DataFrame) -> tuple[list[tuple], list[tuple], list[float]]:
    """Headings as (position, text), labels as (position, text, weight, colour), row positions."""
    headings, labels, positions, position, group = [], [], [], 0.0, None
    several = rows["pair"].nunique() > 1
    for _, row in rows.iterrows():
        key = (row["pair"], row["evaluation"], row["metric"])
        if key != group:
            position += 0.4 if group else 0
            if not group or key[:2] != group[:2]:
                title = row["evaluation"]
                title = f"{row['pair']} · {title}" if several else title
                headings.append((position + 0.2, title))
                position += 0.9
            weight = "bold" if row["primary"] else "normal"
            # Bold letters are wider.
            title = f"{_cut(row['label'], 50 if row['primary'] else 58)} {direction(row)}"
            labels.append((position + 0.2, title, weight, "#111827"))
            position += 0.9
            group = key
        labels.append((position + 0.2, recipe_title(row["recipe"]), "normal", "#4B5563"))
        positions.append(position + 0.2)
        position += 0.85
    return headings, labels, positions


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def _levels(axes: Axes, row: pd.Series, position: float) -> None:
    for side, shift in (("moe", -0.16), ("dense", 0.16)):
        colour, y = COLOURS[side], position + shift
        axes.plot([row[f"{side}_ci_low"], row[f"{side}_ci_high"]], [y, y], color=colour, lw=1.6)
        axes.plot(row[side], y, _MARKERS[side], color=colour, markersize=4.5)


def _difference(axes: Axes, row: pd.Series, position: float) -> None:
    sign = 1 if row["higher_is_better"] else -1
    shown = verdict(row) if row["primary"] else ""
    colour = {"MoE better": COLOURS["moe"], "dense better": COLOURS["dense"]}.get(shown, NEUTRAL)
    ends = [sign * row["ci_low"], sign * row["ci_high"]]
    axes.plot(ends, [position, position], color=colour, lw=2 if row["primary"] else 1.2)
    face = colour if row["primary"] else "white"
    axes.plot(sign * row["difference"], position, "s", color=colour, mfc=face, markersize=5)


def curves_figure(curves: dict[tuple[str, str, int], pd.DataFrame], models: dict[str, str],
                  file: Path) -> None:
    """Loss and gradient norm over steps, and the loss of held-out rows as rings; a row per recipe,
    a line per model and seed.

    ``curves`` maps (model, recipe, seed) to the training curve, ``models`` a model to its role.
    """
    recipes = list(dict.fromkeys(recipe for _, recipe, _ in curves))
    with matplotlib.rc_context(STYLE | {"axes.grid.axis": "y", "axes.spines.left": True}):
        figure = Figure(figsize=(WIDTH_INCHES, 2.9 * len(recipes)), layout="constrained")
        panels = figure.subplots(len(recipes), 2, squeeze=False)
        styles = _line_styles(models)
        for recipe, (loss, norm) in zip(recipes, panels, strict=True):
            drawn = {key: curve for key, curve in curves.items() if key[1] == recipe}
            for (model, _, seed), curve in drawn.items():
                look = {"color": COLOURS[models[model]], "linestyle": styles[model]}
                first = seed == min(s for m, _, s in drawn if m == model)
                for axes, column in ((loss, "loss"), (norm, "gradient_norm")):
                    # Single steps are noisy: drawn pale, their running mean in full colour.
                    window = max(len(curve) // 15, 1)
                    smooth = curve[column].rolling(window, min_periods=1, center=True).mean()
                    axes.plot(curve["step"], curve[column], color=look["color"], alpha=0.2, lw=0.8)
                    axes.plot(curve["step"], smooth, lw=1.8, label=model if first else None, **look)
                if "validation_loss" in curve:
                    loss.plot(curve["step"], curve["validation_loss"], "o", mfc="white",
                              color=look["color"], markersize=4,
                              label=f"{model}, held out" if first else None)
            loss.set_title(f"{recipe}: training loss", loc="left", fontsize=10, weight="bold")
            norm.set_title("gradient norm", loc="left", fontsize=10)
            loss.legend(frameon=False)
            loss.set_xlabel("optimiser step")
            norm.set_xlabel("optimiser step")
            loss.set_ylim(bottom=0)
            norm.set_ylim(bottom=0)
        save(figure, file)


def _line_styles(models: dict[str, str]) -> dict[str, str]:
    """Models of one architecture share a colour and differ in the line."""
    styles, used = {}, {"moe": 0, "dense": 0}
    for model, role in models.items():
        styles[model] = ("-", "--", ":", "-.")[used[role] % 4]
        used[role] += 1
    return styles


def inline(figure: Path) -> str:
    """An SVG file as an address that needs no other file."""
    return "data:image/svg+xml;base64," + base64.b64encode(figure.read_bytes()).decode("ascii")


def save(figure: Figure, file: Path) -> None:
    """Write an SVG file that depends on the figure alone."""
    figure.savefig(file, format="svg", metadata={"Date": None})
