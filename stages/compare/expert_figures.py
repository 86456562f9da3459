"""Figures about experts: routes by layer, answers with other experts, what the loss goes with.

What is about the experts of an upcycled model is drawn as change from its untuned twin where the
sweep has that.
"""

import re
from collections.abc import Iterable
from itertools import cycle
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from stages.compare.figures import NEUTRAL, WIDTH_INCHES, save
from stages.compare.measured import Measured
from stages.compare.panels import PANELS, band, grid, legend, name_axes, with_experts
from stages.compare.quantities import SUBSTITUTIONS, routing_change, shares
from stages.compare.spec import UNTUNED
from stages.compare.table import number

_KINDS = dict(
    zip(SUBSTITUTIONS, ("#0072B2", "#D55E00", "#E69F00", "#CC79A7", "#009E73"), strict=True)
)
_BASELINES = {"random": ("random perturbation", "#E69F00", "s"),
              "noise": ("same input again", "#009E73", "^")}  # fmt: skip
_MOST_POINTS = 1500
"""Of a panel; more would only make the file large."""


def routing_figure(measured: Measured, recipe: str, file: Path) -> bool:
    """Change of routes by layer under attack, beside its baselines; a panel per MoE model."""
    if "attacks" not in measured.scores:
        return False
    there = measured.columns("attacks")
    wanted = routing_change(measured.evaluation("attacks"), there)
    by_layer = {name: _by_layer(columns, there) for name, columns in wanted.items()}
    models = with_experts(measured, "attacks", recipe) if by_layer["attack"] else []
    if not models:
        return False
    with matplotlib.rc_context(PANELS):
        figure, axes = grid(len(models), height=2.9)
        for model, panel in zip(models, axes, strict=True):
            change = _lines_by_layer(panel, measured, model, recipe, wanted, by_layer)
            panel.set_title(model, loc="left", fontsize=9, weight="bold")
            if change:
                panel.axhline(0, color="#111827", linewidth=0.8)
            else:
                panel.set_ylim(-0.02, 1.02)
        what = "1 − IoU, change from untuned" if change else "1 − IoU of the chosen experts"
        name_axes(figure, axes, "layer", what)
        legend(figure, axes[0])
        save(figure, file)
    return True


def substitution_figure(measured: Measured, recipe: str, file: Path) -> bool:
    """Accuracy against the share of tokens whose experts are replaced, and under every other
    intervention; a row per MoE model."""
    models = with_experts(measured, "interventions", recipe)
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
    with matplotlib.rc_context(PANELS):
        figure = Figure(figsize=(WIDTH_INCHES, height * len(models) + 0.4), layout="constrained")
        rows = figure.subplots(len(models), columns, squeeze=False, sharex="col")
        for model, row in zip(models, rows, strict=True):
            change = measured.twin("interventions", model, recipe)
            what = "accuracy, change from untuned" if change else "accuracy"
            left, *right = row
            if curves:
                left.sharey(rows[0][0])  # shared later, the limits would leave out its bands
                _substitution_curves(left, measured, model, recipe, curves)
                left.set_ylabel(what)
            if others:
                (panel,) = right or [left]
                _substitution_dots(panel, measured, model, recipe, others)
                panel.tick_params(labelbottom=True)
            left.set_title(model, loc="left", fontsize=9, weight="bold")
        lowest = list(rows[-1])
        if curves:
            lowest.pop(0).set_xlabel("share of the tokens with other experts")
            legend(figure, rows[0][0])
        if others:
            lowest.pop().set_xlabel(what)
        save(figure, file)
    return True


def loss_figure(measured: Measured, recipe: str, file: Path) -> bool:
    """Loss rise under attack over routing term and over router margin, a point per example and
    seed; a row per MoE model."""
    models = with_experts(measured, "geometry", recipe)
    there = measured.columns("geometry") if models else []
    shown = {"routing_term": "routing term", "router_margin": "margin of the two best experts"}
    shown = {name: label for name, label in shown.items() if name in there}
    if not shown or "loss_rise" not in there:
        return False
    with matplotlib.rc_context(PANELS | {"axes.grid.axis": "both"}):
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
                told = f"r = {number(found, signed=True)}"
                if measured.twin("geometry", model, recipe):
                    before = measured.table("geometry", model, UNTUNED, 0)
                    untuned = before[name].corr(before["loss_rise"])
                    told += f", untuned {number(untuned, signed=True)}"
                panel.set_title(told, loc="right", fontsize=9)
                panel.set_xlabel(label)
            row[0].set_title(model, loc="left", fontsize=9, weight="bold")
            row[0].set_ylabel("loss added by the attack (nats)")
        save(figure, file)
    return True


def _by_layer(columns: Iterable[str], there: list[str]) -> dict[str, tuple[str, ...]]:
    """Layer to the columns that hold its part of some scores, in the order of the model.

    A layer is named by the first number in the path of its module, or by the whole path where that
    does not tell the layers apart, as in an encoder-decoder.
    """
    found: dict[str, list[str]] = {}
    for column in columns:
        for c in there:
            if c.startswith(f"{column}/"):
                found.setdefault(c.removeprefix(f"{column}/"), []).append(c)
    numbers = {path: number[0] for path in found if (number := re.search(r"\d+", path))}
    told = len(set(numbers.values())) == len(found)
    return {numbers[path] if told else path: tuple(of) for path, of in found.items()}


def _lines_by_layer(
    panel: Axes,
    measured: Measured,
    model: str,
    recipe: str,
    wanted: dict[str, tuple[str, ...]],
    by_layer: dict[str, dict[str, tuple[str, ...]]],
) -> bool:
    """Draw attack and baselines of one model; whether they are changes from its untuned twin."""
    change = False
    lines = {"attack": ("attacks, mean", "#0072B2", "o")} | _BASELINES
    for name, (label, colour, marker) in lines.items():
        look = {"color": colour, "label": label}
        levels = {
            layer: measured.level("attacks", columns, model, recipe, learned=True)
            for layer, columns in by_layer[name].items()
        }
        levels = {layer: level for layer, level in levels.items() if level is not None}
        if levels:
            change = any(level.change for level in levels.values())
            band(panel, levels, marker=marker, **look)
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
        band(panel, levels, color=_KINDS[name], label=SUBSTITUTIONS[name], marker="o")
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
