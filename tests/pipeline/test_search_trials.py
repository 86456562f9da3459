"""Trials on Ray Tune with a stub in place of training: sequence, failures, restarts, stopping."""

import importlib
import json
import math
import os
import sys
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
from ray import tune
from ray.tune.schedulers import TrialScheduler
from ray.util.state import list_actors
from search_sweeps import BASE, RATE, search_of
from smoke import ROOT

from pipeline.search.ledger import Ledger, Report, Trial
from pipeline.search.plan import Member, segments_of
from pipeline.search.proposals import proposals
from pipeline.search.run import _values_text, recipes_of, trial_table
from pipeline.search.schedulers import scheduler
from pipeline.search.space import Space
from pipeline.search.tuning import _drive, _slot, run_trials
from pipeline.store import Store
from stages.errors import StageFailed
from stages.finetune.recipe import Router

# Workers do not see this file.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

ASHA = {"kind": "asha", "reduction_factor": 3, "rungs": 1}
PBT = {"kind": "pbt", "segments": 3, "quantile": 0.5}


class Stub:
    """Loss falls with the distance of the rate from 1e-3 and, a little, with training.

    Leaves a file for each measurement in a folder, so that repeated work is seen.
    """

    def __init__(self, search, folder: Path, dies_in: int | None = None):
        self.search, self.folder = search, str(folder)
        draw = None if dies_in is None else Space(BASE, search.space).draw(0, dies_in)
        self.unlucky = draw and draw["learning_rate"]

    @staticmethod
    def spent(values, past):
        return 3, 7 + len(past)

    def __call__(self, values, past):
        for resource in self.search.resources():
            if past and resource <= past[-1].resource:
                continue
            files = Path(self.folder)
            files.mkdir(exist_ok=True)
            rate = values["learning_rate"]
            if rate == self.unlucky:
                (files / f"out-{len(list(files.iterdir()))}").touch()
                raise RuntimeError("the lights went out")
            if rate > 0.02:
                raise StageFailed(f"step 3: the loss is nan at {rate:.3g}")
            (files / f"{rate:.9g}-{resource}-{len(list(files.iterdir()))}").touch()
            loss = abs(math.log10(rate) + 3) - 0.01 * resource
            yield Report(resource, [loss, rate][: len(self.search.objectives)], loss,
                         steps=resource, tokens=10 * resource, values=values)


@pytest.fixture
def run(cluster, tmp_path):
    """A function that runs a search of the stub's loss, and its ledger afterwards."""
    store = Store(str(tmp_path / "store"))

    def go(search, trials: int, name: str = "s", concurrent: int = 1, **stub) -> Ledger:
        folder = f"search/{name}@0"
        goals = [False, True][: len(search.objectives)]
        run_trials(search, Space(BASE, search.space), trials, Ledger(store, folder),
                   Stub(search, tmp_path / name, **stub), spent=Stub.spent, maximize=goals,
                   upwards=False, storage=store.path(folder), concurrent=concurrent,
                   tell=lambda trial: None)
        store.delete(f"{folder}/tune")
        return Ledger(store, folder)

    go.folder = tmp_path
    return go


def rates(ledger: Ledger) -> list[float]:
    return [t.values["learning_rate"] for _, t in sorted(ledger.trials.items())]


def test_random_trials_are_the_space_s_draws_and_failures_end_nothing(run):
    search = search_of()
    ledger = run(search, 8)
    space = Space(BASE, search.space)
    assert rates(ledger) == [space.draw(0, n)["learning_rate"] for n in range(8)]
    failed = {n for n, rate in enumerate(rates(ledger)) if rate > 0.02}
    assert 0 < len(failed) < 8
    for number, trial in ledger.trials.items():
        assert trial.status == ("failed" if number in failed else "finished")
        assert ("the loss is nan" in trial.reason) == (number in failed)
    table = trial_table(ledger, search)
    assert table["objective:edits/clean_accuracy"].isna().sum() == len(failed)
    assert table.loc[table["status"] == "finished", "tokens"].eq(10).all()
    assert table.loc[table["status"] == "failed", "tokens"].eq(7).all()
    claims = [a for a in list_actors(limit=1000) if a.class_name == "Claims"]
    assert claims and {a.state for a in claims} == {"DEAD"}


def test_one_driver_process_takes_one_trial_after_the_other(cluster, tmp_path):
    def measure(values, past):
        (tmp_path / "drivers").mkdir(exist_ok=True)
        (tmp_path / "drivers" / str(os.getpid())).touch()
        yield Report(1, [0.5], 0.5, steps=1, tokens=10, values=values)

    search, store = search_of(), Store(str(tmp_path / "store"))
    run_trials(search, Space(BASE, search.space), 4, Ledger(store, "search/s@0"), measure,
               spent=Stub.spent, maximize=[True], upwards=True, storage=store.path("search/s@0"),
               concurrent=1, tell=lambda trial: None)
    assert len(Ledger(store, "search/s@0").trials) == 4
    assert len(list((tmp_path / "drivers").iterdir())) == 1


def test_the_benchmark_of_a_search_s_cost_runs_its_trials(cluster, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    benchmark = importlib.import_module("search")
    ray.cloudpickle.register_pickle_by_value(benchmark)
    assert benchmark.run(3, str(tmp_path)) == {"finished": 3}


def test_a_grid_is_gone_through_once(run):
    search = search_of(algorithm={"kind": "grid"}, trials=3,
                       space={"learning_rate": {"grid": [1e-4, 1e-3, 1e-2]}})
    ledger = run(search, 3)
    assert rates(ledger) == [1e-4, 1e-3, 1e-2]
    losses = [t.reports[-1].objectives[0] for _, t in sorted(ledger.trials.items())]
    assert losses == pytest.approx([0.99, -0.01, 0.99])


def test_a_restarted_search_goes_on_with_the_unfinished_trials_and_repeats_none(run):
    """Stopped by force after three trials: what was recorded stays, the same trials follow."""
    search, whole = search_of(), run(search_of(), 6, "whole")
    half = run(search, 3, "half")
    before = {n: t.ended for n, t in half.trials.items()}
    measured = sorted(p.name for p in (run.folder / "half").iterdir())
    # A trial that had begun: its values are recorded, nothing is measured.
    space = Space(BASE, search.space)
    half.begin(3, lambda number: Trial(number, space.draw(0, number)))
    ledger = run(search, 6, "half")
    assert rates(ledger) == rates(whole)
    assert {n: ledger.trials[n].ended for n in before} == before
    assert set(measured) < {p.name for p in (run.folder / "half").iterdir()}
    assert len(list((run.folder / "half").iterdir())) == len(list(
        (run.folder / "whole").iterdir()))


def test_equal_trials_at_once_are_measured_once_also_after_a_restart(run):
    """Eight trials of three rates, two at a time; each rate at the rung and at the end."""
    search = search_of(algorithm=ASHA, space={"learning_rate": {"choice": [1e-4, 1e-3, 3e-3]}})
    ledger = run(search, 8, concurrent=2)

    def measured() -> list[str]:
        return [file.name.rsplit("-", 1)[0] for file in (run.folder / "s").iterdir()]

    taken = sum(len(t.reports) for t in ledger.trials.values())
    assert len(measured()) == len(set(measured())) < taken
    for trial in ledger.trials.values():
        assert all(report.values == trial.values for report in trial.reports)
    # As if the kill had come before a trial reported what an equal one had measured.
    for trial in ledger.trials.values():
        if any(t.number != trial.number and t.values == trial.values
               and len(t.reports) >= len(trial.reports) for t in ledger.trials.values()):
            trial.status, trial.ended, trial.reports = "running", None, []
            ledger.write(trial)
    assert sum(not trial.over for trial in ledger.trials.values()) == 5
    again = run(search, 8, concurrent=2)
    assert all(trial.over for trial in again.trials.values())
    assert len(measured()) == len(set(measured()))


def test_optuna_goes_on_where_it_was_killed(run):
    search = search_of(algorithm={"kind": "tpe", "startup_trials": 2})
    whole = run(search, 6, "whole")
    run(search, 4, "half")
    assert rates(run(search, 6, "half")) == rates(whole)


def test_a_genetic_search_of_two_objectives_goes_on_where_it_was_killed(run):
    """The distance falls and the rate grows: each is measured, and both decide."""
    names = [{"score": "edits/clean_accuracy", "direction": "minimize"},
             {"score": "questions/accuracy"}]
    search = search_of(algorithm={"kind": "nsga2", "population": 3}, objectives=names,
                       space={"learning_rate": {"log_uniform": [1e-5, 1e-2]}})
    whole = run(search, 8, "whole")
    assert {t.status for t in whole.trials.values()} == {"finished"}
    for trial in whole.trials.values():
        rate = trial.values["learning_rate"]
        assert trial.reports[-1].objectives == pytest.approx(
            [abs(math.log10(rate) + 3) - 0.01, rate])
    run(search, 5, "half")
    assert rates(run(search, 8, "half")) == rates(whole)


def test_a_trial_whose_driver_dies_is_tried_again_and_then_told(run):
    """Three times in all; the other trials do not notice."""
    ledger = run(search_of(), 3, dies_in=1)
    assert [t.status for t in ledger.trials.values()] == ["finished", "failed", "finished"]
    assert ledger.trials[1].reason == "its driver died 3 times: RuntimeError: the lights went out"
    assert len([p for p in (run.folder / "s").iterdir() if "out" in p.name]) == 3


def test_asha_stops_what_is_behind_and_a_restart_repeats_no_measurement(run):
    search = search_of(algorithm=ASHA)
    ledger = run(search, 9)
    by_rung = {n: t for n, t in ledger.trials.items() if t.reports}
    for number, trial in by_rung.items():
        earlier = [by_rung[n].reports[0].signal for n in by_rung if n < number]
        # One of three goes on: the cut is the lowest third of those before (here, less is better).
        if earlier:
            ordered = sorted(earlier)
            place = (len(ordered) - 1) / 3
            low = math.floor(place)
            cut = ordered[low] + (place - low) * (
                ordered[min(low + 1, len(ordered) - 1)] - ordered[low])
            assert trial.status == ("finished" if trial.reports[0].signal <= cut else "stopped")
    assert {t.status for t in ledger.trials.values()} >= {"finished", "stopped"}
    table = trial_table(ledger, search)
    assert table.loc[table["status"] == "stopped", "steps"].eq(1).all()
    measured = {p.name for p in (run.folder / "s").iterdir()}
    longer = run(search, 12)
    assert {n: longer.trials[n].status for n in range(9)} == {
        n: ledger.trials[n].status for n in range(9)}
    new = {p.name for p in (run.folder / "s").iterdir()} - measured
    assert all(int(name.rsplit("-", 1)[1]) >= len(measured) for name in new)
    assert len(new) == sum(len(longer.trials[n].reports) for n in range(9, 12))


def test_hyperband_halves_whole_brackets(run):
    search = search_of(algorithm={"kind": "hyperband", "reduction_factor": 3, "rungs": 1},
                       space={"learning_rate": {"log_uniform": [1e-5, 1e-2]}})
    ledger = run(search, 5)
    # Two brackets: two trials that run whole, and three of which one goes on.
    finished = [n for n, t in ledger.trials.items() if t.status == "finished"]
    stopped = {n: t for n, t in ledger.trials.items() if t.status == "stopped"}
    assert len(finished) == 3 and len(stopped) == 2
    assert all(len(t.reports) == 1 for t in stopped.values())
    measured = len(list((run.folder / "s").iterdir()))
    cut = ledger.trials[max(stopped)]
    cut.status, cut.ended = "running", None  # as if the kill had come before the decision
    ledger.write(cut)
    again = run(search, 5)
    assert {n: t.status for n, t in again.trials.items()} == {
        n: "stopped" if n in stopped else "finished" for n in range(5)}
    assert len(list((run.folder / "s").iterdir())) == measured


@dataclass(eq=False)
class Waiting:
    trial_id: str
    status: str = "PENDING"
    is_saving: bool = False
    seen: int = 0
    """Measurements so far."""


class OneByOne:
    """Stands for Ray Tune's controller: trials run in turn, as far as the scheduler lets them."""

    def __init__(self, scheduler, numbers):
        self.scheduler = scheduler
        self.trials = [Waiting(str(number)) for number in numbers]
        for trial in self.trials:
            scheduler.on_trial_add(self, trial)

    def stop_trial(self, trial):
        if trial.status in ("PENDING", "PAUSED"):
            self.scheduler.on_trial_remove(self, trial)
        elif trial.status == "RUNNING":
            self.scheduler.on_trial_complete(self, trial, {})
        trial.status = "TERMINATED"

    def run(self, signals):
        """To the end; a trial that has no signal for a resource fails there."""
        while any(trial.status != "TERMINATED" for trial in self.trials):
            trial = self.scheduler.choose_trial_to_run(self)
            assert trial is not None, "all that are left are paused for ever"
            trial.status = "RUNNING"
            while trial.status == "RUNNING":
                resource = (1, 2, 4)[trial.seen]
                trial.seen += 1
                signal = signals[trial.trial_id].get(resource)
                if signal is None or resource == 4:
                    self.stop_trial(trial)
                    continue
                decision = self.scheduler.on_trial_result(
                    self, trial, {"resource": resource, "signal": signal})
                if decision == TrialScheduler.PAUSE:
                    trial.status = "PAUSED"
                elif decision == TrialScheduler.STOP:
                    self.stop_trial(trial)


def test_a_bracket_is_cut_again_where_the_last_trial_at_a_rung_failed(tmp_path):
    search = search_of(algorithm={"kind": "hyperband", "reduction_factor": 2, "rungs": 2})
    brackets = scheduler(search, Space(BASE, search.space), Ledger(Store(str(tmp_path)), "s"),
                         "max")
    signals = {str(n): {r: n + r for r in (1, 2, 4)} for n in range(10)}
    # Of the bracket of four the best two go on; the best waits for the other one, which fails.
    del signals["8"][2]
    one_by_one = OneByOne(brackets, range(10))
    one_by_one.run(signals)
    assert [trial.seen for trial in one_by_one.trials[6:]] == [1, 1, 2, 3]


def test_a_paused_trial_of_an_earlier_run_reports_the_rest_of_what_it_had(tmp_path, monkeypatch):
    reports = [asdict(Report(r, [0.5], 0.5 + r, values={})) for r in (1, 2)]
    (tmp_path / "reports.json").write_text(json.dumps(reports[:1]))
    kept = SimpleNamespace(as_directory=lambda: nullcontext(str(tmp_path)))
    told = []
    monkeypatch.setattr(tune, "get_checkpoint", lambda: kept)
    monkeypatch.setattr(tune, "report", lambda metrics, **_: told.append(metrics["signal"]))
    proposal = {"number": 0, "values": {}, "reports": reports, "over": True, "reason": "",
                "last": 4, "chained": False, "kept": True}
    _drive({"proposal": proposal}, shared=None)
    assert told == [2.5]


def test_a_population_goes_on_from_the_segments_that_it_has(run):
    search = search_of(algorithm=PBT, space={"learning_rate": {"log_uniform": [1e-5, 1e-2]}})
    ledger = run(search, 3)
    measured = len(list((run.folder / "s").iterdir()))
    kept = {}
    for number in (0, 2):
        trial = ledger.trials[number]
        trial.status, trial.ended = "running", None
        kept[number] = trial.reports[: number and 1]
        trial.reports = list(kept[number])
        ledger.write(trial)
    again = run(search, 3).trials
    assert {t.status for t in again.values()} == {"finished"}
    assert [len(t.reports) for t in again.values()] == [3, 3, 3]
    assert again[1] == ledger.trials[1]
    # Its own first segment, or that of the member whose place it took.
    assert again[2].reports[0] in [kept[2][0], *(again[n].reports[0] for n in (0, 1))]
    # Not those beginnings that a member which took them over has in the ledger.
    assert measured < len(list((run.folder / "s").iterdir())) <= measured + 3 + 2


def test_what_begins_a_training_is_done_in_its_first_segment():
    search = search_of(algorithm={"kind": "pbt", "segments": 3})
    base = BASE.model_copy(update={"warmup_ratio": 0.2, "router": Router(initial="random")})
    recipes = [base, base.model_copy(update={"learning_rate": 3e-3}), base]
    found = segments_of(search, recipes)
    assert [s.steps for s in found] == [3, 3, 3]
    assert [(s.warmup_steps, s.warmup_ratio) for s in found] == [(2, 0), (0, 0), (0, 0)]
    assert [s.router.initial for s in found] == ["random", "pretrained", "pretrained"]
    assert [s.learning_rate for s in found] == [1e-3, 3e-3, 1e-3]


def test_a_population_is_told_with_the_values_that_it_was_trained_with_last():
    """A clone began at a rate that nothing of its chain was trained with."""
    search = search_of(algorithm=PBT)
    clone = Trial(0, {"learning_rate": 5e-2}, "finished", ended=0.0)
    clone.reports = [Report(n, [0.9], 0.9, steps=3 * n, values={"learning_rate": rate})
                     for n, rate in ((1, 1e-3), (2, 1e-3), (3, 1.2e-3))]
    fresh = Trial(1, {"learning_rate": 2e-3}, "failed", reason="lost", ended=0.0)
    table = trial_table(SimpleNamespace(trials={0: clone, 1: fresh}), search)
    assert table["value:learning_rate"].tolist() == [1.2e-3, 2e-3]
    assert _values_text(clone) == "learning_rate 0.0012"


def test_a_population_s_winner_is_a_chain_that_can_be_planned_again(run):
    search = search_of(algorithm=PBT, space={"learning_rate": {"log_uniform": [1e-5, 1e-2]}})
    space = Space(BASE, search.space)
    ledger = run(search, 4)
    assert {t.status for t in ledger.trials.values()} == {"finished"}
    chains = [[r.values["learning_rate"] for r in t.reports] for t in ledger.trials.values()]
    assert [len(chain) for chain in chains] == [3, 3, 3, 3]
    assert any(len(set(chain)) > 1 for chain in chains)  # somebody took over and changed
    assert all(1e-5 <= rate <= 1e-2 for chain in chains for rate in chain)
    for trial, chain in zip(ledger.trials.values(), chains, strict=True):
        segments = recipes_of(trial, Member("m", "moe", space, ()), search)
        assert [(s.steps, s.learning_rate) for s in segments] == [(3, r) for r in chain]


@pytest.mark.parametrize("algorithm, objectives", [
    ({"kind": "tpe", "startup_trials": 3}, 1), ({"kind": "nsga2", "population": 3}, 2)])
def test_optuna_asks_after_a_restart_what_it_would_have_asked(tmp_path, algorithm, objectives):
    names = [{"score": s} for s in ("edits/clean_accuracy", "questions/accuracy")[:objectives]]
    search = search_of(algorithm=algorithm, objectives=names, space={
        **RATE, "schedule": {"choice": ["linear", "cosine"]},
        "warmup_steps": {"uniform": [1, 4], "when": {"schedule": ["linear"]}}})
    space, store = Space(BASE, search.space), Store(str(tmp_path))
    goals = [True, False][:objectives]

    def trials(ledger: Ledger, start: int, stop: int) -> None:
        source = proposals(search, space, ledger, goals)
        for number in range(start, stop):
            trial = ledger.begin(number, source.propose)
            rate = trial.values["learning_rate"]
            if number == 2:
                ledger.end(trial, "failed", "lost")
            else:
                trial.reports = [Report(1, [-abs(math.log10(rate) + 2), rate][:objectives], 0.0)]
                ledger.end(trial, "finished")
            source.tell(trial)

    trials(Ledger(store, "whole"), 0, 14)
    trials(Ledger(store, "parts"), 0, 7)
    trials(Ledger(store, "parts"), 7, 14)
    whole, parts = (Ledger(store, name).trials for name in ("whole", "parts"))
    assert {n: t.values for n, t in parts.items()} == {n: t.values for n, t in whole.items()}
    conditional = [t.values for t in whole.values()]
    assert all(("warmup_steps" in v) == (v["schedule"] == "linear") for v in conditional)
    random = [space.draw(0, n)["learning_rate"] for n in range(14)]
    assert [t.values["learning_rate"] for t in whole.values()] != random


def test_tpe_comes_closer_to_the_best_than_it_began(tmp_path):
    search = search_of(algorithm={"kind": "tpe", "startup_trials": 5})
    space, ledger = Space(BASE, search.space), Ledger(Store(str(tmp_path)), "s")
    source = proposals(search, space, ledger, [True])
    distances = []
    for number in range(30):
        trial = ledger.begin(number, source.propose)
        distances.append(abs(math.log10(trial.values["learning_rate"]) + 3))
        trial.reports = [Report(1, [-distances[-1]], -distances[-1])]
        ledger.end(trial, "finished")
        source.tell(trial)
    # Draws at random are 1 away on average.
    assert sum(distances[10:]) / 20 < 0.75


def test_as_many_drivers_fit_as_trials_may_run(cluster):
    """Also beside what Ray Train takes of the same resource, 0.001 for each run."""
    for concurrent in (1, 2, 7, 22, 23, 100):
        share = _slot(concurrent)
        assert concurrent * (share + 0.001) <= 1
        if concurrent <= 22:
            assert (concurrent + 1) * share > 1
    assert ray.cluster_resources()["node:__internal_head__"] == 1


def test_the_ledger_reads_back_what_it_wrote(tmp_path):
    store = Store(str(tmp_path))
    ledger = Ledger(store, "s")
    # What a kill left of a file that was being written counts for nothing.
    store.write_bytes("s/trials/000003.json.0badc0de", b'{"number": 3, "val')
    trial = ledger.begin(
        3, lambda number: Trial(number, {"data.0.repeat": 2, "schedule": "linear"}))
    trial.reports = [Report(1, [], 0.25, 3, 30, {"a/b": 0.25}, trial.values, ["finetune/x@1"])]
    ledger.write(trial)
    again = Ledger(Store(str(tmp_path)), "s").trials[3]
    assert again == trial and not again.over
    assert json.loads((tmp_path / "s/trials/000003.json").read_text())["status"] == "running"
