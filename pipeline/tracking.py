"""What a sweep found, in MLflow: one parent run, one child per model, recipe and seed.

Logging can be repeated: a child is found again by the fingerprint of its content, points keep the
times they were measured at (MLflow drops a point that it has), and a run counts as logged when its
status says FINISHED, which is set last. Changed content makes a new child; the tag ``superseded``
tells the old one.

Everything goes through ``MlflowClient`` with explicit run ids, from one process, after the work:
the fluent API's active run and environment variables play no part. MLflow is imported when a
``Tracker`` is made.
"""

import json
import logging
import math
import os
import re
from collections.abc import Iterable, Sequence, Sized
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from urllib.parse import urlencode

from pipeline.children import DIGEST, Child, content_fingerprint

_SECRETS = re.compile(r"TOKEN|PASSWORD|SECRET|ACCESS_KEY|API_KEY|CREDENTIAL", re.IGNORECASE)
_SHORTEST_SECRET = 8
"""Shorter values of secret variables are not looked for: they would match by chance."""
PER_BATCH = 1000  # MLflow's limit on metrics in a log_batch
_PARAMS_PER_BATCH = 100
_STEPS_BY_LAYER = 50
"""Steps, evenly spaced, for which the curves of single layers are logged."""
PAGES = "workflowType=machine_learning"
"""Asks MLflow's pages for the view of model training; without it they open that of agents."""


@dataclass(frozen=True)
class Logged:
    """Where a sweep is in MLflow, and what this call did."""

    experiment_id: str
    parent_run_id: str
    added: int
    """Children made by this call."""
    superseded: int
    """Older children that no longer stand for their model, recipe and seed."""

    child_run_ids: tuple[str, ...]
    """The runs that stand for the given children, in their order."""

    @property
    def path(self) -> str:
        """The parent run's address below that of the MLflow server."""
        return f"/#/experiments/{self.experiment_id}/runs/{self.parent_run_id}?{PAGES}"

    @property
    def comparison_path(self) -> str:
        """The address of the page that compares the children."""
        chosen = {"runs": self.child_run_ids, "experiments": [self.experiment_id]}
        query = urlencode({name: json.dumps(ids) for name, ids in chosen.items()})
        return f"/#/compare-runs?{query}&{PAGES}"


class Tracker:
    """Logs sweeps to one MLflow store or server.

    An SQLite store keeps its artifacts in the folder ``mlflow_artifacts`` beside the database.
    """

    note = ("One parent run per sweep with the report; below it one run per model, recipe and "
            "seed. Runs whose tag `superseded` is true were replaced: filter with "
            "`tags.superseded = 'false'`.")
    """What an experiment says of itself."""

    def __init__(self, uri: str):
        # A new SQLite store tells of every migration at level INFO.
        for name in ("alembic", "mlflow.store.db.utils"):
            logging.getLogger(name).setLevel(logging.WARNING)
        from mlflow import MlflowClient

        self.database = sqlite_file(uri)
        if self.database is not None:
            self.database.parent.mkdir(parents=True, exist_ok=True)
        self.client = MlflowClient(uri)

    def log_sweep(
        self,
        sweep: str,
        children: Sequence[Child],
        report: Path | None = None,
        *,
        description: str = "",
        tags: dict[str, str] | None = None,
        texts: dict[str, str] | None = None,
    ) -> Logged:
        """Bring the experiment ``sweep`` up to date.

        ``report`` is the folder of the compare stage; it goes to the parent run with its tables
        and figures. ``description`` is shown as Markdown on the parent run, ``texts`` are further
        files of it (name to content), such as the sweep file and the plan's fingerprints.
        """
        experiment = self._experiment(sweep)
        runs = self._runs(experiment)
        content = content_fingerprint(sweep, children, report)
        parent = self._parent(experiment, runs, sweep, children)
        added = superseded = 0
        current = []
        for child in children:
            of_child = [run for run in runs if _same_place(run, child)]
            known = [r for r in of_child if r.data.tags["fingerprint"] == child.fingerprint]
            run = known[0] if known else self._create(experiment, parent.info.run_id, child)
            added += not known
            if run.info.status != "FINISHED":
                self._fill(experiment, run.info.run_id, child)
            superseded += self._supersede(run, of_child)
            current.append(run.info.run_id)
        if parent.data.tags.get("fingerprint") != content or parent.info.status != "FINISHED":
            if report is not None:
                self._log_report(parent.info.run_id, report)
            for name, text in (texts or {}).items():
                self.client.log_text(parent.info.run_id, _clean(text), name)
            self._tag(parent.info.run_id, (tags or {}) | {"mlflow.note.content": description})
            # Last, so that a call that was killed is repeated.
            self._tag(parent.info.run_id, {"fingerprint": content})
            finished = max((child.finished for child in children), default=0.0)
            self.client.set_terminated(parent.info.run_id, "FINISHED", milliseconds(finished))
        return Logged(experiment, parent.info.run_id, added, superseded, tuple(current))

    def _experiment(self, sweep: str) -> str:
        found = self.client.get_experiment_by_name(sweep)
        if found is None:
            place = None
            if self.database is not None:
                place = (self.database.parent / "mlflow_artifacts" / sweep).as_uri()
            # Without a kind the page asks its reader what the experiment is for.
            tags = {"mlflow.experimentKind": "custom_model_development",
                    "mlflow.note.content": self.note}
            return self.client.create_experiment(sweep, place, tags)
        if found.lifecycle_stage == "deleted":
            self.client.restore_experiment(found.experiment_id)
        return found.experiment_id

    def _runs(self, experiment: str) -> list:
        runs, token = [], None
        while True:
            page = self.client.search_runs([experiment], max_results=1000, page_token=token)
            runs += page
            token = page.token
            if not token:
                return runs

    def _parent(self, experiment: str, runs: list, sweep: str, children: Sequence[Child]):
        for run in runs:
            if run.data.tags.get("kind") == "sweep":
                return run
        started = min((child.started for child in children), default=0.0)
        return self.client.create_run(
            experiment, milliseconds(started), {"kind": "sweep", "sweep": sweep}, sweep
        )

    def _create(self, experiment: str, parent: str, child: Child):
        tags = {
            "mlflow.parentRunId": parent,
            "kind": "checkpoint",
            "model": child.model,
            "recipe": child.recipe,
            "seed": str(child.seed),
            "pair": "; ".join(child.pairs),
            "architecture": child.card.architecture,
            "family": child.card.family,
            "active_parameters": str(child.card.active_parameters),
            "total_parameters": str(child.card.total_parameters),
            "fingerprint": child.fingerprint,
            "scores_digest": child.scores_digest,
            "superseded": "false",
        }
        return self.client.create_run(
            experiment, milliseconds(child.started), clean_all(tags), child.name
        )

    def _fill(self, experiment: str, run: str, child: Child) -> None:
        """Log all of a child's content; what is there already stays as it is."""
        from mlflow.entities import Param

        params = [Param(key, value) for key, value in clean_all(_params(child)).items()]
        for start in range(0, len(params), _PARAMS_PER_BATCH):
            self.client.log_batch(run, params=params[start : start + _PARAMS_PER_BATCH])
        self._log_inputs(run, child)
        model = self._logged_model(experiment, run, child)
        points = [*_curve_points(child), *_score_points(child, model)]
        for start in range(0, len(points), PER_BATCH):
            self.client.log_batch(run, metrics=points[start : start + PER_BATCH])
        for file in child.artifacts:
            self.client.log_artifact(run, str(file))
        self.client.set_terminated(run, "FINISHED", milliseconds(child.finished))

    def _log_inputs(self, run: str, child: Child) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        inputs = [
            DatasetInput(
                Dataset(
                    name=each.name,
                    digest=each.digest[:DIGEST],
                    source_type="pack" if each.source.startswith("pack:") else "local",
                    source=json.dumps({"uri": _clean(each.source)}),
                    profile=json.dumps({"num_rows": each.rows}),
                ),
                [InputTag("mlflow.data.context", each.use)],
            )
            for each in child.data
        ]
        if inputs:
            self.client.log_inputs(run, inputs)

    def _logged_model(self, experiment: str, run: str, child: Child) -> str:
        """The checkpoint as a LoggedModel whose weights lie in the artifact store."""
        from mlflow.entities import LoggedModelOutput

        source = f"source_run_id='{run}'"
        found = self.client.search_logged_models([experiment], filter_string=source)
        if found:
            return found[0].model_id
        model = self.client.create_logged_model(
            experiment,
            # MLflow allows no / : . % " ' in the name of a model.
            name=re.sub(r"[/:.%\"']", "-", child.name),
            source_run_id=run,
            tags=clean_all(
                {"mlflow.model.isExternal": "true", "checkpoint_uri": child.checkpoint_uri}
            ),
            params=clean_all(_identity(child)),
            model_type=child.card.architecture,
        )
        self.client.finalize_logged_model(model.model_id, "READY")
        self.client.log_outputs(run, [LoggedModelOutput(model.model_id, 0)])
        return model.model_id

    def _supersede(self, current, of_child: list) -> int:
        """Tag the other runs of the same model, recipe and seed as replaced by the current one."""
        replaced = 0
        if current.data.tags["superseded"] != "false":
            # Content that came back: an older run stands for it again.
            self.client.set_tag(current.info.run_id, "superseded", "false")
            self.client.delete_tag(current.info.run_id, "superseded_by")
        for run in of_child:
            if run.info.run_id == current.info.run_id or run.data.tags["superseded"] == "true":
                continue
            self.client.set_tag(run.info.run_id, "superseded", "true")
            self.client.set_tag(run.info.run_id, "superseded_by", current.info.run_id)
            replaced += 1
        return replaced

    def _tag(self, run: str, tags: dict[str, str]) -> None:
        from mlflow.entities import RunTag

        self.client.log_batch(run, tags=[RunTag(k, v) for k, v in clean_all(tags).items()])

    def _log_report(self, run: str, report: Path) -> None:
        """The report's files, and its tables as MLflow shows them.

        ``MlflowClient.log_table`` appends to a table that is there; a repeated call must not.
        """
        import pandas as pd

        self.client.log_artifacts(run, str(report))
        listed = []
        for file in sorted(report.glob("*.parquet")):
            name = f"{file.stem}.json"
            frame = pd.read_parquet(file)
            self.client.log_text(run, frame.to_json(orient="split", index=False), name)
            listed.append({"path": name, "type": "table"})
        self._tag(run, {"mlflow.loggedArtifacts": json.dumps(listed)})


def sqlite_file(uri: str) -> Path | None:
    """The database of an ``sqlite:///`` address, or None for a server."""
    return Path(uri.removeprefix("sqlite:///")).resolve() if uri.startswith("sqlite:///") else None


def _same_place(run, child: Child) -> bool:
    tags = run.data.tags
    return tags.get("kind") == "checkpoint" and (
        (tags["model"], tags["recipe"], tags["seed"])
        == (child.model, child.recipe, str(child.seed))
    )


def _identity(child: Child) -> dict[str, object]:
    card = child.card
    return {
        "model": child.model,
        "recipe": child.recipe,
        "seed": child.seed,
        "architecture": card.architecture,
        "family": card.family,
        "active_parameters": card.active_parameters,
        "total_parameters": card.total_parameters,
        "flops_per_token": card.flops_per_token,
        "experts": card.experts,
        "top_k": card.top_k,
        "moe_layers": len(card.moe_layers),
    }


def _params(child: Child) -> dict[str, object]:
    return _identity(child) | {f"recipe/{key}": value for key, value in child.params.items()}


def _curve_points(child: Child) -> Iterable:
    """Each step's values at the time the step ended."""
    from mlflow.entities import Metric

    if child.curve is None:
        return
    curve = child.curve
    times = child.started + curve["seconds"].cumsum()
    shown = range(0, len(curve), math.ceil(len(curve) / _STEPS_BY_LAYER) or 1)
    for column in curve.columns.drop(["step", "seconds"]):
        by_layer = column.endswith("_by_layer")
        for place in shown if by_layer else range(len(curve)):
            value, step = curve[column].iloc[place], int(curve["step"].iloc[place])
            name = f"training/{column.removesuffix('_by_layer')}"
            time = milliseconds(times.iloc[place])
            for key, number in _numbers(name, value):
                yield Metric(key, number, time, step)


def _numbers(name: str, value: object) -> Iterable[tuple[str, float]]:
    """A value, or the value of each layer; of the loads of a layer's experts the largest and the
    smallest (all of them are in the file of the curve)."""
    if isinstance(value, dict):
        for layer, part in value.items():
            if isinstance(part, Sized):
                yield f"{name}_max/{layer}", float(max(part))
                yield f"{name}_min/{layer}", float(min(part))
            else:
                yield from _numbers(f"{name}/{layer}", part)
    elif isinstance(value, Real) and math.isfinite(value):
        yield name, float(value)


def _score_points(child: Child, model: str) -> Iterable:
    """``evaluation/metric`` with ``_ci_low``, ``_ci_high`` and ``_n``, tied to the checkpoint."""
    from mlflow.entities import Metric

    time = milliseconds(child.finished)
    ends = {"value": "", "ci_low": "_ci_low", "ci_high": "_ci_high", "n": "_n"}
    for evaluation, metrics in child.metrics.items():
        for metric, found in metrics.items():
            for field, end in ends.items():
                if math.isfinite(found[field]):
                    key = f"{evaluation}/{metric}{end}"
                    yield Metric(key, float(found[field]), time, 0, model_id=model)


def milliseconds(seconds: float) -> int:
    """MLflow's unit of time."""
    return int(seconds * 1000)


def clean_all(values: dict[str, object]) -> dict[str, str]:
    """The values as text, without user names, passwords and secrets."""
    return {key: _clean(str(value)) for key, value in values.items()}


def _clean(text: str) -> str:
    """The text without user names and passwords in addresses and without secret variables."""
    text = re.sub(r"(\w://)[^/\s@]+@", r"\1", text)
    for name, value in os.environ.items():
        if _SECRETS.search(name) and len(value) >= _SHORTEST_SECRET:
            text = text.replace(value, "***")
    return text
