"""The examples behind a number: prompt, answer and score of both models of a pair."""

import argparse

import pandas as pd

from pipeline.asked import sweep_recipes
from pipeline.plan import Plan
from pipeline.store import Store
from pipeline.survey import survey
from pipeline.sweep import Sweep
from pipeline.sweep_file import nearest
from stages.errors import BadInput, StageFailed
from stages.evaluate.base import Metric

_SIDES = ("moe", "dense")


def examples(sweep: Sweep, plan: Plan, store: Store, options: argparse.Namespace) -> list[str]:
    """Lines that show the examples behind an evaluation's primary metric that meet ``--where``.

    ``right`` and ``wrong`` refer to the per-example score of that metric.
    """
    if options.evaluation not in sweep.evaluations:
        raise BadInput(f"--evaluation {options.evaluation}: not in {options.sweep}"
                       f"{nearest(options.evaluation, list(sweep.evaluations))}")
    if not 0 <= options.pair < len(sweep.pairs):
        raise BadInput(f"--pair {options.pair}: the sweep has {len(sweep.pairs)}; count from 0")
    recipes = sweep_recipes(sweep)
    recipe = options.recipe or list(recipes)[-1]
    if recipe not in recipes:
        raise BadInput(f"--recipe {recipe}: not in {options.sweep}{nearest(recipe, list(recipes))}")
    pair, seed = sweep.pairs[options.pair], recipes[recipe][0]
    states = survey(plan, store)
    tables = {}
    for side in _SIDES:
        role = f"scores/{getattr(pair, side)}/{recipe}/{seed}/{options.evaluation}"
        if role not in plan.compare.inputs:
            raise BadInput(f"--recipe {recipe}: {options.evaluation} does not score "
                           f"{getattr(pair, side)} under it; name another recipe")
        key = plan.compare.inputs[role]
        if states[key].status != "done":
            raise StageFailed(f"{key} has not been run; "
                              f"run `moe-reliability run {options.sweep}` first")
        folder = store.fetch(plan.nodes[key].folder)
        tables[side] = pd.read_parquet(folder / "scores.parquet").set_index("example_id")
    evaluation = sweep.evaluations[options.evaluation]
    metric = next(m for m in evaluation.metrics() if m.name == evaluation.primary)
    if metric.column is None:
        raise BadInput(f"--evaluation {options.evaluation}: its primary metric {metric.name} is no "
                       "mean of examples' scores; read its scores.parquet")
    kept = _select(tables, metric, options.where)
    total = len(_select(tables, metric, ""))
    lines = [f"{len(kept)} of {total} examples · {options.evaluation} · {pair.name} · {recipe}, "
             f"seed {seed} · score: {metric.column}", ""]
    for example in kept[: options.limit]:
        row = tables["moe"].loc[example]
        lines.append(f"── {example} · {row['subset']} · gold: {row['gold']}")
        lines.append(f"   prompt: {_one_line(row['prompt'])}")
        for side in _SIDES:
            row = tables[side].loc[example]
            answer = row["answer"] or row["prediction"]
            lines.append(f"   {side:<6} {_number(row[metric.column])}  {_one_line(answer)}")
        lines.append("")
    if len(kept) > options.limit:
        lines.append(f"{len(kept) - options.limit} more; --limit shows them")
    return lines


def _select(tables: dict[str, pd.DataFrame], metric: Metric, where: str) -> list[str]:
    # Only the rows that the metric counts: an evaluation may have a control beside them.
    counted = metric.statistics(tables["moe"])[:, 1] > 0
    keep = pd.Series(counted, index=tables["moe"].index)
    for condition in filter(None, where.split(",")):
        side, _, value = condition.partition("_")
        if condition.startswith("subset="):
            keep &= tables["moe"]["subset"] == condition.removeprefix("subset=")
        elif side in _SIDES and value in ("wrong", "right"):
            scores = tables[side][metric.column].reindex(keep.index)
            keep &= scores < 0.5 if value == "wrong" else scores >= 0.5
        else:
            raise BadInput(f"--where {condition}: unknown condition; use moe_wrong, moe_right, "
                           "dense_wrong, dense_right or subset=NAME")
    return list(keep[keep].index)


def _one_line(text: str) -> str:
    # Control characters of a model's output must not reach the terminal.
    clean = "".join(c if c.isprintable() else " " for c in str(text))
    return clean if len(clean) <= 400 else clean[:397] + "..."


def _number(value: float) -> str:
    return "  -  " if pd.isna(value) else f"{value:5.2f}"
