"""Runs the trials of one search on Ray Tune.

A trial is a driver function that holds no CPU: it has the pipeline's own stages do the work and
reports what was measured. Tune asks for proposals, stops, pauses and clones trials; the ledger
keeps what happened. A restarted search is a new Tune run over the same ledger: where a scheduler
stops trials, those that are over report again what they reported before, and those of a population
take part in it through the ledger (``schedulers.py``).
"""

import json
import logging
import math
import os
import random
import tempfile
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from ray import tune
from ray.tune.search import Searcher

from pipeline.search.equal import Measure, Shared, SharedClaims, known
from pipeline.search.ledger import Ledger, Report, Status, Trial
from pipeline.search.proposals import Proposals, proposals
from pipeline.search.schedulers import scheduler
from pipeline.search.space import Space, Values
from pipeline.search.spec import STOPPING, Hyperband, Pbt, Search
from stages.errors import BadInput, StageFailed

Spent = Callable[[Values, list[Report]], tuple[int, int]]
"""Takes the values that a trial failed with and its reports; its steps and training tokens."""
_SLOT = "node:__internal_head__"
"""Of this resource the head machine has 1. Drivers reserve a share each, which limits how many run
at once; Tune's own limit counts paused trials too, with which brackets and populations stall."""
_SETTINGS = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the ledger keeps what its loggers would
    "RAY_AIR_NEW_OUTPUT": "0",  # prints even when told to be silent
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C ends the command, not only Tune
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000",  # its snapshots are not used
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
}
_RETRIES = 2
"""How often a trial whose driver or machine died starts again from what is stored."""


def run_trials(
    search: Search,
    space: Space,
    trials: int,
    ledger: Ledger,
    measure: Measure,
    *,
    spent: Spent,
    maximize: list[bool],
    upwards: bool,
    storage: str,
    concurrent: int,
    tell: Callable[[Trial], None],
) -> None:
    """Run what is unfinished of a search's trials; each is over afterwards, in the ledger.

    ``spent`` is asked what a failed trial cost. ``maximize`` says for each objective whether more
    is better, ``upwards`` for the signal.
    ``storage`` is a folder that all machines share, used while the search runs; ``concurrent`` the
    number of trials at once. ``tell`` hears of every trial that starts, reports or ends.
    """
    replayed = isinstance(search.algorithm, STOPPING)
    numbers = [n for n in range(trials)
               if replayed or n not in ledger.trials or not ledger.trials[n].over]
    if all(n in ledger.trials and ledger.trials[n].over for n in numbers):
        return
    os.environ.update(_SETTINGS, TUNE_MAX_PENDING_TRIALS_PG=str(max(16, concurrent)))
    source = proposals(search, space, ledger, maximize)
    arguments: dict[str, Any] = {}
    if isinstance(search.algorithm, Pbt):
        # Tune wants the whole population at once here, and no searcher.
        random.seed(search.seed)
        np.random.seed(search.seed)
        population = [_proposal(ledger, source, n, search) for n in numbers]
        arguments["config"] = {"proposal": tune.grid_search(population)}
    else:
        arguments |= {"search_alg": _Searcher(numbers, ledger, source, search),
                      "num_samples": len(numbers)}
        if not isinstance(search.algorithm, Hyperband):
            arguments["max_concurrent_trials"] = concurrent
    # What went wrong is in the ledger; the rest is about files that Tune was told not to write.
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    with closing(SharedClaims(known(ledger, search, space))) as claims:
        driver = tune.with_parameters(_drive, shared=Shared(measure, search, space, claims))
        tune.run(
            tune.with_resources(driver, {_SLOT: _slot(concurrent)}),
            name="tune",
            storage_path=storage,
            scheduler=scheduler(search, space, ledger, "max" if upwards else "min"),
            callbacks=[_Recorder(ledger, search.resources()[-1], tell, claims, spent)],
            reuse_actors=True,
            max_failures=_RETRIES,
            raise_on_failed_trial=False,
            trial_dirname_creator=lambda trial: trial.trial_id,
            verbose=0,
            **arguments,
        )


def _slot(concurrent: int) -> float:
    """A driver's share of the head machine's resource: so many fit, and one more does not.

    Ray Train takes 0.001 of the resource for each run, to clean up after it.
    """
    return math.floor(10_000 * min(1 / (concurrent + 0.5), 1 / concurrent - 0.001)) / 10_000


def _proposal(ledger: Ledger, source: Proposals, number: int, search: Search) -> dict[str, Any]:
    """What the driver of a trial is told; its reports are those of an earlier run."""
    trial = ledger.begin(number, source.propose)
    chained = isinstance(search.algorithm, Pbt)
    return {
        "number": number,
        "values": trial.reports[-1].values if chained and trial.reports else trial.values,
        "reports": [asdict(report) for report in trial.reports],
        "over": trial.over,
        "reason": trial.reason,
        "last": search.resources()[-1],
        "chained": chained,
        # Paused and cloned trials go on from their checkpoint.
        "kept": chained or isinstance(search.algorithm, Hyperband),
    }


def _drive(config: dict[str, Any], shared: Shared) -> None:
    """Body of a trial's driver."""
    proposal = config["proposal"]
    checkpoint = tune.get_checkpoint()
    reports: list[dict] = []
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            reports = json.loads((Path(folder) / "reports.json").read_text())
    if proposal["chained"]:
        # A clone of a member that was over has its segments here, as many as it had itself.
        if len(reports) <= len(proposal["reports"]):
            reports = list(proposal["reports"])
    else:
        for report in proposal["reports"][len(reports) :]:
            reports.append(report)
            _report(reports, proposal)
    if proposal["over"]:
        if proposal["reason"]:
            _fail(reports, proposal["reason"])
        return
    try:
        past = [Report(**report) for report in reports]
        for report in shared(tune.get_context().get_trial_id(), proposal["values"], past):
            reports.append(asdict(report))
            _report(reports, proposal)
    except (StageFailed, BadInput) as error:
        # Reported, not raised: trying again would fail the same way.
        _fail(reports, str(error))


def _report(reports: list[dict], proposal: dict[str, Any]) -> None:
    latest = reports[-1]
    metrics = {"resource": latest["resource"], "signal": latest["signal"], "reports": reports,
               "done": latest["resource"] >= proposal["last"]}
    if not proposal["kept"]:
        tune.report(metrics)
        return
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "reports.json").write_text(json.dumps(reports))
        tune.report(metrics, checkpoint=tune.Checkpoint.from_directory(folder))


def _fail(reports: list[dict], reason: str) -> None:
    tune.report({"resource": 0, "signal": math.nan, "reports": reports, "failed": reason,
                 "done": True})


class _Searcher(Searcher):
    """Hands Tune the proposals of the given trials, in their order."""

    def __init__(self, numbers: list[int], ledger: Ledger, source: Proposals, search: Search):
        super().__init__(metric="signal", mode="max")
        self.waiting, self.ledger, self.source, self.search = numbers, ledger, source, search
        self.numbers: dict[str, int] = {}

    def suggest(self, trial_id: str) -> dict | str:
        if not self.waiting:
            return Searcher.FINISHED
        number, *self.waiting = self.waiting
        self.numbers[trial_id] = number
        return {"proposal": _proposal(self.ledger, self.source, number, self.search)}

    def on_trial_complete(
        self, trial_id: str, result: dict | None = None, error: bool = False
    ) -> None:
        # What the trial reported last is in the ledger by now.
        self.source.tell(self.ledger.trials[self.numbers[trial_id]])

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the ledger has it."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: a restarted search is a new Tune run."""


class _Recorder(tune.Callback):
    """Keeps the ledger."""

    def __init__(
        self, ledger: Ledger, last: int, tell: Callable[[Trial], None], claims: SharedClaims,
        spent: Spent,
    ):
        self.ledger, self.last, self.tell = ledger, last, tell
        self.claims, self.spent = claims, spent
        self.numbers: dict[str, int] = {}

    def _of(self, trial: Any) -> Trial:
        # As it was at the start: a clone has the configuration, and so the number, of its model.
        proposal = trial.config["proposal"]
        return self.ledger.trials[self.numbers.setdefault(trial.trial_id, proposal["number"])]

    def _end(self, trial: Trial, status: Status, reason: str = "") -> None:
        if not trial.over:
            self.ledger.end(trial, status, reason)
            self.tell(trial)

    def _fail(self, record: Trial, trial: Any, reason: str) -> None:
        if record.over:
            return
        values = trial.config["proposal"]["values"]  # a clone's own, which no report has yet
        record.steps, record.tokens = self.spent(values, record.reports)
        self._end(record, "failed", reason)

    def on_trial_start(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        """Remember the number; a trial that was paused starts more than once."""
        new = trial.trial_id not in self.numbers
        record = self._of(trial)
        if new and not record.over:
            self.tell(record)

    def on_trial_result(
        self, iteration: int, trials: list, trial: Any, result: dict, **info: Any
    ) -> None:
        """Enter what a driver reported."""
        record = self._of(trial)
        if record.over:
            return
        record.reports = [Report(**report) for report in result["reports"]]
        if "failed" in result:
            self._fail(record, trial, result["failed"])
        elif record.reports[-1].resource >= self.last:
            self._end(record, "finished")
        else:
            self.ledger.write(record)
            self.tell(record)

    def on_trial_complete(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        """A trial that is not over by now was stopped by the scheduler."""
        self._end(self._of(trial), "stopped")

    def on_trial_recover(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        """The driver, or its machine, died and will be started again; another may be first."""
        self.claims.release(trial.trial_id)

    def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        """The driver, or its machine, died too often."""
        self.claims.release(trial.trial_id)
        self._fail(self._of(trial), trial, _cause(trial))


def _cause(trial: Any) -> str:
    """The last line of the traceback that Tune keeps of a trial."""
    lines = Path(trial.error_file).read_text(errors="replace").strip().splitlines()
    return f"its driver died {_RETRIES + 1} times: {lines[-1][:300]}"
