"""The claims of H1 to H5, from the score tables of attacks and probes (``hypotheses.py``)."""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import pandas as pd

from stages.compare.claim import ALIKE, FISHER, LOG, MATTER, Claim
from stages.compare.contrast import Contrast, contrast
from stages.compare.headline import missing
from stages.compare.measured import VALUE, Measured, frame, row_mean
from stages.compare.quantities import (
    attack_names,
    of_images,
    routing_change,
    shares,
    swapped,
)
from stages.compare.selection import (
    SIZE_TOLERANCE,
    NotTested,
    equal_flops,
    expert_series,
    scored_moes,
)
from stages.compare.spec import UNTUNED, Hypotheses
from stages.compare.table import interval, number
from stages.evaluate.base import Evaluation, Metric
from stages.models.card import ModelCard

_GIVES = {
    "attacks": "attacks the models; add image_attacks or text_attacks",
    "interventions": "puts other experts in; add image_interventions or expert_interventions",
    "geometry": "measures the routing term; add image_geometry or router_geometry",
    "lipschitz": "measures slopes; add image_lipschitz or local_lipschitz",
}
Value = Callable[[pd.DataFrame], pd.Series]
"""What is measured on each example of a score table."""


class Claims:
    """What is claimed of the models under one recipe."""

    def __init__(self, measured: Measured, cards: dict[str, ModelCard], recipe: str):
        self.measured, self.cards, self.recipe = measured, cards, recipe
        self.spec = measured.spec
        self.asked = self.spec.hypotheses or Hypotheses()
        self.used: dict[tuple[str, str], None] = {}
        """Part and model of what the current hypothesis read."""

    def of(self, hypothesis: str) -> tuple[list[Claim], str, list[str]]:
        """The claims of a hypothesis, the sentence that says what was compared, and what weakens
        them: failed checks of the attack, missing seeds.

        Raises NotTested.
        """
        self.used = {}
        claims, compared = getattr(self, hypothesis.lower())()
        for claim in claims:
            if np.isnan(claim.found.p_value):
                raise NotTested(f"{claim.label}: no number ({claim.found.documents} documents)")
        notes = [
            note
            for part, model in self.used
            for note in (
                missing(self.measured, part, model, self.recipe),
                self.measured.scores[part].failed_checks(model, self.recipe),
            )
        ]
        return claims, compared, list(filter(None, notes))

    def h1(self) -> tuple[list[Claim], str]:
        """MoE minus dense, over the pairs of equal FLOPs."""
        pairs = equal_flops(self.spec, self.cards, self.recipe, self._name("attacks"))
        weights: dict[str, float] = {}
        for pair in pairs:
            weights[pair.moe] = weights.get(pair.moe, 0) + 1 / len(pairs)
            weights[pair.dense] = weights.get(pair.dense, 0) - 1 / len(pairs)
        robust = self._contrast("attacks", weights, self._robust)
        slope = self._contrast("lipschitz", weights, "lipschitz", metric=LOG)
        level = dict(zip(weights, robust.levels, strict=True))
        moe, dense = (np.mean([level[getattr(pair, side)] for pair in pairs])
                      for side in ("moe", "dense"))  # fmt: skip
        named = ", ".join(pair.name for pair in pairs)
        return [
            Claim("robust accuracy, MoE minus dense", robust, above=True),
            Claim("local Lipschitz constant, MoE over dense", slope, above=False, told=np.exp),
        ], (
            f"{named}, whose FLOPs per token are equal within {SIZE_TOLERANCE:.0%}; robust "
            f"accuracy ({self._worst}) {number(moe)} against {number(dense)}"
            f"{self._over_parameters(weights)}"
        )

    def _over_parameters(self, models: Iterable[str]) -> str:
        """The slope of the Lipschitz constant's logarithm over that of all parameters, told beside
        that of the law of robustness; of three sizes or more, two being told by their ratio."""
        sizes = {model: self.cards[model].total_parameters for model in models
                 if model in self.cards}  # fmt: skip
        if len(set(sizes.values())) < 3:
            return ""
        weights = _least_squares(sizes, np.log(list(sizes.values())))
        found = self._contrast("lipschitz", weights, "lipschitz", metric=LOG)
        slope = number(found.value, signed=True), interval(found.ci_low, found.ci_high, signed=True)
        return (
            "; the logarithm of the Lipschitz constant over that of all parameters has slope "
            f"{' '.join(filter(None, slope))} (the lower bound of arXiv 2105.12806: −0.5)"
        )

    def h2(self) -> tuple[list[Claim], str]:
        """The slope of robust accuracy over log2(E)."""
        series = expert_series(self.spec, self.cards, self.recipe, self._name("attacks"))
        weights = _least_squares(series, np.log2(list(series.values())))
        found = self._contrast("attacks", weights, self._robust)
        levels = ", ".join(
            f"{number(level)} at E = {experts}"
            for experts, level in zip(series.values(), found.levels, strict=True)
        )
        return [Claim("robust accuracy per doubling of E", found, above=True)], (
            f"{', '.join(series)}, which differ in E alone; robust accuracy ({self._worst}) "
            f"{levels}"
        )

    def h3(self) -> tuple[list[Claim], str]:
        """Change of routes against its baselines, and harm by the attacked routes."""
        asked, models = self.asked, self._experts("attacks")
        evaluation, there = self._part("attacks")
        columns = routing_change(evaluation, there)
        self._there("attacks", {name: columns[name] for name in ("attack", "random", "noise")})
        swap = swapped(evaluation, there, "clean_attacked")
        self._there("attacks", {"swap_clean_attacked": swap})

        def excess(baseline: str) -> Value:
            return lambda table: (
                row_mean(table, columns["attack"]) - asked.far * row_mean(table, columns[baseline])
            )

        def harm(table: pd.DataFrame) -> pd.Series:
            clean = 1.0 if of_images(evaluation) else table["clean"]
            return clean - row_mean(table, swap)

        matter = self._matter(models, of_predictions=of_images(evaluation))
        claims = []
        for baseline, words in (
            ("random", "under a random perturbation"), ("noise", "of the same input again")
        ):  # fmt: skip
            label = f"change of routes minus {asked.far:g} × that {words}"
            claims += self._learned("attacks", models, label, excess(baseline), above=True)
        lost = "clean predictions changed" if of_images(evaluation) else "clean accuracy lost"
        claims += self._learned(
            "attacks", models, f"{lost} under the attacked routes", harm, above=False,
            null=asked.margin, share=True,
        )  # fmt: skip
        level = {name: self._level("attacks", models, columns[name]) for name in columns}
        return [*claims, matter], (
            f"{', '.join(models)}; change of routes under attack {level['attack']}, random "
            f"perturbation {level['random']}, same input again {level['noise']}, independent "
            f"choices {level['chance']}"
        )

    def h4(self) -> tuple[list[Claim], str]:
        """Correlation of loss rise and routing term over examples."""
        models = self._experts("geometry")
        self._there("geometry", {name: (name,) for name in ("routing_term", "loss_rise")})
        claims = self._learned(
            "geometry", models, "correlation of loss rise and routing term", None, above=True,
            metric=FISHER, told=np.tanh,
        )  # fmt: skip
        each = ", ".join(
            f"{model} {number(np.tanh(level), signed=True)}"
            for model, level in zip(models, claims[0].found.levels, strict=True)
        )
        return claims, f"Pearson's correlation over examples: {each}"

    def h5(self) -> tuple[list[Claim], str]:
        """Accuracy lost with ranks K + 1 to 2K and with random experts."""
        models = self._experts("interventions")
        _, there = self._part("interventions")
        both = [s for s in shares(there, "next_ranked") if s in shares(there, "random")]
        if not both:
            raise NotTested(
                f"{self._name('interventions')} has no share of tokens at which both next_ranked "
                "and random experts were tried; name both in substitutions"
            )
        second, drawn = (f"correct/{name}_{both[-1]}" for name in ("next_ranked", "random"))
        cost = self._learned(
            "interventions", models, "accuracy lost with second-best experts",
            lambda table: table["correct"] - table[second], above=False,
            null=self.asked.margin, share=True,
        )  # fmt: skip
        saved = self._learned(
            "interventions", models, "that minus the accuracy lost with random ones",
            lambda table: table[drawn] - table[second], above=False,
        )  # fmt: skip
        own, *others = (self._level("interventions", models, (c,))
                        for c in ("correct", second, drawn))  # fmt: skip
        return [*cost, *saved, self._matter(models, of_predictions=False)], (
            f"{', '.join(models)}; accuracy as routed {own}, second-best experts {others[0]}, "
            f"random experts {others[1]}"
        )

    def _matter(self, models: dict[str, float], *, of_predictions: bool) -> Claim:
        """That the experts matter: what is lost without the output of any is above the margin."""
        _, there = self._part("interventions")
        tried = shares(there, "drop_output")
        if not tried:
            raise NotTested(
                f"{self._name('interventions')} never leaves the experts' output out, so that it "
                "is not known whether they matter; name drop_output in substitutions"
            )
        column = f"drop_output_{tried[-1]}"

        def lost(table: pd.DataFrame) -> pd.Series:
            if of_predictions:
                return table[f"changed/{column}"]
            return table["correct"] - table[f"correct/{column}"]

        what = "predictions changed" if of_predictions else "accuracy lost"
        found = self._contrast(
            "interventions", models, lost, null=self.asked.margin, share=True
        )
        return Claim(f"{what} with no expert's output", found, above=True, premise=MATTER)

    def _learned(
        self,
        part: str,
        models: dict[str, float],
        label: str,
        value: Value | None,
        *,
        above: bool,
        told: Callable[[float], float] = float,
        **options,
    ) -> list[Claim]:
        """A claim about routes or experts of some models; and, as a premise, the same of the change
        from the untuned models, of those whose experts started alike.

        Raises NotTested where an untuned one has no scores.
        """
        claims = [Claim(label, self._contrast(part, models, value, **options), above, told)]
        alike = [model for model in models if model in self.spec.upcycled]
        if lacking := [m for m in alike if not self.measured.twin(part, m, self.recipe)]:
            raise NotTested(
                f"the experts of {', '.join(lacking)} started alike, and there are no scores of "
                "them trained and untuned to tell a change from; set untuned: true"
            )
        if alike:
            equal = dict.fromkeys(alike, 1 / len(alike))
            change = self._contrast(part, equal, value, **options, from_untuned=True)
            of = "" if len(alike) == len(models) else f" of {', '.join(alike)}"
            # A difference on Fisher's scale is that of no two correlations.
            scale = " (Fisher's z)" if told is np.tanh else ""
            name = f"{label}, change from untuned{of}{scale}"
            claims.append(Claim(name, change, above, premise=ALIKE))
        return claims

    def _contrast(
        self,
        part: str,
        weights: dict[str, float],
        value: Value | str | None,
        *,
        metric: Metric = VALUE,
        null: float = 0.0,
        share: bool = False,
        from_untuned: bool = False,
    ) -> Contrast:
        """The weighted sum over models of a metric of a column (or of what ``value`` makes of the
        scores), over the seeds that all of them have; or of its change from the untuned models."""
        seeds = self._seeds(part, weights)

        def made(table: pd.DataFrame) -> pd.DataFrame:
            if value is None:
                return table
            return frame(table, table[value] if isinstance(value, str) else value(table))

        runs = [
            [made(self.measured.table(part, model, self.recipe, seed)) for seed in seeds]
            for model in weights
        ]
        factors = list(weights.values())
        if from_untuned:
            for model, weight in weights.items():
                before = made(self.measured.table(part, model, UNTUNED, 0))
                runs.append([before] * len(seeds))
                factors.append(-weight)
        return contrast(
            runs, factors, metric, null=null, share=share,
            resamples=self.spec.resamples, seed=self.spec.seed,
        )  # fmt: skip

    def _seeds(self, part: str, models: Iterable[str]) -> list[int]:
        """The seeds that all of some models have scores of."""
        self._part(part)
        self.used |= {(part, model): None for model in models}
        seeds = [seed for seed in self.spec.seeds_of(self.recipe)
                 if all(seed in self.measured.seeds(part, m, self.recipe) for m in models)]
        if not seeds:
            raise NotTested(
                f"no seed has scores of all models; {self._missing(part, models)}"
            )
        return seeds

    def _missing(self, part: str, models: Iterable[str]) -> str:
        found = (missing(self.measured, part, model, self.recipe) for model in models)
        return "; ".join(filter(None, found))

    def _level(self, part: str, models: Iterable[str], columns: Sequence[str]) -> str:
        """The mean of some columns over examples, seeds and models, and of the untuned ones where
        that is what a change is told from."""

        def mean(recipe: str, of: Iterable[str], seeds: Sequence[int]) -> str:
            return number(np.mean([
                row_mean(self.measured.table(part, model, recipe, seed), columns).mean()
                for model in of
                for seed in seeds
            ]))  # fmt: skip

        told = mean(self.recipe, models, self._seeds(part, models))
        alike = [model for model in models if model in self.spec.upcycled]
        return f"{told} (untuned {mean(UNTUNED, alike, (0,))})" if alike else told

    def _part(self, part: str) -> tuple[Evaluation, list[str]]:
        """The evaluation that plays a part, and its score columns."""
        if part not in self.measured.scores:
            raise NotTested(f"no evaluation of the sweep {_GIVES[part]}")
        return self.measured.evaluation(part), self.measured.columns(part)

    def _name(self, part: str) -> str:
        self._part(part)
        return self.measured.scores[part].evaluation

    def _there(self, part: str, wanted: dict[str, Sequence[str]]) -> None:
        there = set(self.measured.columns(part))
        lacks = [name for name, columns in wanted.items() if not there & set(columns)]
        if lacks:
            raise NotTested(f"the scores of {self._name(part)} have no {', '.join(lacks)}")

    def _experts(self, part: str) -> dict[str, float]:
        """The MoE models that have scores, each with its share of the mean."""
        self._part(part)
        moes = scored_moes(self.spec, self.recipe, self._name(part))
        self.used |= {(part, model): None for model in moes}
        found = [model for model in moes if self.measured.seeds(part, model, self.recipe)]
        if not found:
            raise NotTested(
                self._missing(part, moes) or f"no MoE model is scored on {self._name(part)}"
            )
        return dict.fromkeys(found, 1 / len(found))

    @property
    def _robust(self) -> str:
        """The column of the worst case over attacks."""
        evaluation, _ = self._part("attacks")
        return "robust" if of_images(evaluation) else "correct"

    @property
    def _worst(self) -> str:
        evaluation, _ = self._part("attacks")
        count = sum(a.kind != "paper" for a in attack_names(evaluation).values())
        of = ", mean of budgets" if of_images(evaluation) else ""
        return f"worst case over {count} attacks{of}"


def _least_squares(models: Iterable[str], at: np.ndarray) -> dict[str, float]:
    """Each model's weight in the slope of a line through what is measured of them."""
    centred = at - at.mean()
    return dict(zip(models, centred / (centred**2).sum(), strict=True))
