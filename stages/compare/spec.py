"""What the comparison is told: which models are paired, under which recipes, on what."""

from typing import Annotated, ClassVar

from pydantic import Field

from stages.evaluate.registry import AnyEvaluation
from stages.spec import Spec

UNTUNED = "none"
"""The recipe name of a model that was not fine-tuned; it has the single seed 0."""


class Pair(Spec):
    """A Mixture-of-Experts model and its dense partner."""

    name: str
    moe: str
    dense: str


class CompareSpec(Spec):
    """Input roles, each may be absent (a gap of the report):

    - ``scores/<model>/<recipe>/<seed>/<evaluation>``: a folder with ``scores.parquet``
    - ``checkpoint/<model>/<recipe>/<seed>``: a checkpoint with ``card.json`` and, if it was
      fine-tuned, ``training_curve.parquet``
    - ``data/<dataset>``: a prepared data set with ``card.json``
    """

    VERSION: ClassVar[int] = 2

    title: str
    pairs: Annotated[tuple[Pair, ...], Field(min_length=1)]
    recipes: Annotated[tuple[str, ...], Field(min_length=1)]
    """Names in the order of the tables; ``none`` stands for the untuned models."""
    models_of: dict[str, tuple[str, ...]] = {}
    """The models of a recipe that not all of them have."""
    evaluations_of: dict[str, tuple[str, ...]] = {}
    """The evaluations of a recipe that is not scored by all of them."""
    seeds: Annotated[tuple[int, ...], Field(min_length=1)]
    evaluations: Annotated[dict[str, AnyEvaluation], Field(min_length=1)]
    resamples: Annotated[int, Field(ge=100)]
    """Bootstrap resamples, and random permutations where no exact test exists."""
    seed: int = 0
    notes: tuple[str, ...] = ()
    """What the reader must know and no score shows, such as how the recipes were found."""

    def seeds_of(self, recipe: str) -> tuple[int, ...]:
        """The seeds that a recipe was trained with."""
        return (0,) if recipe == UNTUNED else self.seeds

    def has(self, recipe: str, evaluation: str, *models: str) -> bool:
        """Whether all of the models are in a recipe that is scored by an evaluation."""
        scored = evaluation in self.evaluations_of.get(recipe, self.evaluations)
        return scored and set(models) <= set(self.models_of.get(recipe, self.models))

    @property
    def models(self) -> dict[str, str]:
        """Model name to ``moe`` or ``dense``, in the order of the pairs."""
        roles = {}
        for pair in self.pairs:
            roles.setdefault(pair.moe, "moe")
            roles.setdefault(pair.dense, "dense")
        return roles
