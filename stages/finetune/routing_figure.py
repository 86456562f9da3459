"""How the routing of a Mixture-of-Experts model moved while it was trained, as one figure."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure


def routing_figure(curve: list[dict], file: Path) -> None:
    """Write an SVG: per sparse layer, over the steps, the entropy of the router and the variation
    of the experts' loads, and the load of each expert in the last tenth of the steps.

    ``curve`` are the rows of the training curve.
    """
    layers = list(curve[-1]["expert_load_by_layer"])
    titles = {
        "router_entropy_by_layer": "router entropy (nats)",
        "expert_load_variation_by_layer": "variation of the experts' loads",
    }
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    *panels, last = figure.subplots(1, 3)
    steps = [row["step"] for row in curve]
    shades = np.linspace(0.9, 0.2, len(layers))
    for axes, (column, title) in zip(panels, titles.items(), strict=True):
        for layer, shade in zip(layers, shades, strict=True):
            values = [row[column][layer] for row in curve]
            axes.plot(steps, values, color=str(shade), lw=0.9)
        axes.plot(steps, [np.mean(list(row[column].values())) for row in curve], lw=1.8)
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_xlabel("optimiser step")
        axes.set_ylim(bottom=0)
    tail = curve[-max(1, len(curve) // 10) :]
    loads = np.mean([[row["expert_load_by_layer"][layer] for layer in layers] for row in tail], 0)
    image = last.imshow(loads * loads.shape[1], aspect="auto", cmap="RdBu_r", vmin=0, vmax=2)
    last.set_title("load of each expert, 1 = even", loc="left", fontsize=10)
    last.set_yticks(range(len(layers)), [name.removeprefix("layer_") for name in layers])
    last.set_ylabel("layer")
    last.set_xlabel("expert")
    figure.colorbar(image, ax=last)
    figure.savefig(file, format="svg")
