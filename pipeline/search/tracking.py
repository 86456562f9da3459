"""A search in MLflow: an experiment of its own, one parent run, one child per trial.

Values are params under the names of the recipe's fields, so MLflow's parallel coordinates and
scatter plots take them as they are; objectives and all scores of the selection split are metrics
over optimiser steps. Logging can be repeated: a child is found again by the fingerprint of its
content, and counts as logged once its run has ended, which is said last.
"""

import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from pipeline.children import digest, digests
from pipeline.search.ledger import Trial
from pipeline.search.spec import Search
from pipeline.store import Store
from pipeline.tracking import PER_BATCH, Tracker, clean_all, milliseconds

_STATUS = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
"""How a trial ended, in MLflow's words."""


class TrialTracker(Tracker):
    """Logs searches to one MLflow store or server."""

    note = ("One parent run per search with its report; below it one run per trial: values that "
            "were searched are params, scores of the selection split metrics. Runs whose tag "
            "`superseded` is true were replaced: filter with `tags.superseded = 'false'`.")

    def log_search(
        self,
        name: str,
        search: Search,
        trials: Sequence[tuple[str, str, Trial]],
        report: Path,
    ) -> str:
        """Bring the experiment ``name`` up to date; returns the experiment's id.

        ``trials`` are model, side (``moe`` or ``dense``) and a trial that is over; ``report`` is
        the folder of the search's report, kept with the parent run.
        """
        experiment = self._experiment(name)
        runs = self._runs(experiment)
        content = trials_fingerprint(name, trials, report)
        parent = next((r for r in runs if r.data.tags.get("kind") == "search"), None)
        if parent is None:
            started = min((trial.started for _, _, trial in trials), default=0.0)
            tags = {"kind": "search", "algorithm": search.algorithm.kind}
            parent = self.client.create_run(experiment, milliseconds(started), tags, name)
        for model, side, trial in trials:
            self._log_trial(experiment, parent.info.run_id, runs, search, model, side, trial)
        if parent.data.tags.get("fingerprint") != content:
            self._log_report(parent.info.run_id, report)
            self._tag(parent.info.run_id, {"fingerprint": content})
            ended = max((trial.ended for _, _, trial in trials), default=0.0)
            self.client.set_terminated(parent.info.run_id, "FINISHED", milliseconds(ended))
        return experiment

    def _log_trial(
        self, experiment: str, parent: str, runs: list, search: Search, model: str, side: str,
        trial: Trial,
    ) -> None:
        fingerprint = digest([model, _content(trial)])
        place = {"kind": "trial", "model": model, "trial": str(trial.number)}
        alike = [r for r in runs if all(r.data.tags.get(k) == v for k, v in place.items())]
        run = next((r for r in alike if r.data.tags["fingerprint"] == fingerprint), None)
        if run is None:
            tags = place | {
                "mlflow.parentRunId": parent, "architecture": side, "status": trial.status,
                "reason": trial.reason, "fingerprint": fingerprint, "superseded": "false",
            }
            run = self.client.create_run(
                experiment, milliseconds(trial.started), clean_all(tags),
                f"{model} · trial {trial.number}")
        if run.info.status == "RUNNING":
            self._fill_trial(run.info.run_id, search, side, trial)
        for other in alike:
            replaced = str(other.info.run_id != run.info.run_id).lower()
            if other.data.tags["superseded"] != replaced:
                self._tag(other.info.run_id, {"superseded": replaced})

    def _fill_trial(self, run: str, search: Search, side: str, trial: Trial) -> None:
        from mlflow.entities import Metric, Param

        values = {"architecture": side, **trial.trained}
        params = [Param(key, value) for key, value in clean_all(values).items()]
        time, points = milliseconds(trial.ended), []
        # Population-based training changes values on the way; the run shows each of them.
        changed = {path for report in trial.reports for path, value in report.values.items()
                   if value != trial.trained[path] and isinstance(value, int | float)}
        for report in trial.reports:
            found = {"signal": report.signal, "tokens": float(report.tokens), **report.scores}
            found |= {_key(objective.name): value for objective, value in
                      zip(search.objectives, report.objectives, strict=False)}
            found |= {f"value/{path}": float(value) for path, value in report.values.items()
                      if path in changed and isinstance(value, int | float)}
            points += [Metric(key, value, time, report.steps) for key, value in found.items()]
        self.client.log_batch(run, params=params)
        if trial.tokens:
            points.append(Metric("tokens", float(trial.tokens), time, trial.steps))
        for start in range(0, len(points), PER_BATCH):
            self.client.log_batch(run, metrics=points[start : start + PER_BATCH])
        self.client.set_terminated(run, _STATUS[trial.status], time)


def trials_fingerprint(
    name: str, trials: Sequence[tuple[str, str, Trial]], report: Path
) -> str:
    """Digest of everything that ``TrialTracker.log_search`` would log; needs no MLflow."""
    files = sorted(path for path in report.rglob("*") if path.is_file())
    return digest([name, [[m, s, _content(t)] for m, s, t in trials], digests(files)])


def record_trials(
    name: str,
    search: Search,
    trials: Sequence[tuple[str, str, Trial]],
    store: Store,
    report: str,
    uri: str,
) -> None:
    """Log a search unless the store remembers that just this was logged there.

    ``report`` is the report's folder in the store.
    """
    folder, memory = store.download(report), f"tracking/{name}.json"
    now = {"fingerprint": trials_fingerprint(name, trials, folder), "uri": uri}
    if store.read_json(memory) != now:
        TrialTracker(uri).log_search(name, search, trials, folder)
        store.write_json(memory, now)


def _content(trial: Trial) -> dict:
    """What is logged of a trial, whose params are what it was trained with last."""
    content = asdict(trial) | {"values": trial.trained}
    if not trial.tokens:  # as it was logged before failures were counted
        del content["steps"], content["tokens"]
    return content


def _key(name: str) -> str:
    """An objective's name with the characters that MLflow takes in a metric's."""
    return re.sub(r"[^\w/.\- :]", " ", name).strip()
