"""The report of a search: HTML that stands alone, and the figures beside it.

It shows how the recipes were found, on the selection split. What they are worth is in the other
report, on the test split and with fresh seeds.
"""

from pathlib import Path

import pandas as pd

from stages.compare.figures import inline
from stages.compare.report import PALETTE, render
from stages.compare.search_figures import draw
from stages.compare.search_results import FEWEST
from stages.compare.search_spec import SearchContent, SearchedModel

REPORT_FILE = "search.html"
TRIALS_FILE = "trials.parquet"
_BUDGET_TOLERANCE = 0.05
"""Training tokens of a pair's searches that differ by more than this share are pointed out."""
_TITLES = {
    "budget": "MoE and dense at equal budget",
    "fronts": "Objectives against each other",
    "scatter": "Every trial, by knob",
    "parallel": "Every trial as a line",
    "importance": "Which knobs matter",
}
_READING = {
    "budget": "The best score that a search of so many trials, or of so many training tokens, "
              "would have found, on average over random orders of the trials made; the band holds "
              "95 % of the orders. A curve begins where every order has a finished trial.",
    "fronts": "Each point is a trial; the line joins those that no other trial beats in both.",
    "scatter": "Rings mark the trials that were trained again. Trials that stopped early or failed "
               "have no score and are not drawn.",
    "parallel": "Darker lines ended better in the first objective; thick ones were trained again. "
                "A line is broken where a condition switched the knob off.",
    "importance": "Share of the objective's variance over the trials that goes with a knob: the "
                  "permutation importance in random forests that are fitted to resampled trials. "
                  "Bars hold 95 % of the resamples. A bar that reaches zero shows nothing.",
}


def write(content: SearchContent, output: Path) -> None:
    """Write ``search.html``, ``trials.parquet`` and ``figures/*.svg``."""
    tables = [m.table.assign(model=m.model, side=m.side) for m in content.models]
    everything = pd.concat(tables, ignore_index=True)
    for knob in content.knobs:  # one model may lack a knob, or have switched it off throughout
        if knob.column in everything and everything[knob.column].dtype == object:
            everything[knob.column] = everything[knob.column].astype("string")
    everything.to_parquet(output / TRIALS_FILE, index=False)
    (output / "figures").mkdir()
    figures = draw(content, output / "figures")
    render(REPORT_FILE, {
        "content": content,
        "colours": PALETTE,
        "warnings": fairness(content) + _cautions(content),
        "models": [_model(each, content) for each in content.models],
        "again": _again(content),
        "figures": [{"title": _TITLES[name], "reading": _READING[name], "inline": inline(file)}
                    for name, file in figures.items()],
        "few": "importance" not in figures,
        "fewest": FEWEST,
    }, output)


def fairness(content: SearchContent) -> list[str]:
    """Where the two sides of a pair had not the same budget; empty if they had."""
    models, found = {each.model: each for each in content.models}, []
    for moe, dense in content.pairs:
        first, second = models[moe], models[dense]
        for what, a, b in (
            ("trials", len(first.table), len(second.table)),
            ("seeds per trial", first.seeds, second.seeds),
        ):
            if a != b:
                found.append(f"{moe} had {a} {what}, {dense} {b}: their best scores are not found "
                             "with equal effort.")
        tokens = [int(each.table["tokens"].sum()) for each in (first, second)]
        if abs(tokens[0] - tokens[1]) > _BUDGET_TOLERANCE * max(tokens):
            found.append(f"The trials of {moe} trained on {tokens[0]:,} tokens, those of {dense} "
                         f"on {tokens[1]:,}: early stopping, failures or the trials' own sizes "
                         "made the budgets unequal.")
    return found


def _cautions(content: SearchContent) -> list[str]:
    found = [
        "Scores on this page chose the recipes and flatter them: the best of many noisy scores is "
        "too good on average. Quote the other report, which has other examples and fresh seeds."
    ]
    if content.algorithm == "pbt":
        found.append("A trial is shown with the knobs of its last segment; those of the earlier "
                     "ones, which it was trained with as well, are in its MLflow run.")
    for each in content.models:
        failed = int((each.table["status"] == "failed").sum())
        if failed:
            found.append(f"{each.model}: {failed} of {len(each.table)} trials failed; the table of "
                         "all trials says why.")
        if each.idle:
            found.append(f"Left out of the search of {each.model}, where they change nothing: "
                         f"{', '.join(each.idle)}.")
    return found


def _model(each: SearchedModel, content: SearchContent) -> dict:
    knobs = [knob for knob in content.knobs if knob.column in each.table]
    order = each.table
    for goal in reversed(content.goals):
        order = order.sort_values(goal.column, ascending=not goal.maximize, kind="stable")
    counts = each.table["status"].value_counts()
    return {
        "name": each.model,
        "side": each.side,
        "label": {"moe": "MoE", "dense": "dense"}[each.side],
        "trials": len(each.table),
        "seeds": each.seeds,
        "tokens": f"{int(each.table['tokens'].sum()):,}",
        "statuses": ", ".join(f"{n} {status}" for status, n in counts.items()),
        "knobs": [knob.field for knob in knobs],
        "rows": [
            {
                "number": row["number"],
                "status": row["status"],
                "reason": row["reason"],
                "chosen": row["number"] in each.chosen,
                "values": [_text(row[knob.column]) for knob in knobs],
                "goals": [_text(row[goal.column]) for goal in content.goals],
                "steps": row["steps"],
                "tokens": f"{row['tokens']:,}",
            }
            for _, row in order.iterrows()
        ],
    }


def _again(content: SearchContent) -> dict:
    """The trials that were trained again, side by side beside the recipe they started from."""
    chosen = [(each, row) for each in content.models for number in each.chosen
              for _, row in each.table[each.table["number"] == number].iterrows()]
    goals = [{"name": goal.title, "values": ["—", *(_text(row[goal.column]) for _, row in chosen)]}
             for goal in content.goals]
    knobs = [{"name": knob.field, "values": [
        _text(knob.base), *(_text(row.get(knob.column)) for _, row in chosen)]}
        for knob in content.knobs]
    return {"columns": [{"model": each.model, "side": each.side, "number": row["number"]}
                        for each, row in chosen], "rows": goals + knobs}


def _text(value: object) -> str:
    if value is None or value != value:  # absent, or NaN where a condition switched it off
        return "—"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
