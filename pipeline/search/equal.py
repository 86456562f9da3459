"""Equal trials share one training: whoever comes first measures, the others take its result.

Spaces of choices, and grids gone through twice, give several trials one recipe, whose work lies in
one place of the store. Two trainings there at once would share their checkpoints, of which the
first to finish deletes what the second still needs.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from typing import Literal

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.search.ledger import Ledger, Report
from pipeline.search.plan import digest, segments_of
from pipeline.search.space import Space, Values
from pipeline.search.spec import Pbt, Search
from stages.errors import BadInput, StageFailed

Measure = Callable[[Values, list[Report]], Iterator[Report]]
"""Takes a trial's values and the reports that it has, does the work, and yields the next ones."""
Answer = tuple[Literal["measure", "wait", "take", "fail"], Report | str | None]
_POLL = 1.0
"""Seconds between two questions of a trial that waits."""


class Claims:
    """Who measures what, and what came of it.

    Lives and dies with the process that runs a search, so that nothing is left of it by a kill;
    a restarted search begins with what its ledger knows.
    """

    def __init__(self, reports: dict[str, Report]):
        self._outcomes: dict[str, Report | str] = dict(reports)
        self._holders: dict[str, str] = {}

    def claim(self, point: str, trial: str) -> Answer:
        """What a trial is to do about a point: measure it itself, ask again later, or take the
        report or the reason of a failure that is there."""
        if point in self._outcomes:
            outcome = self._outcomes[point]
            return ("fail" if isinstance(outcome, str) else "take"), outcome
        holder = self._holders.setdefault(point, trial)
        return ("measure" if holder == trial else "wait"), None

    def settle(self, point: str, outcome: Report | str) -> None:
        """Enter what a trial measured, or why it failed."""
        self._outcomes[point] = outcome
        self._holders.pop(point, None)  # its own claim may have been released meanwhile

    def release(self, trial: str) -> None:
        """Let others have what a trial, whose driver is gone, was about to measure."""
        self._holders = {p: holder for p, holder in self._holders.items() if holder != trial}


class SharedClaims:
    """Claims that drivers on all machines of the cluster ask."""

    def __init__(self, reports: dict[str, Report]):
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self._actor = ray.remote(num_cpus=0)(Claims).options(scheduling_strategy=here).remote(
            reports)

    def claim(self, point: str, trial: str) -> Answer:
        """As that of Claims."""
        return ray.get(self._actor.claim.remote(point, trial))

    def settle(self, point: str, outcome: Report | str) -> None:
        """As that of Claims."""
        ray.get(self._actor.settle.remote(point, outcome))

    def release(self, trial: str) -> None:
        """As that of Claims."""
        ray.get(self._actor.release.remote(trial))

    def close(self) -> None:
        """End the actor, which the trials' stored functions refer to for longer."""
        ray.kill(self._actor)


class Shared:
    """Measures each recipe once at each point of its training, whichever trials ask for it."""

    def __init__(
        self, measure: Measure, search: Search, space: Space, claims: Claims | SharedClaims
    ):
        self.measure, self.search, self.space, self.claims = measure, search, space, claims

    def __call__(self, trial: str, values: Values, past: list[Report]) -> Iterator[Report]:
        """Yield what is measured at each point of the training that ``past`` lacks.

        Raises StageFailed when the work, or that of an equal trial, failed.
        """
        for resource in self.search.resources():
            if past and resource <= past[-1].resource:
                continue
            point = point_of(self.search, self.space, past, values, resource)
            while (answer := self.claims.claim(point, trial))[0] == "wait":
                time.sleep(_POLL)
            task, outcome = answer
            if task == "fail":
                raise StageFailed(outcome)
            if task == "take":
                past = [*past, replace(outcome, values=values)]
                yield past[-1]
                continue
            with closing(self.measure(values, past)) as work:
                past = [*past, self._first(work, point)]
                yield past[-1]

    def _first(self, work: Iterator[Report], point: str) -> Report:
        try:
            report = next(work)
        except (StageFailed, BadInput) as error:
            self.claims.settle(point, str(error))
            raise
        self.claims.settle(point, report)
        return report


def point_of(
    search: Search, space: Space, past: list[Report], values: Values, resource: int
) -> str:
    """Names the recipe, or the chain of a population's segments, and how far it is trained."""
    before = [report.values for report in past] if isinstance(search.algorithm, Pbt) else []
    recipes = [space.recipe(each) for each in (*before, values)]
    return f"{digest(segments_of(search, recipes))}@{resource}"


def known(ledger: Ledger, search: Search, space: Space) -> dict[str, Report]:
    """What the trials of a ledger measured, by point."""
    found: dict[str, Report] = {}
    for _, trial in sorted(ledger.trials.items()):
        for index, report in enumerate(trial.reports):
            point = point_of(
                search, space, trial.reports[:index], report.values, report.resource)
            found.setdefault(point, report)
    return found
