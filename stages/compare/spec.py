"""What the comparison is told: which models are paired, under which recipes, on what."""

from typing import Annotated, ClassVar

from pydantic import AfterValidator, Discriminator, Field, Tag

from stages.evaluate.registry import AnyEvaluation
from stages.spec import Seed, Seeds, Spec

UNTUNED = "none"
"""The recipe name of a model that was not fine-tuned; it has the single seed 0."""


class Pair(Spec):
    """A Mixture-of-Experts model and its dense partner."""

    name: str
    moe: str
    dense: str


class Hypotheses(Spec):
    """That H1 to H5 are judged (``hypotheses.py``), and by what.

    ``true`` in a sweep stands for all fields absent.
    """

    attacks: str | None = None
    """The evaluation that attacks the models; to be named for verdicts where the sweep has several
    of its kind, as are the next three. Tables without verdicts are of the first one and say so."""
    interventions: str | None = None
    geometry: str | None = None
    lipschitz: str | None = None
    equal_flops: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """Names of the pairs that are compared in H1; when absent those whose models' cards have equal
    FLOPs per token, within 5 %."""
    series: Annotated[tuple[str, ...], Field(min_length=2)] | None = None
    """The models of H2; when absent the largest set whose cards differ in the number of experts
    alone."""
    margin: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """The share of predictions, or loss of accuracy, up to which H3 and H5 count an intervention as
    harmless; without any expert's output more must be lost for that to say anything."""
    far: Annotated[float, Field(ge=1)] = 2.0
    """How many times a baseline a change of routes must be to lie far above it (H3)."""


def _by_default(value: Hypotheses | bool | None) -> Hypotheses | None:
    return Hypotheses() if value is True else value or None


# Told apart before they are read, so that a mistake in the section is not also told as a bad flag.
AskedHypotheses = Annotated[
    Annotated[Hypotheses, Tag("section")] | Annotated[bool | None, Tag("flag")],
    Discriminator(lambda value: "section" if isinstance(value, dict | Hypotheses) else "flag"),
    AfterValidator(_by_default),
]


class CompareSpec(Spec):
    """Input roles, each may be absent (a gap of the report):

    - ``scores/<model>/<recipe>/<seed>/<evaluation>``: a folder with ``scores.parquet``
    - ``checkpoint/<model>/<recipe>/<seed>``: a checkpoint with ``card.json`` and, if it was
      fine-tuned, ``training_curve.parquet``
    - ``data/<dataset>``: a prepared data set with ``card.json``
    - ``judge/<name>``: a judge that is a model; only its absence is told
    """

    VERSION: ClassVar[int] = 10

    title: str
    pairs: Annotated[tuple[Pair, ...], Field(min_length=1)]
    recipes: Annotated[tuple[str, ...], Field(min_length=1)]
    """Names in the order of the tables; ``none`` stands for the untuned models."""
    models_of: dict[str, tuple[str, ...]] = {}
    """The models of a recipe that not all of them have."""
    evaluations_of: dict[str, tuple[str, ...]] = {}
    """The evaluations of a recipe that is not scored by all of them."""
    seeds: Seeds
    evaluations: Annotated[dict[str, AnyEvaluation], Field(min_length=1)]
    resamples: Annotated[int, Field(ge=100)]
    """Bootstrap resamples, and random permutations where no exact test exists."""
    seed: Seed = 0
    hypotheses: AskedHypotheses = None
    upcycled: tuple[str, ...] = ()
    """Models whose experts were made of one dense block each, and start alike."""
    may_share: dict[str, tuple[str, ...]] = {}
    """Scored splits that nothing keeps disjoint from splits that are trained on, with these; each
    ``DATASET/SPLIT``."""
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
