"""From score tables to the rows of the comparison: every pair, recipe, evaluation and metric.

A missing score table is a gap: its rows are there, with the reason and without a number. Where
some seeds of several are missing, the row is over the seeds that both models have and says so. A
metric that reads a data set or a judge which could not be had is a gap too, whatever the tables
hold, and so is a row whose tables are not of the same examples.
"""

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from stages.compare.spec import UNTUNED, CompareSpec
from stages.compare.table import recipe_title
from stages.errors import StageFailed
from stages.evaluate.base import AXES, TEXT_COLUMNS, Evaluation, Metric
from stages.evaluate.hygiene import failures
from stages.evaluate.judges import column
from stages.evaluate.partial import reads
from stages.evaluate.spec import JUDGE
from stages.statistics import holm, paired

NOT_RUN = "not run"
_NUMBERS = ("difference", "ci_low", "ci_high", "p_value", "effect_size", "minimum_detectable")


def compare(
    spec: CompareSpec, inputs: dict[str, Path], gaps: dict[str, str]
) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """The comparison (MoE minus dense), the recipes' effects (tuned minus untuned) and the checks.

    The first two have one row per metric, the first metric of an evaluation being its primary one,
    with Holm's correction over all primary rows of the table. The third has what each attack must
    show (``hygiene.py``), one row per checkpoint, attack and check.
    """
    pairs, effects, checks = [], [], []
    for name, evaluation in spec.evaluations.items():
        scores = Scores(name, spec, inputs, gaps)
        checks += [
            {"evaluation": name, "model": model, "recipe": recipe, "seed": seed} | check
            for (model, recipe, seed), found in scores.checks.items()
            for check in found
        ]
        missing = scores.leave_out(
            {d: gaps[f"data/{d}"] for d in evaluation.datasets() if f"data/{d}" in gaps}
        )
        unasked = {
            judge: gaps[f"{JUDGE}{judge}"]
            for judge in evaluation.judge_models()
            if f"{JUDGE}{judge}" in gaps and not scores.all_have(column(judge))
        }
        for metric in evaluation.metrics():
            about = _about(name, evaluation, metric)
            lacks = metric.gap or "; ".join(
                f"data set {dataset} is missing: {reason}"
                for dataset, reason in missing.items()
                if dataset in reads(metric, evaluation)
            )
            if metric.judge in unasked:
                lacks = lacks or f"judge {metric.judge} is missing: {unasked[metric.judge]}"
            for pair in spec.pairs if not metric.of_experts else ():
                for recipe in spec.recipes:
                    if not spec.has(recipe, name, pair.moe, pair.dense):
                        continue
                    row = scores.paired(
                        [(pair.moe, recipe, seed) for seed in spec.seeds_of(recipe)],
                        [(pair.dense, recipe, seed) for seed in spec.seeds_of(recipe)],
                        metric,
                        ("moe", "dense"),
                        lacks,
                    )
                    models = {"pair": pair.name, "moe_model": pair.moe, "dense_model": pair.dense}
                    pairs.append(models | {"recipe": recipe} | about | row)
            if UNTUNED not in spec.recipes or not spec.has(UNTUNED, name):
                continue
            for model, architecture in spec.models.items():
                if metric.of_experts and architecture == "dense":
                    continue
                for recipe in spec.recipes:
                    if recipe == UNTUNED or not spec.has(recipe, name, model):
                        continue
                    row = scores.paired(
                        [(model, recipe, seed) for seed in spec.seeds],
                        [(model, UNTUNED, 0)] * len(spec.seeds),
                        metric,
                        ("tuned", "untuned"),
                        lacks,
                    )
                    models = {"model": model, "architecture": architecture, "recipe": recipe}
                    effects.append(models | about | row)
    return _corrected(pairs, spec), _corrected(effects, spec), pd.DataFrame(checks)


def _about(name: str, evaluation: Evaluation, metric: Metric) -> dict:
    return {
        "axis": evaluation.axis,
        "evaluation": name,
        "metric": metric.name,
        "label": metric.label or metric.name.replace("_", " "),
        "primary": metric.name == evaluation.primary,
        "higher_is_better": metric.higher_is_better,
    }


class Scores:
    """The score tables of one evaluation, read once, and the reasons of those that are missing."""

    def __init__(
        self, evaluation: str, spec: CompareSpec, inputs: dict[str, Path], gaps: dict[str, str]
    ):
        self.evaluation = evaluation
        self.spec = spec
        self.tables: dict[tuple, pd.DataFrame] = {}
        self.missing: dict[tuple, str] = {}
        for model in spec.models:
            for recipe in spec.recipes:
                for seed in spec.seeds_of(recipe):
                    key = (model, recipe, seed)
                    role = f"scores/{model}/{recipe}/{seed}/{evaluation}"
                    if role in inputs:
                        self.tables[key] = _read(inputs[role] / "scores.parquet")
                    else:
                        self.missing[key] = gaps.get(role, NOT_RUN)
        self.checks = {
            key: spec.evaluations[evaluation].checks(table) for key, table in self.tables.items()
        }

    def leave_out(self, gaps: dict[str, str]) -> dict[str, str]:
        """Those of the data sets with a gap that some table has no rows of; none has them then."""
        sets = {
            key: table["example_id"].str.partition("/")[0] for key, table in self.tables.items()
        }
        missing = {
            dataset: reason
            for dataset, reason in gaps.items()
            if not all((names == dataset).any() for names in sets.values())
        }
        if missing:
            self.tables = {k: t[~sets[k].isin(missing)] for k, t in self.tables.items()}
        return missing

    def all_have(self, column: str) -> bool:
        """Whether every table has a column."""
        return all(column in table for table in self.tables.values())

    def failed_checks(self, model: str, recipe: str) -> str:
        """The checks of the attack that a model fails in some seed, each with the attacks."""
        failed = failures(
            check for key, found in self.checks.items() if key[:2] == (model, recipe)
            for check in found
        )
        of = f"{model} {recipe_title(recipe)}"
        return f"{self.evaluation}: {of} fails checks of the attack: {failed}" if failed else ""

    def paired(
        self,
        first: list[tuple],
        second: list[tuple],
        metric: Metric,
        names: tuple[str, str],
        lacks: str,
    ) -> dict:
        """One row's numbers, over the seeds for which both tables are there.

        ``lacks`` is why there is no number at all: names the data sets that the metric reads and
        that could not be had, say; the row is a gap then.
        """
        there = [
            (a, b)
            for a, b in zip(first, second, strict=True)
            if a in self.tables and b in self.tables and not lacks
        ]
        if metric.per and not all(self._same(a, b, metric.per) for a, b in there):
            there, lacks = [], f"the models' {metric.per} differ, and it is a mean over them"
        gap = lacks or "; ".join(
            f"{model} {recipe} seed {seed}: {self.missing[model, recipe, seed]}"
            for model, recipe, seed in dict.fromkeys([*first, *second])
            if (model, recipe, seed) in self.missing
        )
        row = {"seeds": ",".join(str(a[2]) for a, _ in there), "gap": gap}
        row["caution"] = ". ".join(filter(None, (
            self.failed_checks(model, recipe)
            for model, recipe in dict.fromkeys(key[:2] for pair in there for key in pair)
        )))
        if not there:
            levels = (f"{name}{end}" for name in names for end in ("", "_ci_low", "_ci_high"))
            none = dict.fromkeys((*levels, *_NUMBERS), np.nan)
            return row | none | {"n": 0, "documents": 0, "test": "", "identical": False}
        try:
            found = paired(
                [self.tables[a] for a, _ in there],
                [self.tables[b] for _, b in there],
                metric,
                resamples=self.spec.resamples,
                seed=self.spec.seed,
            )
        except StageFailed as error:  # the tables differ in their examples
            return self.paired(first, second, metric, names, str(error))
        for name, level in zip(names, (found.first, found.second), strict=True):
            row |= {name: level.value}
            row |= {f"{name}_ci_low": level.ci_low, f"{name}_ci_high": level.ci_high}
        if not found.n:
            row["gap"] = row["gap"] or "no example has a value of it"
        kept = (*_NUMBERS, "n", "documents", "test", "identical")
        return row | {name: getattr(found, name) for name in kept}

    def _same(self, first: tuple, second: tuple, column: str) -> bool:
        """Whether two tables have the same values in a column, example by example."""
        a, b = (self.tables[key].set_index("example_id")[column] for key in (first, second))
        return a.sort_index().equals(b.sort_index())


def _read(file: Path) -> pd.DataFrame:
    columns = [name for name in pq.read_schema(file).names if name not in TEXT_COLUMNS]
    return pd.read_parquet(file, columns=columns)


def _corrected(rows: list[dict], spec: CompareSpec) -> pd.DataFrame:
    """The rows in the order of the tables, with ``p_holm`` for the primary ones."""
    table = pd.DataFrame(rows)
    if table.empty:
        return table
    table["p_holm"] = holm(table["p_value"].where(table["primary"]))
    who = "pair" if "pair" in table else "model"
    order = {
        who: list(dict.fromkeys(table[who])),
        "axis": list(AXES),
        "evaluation": list(spec.evaluations),
    }
    ranks = pd.DataFrame({name: table[name].map(seen.index) for name, seen in order.items()})
    return table.loc[ranks.sort_values(list(order), kind="stable").index].reset_index(drop=True)
