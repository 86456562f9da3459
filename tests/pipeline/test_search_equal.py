"""Equal trials of a search: one measures, the others wait for it and take its result."""

import threading
import time
from types import SimpleNamespace

import pytest
from search_sweeps import BASE, RATE, search_of

from pipeline.search import equal
from pipeline.search.equal import Claims, Shared, known, point_of
from pipeline.search.ledger import Ledger, Report, Trial
from pipeline.search.space import Space
from pipeline.search.tuning import _Recorder
from pipeline.store import Store
from stages.errors import StageFailed

CHOICE = {"schedule": {"choice": ["linear", "constant"]}}
ASHA = {"kind": "asha", "reduction_factor": 3, "rungs": 1}
PBT = {"kind": "pbt", "segments": 2}
LINEAR, CONSTANT = {"schedule": "linear"}, {"schedule": "constant"}


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(equal, "_POLL", 0.01)


class Slow:
    """Takes a moment for each measurement and keeps weights of a rung until it has reported."""

    def __init__(self, search):
        self.search, self.began, self.at_work, self.together = search, [], set(), []

    def __call__(self, values, past):
        for resource in self.search.resources():
            if past and resource <= past[-1].resource:
                continue
            key = (values["schedule"], resource)
            self.began.append(key)
            self.together.append(key in self.at_work)
            self.at_work.add(key)
            time.sleep(0.1)
            if values["schedule"] == "linear" and resource == 3:
                raise StageFailed("the loss is nan")
            yield Report(resource, [0.5], 0.5, steps=resource, values=values)
            self.at_work.discard(key)


def raced(shared: Shared, trials: list[dict]) -> list:
    """What each of the trials, all begun at once, reports; the reason where it failed."""
    found = [None] * len(trials)

    def go(number: int) -> None:
        found[number] = []
        try:
            found[number] += shared(f"trial-{number}", trials[number], [])
        except StageFailed as error:
            found[number].append(str(error))

    threads = [threading.Thread(target=go, args=(n,)) for n in range(len(trials))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return found


def test_equal_trials_at_once_are_measured_once_and_all_have_the_result():
    search = search_of(algorithm=ASHA, space=CHOICE)
    slow = Slow(search)
    found = raced(Shared(slow, search, Space(BASE, search.space), Claims({})),
                  [CONSTANT, LINEAR, CONSTANT, LINEAR, CONSTANT])
    assert sorted(slow.began) == [("constant", 1), ("constant", 3), ("linear", 1), ("linear", 3)]
    assert not any(slow.together)
    for reports in (found[0], found[2], found[4]):
        assert [(r.resource, r.objectives, r.values) for r in reports] == [
            (1, [0.5], CONSTANT), (3, [0.5], CONSTANT)]
    for first, reason in (found[1], found[3]):
        assert first.values == LINEAR and reason == "the loss is nan"


def test_a_trial_whose_driver_died_holds_nobody_up():
    claims = Claims({})
    assert claims.claim("p", "a")[0] == "measure" and claims.claim("p", "b")[0] == "wait"
    assert claims.claim("p", "a")[0] == "measure"  # started again
    recorder = _Recorder(SimpleNamespace(trials={}), 1, lambda trial: None, claims, None)
    recorder.on_trial_recover(0, [], SimpleNamespace(trial_id="a"))
    assert claims.claim("p", "b")[0] == "measure" and claims.claim("p", "a")[0] == "wait"
    claims.settle("p", report := Report(1, [0.5], 0.5))
    assert claims.claim("p", "a") == ("take", report)


def test_a_restarted_search_knows_what_its_equal_trials_measured(tmp_path):
    """The weights of a rung are gone by then; to train it again is what is saved."""
    search = search_of(algorithm=ASHA, space=CHOICE)
    space, ledger = Space(BASE, search.space), Ledger(Store(str(tmp_path)), "s")
    trial = ledger.begin(0, lambda number: Trial(number, CONSTANT))
    trial.reports = [Report(1, [], 0.25, steps=3, tokens=40, values=CONSTANT)]
    ledger.end(trial, "stopped")
    slow = Slow(search)
    again = Ledger(Store(str(tmp_path)), "s")
    reports = list(Shared(slow, search, space, Claims(known(again, search, space)))(
        "b", CONSTANT, []))
    assert reports[0] == trial.reports[0] and slow.began == [("constant", 3)]


def test_members_of_a_population_are_equal_as_long_as_all_their_segments_are():
    search = search_of(algorithm=PBT)
    space, slow, fast = Space(BASE, search.space), {"learning_rate": 1e-3}, {"learning_rate": 1e-2}
    after = {rate["learning_rate"]: [Report(1, [0.5], 0.5, values=rate)] for rate in (slow, fast)}

    def point(past, values):
        return point_of(search, space, past, values, 2)

    assert point(after[1e-3], fast) == point(after[1e-3], dict(fast))
    assert point(after[1e-3], fast) != point(after[1e-2], fast)
    alone = search_of(space=RATE)  # without segments what came before does not matter
    assert point_of(alone, space, after[1e-3], fast, 1) == point_of(alone, space, [], fast, 1)
