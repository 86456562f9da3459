"""What one trial does: fine-tunes and evaluations of its recipe, by the ordinary stages.

Everything goes through the store under its fingerprint, so what is finished is never repeated, by
this search, a restarted one, or a sweep that later asks for the same.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from pipeline.execute import execute
from pipeline.plan import Plan
from pipeline.search.ledger import Report
from pipeline.search.plan import Measured, Member, objective_evaluations, segments_of, trial_plan
from pipeline.search.space import Values
from pipeline.search.spec import Objective, Pbt
from pipeline.store import Store
from pipeline.survey import settle
from pipeline.sweep import Sweep
from stages.errors import StageFailed


@dataclass(frozen=True)
class TrialWork:
    """Measures recipes of one model; called by trial drivers, which may be on any machine."""

    sweep: Sweep
    """A ``selecting`` sweep."""
    contents: dict[str, str]
    member: Member
    store: str
    folder: str
    """Of the sweep file."""

    def __call__(self, values: Values, past: list[Report]) -> Iterator[Report]:
        """Yield what is measured at each point of the training that ``past`` lacks.

        Raises StageFailed when a fine-tune or evaluation fails.
        """
        search, store = self.sweep.search, Store(self.store)
        for resource in search.resources():
            if past and resource <= past[-1].resource:
                continue
            report, rungs = self._measured(values, past, resource, store)
            past = [*past, report]
            try:
                yield report
            finally:
                # What is left of a rung is its scores; the training itself goes on or stays
                # resumable in the folder of the whole fine-tune.
                for folder in rungs:
                    store.delete(folder)

    def _measured(
        self, values: Values, past: list[Report], resource: int, store: Store
    ) -> tuple[Report, list[str]]:
        """What is measured at a resource, and the folders that only serve that."""
        search, space = self.sweep.search, self.member.space
        chained = isinstance(search.algorithm, Pbt)
        whole = chained or resource == search.resources()[-1]
        recipe = space.recipe(values)
        until = None if whole else search.steps_at(resource, recipe.steps)
        before = [space.recipe(report.values) for report in past] if chained else []
        objectives = [*search.objectives] if whole else []
        plan, measured = trial_plan(
            self.sweep, self.contents, self.member.model,
            segments_of(search, [*before, recipe]), search.seeds_of(self.member.side),
            objective_evaluations([*objectives, search.intermediate]), until)
        settle(plan, store)
        self._work(plan, measured, store)
        scores = _scores(plan, measured, store)
        curves = [_tokens(plan, each, store) for each in measured]
        earlier = past[-1] if chained and past else Report(0, [], 0.0)
        report = Report(
            resource=resource,
            objectives=[value_of(objective, scores) for objective in objectives],
            signal=value_of(search.intermediate, scores),
            steps=earlier.steps + len(curves[0]),
            tokens=earlier.tokens + int(sum(curve.sum() for curve in curves)),
            scores=scores,
            values=values,
            nodes=[plan.nodes[key].folder for each in measured
                   for key in (each.finetune, *each.evaluations.values())],
        )
        return report, [] if whole else [plan.nodes[each.finetune].folder for each in measured]

    def _work(self, plan: Plan, measured: list[Measured], store: Store) -> None:
        """Do what is missing; data and models are there before the first trial starts."""
        keys = plan.needs(key for each in measured
                          for key in (each.finetune, *each.evaluations.values()))
        folders = {key: plan.nodes[key].folder for key in keys}
        done = store.finished(folders.values())
        todo = {key for key in keys if folders[key] not in done}
        outcomes = execute(
            plan, todo, store, Path(self.folder), lambda event: None, one_by_one=True)
        for key, outcome in outcomes.items():
            if outcome.died:
                raise RuntimeError(f"{key}: {outcome.message}")
            if outcome.status == "failed":
                raise StageFailed(f"{key}: {outcome.message}")


def value_of(objective: Objective, scores: dict[str, float]) -> float:
    """The weighted sum of scores; raises StageFailed where one is no number."""
    for score in objective.weights:
        if not np.isfinite(scores[score]):
            raise StageFailed(f"{score} has no value on the selection split; give it more rows")
    return float(sum(weight * scores[score] for score, weight in objective.weights.items()))


def _scores(plan: Plan, measured: list[Measured], store: Store) -> dict[str, float]:
    """Every metric of the evaluations, mean over seeds."""
    found: dict[str, list[float]] = {}
    for each in measured:
        for name, key in each.evaluations.items():
            folder = store.fetch(plan.nodes[key].folder)
            for metric, row in json.loads((folder / "summary.json").read_text()).items():
                found.setdefault(f"{name}/{metric}", []).append(row["value"])
    return {name: float(np.mean(values)) for name, values in found.items()}


def _tokens(plan: Plan, measured: Measured, store: Store) -> pd.Series:
    """Training tokens of each step of the (last) fine-tune."""
    file = store.fetch(plan.nodes[measured.finetune].folder) / "training_curve.parquet"
    return pd.read_parquet(file, columns=["tokens"])["tokens"]
