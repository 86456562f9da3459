"""A population after a restart: those of its members that finished are still compared and copied.

Tune's scheduler is asked as Tune asks it, with stand-ins for its controller and trials.
"""

import json
from dataclasses import asdict
from types import SimpleNamespace

import pytest
from search_sweeps import BASE, search_of

from pipeline.search import tuning
from pipeline.search.equal import Claims, Shared
from pipeline.search.ledger import Ledger, Report, Trial
from pipeline.search.schedulers import scheduler
from pipeline.search.space import Space
from pipeline.store import Store

SEARCH = search_of(algorithm={"kind": "pbt", "segments": 3, "quantile": 0.5},
                   space={"learning_rate": {"log_uniform": [1e-5, 1e-2]}})
GOOD = [Report(n, [signal], signal, steps=3 * n, values={"learning_rate": rate})
        for n, signal, rate in ((1, 0.5, 1e-3), (2, 0.7, 1e-3), (3, 0.9, 2e-3))]


class Live:
    """A trial of Tune's that has just reported."""

    trial_id, experiment_tag, status, last_result = "live", "", "RUNNING", {}

    def __init__(self, proposal: dict):
        self.config = {"proposal": proposal}
        manager = SimpleNamespace(
            _latest_checkpoint_result="own", checkpoint_config=SimpleNamespace(num_to_keep=None))
        self.run_metadata = SimpleNamespace(checkpoint_manager=manager)

    def is_finished(self) -> bool:
        return False

    def set_experiment_tag(self, tag: str) -> None:
        self.experiment_tag = tag

    def set_config(self, config: dict) -> None:
        self.config = config


@pytest.fixture
def restarted(tmp_path):
    """The ledger of a search of which one trial finished, one failed and one goes on."""
    ledger = Ledger(Store(str(tmp_path)), "s")
    for number in range(3):
        ledger.begin(number, lambda n: Trial(n, {"learning_rate": 5e-3}))
    ledger.trials[0].reports = list(GOOD)
    ledger.end(ledger.trials[0], "finished")
    ledger.trials[1].reports = [Report(1, [1.0], 1.0, values={"learning_rate": 1e-5})]
    ledger.end(ledger.trials[1], "failed", "lost")
    return ledger


def after(ledger: Ledger, signal: float, resource: int) -> tuple[Live, list]:
    """The unfinished trial after a segment, and who was paused."""
    proposal = tuning._proposal(ledger, SimpleNamespace(propose=None), 2, SEARCH)
    trial, paused = Live(proposal), []
    controller = SimpleNamespace(
        search_alg=None, get_trials=lambda: [trial],
        pause_trial=lambda t, should_checkpoint: paused.append(t),
        _schedule_trial_save=lambda t, result: "saved")
    population = scheduler(SEARCH, Space(BASE, SEARCH.space), ledger, "max")
    population.on_trial_add(controller, trial)
    population.on_trial_result(controller, trial, {"signal": signal, "resource": resource})
    assert list(population._trial_state) == [trial]
    return trial, paused


@pytest.mark.parametrize("resource", [1, 2])
def test_the_last_unfinished_member_takes_over_a_finished_one_s_segments(restarted, resource):
    trial, paused = after(restarted, 0.1, resource)
    proposal = trial.config["proposal"]
    assert paused == [trial] and proposal["number"] == 2 and not proposal["over"]
    assert proposal["reports"] == [asdict(report) for report in GOOD[:resource]]
    # 0.8 or 1.2 times the rate of that segment, or a new draw; the final rate is another one.
    assert 1e-5 <= proposal["values"]["learning_rate"] <= 1e-2
    assert proposal["values"] != GOOD[resource - 1].values
    # Tune restores its own checkpoint, which has as many segments; the proposal's are meant.
    assert trial.run_metadata.checkpoint_manager._latest_checkpoint_result == "own"


def test_it_is_compared_with_the_same_segment_and_goes_on_where_it_is_better(restarted):
    """0.6 is more than the finished trial had after one segment, less than it ended with; the one
    that failed, with more, is no member."""
    trial, paused = after(restarted, 0.6, 1)
    assert paused == [] and trial.config["proposal"]["reports"] == []


@pytest.mark.parametrize("kept, goes_on", [(1, 1), (2, 2)])
def test_a_clone_goes_on_from_the_longer_of_proposal_and_checkpoint(
    monkeypatch, tmp_path, restarted, kept, goes_on
):
    trial, _ = after(restarted, 0.1, 1)
    own = [asdict(Report(n + 1, [0.1], 0.1, values={"learning_rate": 5e-3})) for n in range(kept)]
    (tmp_path / "reports.json").write_text(json.dumps(own))
    monkeypatch.setattr(tuning.tune, "get_checkpoint",
                        lambda: tuning.tune.Checkpoint.from_directory(str(tmp_path)))
    monkeypatch.setattr(tuning.tune, "get_context",
                        lambda: SimpleNamespace(get_trial_id=lambda: "live"))
    monkeypatch.setattr(tuning, "_report", lambda reports, proposal: None)
    pasts = []

    def measure(values, past):
        pasts.append([asdict(report) for report in past])
        yield Report(len(past) + 1, [0.5], 0.5, values=values)

    shared = Shared(measure, SEARCH, Space(BASE, SEARCH.space), Claims({}))
    tuning._drive(trial.config, shared)
    assert pasts[0] == (own if kept == 2 else [asdict(GOOD[0])])
    assert [len(past) for past in pasts] == list(range(goes_on, 3))
