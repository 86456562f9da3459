"""What a sweep's ``search`` section says: the space, the objectives, the algorithm, the budget."""

from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, Field, model_validator

from stages.spec import Seed, Seeds, Spec, independent

Side = Literal["moe", "dense"]
FRESH_SEEDS = 3
"""Fewest seeds with which a winner is trained again."""


class Dimension(Spec):
    """The values that a trial may take for one field of the recipe: exactly one of the four."""

    choice: Annotated[tuple[Any, ...], Field(min_length=1)] | None = None
    """One of these values, each as likely."""
    grid: Annotated[tuple[Any, ...], Field(min_length=1)] | None = None
    """Every one of these values in turn, combined with those of the other grids."""
    uniform: tuple[float, float] | None = None
    """Lowest and highest value, both included where the field takes whole numbers."""
    log_uniform: tuple[float, float] | None = None
    """The same, with the logarithm uniform."""
    when: dict[str, tuple[Any, ...]] = {}
    """Other fields of the space and their values for which this one is searched; otherwise the
    field keeps the value of the base recipe."""

    @property
    def values(self) -> tuple[Any, ...] | None:
        """The values of a choice or grid; None for a range."""
        return self.grid if self.choice is None else self.choice

    @property
    def bounds(self) -> tuple[float, float] | None:
        """Lowest and highest value of a range; None for listed values."""
        return self.uniform if self.log_uniform is None else self.log_uniform

    @model_validator(mode="after")
    def _one_distribution(self) -> "Dimension":
        names = ("choice", "grid", "uniform", "log_uniform")
        given = [name for name in names if getattr(self, name) is not None]
        if len(given) != 1:
            found = " and ".join(given) or "none of them"
            raise ValueError(f"needs exactly one of {', '.join(names)}, has {found}")
        if self.bounds and self.bounds[0] >= self.bounds[1]:
            raise ValueError(f"{given[0]} runs from low to high; swap the bounds")
        if self.log_uniform and self.log_uniform[0] <= 0:
            raise ValueError("log_uniform needs a lower bound above 0; raise it or use uniform")
        if self.values and any(v in self.values[:i] for i, v in enumerate(self.values)):
            raise ValueError(f"{given[0]} lists a value twice; keep one")
        return self


class Objective(Spec):
    """A score, ``evaluation/metric``, or a weighted sum of several, on the selection split."""

    score: str | Annotated[dict[str, float], Field(min_length=1)]
    direction: Literal["maximize", "minimize"] | None = None
    """By default that of the metric; a weighted sum is maximized, so a score that is better when
    lower takes a negative weight."""

    @property
    def weights(self) -> dict[str, float]:
        """Score to weight."""
        return {self.score: 1.0} if isinstance(self.score, str) else self.score

    @property
    def name(self) -> str:
        """How the objective is called in tables of numbers and in MLflow."""
        if isinstance(self.score, str):
            return self.score
        return " ".join(f"{weight:+g}·{score}" for score, weight in self.score.items())


class Random(Spec):
    """Independent draws (Bergstra and Bengio 2012); grids are gone through in turn."""

    kind: Literal["random"] = "random"


class Grid(Spec):
    """Every combination of the grids, each once."""

    kind: Literal["grid"] = "grid"


class _Halving(Spec):
    reduction_factor: Annotated[int, Field(ge=2)] = 3
    """One trial in so many goes on from each rung, with so many times the steps."""
    rungs: Annotated[int, Field(ge=1)] = 2
    """Intermediate evaluations. The last comes at 1 / reduction_factor of a recipe's steps, each
    earlier one at 1 / reduction_factor of the next."""
    intermediate: Objective | None = None
    """What is compared at a rung, for example one cheap evaluation; by default the objective."""


class Asha(_Halving):
    """Random draws, stopped early by asynchronous successive halving (Li et al. 2020)."""

    kind: Literal["asha"] = "asha"


class Hyperband(_Halving):
    """Random draws in brackets that differ in how early they stop trials (Li et al. 2018).

    With r rungs and reduction factor f, a round of r + 1 brackets takes the sum over s = 0..r of
    ceil((r + 1) / (s + 1) · f^s) trials: 17 for 2 and 3. Another number leaves a bracket unfilled.
    """

    kind: Literal["hyperband"] = "hyperband"


class Pbt(Spec):
    """Population-based training (Jaderberg et al. 2017): the trials are the population.

    After each segment a trial of the lowest quantile takes over the weights of one of the highest
    and goes on with changed values. A segment is a fine-tune of its own that starts from the
    checkpoint of the segment before, with a new optimiser and its own part of the schedule's steps.
    """

    kind: Literal["pbt"] = "pbt"
    segments: Annotated[int, Field(ge=2)] = 4
    """Equal parts into which the recipe's steps are cut."""
    quantile: Annotated[float, Field(gt=0, le=0.5)] = 0.25
    resample: Annotated[float, Field(ge=0, le=1)] = 0.25
    """Probability of a new draw; otherwise a value moves by a factor of 0.8 or 1.2, or to a
    neighbour in its list."""


class Tpe(Spec):
    """Tree-structured Parzen estimator (Bergstra et al. 2011; Optuna's)."""

    kind: Literal["tpe"] = "tpe"
    startup_trials: Annotated[int, Field(ge=1)] = 10
    """Random trials before the first model of the objective."""


class Nsga2(Spec):
    """Genetic search for several objectives (Deb et al. 2002; Optuna's)."""

    kind: Literal["nsga2"] = "nsga2"
    population: Annotated[int, Field(ge=2)] = 20


AnyAlgorithm = Annotated[
    Random | Grid | Asha | Hyperband | Pbt | Tpe | Nsga2, Field(discriminator="kind")
]
ALGORITHMS: dict[str, type[Spec]] = {
    kind.model_fields["kind"].default: kind for kind in get_args(get_args(AnyAlgorithm)[0])
}
STOPPING = (Asha, Hyperband)
"""Algorithms that stop trials early."""
OPTUNA = (Tpe, Nsga2)
"""Algorithms that need the optional package optuna."""


class Budget(Spec):
    """What one side of the pairs gets where it differs from the other."""

    trials: Annotated[int, Field(ge=1)] | None = None
    seeds: Seeds | None = None


class Search(Spec):
    """A search for the recipe of each model of the pairs, each in a search of its own."""

    base: str
    """The recipe of the sweep whose fields the space replaces."""
    space: Annotated[dict[str, Dimension], Field(min_length=1)]
    """Dotted field of the recipe to the values to try."""
    objectives: Annotated[tuple[Objective, ...], Field(min_length=1)]
    """One, or several for a Pareto front."""
    algorithm: AnyAlgorithm = Random()
    trials: Annotated[int, Field(ge=1)]
    seeds: Seeds = (0,)
    """Each trial is trained once per seed; its objective is the mean."""
    final_seeds: Annotated[
        tuple[int, ...], Field(min_length=FRESH_SEEDS), AfterValidator(independent)
    ] = (101, 102, 103)
    """Seeds with which winners are trained again for the test split; none of ``seeds``."""
    front: Annotated[int, Field(ge=1)] = 3
    """Most members of a Pareto front that are trained again."""
    budget: dict[Side, Budget] = {}
    """Where one side of the pairs gets other trials or seeds; the report says so."""
    seed: Seed = 0
    """Of the draws."""

    @model_validator(mode="after")
    def _fresh(self) -> "Search":
        seen = {*self.seeds, *(s for b in self.budget.values() for s in b.seeds or ())}
        used = sorted(seen & set(self.final_seeds))
        if used:
            raise ValueError(f"final_seeds names {used[0]}, which the trials use; choose others")
        return self

    def trials_of(self, side: Side) -> int:
        """Trials of the searches on one side of the pairs."""
        return (self.budget.get(side) or Budget()).trials or self.trials

    def seeds_of(self, side: Side) -> tuple[int, ...]:
        """Seeds of each trial on one side of the pairs."""
        return (self.budget.get(side) or Budget()).seeds or self.seeds

    @property
    def intermediate(self) -> Objective:
        """What a scheduler compares."""
        return getattr(self.algorithm, "intermediate", None) or self.objectives[0]

    def label(self, objective: Objective) -> str:
        """A short name of an objective; weighted sums are numbered where there are several."""
        if isinstance(objective.score, str):
            return objective.score
        sums: list[Objective] = []
        for each in (*self.objectives, self.intermediate):
            if not isinstance(each.score, str) and each not in sums:
                sums.append(each)
        return "weighted sum" if len(sums) == 1 else f"weighted sum {sums.index(objective) + 1}"

    def resources(self) -> list[int]:
        """Shares of the steps at which a trial is evaluated, in units; the last is all of them."""
        if isinstance(self.algorithm, STOPPING):
            factor, rungs = self.algorithm.reduction_factor, self.algorithm.rungs
            return [factor**rung for rung in range(rungs + 1)]
        if isinstance(self.algorithm, Pbt):
            return list(range(1, self.algorithm.segments + 1))
        return [1]

    def steps_at(self, resource: int, steps: int) -> int:
        """Optimiser steps of a recipe of ``steps`` at a resource, rounded up."""
        return -(-steps * resource // self.resources()[-1])
