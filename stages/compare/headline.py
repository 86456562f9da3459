"""The headline table: what attacks and probes found, one column per model.

Levels, not differences: accuracy clean and under attack, how much predictions and routes change,
answers under swapped routes and under other experts, slopes, disagreement of experts. A dense model
has a dash where experts are needed. The paired differences stand in the comparison.
"""

import pandas as pd

from stages.compare.measured import Level, Measured
from stages.compare.quantities import quantities
from stages.compare.table import recipe_title

COLUMNS = (
    "recipe", "group", "quantity", "label", "evaluation", "model", "architecture", "value",
    "ci_low", "ci_high", "n", "documents", "seeds", "change_from_untuned", "gap", "caution",
)  # fmt: skip


def headline(measured: Measured) -> pd.DataFrame:
    """One row per recipe, quantity and model, in the order of the table; empty without attacks.

    ``change_from_untuned`` marks the differences from the untuned twin that stand in for levels
    where the experts of an upcycled model started alike; ``gap`` says which seeds are missing and
    why; ``caution`` which checks of the attack failed, and that there is no untuned twin.
    """
    spec, rows = measured.spec, []
    if "attacks" not in measured.scores:
        return pd.DataFrame(columns=COLUMNS)
    # Dense models first, so that their dashes stand together.
    models = sorted(spec.models.items(), key=lambda model: model[1] != "dense")
    for recipe in spec.recipes:
        notes = {
            (part, model): (
                missing(measured, part, model, recipe),
                measured.scores[part].failed_checks(model, recipe),
            )
            for part in measured.scores
            for model in spec.models
        }  # fmt: skip
        for part, scores in measured.scores.items():
            found = quantities(part, measured.evaluation(part), measured.columns(part))
            for quantity in found:
                for model, architecture in models:
                    absent = quantity.of_experts and architecture == "dense"
                    if not spec.has(recipe, scores.evaluation, model):
                        continue
                    learned = quantity.of_experts and not quantity.fixed
                    level = None if absent else measured.level(
                        part, quantity.columns, model, recipe,
                        learned=learned, among=quantity.among,
                    )  # fmt: skip
                    gap, caution = ("", "") if absent else notes[part, model]
                    if learned and measured.lacks_twin(part, model, recipe):
                        alike = f"the experts of {model} started alike, and no untuned twin is here"
                        caution = "\n".join(filter(None, (caution, alike)))
                    about = (recipe, quantity.group, quantity.name, quantity.label,
                             scores.evaluation, model, architecture)  # fmt: skip
                    rows.append((*about, *_numbers(level), gap, caution))
    return pd.DataFrame(rows, columns=COLUMNS)


def _numbers(level: Level | None) -> tuple:
    if level is None:
        return (float("nan"),) * 3 + (0, 0, "", False)
    seeds = ",".join(map(str, level.seeds))
    numbers = (level.value, level.ci_low, level.ci_high, level.n, level.documents)
    return (*numbers, seeds, level.change)


def missing(measured: Measured, part: str, model: str, recipe: str) -> str:
    """The seeds whose scores are not there, with the reasons."""
    scores = measured.scores[part]
    reasons: dict[str, list[str]] = {}
    for seed in measured.spec.seeds_of(recipe):
        if (model, recipe, seed) in scores.missing:
            reasons.setdefault(scores.missing[model, recipe, seed], []).append(str(seed))
    where = f"{scores.evaluation}: {model} {recipe_title(recipe)}"
    return "; ".join(f"{where} seed {', '.join(of)}: {why}" for why, of in reasons.items())
