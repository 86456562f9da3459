"""Figures of attacks and probes: accuracy against budget, routes by layer, other experts, losses.

SVG in the report's look. Bands and bars are 95 % intervals over examples and seeds. What is about
the experts of an upcycled model is drawn as change from its untuned twin where the sweep has that.
"""

import math
from collections.abc import Iterable
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from stages.compare.figures import NEUTRAL, STYLE, WIDTH_INCHES, save
from stages.compare.measured import Level, Measured
from stages.compare.quantities import (
    SUBSTITUTIONS,
    attack_names,
    budgets,
    of_images,
    routing_change,
    shares,
)
from stages.compare.table import number

_COLOURS = {"moe": ("#0072B2", "#56B4E9", "#009E73"), "dense": ("#D55E00", "#E69F00", "#CC79A7")}
_MARKERS = {"moe": "osv", "dense": "DX^"}
_KINDS = dict(
    zip(SUBSTITUTIONS, ("#0072B2", "#D55E00", "#E69F00", "#CC79A7", "#009E73"), strict=True)
)
_BASELINES = {"random": ("random perturbation", "#E69F00", "s"),
              "noise": ("same input again", "#009E73", "^")}  # fmt: skip
_ACROSS = 4
"""Panels beside one another."""
_MOST_POINTS = 1500
"""Of a panel; more would only make the file large."""
_STYLE = STYLE | {"axes.grid.axis": "y", "axes.spines.left": True}


def accuracy_figure(measured: Measured, recipe: str, file: Path) -> bool:
    """Accuracy against the budget: worst case over attacks, and each attack; a line per model."""
    panels = _budget_curves(measured)
    if not panels:
        return False
    looks = _looks(measured)
    with matplotlib.rc_context(_STYLE):
        images = of_images(measured.evaluation("attacks"))
        figure, axes = _panels(len(panels), height=2.5, sharex=images)
        for (title, curve), panel in zip(panels.items(), axes, strict=True):
            for model, look in looks.items():
                _curve(panel, measured, curve, model, recipe, look)
            panel.set_title(title, loc="left", fontsize=9, weight="bold")
            panel.set_ylim(-0.02, 1.02)
            panel.set_xlim(left=0)
        unit = "budget, in 1/255" if images else "budget, in the attack's own unit"
        _label(figure, axes, unit, "accuracy")
        _legend(figure, axes[0])
        save(figure, file)
    return True


def routing_figure(measured: Measured, recipe: str, file: Path) -> bool:
    """Change of routes by layer under attack, beside its baselines; a panel per MoE model."""
    if "attacks" not in measured.scores:
        return False
    there = measured.columns("attacks")
    wanted = routing_change(measured.evaluation("attacks"), there)
    by_layer = {name: _by_layer(columns, there) for name, columns in wanted.items()}
    models = _experts(measured, "attacks", recipe) if by_layer["attack"] else []
    if not models:
        return False
    with matplotlib.rc_context(_STYLE):
        figure, axes = _panels(len(models), height=2.9)
        for model, panel in zip(models, axes, strict=True):
            change = _lines_by_layer(panel, measured, model, recipe, wanted, by_layer)
            panel.set_title(model, loc="left", fontsize=9, weight="bold")
            if change:
                panel.axhline(0, color="#111827", linewidth=0.8)
            else:
                panel.set_ylim(-0.02, 1.02)
        what = "1 − IoU, change from untuned" if change else "1 − IoU of the chosen experts"
        _label(figure, axes, "layer", what)
        _legend(figure, axes[0])
        save(figure, file)
    return True


def substitution_figure(measured: Measured, recipe: str, file: Path) -> bool:
    """Accuracy against the share of tokens whose experts are replaced, and under every other
    intervention; a row per MoE model."""
    models = _experts(measured, "interventions", recipe)
    if not models:
        return False
    there = measured.columns("interventions")
    curves = {name: shares(there, name) for name in SUBSTITUTIONS}
    curves = {name: found for name, found in curves.items() if len(found) > 1}
    others = [
        c.removeprefix("correct/") for c in there
        if c.startswith("correct/") and c.removeprefix("correct/").rsplit("_", 1)[0] not in curves
    ]  # fmt: skip
    columns = bool(curves) + bool(others)
    if not columns:
        return False
    height = 0.9 + max(2.2 * bool(curves), 0.2 * len(others))
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(WIDTH_INCHES, height * len(models) + 0.4), layout="constrained")
        rows = figure.subplots(len(models), columns, squeeze=False, sharex="col")
        for model, row in zip(models, rows, strict=True):
            change = measured.twin("interventions", model, recipe)
            what = "accuracy, change from untuned" if change else "accuracy"
            left, *right = row
            if curves:
                _substitution_curves(left, measured, model, recipe, curves)
                left.set_ylabel(what)
                left.sharey(rows[0][0])
            if others:
                (panel,) = right or [left]
                _substitution_dots(panel, measured, model, recipe, others)
                panel.tick_params(labelbottom=True)
            left.set_title(model, loc="left", fontsize=9, weight="bold")
        lowest = list(rows[-1])
        if curves:
            lowest.pop(0).set_xlabel("share of the tokens with other experts")
            _legend(figure, rows[0][0])
        if others:
            lowest.pop().set_xlabel(what)
        save(figure, file)
    return True


def loss_figure(measured: Measured, recipe: str, file: Path) -> bool:
    """Loss rise under attack over routing term and over router margin, a point per example and
    seed; a row per MoE model."""
    models = _experts(measured, "geometry", recipe)
    there = measured.columns("geometry") if models else []
    shown = {"routing_term": "routing term", "router_margin": "margin of the two best experts"}
    shown = {name: label for name, label in shown.items() if name in there}
    if not shown or "loss_rise" not in there:
        return False
    with matplotlib.rc_context(_STYLE | {"axes.grid.axis": "both"}):
        size = (WIDTH_INCHES, 2.6 * len(models) + 0.3)
        figure = Figure(figsize=size, layout="constrained")
        rows = figure.subplots(len(models), len(shown), squeeze=False)
        for model, row in zip(models, rows, strict=True):
            seeds = measured.seeds("geometry", model, recipe)
            tables = [measured.table("geometry", model, recipe, seed) for seed in seeds]
            for (name, label), panel in zip(shown.items(), row, strict=True):
                for table, colour in zip(tables, cycle(_KINDS.values()), strict=False):
                    points = table[[name, "loss_rise"]].dropna().head(_MOST_POINTS // len(seeds))
                    panel.scatter(
                        points[name], points["loss_rise"], s=9, alpha=0.55, lw=0, color=colour
                    )
                found = np.mean([table[name].corr(table["loss_rise"]) for table in tables])
                panel.set_title(f"r = {number(found, signed=True)}", loc="right", fontsize=9)
                panel.set_xlabel(label)
            row[0].set_title(model, loc="left", fontsize=9, weight="bold")
            row[0].set_ylabel("loss added by the attack (nats)")
        save(figure, file)
    return True


def _experts(measured: Measured, part: str, recipe: str) -> list[str]:
    """The MoE models that a part has scores of."""
    if part not in measured.scores:
        return []
    roles = measured.spec.models.items()
    return [m for m, role in roles if role == "moe" and measured.seeds(part, m, recipe)]


def _looks(measured: Measured) -> dict[str, dict]:
    """Colour, marker and line of each model; the architectures have colours of their own."""
    looks, used = {}, {"moe": 0, "dense": 0}
    for model, role in measured.spec.models.items():
        turn, place = divmod(used[role], len(_COLOURS[role]))
        looks[model] = {
            "color": _COLOURS[role][place],
            "marker": _MARKERS[role][place],
            "linestyle": ("-", "--", ":", "-.")[turn % 4],
        }
        used[role] += 1
    return looks


def _panels(count: int, height: float, sharex: bool = True) -> tuple[Figure, list[Axes]]:
    """A figure with so many panels of common axes, some beside one another."""
    across = min(count, _ACROSS)
    down = math.ceil(count / across)
    figure = Figure(figsize=(WIDTH_INCHES, height * down + 0.5), layout="constrained")
    grid = figure.subplots(down, across, squeeze=False, sharex=sharex, sharey=True)
    axes = list(grid.flat)
    for unused in axes[count:]:
        unused.remove()
    for column in range(across):
        lowest = [a for a in axes[column:count:across]][-1]
        lowest.tick_params(labelbottom=True)
    return figure, axes[:count]


def _label(figure: Figure, axes: list[Axes], x: str, y: str) -> None:
    figure.supxlabel(x, fontsize=9)
    for panel in axes[::_ACROSS]:
        panel.set_ylabel(y)


def _legend(figure: Figure, panel: Axes) -> None:
    handles, labels = panel.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside upper left", ncols=6, frameon=False, fontsize=9,
        columnspacing=1.4, handlelength=1.8,
    )  # fmt: skip


Curve = dict[float, tuple[tuple[str, ...], bool]]
"""Budget to the columns of its score, and whether that is 1 where the answer is wrong."""


def _budget_curves(measured: Measured) -> dict[str, Curve]:
    """Title of a panel to its curve, which starts at the clean answers."""
    if "attacks" not in measured.scores:
        return {}
    evaluation, there = measured.evaluation("attacks"), measured.columns("attacks")
    if of_images(evaluation):
        sizes = budgets(there)
        clean = {0.0: (("correct",), False)}
        worst = {float(b): ((f"worst/{b}",), False) for b in sizes}
        found = {"worst case of each image": clean | worst}
        for name in attack_names(evaluation):
            of = {float(b): ((f"robust/{name}/{b}",), False) for b in sizes}
            found[name.replace("_", " ")] = clean | of
        return found
    found = {}
    for name in attack_names(evaluation):
        prefix = f"check/{name}/budget "
        columns = [c for c in there if c.startswith(prefix)]
        of = {float(c.removeprefix(prefix)): ((c,), True) for c in columns}
        if of:
            found[name.replace("_", " ")] = dict(sorted(of.items()))
    return found


def _curve(
    panel: Axes, measured: Measured, curve: Curve, model: str, recipe: str, look: dict
) -> None:
    there = set(measured.columns("attacks"))
    levels = {
        budget: measured.level("attacks", columns, model, recipe)
        for budget, (columns, _) in curve.items()
        if there >= set(columns)
    }
    levels = {
        budget: _right(level) if curve[budget][1] else level
        for budget, level in levels.items()
        if level is not None
    }
    if levels:
        _band(panel, levels, label=model, **look)


def _right(level: Level) -> Level:
    """The share of right answers from that of wrong ones."""
    return replace(
        level, value=1 - level.value, ci_low=1 - level.ci_high, ci_high=1 - level.ci_low
    )


def _band(panel: Axes, levels: dict[object, Level], color: str, **look: object) -> None:
    """A line through the levels with a band of their intervals."""
    low, high = ([getattr(v, end) for v in levels.values()] for end in ("ci_low", "ci_high"))
    panel.fill_between(list(levels), low, high, color=color, alpha=0.13, lw=0)
    values = [level.value for level in levels.values()]
    panel.plot(list(levels), values, color=color, lw=1.5, markersize=4, **look)


def _by_layer(columns: Iterable[str], there: list[str]) -> dict[int, tuple[str, ...]]:
    """Layer to the columns that hold its part of some scores, the first layer first."""
    found: dict[int, list[str]] = {}
    for column in columns:
        for c in there:
            if c.rpartition("/")[0] == column and c.rpartition("/")[2].isdecimal():
                found.setdefault(int(c.rpartition("/")[2]), []).append(c)
    return {layer: tuple(of) for layer, of in sorted(found.items())}


def _lines_by_layer(
    panel: Axes,
    measured: Measured,
    model: str,
    recipe: str,
    wanted: dict[str, tuple[str, ...]],
    by_layer: dict[str, dict[int, tuple[str, ...]]],
) -> bool:
    """Draw attack and baselines of one model; whether they are changes from its untuned twin."""
    change = False
    lines = {"attack": ("attacks, mean", "#0072B2", "o")} | _BASELINES
    for name, (label, colour, marker) in lines.items():
        look = {"color": colour, "label": label}
        levels = {
            str(layer): measured.level("attacks", columns, model, recipe, learned=True)
            for layer, columns in by_layer[name].items()
        }
        levels = {layer: level for layer, level in levels.items() if level is not None}
        if levels:
            change = any(level.change for level in levels.values())
            _band(panel, levels, marker=marker, **look)
        else:
            whole = measured.level("attacks", wanted[name], model, recipe, learned=True)
            if whole is not None:
                panel.axhline(whole.value, linestyle="--", lw=1.5, **look)
    chance = measured.level("attacks", wanted["chance"], model, recipe)
    if chance is not None and not change:
        panel.axhline(
            chance.value, color=NEUTRAL, linestyle=":", lw=1.5, label="independent choices"
        )
    return change


def _substitution_curves(
    panel: Axes, measured: Measured, model: str, recipe: str, curves: dict[str, list[str]]
) -> None:
    own = measured.level("interventions", ("correct",), model, recipe, learned=True)
    for name, found in curves.items():
        levels = {0.0: own} | {
            float(share): measured.level(
                "interventions", (f"correct/{name}_{share}",), model, recipe, learned=True
            )
            for share in found
        }
        levels = {share: level for share, level in levels.items() if level is not None}
        _band(panel, levels, color=_KINDS[name], label=SUBSTITUTIONS[name], marker="o")
    panel.set_xlim(-0.02, 1.02)


def _substitution_dots(
    panel: Axes, measured: Measured, model: str, recipe: str, others: list[str]
) -> None:
    rows = {"as routed": "correct"} | {_title(name): f"correct/{name}" for name in others}
    for place, column in enumerate(rows.values()):
        level = measured.level("interventions", (column,), model, recipe, learned=True)
        if level is not None:
            colour = NEUTRAL if column == "correct" else "#0072B2"
            panel.plot([level.ci_low, level.ci_high], [place, place], color=colour, lw=1.5)
            panel.plot(level.value, place, "o", color=colour, markersize=4.5)
    panel.set_yticks(range(len(rows)), list(rows))
    panel.set_ylim(len(rows) - 0.5, -0.5)
    panel.grid(True, axis="x")
    panel.grid(False, axis="y")
    panel.spines["left"].set_visible(False)


def _title(intervention: str) -> str:
    """``random_1`` is the substitution of all tokens, ``top_2`` another K."""
    kind, _, size = intervention.rpartition("_")
    if kind in SUBSTITUTIONS:
        label = SUBSTITUTIONS[kind]
        return label if size == "1" else f"{label}, share {size}"
    return f"K = {size}" if kind == "top" else f"{kind.replace('_', ' ')} {size}"


class Drawn(NamedTuple):
    """A figure of the report."""

    recipe: str
    title: str
    reading: str
    file: Path


FIGURES = {
    "accuracy": (
        accuracy_figure,
        "Accuracy against the budget of the attack",
        "A budget of 0 is the clean input. The worst case counts an example as right only where "
        "every attack fails.",
    ),
    "routing": (
        routing_figure,
        "Change of routes by layer",
        "1 − IoU of the chosen experts, mean over tokens, budgets and the attacks on the loss.",
    ),
    "substitution": (
        substitution_figure,
        "Accuracy with other experts",
        "What the answers owe to the router's choice; without any expert's output is the floor.",
    ),
    "loss": (
        loss_figure,
        "Loss under attack, routing term and margin",
        "A point is an example, a colour a training seed; r is Pearson's correlation, mean over "
        "seeds.",
    ),
}
"""Name to what draws it, its title and how it is read."""


def robustness_figures(measured: Measured, recipes: Iterable[str], folder: Path) -> list[Drawn]:
    """Draw every figure that the scores allow."""
    return [
        Drawn(recipe, title, reading, file)
        for recipe in recipes
        for name, (draw, title, reading) in FIGURES.items()
        if draw(measured, recipe, file := folder / f"{name}_{recipe}.svg")
    ]
