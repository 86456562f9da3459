"""A task of lm-evaluation-harness in a sweep: planned, answered on Ray, compared with its gaps."""

import json
import os

import pandas as pd
import pytest
import yaml
from smoke import SMOKE

from pipeline.checks import check
from pipeline.display import plan_lines
from pipeline.estimate import Estimator
from pipeline.execute import execute
from pipeline.plan import build
from pipeline.store import Store
from pipeline.survey import survey
from pipeline.sweep_file import load
from stages.compare.results import compare
from stages.errors import BadInput

TASK = {
    "task": "colours",
    "dataset_path": "json",
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": ["red", "blue"],
    "doc_to_target": "label",
    "metric_list": [
        {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
        {"metric": "acc_norm", "aggregation": "median", "higher_is_better": True},
    ],
}


@pytest.fixture
def sweep(tmp_path):
    """A sweep file beside a folder with a task and its data."""
    (tmp_path / "own").mkdir()
    docs = [{"question": f"Colour {n}?", "label": n % 2} for n in range(6)]
    (tmp_path / "own" / "docs.jsonl").write_text("\n".join(map(json.dumps, docs)))
    files = {"data_files": {"test": "own/docs.jsonl"}, "cache_dir": str(tmp_path / "cache")}
    (tmp_path / "own" / "task.yaml").write_text(yaml.safe_dump(TASK | {"dataset_kwargs": files}))
    content = {
        "name": "colours",
        "datasets": {},
        "models": {"tiny": {"source": "tiny:llama"}, "tiny-moe": {"source": "tiny:mixtral"}},
        "pairs": [{"moe": "tiny-moe", "dense": "tiny"}],
        "evaluations": {"own": {"kind": "lm_eval", "task": "colours", "include_path": "own"}},
        "resources": {"evaluate": {"shard_size": 4}},
    }
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def planned(path):
    sweep = load(path)
    return build(sweep, check(sweep, path))


def test_runs_on_ray_and_shows_what_cannot_be_summed_as_a_gap(cluster, sweep, tmp_path):
    plan, store = planned(sweep), Store(str(tmp_path / "store"))
    here = os.getcwd()
    key = "evaluate/tiny-none-own"
    outcome = execute(plan, plan.needs({key}), store, tmp_path, lambda event: None)[key]
    assert (outcome.status, outcome.message) == ("done", "")
    assert os.getcwd() == here
    folder = store.fetch(plan.nodes[key].folder)
    # One model stands for both.
    inputs = {f"scores/{model}/none/0/own": folder for model in ("tiny", "tiny-moe")}
    table, *_ = compare(plan.compare.spec, inputs, {})
    scores = pd.read_parquet(folder / "scores.parquet")
    assert list(table["metric"]) == ["acc", "acc_norm"]
    assert list(table["primary"]) == [True, False]
    assert table["dense"][0] == scores["acc"].mean() and table["n"][0] == 6
    assert table["gap"][0] == "" and table["p_holm"].notna()[0]
    assert table["gap"][1] == (
        "the harness sums it up by median, which is no function of sums over examples")
    assert pd.isna(table["moe"][1])


def test_a_change_of_the_task_or_its_data_makes_scores_stale(sweep):
    before = planned(sweep).nodes["evaluate/tiny-none-own"].fingerprint
    assert planned(sweep).nodes["evaluate/tiny-none-own"].fingerprint == before
    data = sweep.parent / "own" / "docs.jsonl"
    data.write_text(data.read_text().replace("Colour 3", "Color 3"))
    assert planned(sweep).nodes["evaluate/tiny-none-own"].fingerprint != before


def test_planning_needs_no_data_and_says_that_its_estimate_is_a_lower_bound(sweep, tmp_path):
    (sweep.parent / "own" / "docs.jsonl").unlink()
    plan, store = planned(sweep), Store(str(tmp_path / "store"))
    lines = plan_lines(plan, survey(plan, store), store, sweep.parent)
    assert any("evaluate/tiny-none-own" in line for line in lines)
    work = Estimator(plan, store, sweep.parent).work(plan.nodes["evaluate/tiny-none-own"])
    assert not work.whole


def test_named_in_short(sweep):
    content = yaml.safe_load(sweep.read_text())
    content["evaluations"] = {"h": "lm_eval:hellaswag"}
    sweep.write_text(yaml.safe_dump(content))
    evaluation = planned(sweep).nodes["evaluate/tiny-none-h"].spec.evaluation
    assert evaluation.task == "hellaswag" and evaluation.primary == "acc"


def test_a_search_does_not_select_by_it(tmp_path):
    path = SMOKE.parent / "search.yaml"
    sweep = load(path, ["evaluations.more=lm_eval:hellaswag",
                        "search.objectives=[{score: more/acc}]"])
    from pipeline.search.checks import check_search

    with pytest.raises(BadInput, match="more is scored on data of lm-evaluation-harness"):
        check_search(sweep, path)


def test_samples_of_a_task_without_a_filter_are_refused_in_a_line(sweep):
    content = yaml.safe_load(sweep.read_text())
    (sweep.parent / "own" / "task.yaml").write_text(yaml.safe_dump(
        TASK | {"output_type": "generate_until", "metric_list": [{"metric": "exact_match"}]}))
    content["evaluations"]["own"]["technique"] = {"kind": "self_consistency", "samples": 3}
    sweep.write_text(yaml.safe_dump(content))
    with pytest.raises(BadInput) as caught:
        load(sweep)
    told = str(caught.value)
    assert told.startswith(f"{sweep}: evaluations.own: ") and "\n" not in told
    assert "and colours has no filter; remove technique" in told
