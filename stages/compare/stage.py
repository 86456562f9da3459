"""Compare each Mixture-of-Experts model with its dense partner: tables, figures, report."""

from pathlib import Path

import pandas as pd

from stages.compare import report
from stages.compare.figures import axis_figure, curves_figure
from stages.compare.overlap import cautions
from stages.compare.results import compare
from stages.compare.robustness import examine
from stages.compare.spec import CompareSpec
from stages.data.card import DataCard
from stages.errors import StageFailed
from stages.evaluate.base import AXES
from stages.finetune.spec import CURVE_FILE
from stages.models.card import ModelCard

COMPARISON_FILE = "comparison.parquet"
EFFECTS_FILE = "recipe_effects.parquet"


def run(
    spec: CompareSpec, inputs: dict[str, Path], output: Path, gaps: dict[str, str] | None = None
) -> None:
    """Write the comparison of a sweep's scores.

    ``inputs`` maps the roles named in ``CompareSpec`` to folders; ``gaps`` says why a role is
    absent. Writes ``comparison.parquet`` and ``recipe_effects.parquet`` (one row per metric),
    ``report.html``, ``report.md`` and ``figures/*.svg``; of attacks and probes also
    ``headline.parquet`` and, where they are asked for, the verdicts in ``hypotheses.parquet``.
    """
    if not any(role.startswith("scores/") for role in inputs):
        raise StageFailed("no evaluation has finished, there is nothing to compare; see its errors")
    comparison, effects, checks = compare(spec, inputs, gaps or {})
    comparison.to_parquet(output / COMPARISON_FILE, index=False)
    effects.to_parquet(output / EFFECTS_FILE, index=False)

    checkpoints = {
        tuple(role.split("/")[1:]): folder
        for role, folder in inputs.items()
        if role.startswith("checkpoint/")
    }
    (output / "figures").mkdir()
    cards = _cards(spec, checkpoints)
    content = report.Content(
        spec=spec,
        comparison=comparison,
        effects=effects,
        checks=checks,
        models=cards,
        data={
            role.removeprefix("data/"): DataCard.read(folder)
            for role, folder in inputs.items()
            if role.startswith("data/")
        },
        figures=_figures(spec, comparison, checkpoints, output / "figures"),
        overlaps=tuple(cautions(spec, inputs)),
        robustness=examine(spec, inputs, gaps or {}, cards, output),
    )
    report.write(content, output)


def _cards(spec: CompareSpec, checkpoints: dict[tuple, Path]) -> dict[str, ModelCard]:
    """The card of each model's first checkpoint, the untuned one where there is one."""
    cards = {}
    for recipe in spec.recipes:
        for model in spec.models:
            for seed in spec.seeds_of(recipe):
                folder = checkpoints.get((model, recipe, str(seed)))
                if folder is not None and model not in cards:
                    cards[model] = ModelCard.read(folder)
    return cards


def _figures(
    spec: CompareSpec, comparison: pd.DataFrame, checkpoints: dict[tuple, Path], folder: Path
) -> dict[str, Path]:
    figures = {}
    shown = comparison[comparison["difference"].notna()]
    for axis in AXES:
        if axis in set(shown["axis"]):
            figures[axis] = folder / f"{axis}.svg"
            axis_figure(shown, axis, figures[axis])
    curves = {
        (model, recipe, int(seed)): pd.read_parquet(checkpoint / CURVE_FILE)
        for (model, recipe, seed), checkpoint in checkpoints.items()
        if (checkpoint / CURVE_FILE).exists()
    }
    if curves:
        figures["curves"] = folder / "training_curves.svg"
        curves_figure(curves, spec.models, figures["curves"])
    return figures
