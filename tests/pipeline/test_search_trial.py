"""What a trial measures at each point of its training; a stub writes what the stages would."""

import json
from types import SimpleNamespace

import pandas as pd
import pytest
from search_sweeps import searching
from smoke import SMOKE

from pipeline.job import Outcome
from pipeline.search import trial as trials
from pipeline.search.checks import check_search
from pipeline.search.equal import Claims, Shared
from pipeline.search.ledger import Ledger, Trial
from pipeline.search.plan import members, selecting
from pipeline.search.run import trial_table
from pipeline.search.trial import TrialWork
from pipeline.search.tuning import _Recorder
from pipeline.store import Store
from pipeline.train import RayCallbacks
from stages.data.card import CARD_FILE
from stages.errors import StageFailed

ASHA = {"kind": "asha", "reduction_factor": 3, "rungs": 1}
INTERMEDIATE = {
    "intermediate": {"score": {"questions/accuracy": 2.0, "refusal/over_refusal_rate": -1.0}}}
SCORES = {
    "questions": {"accuracy": {"value": 0.5}},
    "refusal": {"over_refusal_rate": {"value": 0.25}},
    "edits": {"clean_accuracy": {"value": 0.875}},
}


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A function that makes a trial's work, and the steps and evaluations of all that it had run.
    """
    ran, made = [], []

    def execute(plan, todo, store, folder, tell, *, one_by_one):
        for key in todo:
            node = plan.nodes[key]
            with store.attempt(node.folder) as (attempt, output):
                if node.stage == "finetune":
                    steps = node.spec.until or node.spec.steps
                    curve = pd.DataFrame({"tokens": [100] * steps})
                    curve.to_parquet(output / "training_curve.parquet")
                    ran.append(steps)
                elif node.stage == "evaluate":
                    name = next(n for n, e in made[0].sweep.evaluations.items()
                                if e == node.spec.evaluation)
                    (output / "summary.json").write_text(json.dumps(SCORES[name]))
                    ran.append(name)
                elif node.stage == "data":
                    (output / CARD_FILE).write_text(json.dumps({"left_out": ""}))
            store.commit(node.folder, {"attempt": attempt})
        return dict.fromkeys(todo, Outcome("done"))

    monkeypatch.setattr(trials, "execute", execute)

    def make(algorithm, *overrides, **fields):
        # Its objective is edits/clean_accuracy.
        sweep = searching(*overrides, algorithm=algorithm, **fields)
        contents, selected = check_search(sweep, SMOKE), selecting(sweep)
        made[:] = [TrialWork(selected, contents, members(selected, contents, SMOKE.parent)[0],
                             Store(str(tmp_path / "store")).uri, str(SMOKE.parent))]
        return made[0]

    return make, ran


def test_a_rung_runs_the_intermediate_evaluations_alone_and_is_compared_by_their_sum(work):
    make, ran = work
    reports = make(ASHA | INTERMEDIATE)({"learning_rate": 1e-3}, [])
    rung = next(reports)
    assert sorted(map(str, ran)) == ["2", "questions", "refusal"]  # of 6 steps
    assert rung.signal == 2 * 0.5 - 0.25 and rung.objectives == []
    assert set(rung.scores) == {"questions/accuracy", "refusal/over_refusal_rate"}
    assert (rung.resource, rung.steps, rung.tokens) == (1, 2, 200)
    ran.clear()
    end = next(reports)
    assert sorted(map(str, ran)) == ["6", "edits", "questions", "refusal"]
    assert end.signal == 0.75 and end.objectives == [0.875]
    assert (end.resource, end.steps, end.tokens) == (3, 6, 600)
    assert list(reports) == []


def test_a_rung_without_an_intermediate_runs_the_objective(work):
    make, ran = work
    rung = next(make(ASHA)({"learning_rate": 1e-3}, []))
    assert sorted(map(str, ran)) == ["2", "edits"] and rung.signal == 0.875


def test_an_equal_trial_that_comes_later_trains_no_rung_again(work):
    """The first one's weights of the rung are gone by then."""
    make, ran = work
    of = make(ASHA)
    shared = Shared(of, of.sweep.search, of.member.space, Claims({}))
    first = list(shared("a", {"learning_rate": 1e-3}, []))
    assert list(shared("b", {"learning_rate": 1e-3}, [])) == first
    assert sorted(map(str, ran)) == ["2", "6", "edits", "edits"]
    assert Store(of.store).finished(first[0].nodes) == {first[0].nodes[1]}


def failing(monkeypatch, step: int) -> None:
    """Lets the last seed's fine-tune get to a step, of 100 tokens each, and fail there."""
    run = trials.execute
    rank = SimpleNamespace(get_world_rank=lambda: 0)
    monkeypatch.setattr("ray.train.get_context", lambda: rank)

    def execute(plan, todo, store, folder, tell, *, one_by_one):
        *rest, last = (key for key in plan.nodes if plan.nodes[key].stage == "finetune")
        scored = {key for key in todo if plan.nodes[key].inputs.get("checkpoint") == last}
        run(plan, todo - scored - {last}, store, folder, tell, one_by_one=one_by_one)
        node = plan.nodes[last]
        callbacks = RayCallbacks(SimpleNamespace(node=node), store, node.spec)
        callbacks.report({"step": step, "total_steps": 6, "loss": float("nan"),
                          "total_tokens": 100 * step})
        return {last: Outcome("failed", "the loss is nan")}

    monkeypatch.setattr(trials, "execute", execute)


def test_a_failed_trial_cost_what_its_seeds_trained_until_then(work, monkeypatch):
    make, _ = work
    of, rate = make({"kind": "random"}, seeds=[0, 1]), {"learning_rate": 1e-3}
    assert of.spent(rate, []) == (0, 0)
    failing(monkeypatch, step=4)
    with pytest.raises(StageFailed, match="the loss is nan"):
        list(of(rate, []))
    assert of.spent(rate, []) == (6, 600 + 400)
    # It stands in the ledger, and in the table from which budgets are compared.
    ledger = Ledger(Store(of.store), "s")
    ledger.begin(0, lambda number: Trial(number, rate))
    recorder = _Recorder(ledger, 1, lambda trial: None, None, of.spent)
    trial = SimpleNamespace(trial_id="a", config={"proposal": {"number": 0, "values": rate}})
    recorder.on_trial_result(0, [], trial, {"reports": [], "failed": "the loss is nan"})
    # What happens to its driver afterwards changes nothing.
    recorder._fail(ledger.trials[0], trial, "its machine is gone")
    row = trial_table(Ledger(Store(of.store), "s"), of.sweep.search).iloc[0]
    assert row["reason"] == "the loss is nan"
    assert (row["status"], row["steps"], row["tokens"]) == ("failed", 6, 1000)


def test_a_segment_that_failed_costs_beside_those_before_it(work, monkeypatch):
    make, _ = work
    of = make({"kind": "pbt", "segments": 3}, "recipes.sft.schedule=constant")
    first = next(of({"learning_rate": 1e-3}, []))
    assert (first.steps, first.tokens) == (2, 200)
    failing(monkeypatch, step=1)
    clone = {"learning_rate": 2e-3}  # changed after the first segment
    with pytest.raises(StageFailed):
        list(of(clone, [first]))
    assert of.spent(clone, [first]) == (2 + 1, 200 + 100)


def test_a_trial_that_failed_on_its_way_from_a_rung_cost_that_at_least(work, monkeypatch):
    """Its training goes on from the rung's, whose tokens are in its own count."""
    make, _ = work
    of, rate = make(ASHA), {"learning_rate": 1e-3}
    rung = next(of(rate, []))
    assert of.spent(rate, [rung]) == (2, 200)
    failing(monkeypatch, step=5)
    with pytest.raises(StageFailed):
        list(of(rate, [rung]))
    assert of.spent(rate, [rung]) == (5, 500)
