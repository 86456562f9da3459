"""A search in MLflow: one run per trial, numeric params, logged once."""

from dataclasses import replace

import pytest
from mlflow import MlflowClient
from search_sweeps import search_of

from pipeline.search.ledger import Report, Trial
from pipeline.search.tracking import record_trials
from pipeline.store import Store

SCORE = "edits/clean_accuracy"


def trials() -> list[tuple[str, str, Trial]]:
    values = {"learning_rate": 2e-4, "schedule": "linear", "data.1.repeat": 2}
    rung = Report(1, [], 0.5, 3, 300, {SCORE: 0.5}, values)
    whole = Report(3, [0.75], 0.75, 9, 900, {SCORE: 0.75, "edits/adversarial_drop": 0.1}, values)
    times = {"started": 100.0, "ended": 160.0}
    return [
        ("moe", "moe", Trial(0, values, "finished", [rung, whole], **times)),
        ("moe", "moe", Trial(1, values, "stopped", [rung], **times)),
        ("dense", "dense", Trial(0, values, "failed", [], "the loss is nan", 4, 800, **times)),
    ]


@pytest.fixture
def place(tmp_path):
    store = Store(str(tmp_path / "store"))
    store.write_bytes("reports/s-trials/search.html", b"<html>")
    return store, f"sqlite:///{tmp_path}/mlflow.db"


def runs(uri: str) -> list:
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("s-trials").experiment_id
    return client.search_runs([experiment], filter_string="tags.kind = 'trial'")


def record(place, found) -> None:
    store, uri = place
    record_trials("s-trials", search_of(), found, store, "reports/s-trials", uri)


def test_a_run_per_trial_with_its_values_scores_and_end(place):
    record(place, trials())
    by_place = {(r.data.tags["model"], r.data.tags["trial"]): r for r in runs(place[1])}
    assert set(by_place) == {("moe", "0"), ("moe", "1"), ("dense", "0")}
    done = by_place["moe", "0"]
    assert done.data.params == {"architecture": "moe", "learning_rate": "0.0002",
                                "schedule": "linear", "data.1.repeat": "2"}
    assert done.data.metrics == {
        "signal": 0.75, "tokens": 900.0, SCORE: 0.75, "edits/adversarial_drop": 0.1}
    assert {r.info.status for r in by_place.values()} == {"FINISHED", "KILLED", "FAILED"}
    assert by_place["dense", "0"].data.tags["reason"] == "the loss is nan"
    assert by_place["dense", "0"].data.metrics == {"tokens": 800.0}
    curve = MlflowClient(place[1]).get_metric_history(done.info.run_id, SCORE)
    assert [(m.step, m.value) for m in curve] == [(3, 0.5), (9, 0.75)]
    parent = MlflowClient(place[1]).get_run(done.data.tags["mlflow.parentRunId"])
    assert parent.data.tags["kind"] == "search" and parent.info.status == "FINISHED"


def test_a_trial_of_many_scores_and_rungs_is_logged_in_parts(place, monkeypatch):
    """1,260 points; an MLflow server takes 1,000 at once."""
    sizes, log_batch = [], MlflowClient.log_batch

    def counted(client, run, metrics=(), **rest):
        sizes.append(len(metrics))
        log_batch(client, run, metrics=metrics, **rest)

    monkeypatch.setattr(MlflowClient, "log_batch", counted)
    scores = {f"edits/score{i}": float(i) for i in range(39)}
    reports = [Report(n, [0.5], 0.5, n, n, scores, {"learning_rate": 1e-4}) for n in range(30)]
    record(place, [("moe", "moe", Trial(0, {"learning_rate": 1e-4}, "finished", reports,
                                        started=100.0, ended=160.0))])
    run = runs(place[1])[0]
    assert len(run.data.metrics) == 39 + 3 and run.info.status == "FINISHED"
    assert [size for size in sizes if size] == [1000, 260]
    history = MlflowClient(place[1]).get_metric_history(run.info.run_id, "edits/score38")
    assert [m.step for m in history] == list(range(30))


def test_logging_again_adds_nothing_and_changed_trials_replace(place):
    record(place, trials())
    first = {r.info.run_id for r in runs(place[1])}
    store, uri = place
    store.delete("tracking")  # as if the store had forgotten
    record(place, trials())
    assert {r.info.run_id for r in runs(uri)} == first
    changed = trials()
    changed[1][2].reports = [replace(changed[1][2].reports[0], signal=0.25)]
    record(place, changed)
    after = runs(uri)
    assert len(after) == 4
    replaced = [r for r in after if r.data.tags["superseded"] == "true"]
    assert [(r.data.tags["trial"], r.data.metrics["signal"]) for r in replaced] == [("1", 0.5)]


def test_a_member_of_a_population_is_logged_with_what_it_was_trained_with(place):
    """Its last rate is a param, the rates of its segments are a curve."""
    rates = (1e-3, 1e-3, 1.2e-3)
    reports = [Report(n, [0.5], 0.5, 3 * n, 30, {SCORE: 0.5},
                      {"learning_rate": rate, "schedule": "constant"})
               for n, rate in enumerate(rates, start=1)]
    began = {"learning_rate": 5e-2, "schedule": "constant"}
    record(place, [("moe", "moe", Trial(0, began, "finished", reports, started=1.0, ended=2.0))])
    run = runs(place[1])[0]
    assert run.data.params == {
        "architecture": "moe", "learning_rate": "0.0012", "schedule": "constant"}
    curve = MlflowClient(place[1]).get_metric_history(run.info.run_id, "value/learning_rate")
    assert [(m.step, m.value) for m in curve] == [(3, 1e-3), (6, 1e-3), (9, 1.2e-3)]


def test_a_value_that_is_a_number_in_some_segments_is_logged_for_those(place):
    """A nullable field: population-based training went from a limit to none."""
    reports = [Report(n, [], 0.5, 3 * n, 300 * n, {}, {"gradient_clipping": limit})
               for n, limit in ((1, 1.0), (2, 0.5), (3, None))]
    member = Trial(0, {"gradient_clipping": 1.0}, "finished", reports, started=100.0, ended=160.0)
    record(place, [("moe", "moe", member)])
    run = runs(place[1])[0]
    logged = MlflowClient(place[1]).get_metric_history(run.info.run_id, "value/gradient_clipping")
    assert [(m.step, m.value) for m in logged] == [(3, 1.0), (6, 0.5)]
