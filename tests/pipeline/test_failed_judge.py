"""A judge is asked in float32; one that fails costs its own metrics and is asked again by the next
run."""

import json

import pandas as pd
import pytest
import torch
from smoke import SMOKE, planned

from pipeline import evaluate
from pipeline.cli import _code
from pipeline.display import finish_lines
from pipeline.execute import _gaps
from pipeline.job import Job, Outcome, run_stage
from pipeline.store import Store
from pipeline.survey import leave_out_missing, survey
from stages.models.tiny import tiny_model, tiny_tokenizer

KEY = "evaluate/tiny-none-refusal"
REASON = "failed when asked: RuntimeError: index 514 is out of bounds"


@pytest.fixture
def asked(monkeypatch):
    """Passes in this process: what was asked by stage, in which precision, and the stages that are
    broken."""
    found = {"broken": set(), "asked": [], "precision": {}}

    def by_actors(missing, jobs, store, checkpoint, dtype):
        stage = checkpoint.partition("@")[0]
        if stage in found["broken"]:
            raise RuntimeError("index 514 is out of bounds")
        for each in missing:
            files = [(each.shard.file, each.folder)]
            actor = evaluate.Responder(store.uri, files, checkpoint, dtype, 1, 0, {}, {})
            (problem,) = actor({"file": [0], "group": [each.shard.group]})["problem"]
            found["asked"].append(stage)
            found["precision"][stage] = actor.engine.model.dtype
            yield each.node, problem

    monkeypatch.setattr(evaluate, "_by_actors", by_actors)
    return found


def judged_by(folder, *names) -> str:
    """The override of a sweep that names guards, which are written into a folder."""
    for seed, name in enumerate(names):
        tiny_model("llama", tiny_tokenizer(), seed=seed).save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    judges = [{"kind": "guard", "name": name, "source": f"file:{folder / name}"} for name in names]
    return f"evaluations.refusal.judges={json.dumps(judges)}"


def prepare(plan, store) -> None:
    """Do all that the evaluation needs."""
    for key in plan.nodes:
        if key in plan.needs({KEY}) - {KEY}:
            done = run_stage(Job.of(plan.nodes[key], plan, store, SMOKE.parent))
            assert done.status == "done", done.message


def test_judges_are_in_float32_whatever_the_precision_of_the_judged_model(asked, tmp_path):
    plan = planned("recipes={}", "scoring_dtype=bfloat16", judged_by(tmp_path, "guard"))
    store = Store(str(tmp_path / "store"))
    prepare(plan, store)
    job = Job.of(plan.nodes[KEY], plan, store, SMOKE.parent)
    assert evaluate.run_pass([job])[KEY].status == "done"
    assert job.node.spec.dtype == "bfloat16"
    assert asked["precision"] == {"model/tiny": torch.bfloat16, "judge/guard": torch.float32}


def test_a_judge_that_fails_when_asked_costs_its_own_metrics(asked, tmp_path):
    judges, store = judged_by(tmp_path, "guard", "other"), Store(str(tmp_path / "store"))

    def plan():
        return planned("recipes={}", judges)

    first = plan()
    prepare(first, store)

    def run(made) -> Outcome:
        asked["asked"].clear()
        return evaluate.run_pass([Job.of(made.nodes[KEY], made, store, SMOKE.parent)])[KEY]

    def scores(folder) -> pd.DataFrame:
        return pd.read_parquet(store.fetch(folder) / "scores.parquet")

    asked["broken"] = {"judge/guard"}
    outcome = run(first)
    assert outcome.status == "done" and list(outcome.lacks) == ["judge/guard"]
    assert outcome.lacks["judge/guard"].startswith(REASON)
    assert {*asked["asked"]} == {"model/tiny", "judge/other"}
    # Stored as the evaluation that does without it.
    whole = first.nodes[KEY].folder
    assert not store.finished([whole])
    first.leave_out(KEY, outcome.lacks)
    rest = first.nodes[KEY].folder
    assert store.finished([rest]) and store.manifest(rest)["inputs"].keys() >= {"judge/other"}
    summary = json.loads((store.fetch(rest) / "summary.json").read_text())
    assert {"harmful_refusal_rate", "harmfulness/other/harmful"} <= summary.keys()
    assert not any("guard" in name for name in (*summary, *scores(rest)))
    # The comparison has the reason.
    outcomes = {key: Outcome("done") for key in first.nodes} | {KEY: outcome}
    assert _gaps(first.compare, first, outcomes) == outcome.lacks
    assert _code({KEY: outcome}) == 1 and _code({KEY: Outcome("done")}) == 0
    (told,) = finish_lines(first, {KEY: outcome}, store)
    assert told.startswith(f"failed  {KEY}: judge/guard {REASON}")

    # A report, and a second run, find what is stored; nothing else is asked again.
    again = plan()
    assert leave_out_missing(again, store) == outcome.lacks
    assert again.nodes[KEY].folder == rest and survey(again, store)[KEY].status == "done"
    before = store.manifest(rest)
    again = plan()
    assert survey(again, store)[KEY].status != "done"
    assert run(again).lacks == outcome.lacks and asked["asked"] == []
    assert store.manifest(rest) == before

    # Once the judge works, it alone is asked, and the whole evaluation is there.
    asked["broken"] = set()
    again = plan()
    assert run(again).lacks == {} and {*asked["asked"]} == {"judge/guard"}
    assert leave_out_missing(again, store) == {} and again.nodes[KEY].folder == whole
    found, partial = scores(whole), scores(rest)
    assert found["harm_guard"].between(0, 1).all()
    pd.testing.assert_frame_equal(found[list(partial)], partial)
