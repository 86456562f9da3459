"""Where a trial's values come from: seeded draws, every combination, or an Optuna study.

A number that the ledger knows gets its recorded values again, so a restarted search goes through
the same trials; what comes after depends on the number and on the results told so far.
"""

import json
from typing import Any, Protocol

import numpy as np

from pipeline.search.ledger import Ledger, Trial
from pipeline.search.space import Space
from pipeline.search.spec import OPTUNA, Dimension, Grid, Search, Tpe


class Proposals(Protocol):
    """The values of each trial."""

    def propose(self, number: int) -> Trial:
        """A trial that the ledger does not know yet."""

    def tell(self, trial: Trial) -> None:
        """Learn from a trial that is over."""


def proposals(search: Search, space: Space, ledger: Ledger, maximize: list[bool]) -> Proposals:
    """The proposals of a search's algorithm, brought up to date with its ledger."""
    if isinstance(search.algorithm, OPTUNA):
        return _Study(search, space, ledger, maximize)
    return _Drawn(search, space)


class _Drawn:
    def __init__(self, search: Search, space: Space):
        self.search, self.space = search, space

    def propose(self, number: int) -> Trial:
        if isinstance(self.search.algorithm, Grid):
            return Trial(number, self.space.combinations()[number])
        return Trial(number, self.space.draw(self.search.seed, number))

    def tell(self, trial: Trial) -> None:
        pass


class _Study:
    """Optuna's ask and tell; the study lives in memory and is rebuilt from the ledger.

    Each question is put to a sampler that is seeded by the trial's number, so that with one trial
    at a time a restarted search asks exactly what an uninterrupted one would have.
    """

    def __init__(self, search: Search, space: Space, ledger: Ledger, maximize: list[bool]):
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.optuna, self.search, self.space = optuna, search, space
        directions = ["maximize" if upwards else "minimize" for upwards in maximize]
        self.study = optuna.create_study(directions=directions)
        for _, trial in sorted(ledger.trials.items()):
            self.study.add_trial(optuna.trial.create_trial(
                state=optuna.trial.TrialState.RUNNING,
                params={path: self._encoded(path, v) for path, v in trial.values.items()},
                distributions={path: self._distribution(path) for path in trial.values},
                system_attrs=trial.sampler,
            ))
            if trial.over:
                self.tell(trial)

    def propose(self, number: int) -> Trial:
        self.study.sampler = self._sampler(number)
        asked = self.study.ask()

        def draw(path: str, dimension: Dimension) -> Any:
            kind = self._distribution(path)
            if dimension.values is not None:
                code = asked.suggest_categorical(path, kind.choices)
                return dimension.values[kind.choices.index(code)]
            suggest = asked.suggest_int if path in self.space.whole_numbers else (
                asked.suggest_float)
            return suggest(path, kind.low, kind.high, log=kind.log)

        values = self.space.suggest(draw)
        noted = self.study.get_trials(deepcopy=False)[asked.number].system_attrs
        return Trial(number, values, sampler=dict(noted))

    def tell(self, trial: Trial) -> None:
        # Trials are asked for in the order of their numbers, so Optuna counts as the ledger does.
        if trial.status == "finished":
            self.study.tell(trial.number, trial.reports[-1].objectives)
        else:
            self.study.tell(trial.number, state=self.optuna.trial.TrialState.FAIL)

    def _encoded(self, path: str, value: Any) -> Any:
        """A listed value as text: Optuna's categories are scalars, a recipe's may be lists."""
        return json.dumps(value) if self.space.dimensions[path].values is not None else value

    def _distribution(self, path: str) -> Any:
        dimension, kinds = self.space.dimensions[path], self.optuna.distributions
        if dimension.values is not None:
            return kinds.CategoricalDistribution(
                [self._encoded(path, value) for value in dimension.values])
        low, high = dimension.bounds
        log = dimension.log_uniform is not None
        if path in self.space.whole_numbers:
            return kinds.IntDistribution(int(low), int(high), log=log)
        return kinds.FloatDistribution(low, high, log=log)

    def _sampler(self, number: int) -> Any:
        seed = int(np.random.SeedSequence([self.search.seed, number]).generate_state(1)[0])
        algorithm = self.search.algorithm
        if isinstance(algorithm, Tpe):
            return self.optuna.samplers.TPESampler(
                seed=seed, n_startup_trials=algorithm.startup_trials, constant_liar=True)
        return self.optuna.samplers.NSGAIISampler(
            seed=seed, population_size=algorithm.population)
