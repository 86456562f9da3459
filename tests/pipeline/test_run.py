"""A whole sweep on a cluster of two machines: as a job, again, killed, and failing."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pandas as pd
import psutil
import pytest
from smoke import ROOT, SECRET, SMOKE, command, planned

from pipeline.execute import _check_shared, check_cluster, execute
from pipeline.store import Store
from pipeline.survey import survey
from stages.errors import BadInput


def test_submitted_job_runs_every_stage_over_both_machines(job):
    assert {s.status for s in survey(job.plan, job.store).values()} == {"done"}
    manifest = job.store.manifest(job.plan.nodes["finetune/tiny-moe-sft-seed0"].folder)
    # Each machine has one CPU, so two workers that share the experts are on both.
    assert manifest["run_time"]["workers"] == manifest["run_time"]["expert_parallel"] == 2
    comparison = pd.read_parquet(job.folder / "reports/smoke/comparison.parquet")
    primary = comparison[comparison["p_holm"].notna()]
    assert sorted(primary["evaluation"]) == sorted(2 * ["refusal", "questions", "edits", "domains"])
    assert "report" in job.output and "MoE − dense" in job.output


def test_secrets_of_the_job_are_in_no_file_and_no_output(job):
    assert SECRET not in job.output
    for file in job.folder.rglob("*"):
        assert not file.is_file() or SECRET.encode() not in file.read_bytes(), file


def test_a_second_run_executes_nothing(job):
    def manifests() -> dict[Path, int]:
        return {p: p.stat().st_mtime_ns for p in job.folder.rglob("manifest.json")}

    before = manifests()
    done = command("run", str(SMOKE), "--store", str(job.folder))
    assert done.returncode == 0, done.stderr
    assert "smoke: 27 nodes, all done" in done.stdout and "MoE − dense" in done.stdout
    assert manifests() == before


def test_score_table_can_be_rebuilt_without_models(job, tmp_path):
    """`report` needs the stored scores and cards, not the weights."""
    store = tmp_path / "store"
    shutil.copytree(job.folder, store, ignore=shutil.ignore_patterns("*.safetensors", "compare"))
    examples = tmp_path / "examples.parquet"
    done = command("report", str(SMOKE), "--store", str(store), "--examples", str(examples))
    assert done.returncode == 0, done.stderr
    table = pd.read_parquet(examples)
    assert f"{len(table):,} scores of examples in {examples}" in done.stdout
    scored = {(e, m, r) for e, m, r in zip(
        table["evaluation"], table["model"], table["recipe"], strict=True)}
    assert len(scored) == sum(node.stage == "evaluate" for node in job.plan.nodes.values())
    again, first = (pd.read_parquet(f / "reports/smoke/comparison.parquet")
                    for f in (store, job.folder))
    pd.testing.assert_frame_equal(again, first)


def test_show_lists_the_examples_that_meet_a_condition(job):
    node = job.plan.nodes["evaluate/tiny-moe-sft-seed0-questions"]
    moe = pd.read_parquet(job.store.fetch(node.folder) / "scores.parquet")
    wrong = moe.loc[moe["correct"] == 0, "example_id"]
    done = command("show", str(SMOKE), "--store", str(job.folder), "--evaluation", "questions",
                   "--where", "moe_wrong")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{len(wrong)} of 8 examples")
    assert all(f"── {example} ·" in done.stdout for example in wrong)


def test_gc_deletes_what_no_sweep_needs_and_nothing_else(job, tmp_path):
    store = tmp_path / "store"
    shutil.copytree(job.folder, store)
    (store / "data/other@123456789abc").mkdir()
    (store / "data/other@123456789abc/rows").write_bytes(b"x" * 1000)
    needed = {node.folder for node in job.plan.nodes.values()}
    listed = command("gc", str(SMOKE), "--store", str(store))
    assert "data/other@123456789abc" in listed.stdout
    assert (store / "data/other@123456789abc").exists()
    command("gc", str(SMOKE), "--store", str(store), "--yes")
    there = {f"{stage.name}/{node.name}" for stage in store.iterdir() if stage.is_dir()
             for node in stage.iterdir() if "@" in node.name}
    assert there == needed


@pytest.fixture
def prepared(job, tmp_path):
    """A store with the sweep's data and models, and nothing trained or evaluated."""
    for stage in ("data", "model"):
        shutil.copytree(job.folder / stage, tmp_path / "store" / stage)
    return Store(str(tmp_path / "store"))


def run_nodes(plan, keys: set[str], store: Store) -> dict:
    todo = {key for key in plan.needs(keys) if survey(plan, store)[key].status != "done"}
    return execute(plan, todo, store, SMOKE.parent, lambda event: None)


def test_killed_worker_resumes_and_ends_with_the_same_curve(cluster, prepared, tmp_path):
    key = "finetune/tiny-moe-sft-seed0"
    plan = planned("recipes.sft.steps=30")
    node = plan.nodes[key]
    whole = Store(str(tmp_path / "whole"))
    shutil.copytree(prepared.root, whole.root)
    assert run_nodes(plan, {key}, whole)[key].status == "done"

    killed = []

    def kill() -> None:
        while not killed:
            progress = prepared.read_json(f"{node.folder}/progress.json") or {"done": 0}
            if progress["done"] >= 9:
                workers = [p for p in psutil.process_iter(["name", "cmdline"])
                           if "RayTrainWorker" in " ".join(p.info["cmdline"] or [])]
                if workers:
                    workers[0].kill()
                    killed.append(progress["done"])
            time.sleep(0.01)

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    outcome = run_nodes(plan, {key}, prepared)[key]
    assert outcome.status == "done", outcome.message
    assert killed and killed[0] < 30
    resumed, uninterrupted = (
        pd.read_parquet(store.fetch(node.folder) / "training_curve.parquet")
        for store in (prepared, whole))
    for column in ("step", "loss", "gradient_norm", "learning_rate", "auxiliary_loss", "tokens"):
        assert resumed[column].tolist() == uninterrupted[column].tolist()


def test_stopped_and_killed_evaluation_repeats_no_finished_shard_and_gives_the_same_scores(
    cluster, job, prepared
):
    overrides = ["--set", "recipes={}", "--set", "resources.evaluate.shard_size=2"]
    arguments = ["run", str(SMOKE), "--store", prepared.root, "--address", cluster.address,
                 *overrides]
    root = Path(prepared.root)

    def shards() -> dict[Path, int]:
        found = (root / "evaluate").glob("*/responses/*.parquet")
        return {path: path.stat().st_mtime_ns for path in found}

    def interrupted(by: signal.Signals) -> tuple[int, str]:
        """Exit code and errors of a run that got a signal after its first new shard."""
        known, deadline = len(shards()), time.monotonic() + 300
        process = subprocess.Popen([sys.executable, "-m", "pipeline", *arguments], cwd=ROOT,
                                   stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                                   # A test run in the background of a script ignores Ctrl-C.
                                   preexec_fn=lambda: signal.signal(
                                       signal.SIGINT, signal.SIG_DFL))
        while len(shards()) == known and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(by)
        _, errors = process.communicate(timeout=60)
        time.sleep(3)  # Ray ends the actors of a driver that is gone
        return process.returncode, errors

    code, errors = interrupted(signal.SIGINT)
    assert code == 130
    assert errors.strip().splitlines()[-1] == (
        "stopped; finished work is kept, run the same command to go on")
    assert "Traceback" not in errors
    stopped = shards()
    interrupted(signal.SIGKILL)
    before = shards()
    assert {path: before[path] for path in stopped} == stopped
    plan = planned("recipes={}", "resources.evaluate.shard_size=2")
    keys = [key for key, node in plan.nodes.items() if node.stage == "evaluate"]
    requests = (root / "evaluate").glob("*/requests.parquet")
    total = 2 * sum(-(-len(pd.read_parquet(path)) // 2) for path in requests)
    assert 0 < len(before) < total
    outcomes = run_nodes(plan, set(keys), prepared)
    assert {outcomes[key].status for key in keys} == {"done"}
    assert {path: shards()[path] for path in before} == before
    for key in keys:
        found, expected = (pd.read_parquet(store.fetch(plan.nodes[key].folder) / "scores.parquet")
                           for store in (prepared, job.store))
        pd.testing.assert_frame_equal(found, expected)


def test_failed_training_leaves_a_gap_and_the_rest_of_the_report(cluster, job, tmp_path):
    store = Store(str(tmp_path / "store"))
    shutil.copytree(job.folder, store.root)
    overrides = ["--set", "recipes.sft.learning_rate=1e30", "--set",
                 "recipes.sft.gradient_clipping=null"]
    done = command("run", str(SMOKE), "--store", store.root, "--address", cluster.address,
                   *overrides)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "failed  finetune/tiny-moe-sft-seed0: " in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    plan = planned("recipes.sft.learning_rate=1e30", "recipes.sft.gradient_clipping=null")
    states = survey(plan, store)
    assert states["finetune/tiny-moe-sft-seed0"].status != "done"
    assert states["compare/smoke"].status != "done"
    comparison = pd.read_parquet(Path(store.root) / "reports/smoke/comparison.parquet")
    untuned = comparison[comparison["recipe"] == "none"]
    assert untuned["difference"].notna().all()
    assert comparison.loc[comparison["recipe"] == "sft", "difference"].isna().all()
    assert "finetune/tiny-moe-sft-seed0 failed" in (
        Path(store.root) / "reports/smoke/report.md").read_text()


def test_a_worker_that_dies_too_often_fails_the_node(cluster, prepared):
    key = "finetune/tiny-sft-seed0"
    plan = planned("recipes.sft.steps=400", "resources.finetune.max_failures=0")
    node = plan.nodes[key]

    def kill() -> None:
        for _ in range(6000):
            if (prepared.read_json(f"{node.folder}/progress.json") or {"done": 0})["done"] >= 1:
                for process in psutil.process_iter(["cmdline"]):
                    if "RayTrainWorker" in " ".join(process.info["cmdline"] or []):
                        process.kill()
                        return
            time.sleep(0.05)

    threading.Thread(target=kill, daemon=True).start()
    outcome = run_nodes(plan, {key}, prepared)[key]
    assert outcome.status == "failed"
    assert outcome.message.startswith("training ended after 0 allowed restart(s): ")
    assert len(outcome.message.splitlines()) == 1
    assert prepared.manifest(node.folder) is None


def test_what_the_cluster_can_never_run_is_refused(cluster, tmp_path):
    plan = planned("resources.evaluate.workers=3")
    with pytest.raises(BadInput, match="resources.evaluate: the cluster's machines have room for 2 "
                                       "of 3 workers of 1 CPU; lower workers"):
        check_cluster(plan, set(plan.nodes), Store(str(tmp_path)))
    plan = planned("resources.data.cpus=2")
    with pytest.raises(BadInput, match="no machine of the cluster has, for one worker, 2 CPU"):
        check_cluster(plan, set(plan.nodes), Store(str(tmp_path)))


def test_a_store_that_the_machines_do_not_share_is_refused(cluster, tmp_path):
    _check_shared(Store(str(tmp_path)))
    assert os.listdir(tmp_path) == []
    with pytest.raises(BadInput, match="does not see what the driver wrote there; use a bucket"):
        _check_shared(Store("mock:///store"))  # each process has its own
