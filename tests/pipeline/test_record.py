"""What a finished command tells MLflow, also when there is no report or a very long one."""

import json
from types import SimpleNamespace

import pandas as pd
import pytest
from smoke import planned

from pipeline import record as recording
from pipeline.store import Store
from stages.models.card import ModelCard

PLAN = SimpleNamespace(sweep=SimpleNamespace(
    name="study", description="What it is about.", model_dump_json=lambda **_: "{}"))


@pytest.fixture
def logged(monkeypatch, tmp_path):
    """The description that MLflow is given for a table of so many lines; None is no report."""

    def log(lines):
        given = []
        store = Store(str(tmp_path / str(lines)))
        if lines is not None:
            report = tmp_path / str(lines) / recording.report_folder("study")
            report.mkdir(parents=True)
            pd.DataFrame().to_parquet(report / "comparison.parquet")

        class Stub:
            def __init__(self, uri):
                pass

            def log_sweep(self, sweep, children, report, description, texts):
                given.append((report is None, description))
                return SimpleNamespace(path="/p", comparison_path="/c")

        monkeypatch.setattr(recording, "Tracker", Stub)
        monkeypatch.setattr(recording, "_children", lambda plan, store: ["a child"])
        monkeypatch.setattr(recording, "content_fingerprint", lambda *_: f"of {lines}")
        monkeypatch.setattr(
            recording, "render_text", lambda _: "\n".join(f"line {n:04d}" for n in range(lines)))
        assert recording.record(PLAN, store, "http://server")[0] == "MLflow  http://server/c"
        return given[0]

    return log


def test_checkpoints_are_logged_though_the_comparison_failed(logged):
    assert logged(None) == (True, "What it is about.")


def test_a_table_is_shown_whole_or_cut_at_a_line(logged):
    assert logged(2) == (False, "What it is about.\n\n```\nline 0000\nline 0001\n```")
    missing, long = logged(1000)
    assert not missing and 7980 < len(long) <= 8000
    *lines, cut, end = long.split("```\n")[1].splitlines()
    assert lines == [f"line {n:04d}" for n in range(len(lines))]
    assert (cut, end) == ("… the whole table is in report.md", "```")


def test_a_fine_tune_s_small_files_go_with_its_run(tmp_path, monkeypatch):
    plan, store = planned(), Store(str(tmp_path))
    card = ModelCard(architecture="moe", family="mixtral", total_parameters=2, active_parameters=1,
                     flops_per_token=2, layers=4, origin="here")
    for role in ("checkpoint/tiny-moe/sft/0", "scores/tiny-moe/sft/0/questions"):
        folder = plan.nodes[plan.compare.inputs[role]].folder
        with store.attempt(folder) as (attempt, output):
            card.write(output)
            (output / "summary.json").write_text(json.dumps({}))
            for name in ("recipe_evidence.json", "routing.svg", "model.safetensors"):
                (output / name).touch()
            pd.DataFrame({"step": [1], "seconds": [1.0]}).to_parquet(
                output / "training_curve.parquet")
        store.commit(folder, {"attempt": attempt, "started": 1.0, "finished": 2.0})
    monkeypatch.setattr(recording, "_data", lambda *_: ())
    (child,) = recording._children(plan, store)
    assert {file.name for file in child.artifacts} == {
        "card.json", "training_curve.parquet", "recipe_evidence.json", "routing.svg"}
