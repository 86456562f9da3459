"""Ray Tune's schedulers for a search's algorithm, and a population whose members can be over."""

from dataclasses import asdict, dataclass
from typing import Any

from ray import tune
from ray.tune.schedulers import (
    AsyncHyperBandScheduler,
    FIFOScheduler,
    HyperBandScheduler,
    PopulationBasedTraining,
    TrialScheduler,
)
from ray.tune.schedulers.pbt import _PBTTrialState

from pipeline.search.ledger import Ledger
from pipeline.search.space import Space
from pipeline.search.spec import Asha, Hyperband, Pbt, Search


def scheduler(search: Search, space: Space, ledger: Ledger, mode: str) -> TrialScheduler:
    """What stops, pauses and clones a search's trials; ``mode`` (max, min) is the signal's."""
    algorithm, common = search.algorithm, {"metric": "signal", "mode": mode}
    if isinstance(algorithm, Asha):
        return AsyncHyperBandScheduler(
            time_attr="resource", max_t=search.resources()[-1], grace_period=1,
            reduction_factor=algorithm.reduction_factor, **common)
    if isinstance(algorithm, Hyperband):
        return Brackets(
            time_attr="resource", max_t=search.resources()[-1],
            reduction_factor=algorithm.reduction_factor, **common)
    if isinstance(algorithm, Pbt):
        return Population(
            ledger, time_attr="resource", perturbation_interval=1,
            hyperparam_mutations={"proposal": {"values": {
                path: _mutation(space, path) for path in space.dimensions}}},
            quantile_fraction=algorithm.quantile, resample_probability=algorithm.resample,
            custom_explore_fn=lambda config: _inside(config, space), log_config=False, **common)
    return FIFOScheduler()


class Brackets(HyperBandScheduler):
    """Hyperband that goes on where a trial ends without the result that its bracket waits for.

    Tune's marks a bracket as being cut at its first cut and never takes that back, and a trial that
    fails, or is over from an earlier run, then leaves the others paused for ever.
    """

    def _process_bracket(self, tune_controller: Any, bracket: Any) -> str:
        try:
            return super()._process_bracket(tune_controller, bracket)
        finally:
            bracket.is_being_processed = False


@dataclass(eq=False)
class _Member:
    """A finished trial as it was after one of its segments, in the place of one of Tune's."""

    trial_id: str
    config: dict[str, Any]
    experiment_tag: str = ""

    def is_finished(self) -> bool:
        return False


class Population(PopulationBasedTraining):
    """A population of which finished trials stay members.

    Tune's forgets a trial that is over, and after a restart knows of the unfinished ones alone:
    the last of them would have nobody to copy from. Here each segment of a trial is compared with
    the same segment of those that finished, in whichever run of the search, and may be exchanged
    for it.
    """

    def __init__(self, ledger: Ledger, **settings: Any):
        super().__init__(**settings)
        self._ledger = ledger

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict) -> str:
        """Decide on a trial after a segment, with the finished ones beside it."""
        states = self._finished(trial, result["resource"])
        self._trial_state |= states
        try:
            return super().on_trial_result(tune_controller, trial, result)
        finally:
            for member in states:
                del self._trial_state[member]

    def _finished(self, trial: Any, resource: int) -> dict[_Member, _PBTTrialState]:
        """The finished trials after the same segment as a trial."""
        states = {}
        for number, record in sorted(self._ledger.trials.items()):
            if record.status != "finished":
                continue
            reports = [report for report in record.reports if report.resource <= resource]
            proposal = trial.config["proposal"] | {
                "values": reports[-1].values, "reports": [asdict(report) for report in reports]}
            member = _Member(f"finished-{number}", {"proposal": proposal})
            state = states[member] = _PBTTrialState(member)
            self._save_trial_state(state, resource, {self._metric: reports[-1].signal}, member)
            state.last_perturbation_time = resource
            state.last_checkpoint = "the proposal's reports"  # anything but None
        return states

    def _exploit(self, tune_controller: Any, trial: Any, trial_to_clone: Any) -> None:
        manager = trial.run_metadata.checkpoint_manager
        own = manager._latest_checkpoint_result
        super()._exploit(tune_controller, trial, trial_to_clone)
        if isinstance(trial_to_clone, _Member):  # which has no checkpoint of Tune's
            manager._latest_checkpoint_result = own


def _mutation(space: Space, path: str) -> Any:
    """A field's distribution as Tune's population-based training takes it."""
    dimension = space.dimensions[path]
    if dimension.values is not None:
        return list(dimension.values)
    low, high = dimension.bounds
    if path in space.whole_numbers:
        whole = tune.lograndint if dimension.log_uniform else tune.randint
        return whole(int(low), int(high) + 1)
    return (tune.loguniform if dimension.log_uniform else tune.uniform)(low, high)


def _inside(config: dict, space: Space) -> dict:
    """Tune's factors can leave a range; this brings the values back."""
    values = config["proposal"]["values"]
    for path, value in values.items():
        if space.dimensions[path].bounds:
            values[path] = space.inside(path, value)
    return config
