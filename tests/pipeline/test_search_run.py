"""A whole search on the cluster of two machines: killed, started again, and reused by a sweep."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
from search_sweeps import searching
from smoke import ROOT, SMOKE, command

from pipeline.gc import collect
from pipeline.node import Node
from pipeline.plan import build
from pipeline.search import run
from pipeline.search.checks import check_search
from pipeline.search.ledger import Ledger
from pipeline.search.plan import selecting
from pipeline.search.trial import TrialWork
from pipeline.store import Store
from pipeline.survey import adopt, survey

FIELDS = {"algorithm": {"kind": "asha", "reduction_factor": 2, "rungs": 1}, "trials": 2}
# Two workers evaluate, all that the cluster has, so one trial runs after the other.
SET = ["recipes.sft.steps=4", "resources.finetune.workers=1",
       "resources.finetune.expert_parallel=1"]


def rung_of(work: TrialWork, values: dict) -> Node:
    """The first steps of a trial's fine-tune."""
    plan, (measured,) = work._planned(values, [], resource=1)
    return plan.nodes[measured.finetune]


def curve(store: Store, folder: str) -> pd.DataFrame:
    return pd.read_parquet(store.fetch(folder) / "training_curve.parquet")


def test_a_killed_search_goes_on_and_repeats_no_finished_node(cluster, tmp_path):
    store = Store(str(tmp_path / "store"))
    sweep = searching(*SET, **FIELDS)
    contents = check_search(sweep, SMOKE)
    moe, dense = run.model_searches(sweep, contents, SMOKE.parent)
    assert moe.member.model == "tiny-moe"

    arguments = [f"--set={field}" for field in SET]
    content = json.dumps(sweep.search.model_dump(mode="json", exclude_none=True))
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline", "search", str(SMOKE), "--store", store.root,
         "--address", cluster.address, f"--set=search={content}", *arguments],
        cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    first = Path(store.root) / moe.folder / "trials/000000.json"
    work = TrialWork(selecting(sweep), contents, moe.member, store.uri, str(SMOKE.parent))
    values, deadline, of_rung = moe.member.space.draw(0, 0), time.monotonic() + 400, None
    while time.monotonic() < deadline and process.poll() is None:
        if first.exists() and json.loads(first.read_text())["status"] != "running":
            break
        if of_rung is None and first.exists():
            part = rung_of(work, values)
            if store.finished([part.folder]):
                of_rung = curve(store, part.folder)
                # What goes on from there is resumable, and no result.
                assert store.manifest(part.part_of) is None
                assert "train" in os.listdir(Path(store.root) / part.part_of)
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(3)  # Ray ends the actors of a driver that is gone
    before = {p: p.stat().st_mtime_ns for p in Path(store.root).rglob("manifest.json")}
    assert run.prepare([moe, dense], store)[1] == set()
    recorded = Ledger(store, moe.folder).trials
    assert recorded[0].status == "finished", recorded[0].reason

    lines = []
    assert store.manifest(moe.folder) is None
    run.run_search(moe, sweep, contents, store, SMOKE.parent, lines.append)
    assert {p: p.stat().st_mtime_ns for p in before} == before
    trials = Ledger(store, moe.folder).trials
    assert trials[0] == recorded[0]
    assert [t.values for t in trials.values()] == [
        moe.member.space.draw(0, number) for number in range(2)]
    table = pd.read_parquet(store.fetch(moe.folder) / "trials.parquet")
    assert table["status"].tolist()[0] == "finished"
    done = trials[0]
    assert [(r.resource, r.steps) for r in done.reports] == [(1, 2), (2, 4)]
    # Training went on from the rung and did not repeat its steps, to the second.
    assert 0 < done.reports[0].tokens < done.reports[1].tokens
    seconds = curve(store, done.reports[1].nodes[0])["seconds"].tolist()
    assert len(seconds) == 4 and seconds[:2] == of_rung["seconds"].tolist()
    # The rung's scores stay, its weights do not; what the trial left is complete.
    rung, rung_scores = done.reports[0].nodes
    assert store.manifest(rung) is None and store.manifest(rung_scores) is not None
    finetune, scores = done.reports[1].nodes
    assert "train" not in os.listdir(Path(store.root) / finetune)
    summary = json.loads((store.fetch(scores) / "summary.json").read_text())
    assert done.reports[1].objectives == [summary["clean_accuracy"]["value"]]
    # Nothing that the search needs is given away, only the attempt that the kill cut short.
    kept = run.folders_of(sweep, [moe, dense], contents, store)
    assert {finetune, scores, rung_scores, moe.folder} <= kept
    assert all("attempt-" in line for line in collect(kept, store, False)[:-1])
    unneeded = "\n".join(collect(kept - {scores}, store, False))
    assert scores in unneeded and finetune not in unneeded
    # A sweep that asks for the same recipe under a name of its own finds it.
    trained = selecting(sweep)
    recipe = moe.member.space.recipe(done.values)
    later = trained.model_copy(update={"recipes": {"mine": recipe}, "search": None})
    plan = build(later, contents)
    keys = ["finetune/tiny-moe-mine-seed0", "evaluate/tiny-moe-mine-seed0-edits"]
    assert {survey(plan, store)[key].status for key in keys} == {"to run"}
    adopt(plan, store)
    assert [plan.nodes[key].folder for key in keys] == [finetune, scores]
    assert {survey(plan, store)[key].status for key in keys} == {"done"}
    # The winner is trained again under its own recipe, with the fresh seeds.
    dense_too = replace(dense, folder=moe.folder)
    final = run.final_plan(sweep, [moe, dense_too], contents, store)
    best = run.winners(moe, sweep, store)[0]
    assert final.nodes["finetune/tiny-moe-searched-seed101"].spec.learning_rate == (
        best.values["learning_rate"])
    report = run.report(sweep, [moe, dense_too], store, f"sqlite:///{tmp_path}/mlflow.db")
    assert "Trained again" in Path(report).read_text()


def test_a_trial_that_could_never_be_placed_is_refused(cluster, tmp_path):
    sweep = searching()
    content = json.dumps(sweep.search.model_dump(mode="json", exclude_none=True))
    done = command("search", str(SMOKE), f"--set=search={content}", "--store", str(tmp_path / "s"),
                   "--address", cluster.address, "--set=resources.evaluate.workers=3")
    assert done.returncode == 2
    refusal = "resources.evaluate: the cluster's machines have room for 2 of 3 workers of 1 CPU"
    assert refusal in done.stderr
    assert not (tmp_path / "s/search").exists()
