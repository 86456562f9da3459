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
from pipeline.store import PROGRESS, Store
from pipeline.survey import settle
from pipeline.sweep import Sweep
from stages.errors import BadInput, StageFailed


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
        search = self.sweep.search
        plan, measured = self._planned(values, past, resource)
        whole = self._whole(resource)
        objectives = [*search.objectives] if whole else []
        self._work(plan, measured, store)
        scores = _scores(plan, measured, store)
        curves = [_tokens(plan, each, store) for each in measured]
        earlier = self._earlier(past)
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

    def spent(self, values: Values, past: list[Report]) -> tuple[int, int]:
        """Steps, and training tokens over all seeds, of a trial that failed after its reports."""
        search, store = self.sweep.search, Store(self.store)
        resource = next(r for r in search.resources() if not past or r > past[-1].resource)
        try:
            plan, measured = self._planned(values, past, resource)
        except BadInput:  # that is why it failed
            return 0, 0
        steps, tokens = [0], 0
        for each in measured:
            folder = plan.nodes[each.finetune].folder
            if store.finished([folder]):
                curve = _tokens(plan, each, store)
                made, cost = len(curve), int(curve.sum())
            else:
                progress = store.read_json(f"{folder}/{PROGRESS}") or {}
                made, cost = progress.get("done", 0), progress.get("tokens", 0)
            steps.append(made)
            tokens += cost
        earlier, last = self._earlier(past), past[-1] if past else Report(0, [], 0.0)
        # A training that goes on from a rung and told nothing yet has at least cost that.
        return max(last.steps, earlier.steps + max(steps)), max(
            last.tokens, earlier.tokens + tokens)

    def _planned(
        self, values: Values, past: list[Report], resource: int
    ) -> tuple[Plan, list[Measured]]:
        search, space = self.sweep.search, self.member.space
        chained, whole = isinstance(search.algorithm, Pbt), self._whole(resource)
        recipe = space.recipe(values)
        until = None if whole else search.steps_at(resource, recipe.steps)
        before = [space.recipe(report.values) for report in past] if chained else []
        objectives = [*search.objectives] if whole else []
        plan, measured = trial_plan(
            self.sweep, self.contents, self.member.model,
            segments_of(search, [*before, recipe]), search.seeds_of(self.member.side),
            objective_evaluations([*objectives, search.intermediate]), until)
        settle(plan, Store(self.store))
        return plan, measured

    def _whole(self, resource: int) -> bool:
        """Whether the fine-tune at a resource is not the beginning of a longer one."""
        search = self.sweep.search
        return isinstance(search.algorithm, Pbt) or resource == search.resources()[-1]

    def _earlier(self, past: list[Report]) -> Report:
        """What was trained in other fine-tunes than the present one."""
        chained = isinstance(self.sweep.search.algorithm, Pbt)
        return past[-1] if chained and past else Report(0, [], 0.0)

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
            if outcome.status == "failed" or outcome.lacks:
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
    folder = store.fetch(plan.nodes[measured.finetune].folder, weights=False)
    file = folder / "training_curve.parquet"
    return pd.read_parquet(file, columns=["tokens"])["tokens"]
