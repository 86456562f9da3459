"""What a trial measures at each point of its training; a stub writes what the stages would."""

import json

import pandas as pd
import pytest
from search_sweeps import searching
from smoke import SMOKE

from pipeline.job import Outcome
from pipeline.search import trial as trials
from pipeline.search.checks import check_search
from pipeline.search.equal import Claims, Shared
from pipeline.search.plan import members, selecting
from pipeline.search.trial import TrialWork
from pipeline.store import Store

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
            store.commit(node.folder, {"attempt": attempt})
        return dict.fromkeys(todo, Outcome("done"))

    monkeypatch.setattr(trials, "execute", execute)

    def make(algorithm):
        sweep = searching(algorithm=algorithm)  # its objective is edits/clean_accuracy
        contents, selected = check_search(sweep, SMOKE), selecting(sweep)
        made[:] = [TrialWork(selected, contents, members(selected, contents)[0],
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
