"""Figures of attacks and probes: accuracy against budget and by attack, and all of them together.

SVG in the report's look. Bands and bars are 95 % intervals over examples and seeds.
"""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from stages.compare.expert_figures import loss_figure, routing_figure, substitution_figure
from stages.compare.figures import WIDTH_INCHES, save
from stages.compare.measured import Level, Measured
from stages.compare.panels import PANELS, band, grid, legend, looks, name_axes
from stages.compare.quantities import attack_names, budgets, of_images

Curve = dict[float, tuple[tuple[str, ...], bool]]
"""Budget to the columns of its score, and whether that is 1 where the answer is wrong."""


def budget_figure(measured: Measured, recipe: str, file: Path) -> bool:
    """Accuracy of images against the budget: worst case over attacks, and each attack."""
    if "attacks" not in measured.scores or not of_images(measured.evaluation("attacks")):
        return False
    sizes = budgets(measured.columns("attacks"))
    clean: Curve = {0.0: (("correct",), False)}
    panels = {"worst case": clean | {float(b): ((f"worst/{b}",), False) for b in sizes}}
    for name in attack_names(measured.evaluation("attacks")):
        of = {float(b): ((f"robust/{name}/{b}",), False) for b in sizes}
        panels[name.replace("_", " ")] = clean | of
    return _curves(measured, recipe, panels, "budget, in 1/255", file)


def checked_figure(measured: Measured, recipe: str, file: Path) -> bool:
    """Accuracy of texts against the budget, on those that attacks are checked on."""
    if "attacks" not in measured.scores or of_images(measured.evaluation("attacks")):
        return False
    panels: dict[str, Curve] = {}
    for name in attack_names(measured.evaluation("attacks")):
        prefix = f"check/{name}/budget "
        columns = [c for c in measured.columns("attacks") if c.startswith(prefix)]
        found = {float(c.removeprefix(prefix)): ((c,), True) for c in columns}
        if found:
            panels[name.replace("_", " ")] = dict(sorted(found.items()))
    return _curves(measured, recipe, panels, "budget, in the attack's own unit", file)


def _curves(
    measured: Measured, recipe: str, panels: dict[str, Curve], unit: str, file: Path
) -> bool:
    """A panel per attack, a line per model."""
    if not panels:
        return False
    models = looks(measured)
    with matplotlib.rc_context(PANELS):
        same = len({tuple(curve) for curve in panels.values()}) == 1
        figure, axes = grid(len(panels), height=2.5, sharex=same)
        for (title, curve), panel in zip(panels.items(), axes, strict=True):
            for model, look in models.items():
                _curve(panel, measured, curve, model, recipe, look)
            panel.set_title(title, loc="left", fontsize=9, weight="bold")
            panel.set_ylim(-0.02, 1.02)
            panel.set_xlim(left=0)
        name_axes(figure, axes, unit, "accuracy")
        legend(figure, axes[0])
        save(figure, file)
    return True


def attacks_figure(measured: Measured, recipe: str, file: Path) -> bool:
    """Accuracy by attack on all examples, beside random edits of the same budget (hollow); for
    texts, whose attacks have one budget each there."""
    if "attacks" not in measured.scores or of_images(measured.evaluation("attacks")):
        return False
    rows = {"clean": ("clean", None), "worst case": ("correct", None)} | {
        name.replace("_", " "): (f"correct/{name}", f"random/{name}")
        for name in attack_names(measured.evaluation("attacks"))
    }
    models = looks(measured)
    with matplotlib.rc_context(PANELS | {"axes.grid.axis": "x"}):
        size = (WIDTH_INCHES, 0.3 * len(rows) + 1.1)
        figure = Figure(figsize=size, layout="constrained")
        panel = figure.subplots()
        for place, columns in enumerate(rows.values()):
            for turn, (model, look) in enumerate(models.items()):
                at = place + 0.5 * (turn - (len(models) - 1) / 2) / len(models)
                for column, filled in zip(columns, (True, False), strict=True):
                    level = column and measured.level("attacks", (column,), model, recipe)
                    if level:
                        _dot(panel, level, at, look, model if place == 0 else None, filled)
        panel.set_yticks(range(len(rows)), list(rows))
        panel.set_ylim(len(rows) - 0.5, -0.5)
        panel.set_xlim(-0.02, 1.02)
        panel.set_xlabel("accuracy")
        legend(figure, panel)
        save(figure, file)
    return True


def _dot(
    panel: Axes, level: Level, at: float, look: dict, name: str | None, filled: bool
) -> None:
    colour = look["color"]
    if filled:
        panel.plot([level.ci_low, level.ci_high], [at, at], color=colour, lw=1.6)
    face = colour if filled else "white"
    panel.plot(level.value, at, look["marker"], color=colour, mfc=face, markersize=5, label=name)


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
        band(panel, levels, label=model, **look)


def _right(level: Level) -> Level:
    """The share of right answers from that of wrong ones."""
    return replace(
        level, value=1 - level.value, ci_low=1 - level.ci_high, ci_high=1 - level.ci_low
    )


class Drawn(NamedTuple):
    """A figure of the report."""

    recipe: str
    title: str
    reading: str
    file: Path


FIGURES = {
    "budget": (
        budget_figure,
        "Accuracy against the budget of the attack",
        "A budget of 0 is the clean image. In the worst case an image counts as right only where "
        "every attack fails.",
    ),
    "attacks": (
        attacks_figure,
        "Accuracy by attack",
        "In the worst case a text counts as right only where every attack fails. Hollow: random "
        "edits of the same budget.",
    ),
    "checked": (
        checked_figure,
        "Accuracy against the budget of the attack",
        "On the texts that the attacks are checked on only.",
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
