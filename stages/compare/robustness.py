"""The report's section on attacks and probes: headline table, verdicts, figures."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from stages.compare.figures import inline
from stages.compare.headline import headline
from stages.compare.hypotheses import NOT_TESTED, REFUTED, SUPPORTED, UNDECIDED, judge
from stages.compare.measured import Measured
from stages.compare.robustness_figures import Drawn, robustness_figures
from stages.compare.spec import UNTUNED, CompareSpec
from stages.compare.table import (
    FEW_SEEDS,
    GAP,
    VERDICTS_FILE,
    count,
    few_seeds,
    interval,
    number,
    p_value,
    recipe_title,
)
from stages.models.card import ModelCard

HEADLINE_FILE = "headline.parquet"
_TONES = {SUPPORTED: "improved", REFUTED: "worsened", UNDECIDED: "neutral", NOT_TESTED: "neutral"}


@dataclass(frozen=True)
class Robustness:
    """What attacks and probes showed."""

    headline: pd.DataFrame
    verdicts: pd.DataFrame
    figures: list[Drawn]


def examine(
    spec: CompareSpec,
    inputs: dict[str, Path],
    gaps: dict[str, str],
    cards: dict[str, ModelCard],
    output: Path,
) -> Robustness | None:
    """Write ``headline.parquet``, ``hypotheses.parquet`` where verdicts are asked for, and the
    figures; nothing where the sweep attacks no model."""
    measured = Measured(spec, inputs, gaps)
    table = headline(measured)
    if table.empty:
        return None
    table.to_parquet(output / HEADLINE_FILE, index=False)
    verdicts = judge(measured, cards)
    if len(verdicts):
        verdicts.to_parquet(output / VERDICTS_FILE, index=False)
    tuned = [recipe for recipe in spec.recipes if recipe != UNTUNED]
    figures = robustness_figures(measured, tuned or [UNTUNED], output / "figures")
    return Robustness(table, verdicts, figures)


def context(found: Robustness, spec: CompareSpec, cards: dict[str, ModelCard]) -> dict:
    """What the templates show."""
    notes: dict[str, str] = {}
    tables = [
        _table(recipe_title(recipe), rows, cards, notes)
        for recipe, rows in found.headline.groupby("recipe", sort=False)
    ]
    recipes = found.verdicts.groupby("recipe", sort=False) if len(found.verdicts) else ()
    return {
        "tables": tables,
        "evaluations": list(found.headline["evaluation"].unique()),
        "changes": bool(found.headline["change_from_untuned"].any()),
        "verdicts": [
            {"recipe": recipe_title(recipe), "hypotheses": _hypotheses(rows, notes)}
            for recipe, rows in recipes
        ],
        "verdict_lead": _lead(found.verdicts, len(spec.seeds)) if len(found.verdicts) else "",
        "figures": [
            {
                "title": f"{drawn.title}, {recipe_title(drawn.recipe)}"
                if len({other.recipe for other in found.figures}) > 1
                else drawn.title,
                "reading": drawn.reading,
                "file": f"figures/{drawn.file.name}",
                "inline": inline(drawn.file),
            }
            for drawn in found.figures
        ],
        "notes": {marker: text for text, marker in notes.items()},
    }


def _lead(verdicts: pd.DataFrame, seeds: int) -> str:
    """How the verdicts were reached, and why few are reached from few seeds."""
    trained = set(verdicts["recipe"]) != {UNTUNED}
    few = ""
    if trained and seeds == 1:
        few = (
            "One training seed: the tests cover the choice of examples, not what another training "
            "run would have given. "
        )
    elif trained and seeds < FEW_SEEDS:
        few = (
            f"{seeds} training seeds leave much undecided: {few_seeds(seeds)}. "
        )
    tested = verdicts.drop_duplicates(["recipe", "hypothesis"])["p_holm"].count()
    return (
        f"{few}Supported or refuted is what lies below 5 % after Holm's correction over the "
        f"{tested} hypotheses tested; everything else is undecided. All claims of a hypothesis "
        "must hold; one that is contrary refutes it, but for the premises, without which it is "
        "undecided: in H3 and H5 that the experts matter at all, and of experts that started alike "
        "the change from untuned. Detectable is the smallest true "
        "distance from the claimed bound that a test like this finds in 80 of 100 repetitions, "
        "uncorrected."
    )


def _marks(texts: Iterable[str], notes: dict[str, str]) -> list[str]:
    """The markers of some notes, which are entered where they are new."""
    found = dict.fromkeys(line for text in texts for line in text.splitlines())
    return [notes.setdefault(line, f"A{len(notes) + 1}") for line in found]


def _table(
    title: str, rows: pd.DataFrame, cards: dict[str, ModelCard], notes: dict[str, str]
) -> dict:
    models = dict(zip(rows["model"], rows["architecture"], strict=True))
    texts = {model: pd.concat([of["gap"], of["caution"]]) for model, of in rows.groupby("model")}
    return {
        "recipe": title,
        "models": [
            {"name": model, "tone": role, "about": _about(cards.get(model)),
             "notes": _marks(texts[model], notes)}
            for model, role in models.items()
        ],
        "groups": [
            {
                "title": group,
                "rows": [
                    {"label": of.iloc[0]["label"], "cells": _cells(of, list(models))}
                    for _, of in of_group.groupby("quantity", sort=False)
                ],
            }
            for group, of_group in rows.groupby("group", sort=False)
        ],
    }  # fmt: skip


def _cells(rows: pd.DataFrame, models: list[str]) -> list[dict]:
    """One cell per model; a dash where there is no number."""
    by_model = rows.set_index("model")
    cells = []
    for model in models:
        if model not in by_model.index:
            cells.append({"value": GAP, "interval": ""})
            continue
        row = by_model.loc[model]
        signed = bool(row["change_from_untuned"])
        value, low, high = (number(row[key], signed) for key in ("value", "ci_low", "ci_high"))
        # A quantity without any spread, such as what chance gives, needs no interval.
        around = "" if low == high else interval(row["ci_low"], row["ci_high"], signed)
        cells.append({"value": f"Δ {value}" if signed else value, "interval": around})
    return cells


def _about(card: ModelCard | None) -> list[str]:
    if card is None:
        return []
    experts = [f"{card.experts} experts, top-{card.top_k}"] if card.experts else []
    return [*experts, f"{count(card.flops_per_token)} FLOPs/token"]


def _hypotheses(rows: pd.DataFrame, notes: dict[str, str]) -> list[dict]:
    found = []
    for name, claims in rows.groupby("hypothesis", sort=False):
        head = claims.iloc[0]
        found.append(
            {
                "name": name,
                "title": head["title"],
                "verdict": head["verdict"],
                "tone": _TONES[head["verdict"]],
                "told": "; ".join(filter(None, (head["compared"], head["reason"]))),
                "p": p_value(head["p_holm"]),
                "notes": _marks(claims["caution"], notes),
                "claims": [_claim(row) for _, row in claims.iterrows() if row["claim"]],
            }
        )
    return found


def _claim(row: pd.Series) -> dict:
    unit = " ×" if row["ratio"] else ""
    signed = not row["ratio"]
    of = "" if row["documents"] == row["n"] else f" ({row['documents']} documents)"
    return {
        "label": row["claim"],
        "value": f"{number(row['value'], signed)}{unit}",
        "interval": interval(row["ci_low"], row["ci_high"], signed),
        "claimed": f"{row['side']} {row['null']:g}{unit}",
        "p": p_value(row["p_claim"]),
        "n": f"{row['n']:,}{of}",
        "seeds": row["seeds"],
        "detectable": number(row["detectable"]) + unit * pd.notna(row["detectable"]),
    }
