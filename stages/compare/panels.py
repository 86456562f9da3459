"""What figures of attacks and probes share: looks of models, grids of panels, lines with bands."""

import math

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from stages.compare.figures import STYLE, WIDTH_INCHES
from stages.compare.measured import Level, Measured

PANELS = STYLE | {"axes.grid.axis": "y", "axes.spines.left": True}
_COLOURS = {"moe": ("#0072B2", "#56B4E9", "#009E73"), "dense": ("#D55E00", "#E69F00", "#CC79A7")}
_MARKERS = {"moe": "osv", "dense": "DX^"}
_ACROSS = 4
"""Panels beside one another."""


def looks(measured: Measured) -> dict[str, dict]:
    """Colour, marker and line of each model; the architectures have colours of their own."""
    found, used = {}, {"moe": 0, "dense": 0}
    for model, role in measured.spec.models.items():
        turn, place = divmod(used[role], len(_COLOURS[role]))
        found[model] = {
            "color": _COLOURS[role][place],
            "marker": _MARKERS[role][place],
            "linestyle": ("-", "--", ":", "-.")[turn % 4],
        }
        used[role] += 1
    return found


def grid(count: int, height: float, sharex: bool = True) -> tuple[Figure, list[Axes]]:
    """A figure with so many panels of common axes, some beside one another."""
    across = min(count, _ACROSS)
    down = math.ceil(count / across)
    figure = Figure(figsize=(WIDTH_INCHES, height * down + 0.5), layout="constrained")
    made = figure.subplots(down, across, squeeze=False, sharex=sharex, sharey=True)
    axes = list(made.flat)
    for unused in axes[count:]:
        unused.remove()
    for column in range(across):
        lowest = [a for a in axes[column:count:across]][-1]
        lowest.tick_params(labelbottom=True)
    return figure, axes[:count]


def name_axes(figure: Figure, axes: list[Axes], x: str, y: str) -> None:
    """Name the common axes of a grid."""
    figure.supxlabel(x, fontsize=9)
    for panel in axes[::_ACROSS]:
        panel.set_ylabel(y)


def legend(figure: Figure, panel: Axes) -> None:
    """One legend above all panels, from one of them."""
    handles, labels = panel.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside upper left", ncols=6, frameon=False, fontsize=9,
        columnspacing=1.4, handlelength=1.8,
    )  # fmt: skip


def band(panel: Axes, levels: dict[object, Level], color: str, **look: object) -> None:
    """A line through the levels with a band of their intervals."""
    low, high = ([getattr(v, end) for v in levels.values()] for end in ("ci_low", "ci_high"))
    panel.fill_between(list(levels), low, high, color=color, alpha=0.13, lw=0)
    values = [level.value for level in levels.values()]
    panel.plot(list(levels), values, color=color, lw=1.5, markersize=4, **look)


def with_experts(measured: Measured, part: str, recipe: str) -> list[str]:
    """The MoE models that a part has scores of."""
    if part not in measured.scores:
        return []
    roles = measured.spec.models.items()
    return [m for m, role in roles if role == "moe" and measured.seeds(part, m, recipe)]
