"""What is known of a search's trials: one small JSON file each, in the search's store folder.

The finished work itself (fine-tunes, scores) lies in the store under its fingerprints. The ledger
has what the store cannot know: which values a trial was given, how far it came, and why it ended.
"""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from pipeline.search.space import Values
from pipeline.store import Store

Status = Literal["running", "finished", "stopped", "failed"]


@dataclass
class Report:
    """What was measured at one point of a trial's training."""

    resource: int
    """How much of the training is done, in the search's units (``Search.resources``)."""
    objectives: list[float]
    """Value of each objective; empty at a rung where only the intermediate one is measured."""
    signal: float
    """What a scheduler compares; equals the first objective unless the search names another."""
    steps: int = 0
    tokens: int = 0
    """Training tokens up to here, over all seeds."""
    scores: dict[str, float] = field(default_factory=dict)
    """``evaluation/metric`` on the selection split, mean over seeds."""
    values: Values = field(default_factory=dict)
    """The values that this part of the training had (population-based training changes them)."""
    nodes: list[str] = field(default_factory=list)
    """Store folders of the fine-tunes and scores behind it."""


@dataclass
class Trial:
    """One trial of a search."""

    number: int
    values: Values
    """What it was started with."""
    status: Status = "running"
    reports: list[Report] = field(default_factory=list)
    reason: str = ""
    """Why it failed."""
    steps: int = 0
    """Of one that failed, as far as it came."""
    tokens: int = 0
    """Training tokens up to its failure, over all seeds."""
    sampler: dict[str, Any] = field(default_factory=dict)
    """What Optuna noted on it (the generation of a genetic search)."""
    started: float = field(default_factory=time.time)
    ended: float | None = None

    @property
    def trained(self) -> Values:
        """What it was trained with last: population-based training changes what it began with."""
        return self.reports[-1].values if self.reports else self.values

    @property
    def over(self) -> bool:
        """Whether nothing is left to do for it."""
        return self.status != "running"

    @classmethod
    def of(cls, content: dict[str, Any]) -> "Trial":
        """From its JSON content."""
        reports = [Report(**report) for report in content["reports"]]
        return cls(**{**content, "reports": reports})


class Ledger:
    """The trials of one search, in memory and in the store."""

    def __init__(self, store: Store, folder: str):
        self.store, self.place = store, f"{folder}/trials"
        self.trials: dict[int, Trial] = {}
        for name in sorted(store.files(self.place)):
            if not name.endswith(".json"):
                continue  # what a kill left of a file that was being written
            trial = Trial.of(store.read_json(f"{self.place}/{name}"))
            self.trials[trial.number] = trial

    def begin(self, number: int, propose: Callable[[int], Trial]) -> Trial:
        """The trial of a number, as recorded or new."""
        if number not in self.trials:
            self.trials[number] = propose(number)
            self.write(self.trials[number])
        return self.trials[number]

    def write(self, trial: Trial) -> None:
        """Record a trial as it is now."""
        data = json.dumps(asdict(trial), indent=1).encode()
        self.store.write_bytes(f"{self.place}/{trial.number:06d}.json", data)

    def end(self, trial: Trial, status: Status, reason: str = "") -> None:
        """Record that a trial is over."""
        trial.status, trial.reason, trial.ended = status, reason, time.time()
        self.write(trial)
