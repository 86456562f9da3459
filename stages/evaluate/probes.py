"""Probes of the experts: what a model's answers owe to which expert takes which token.

Each holds the model while it answers labelled texts (or images, ``image_probes.py``), and leaves
one score row per example. What is about experts alone is compared between a model before and after
a recipe.
"""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import numpy as np
import pandas as pd
from pydantic import Field, model_validator

from stages.evaluate.base import Evaluation, Metric, Request, Response, mean_of
from stages.evaluate.examples import correlation, difference, results
from stages.evaluate.labelled_texts import LabelledTexts

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Substitution = Literal["next_ranked", "random", "drop_first", "drop_output", "permuted"]
Prune = Literal["least_used", "most_used", "random"]
WAYS: tuple[Prune, ...] = ("least_used", "most_used", "random")


class Interventions(Evaluation):
    """Accuracy with other experts than those that the router chose.

    ``next_ranked``: ranks K + 1 to 2K; ``random``: K drawn ones; ``drop_first``: the best adds
    nothing; ``drop_output``: none adds anything, which tells whether the layer matters at all;
    ``permuted``: the experts of each layer change places. Where experts have a capacity, a token
    that one had no room for stays without: experts are exchanged, not the tokens that are served.
    """

    substitutions: tuple[Substitution, ...] = (
        "next_ranked", "random", "drop_first", "drop_output", "permuted"
    )  # fmt: skip
    shares: Annotated[tuple[Annotated[float, Field(gt=0, le=1)], ...], Field(min_length=1)] = (1.0,)
    """Shares of the tokens that are substituted in every layer."""
    weights: Literal["by_rank", "by_logits"] = "by_rank"
    """Of the experts that are put in: those of the ones in whose place they stand, or what the
    router would give them."""
    top_k: tuple[Annotated[int, Field(ge=1)], ...] = ()
    """Other numbers of experts per token."""
    top_k_weights: Annotated[
        tuple[Literal["by_rule", "other_rule"], ...], Field(min_length=1)] = ("by_rule",)
    """Of those, by the router's rule or by the other one (``top_K_other_rule``): some routers
    divide by the sum over the chosen, so that weights always sum to the same, others do not."""
    prune: tuple[Annotated[int, Field(ge=1)], ...] = ()
    """Experts that are taken out of every layer: so many of the least used, of the most used, and
    random ones; their tokens go to the best of the rest."""
    calibration_split: str = "train"
    """Split of the same data set on which usage is counted."""
    calibration_rows: Annotated[int, Field(ge=1)] = 16
    random_masks: Annotated[int, Field(ge=0)] = 0
    """Criticality of each layer's router: the largest rise of the loss over so many random masks of
    half its experts (after RoSais, arXiv 2602.08621)."""

    VERSION: ClassVar[int] = 2
    axis: ClassVar[str] = "adversarial"
    primary: ClassVar[str] = "intervened_accuracy"

    @model_validator(mode="after")
    def _something_is_done(self) -> "ExpertInterventions":
        if not self.interventions:
            raise ValueError("no intervention is named; give substitutions, top_k or prune")
        return self

    @property
    def interventions(self) -> list[str]:
        """Names of all interventions."""
        return [
            *(f"{name}_{share:g}" for name in self.substitutions for share in self.shares),
            *(name for name, _, _ in self.counts),
            *(f"prune_{which}_{count}" for count in self.prune for which in WAYS),
        ]

    @property
    def counts(self) -> list[tuple[str, int, bool]]:
        """Of each intervention with another number of experts the name, that number, and whether
        it is the other rule that weighs them."""
        endings = {"by_rule": "", "other_rule": "_other_rule"}
        return [
            (f"top_{count}{endings[rule]}", count, rule == "other_rule")
            for rule in self.top_k_weights for count in self.top_k
        ]  # fmt: skip

    def sources(self) -> dict[str, tuple[str, str]]:
        """The scored split and, where usage is needed, the one that it is counted on."""
        usage = {self._usage: (self.dataset, self.calibration_split)} if self.prune else {}
        return super().sources() | usage

    @property
    def _usage(self) -> str:
        return f"{self.dataset}#{self.calibration_split}"

    def requests(self, data: dict[str, pd.DataFrame]) -> list[Request]:
        """One per example, with the examples that usage is counted on."""
        others = {}
        if self.prune:
            others = {"calibration": self.rows(data[self._usage].head(self.calibration_rows))}
        return [
            self.procedure_request(row["id"], row | others)
            for row in self.rows(data[self.dataset])
        ]

    def score(self, data: dict[str, pd.DataFrame], responses: dict[str, Response]) -> pd.DataFrame:
        """One row per example: ``correct`` and ``loss`` as the model is; for each intervention I
        ``correct/I``, ``loss/I`` (its rise) and ``changed/I``; ``operations/top_K`` (per token, in
        those of the model as it is); for each layer ``criticality/LAYER``."""
        about, rows = self.about(data), []
        for label, found in zip(
            about["gold"], results(about["example_id"], responses), strict=True
        ):
            plain = found["prediction"]
            row = {"prediction": plain, "answer": "", "correct": float(plain == label),
                   "loss": found["loss"]}  # fmt: skip
            for name, other in found["interventions"].items():
                row[f"correct/{name}"] = float(other["prediction"] == label)
                row[f"changed/{name}"] = float(other["prediction"] != plain)
                row[f"loss/{name}"] = other["loss"] - found["loss"]
            for name, ratio in found["operations"].items():
                row[f"operations/{name}"] = ratio
            for layer, rise in found["criticality"].items():
                row[f"criticality/{layer}"] = rise
            rows.append(row)
        return pd.concat([about, pd.DataFrame(rows)], axis=1)

    def metrics(self) -> tuple[Metric, ...]:
        """Accuracy as the model is and under each intervention; predictions changed, loss added."""
        experts = {"of_experts": True}
        lower, found = {"higher_is_better": False} | experts, []
        for name in self.interventions:
            title = name.replace("_", " ")
            found += [
                mean_of(f"correct/{name}", label=f"accuracy, {title}", **experts),
                mean_of(f"changed/{name}", label=f"predictions changed, {title}", **lower),
                mean_of(f"loss/{name}", label=f"loss added, {title}", **lower),
            ]
        accuracies = found[::3]
        mean = difference(
            self.primary, accuracies, [], label="accuracy, mean of interventions", bounded=True,
            **experts,
        )  # fmt: skip
        costs = [
            mean_of(f"operations/top_{count}", label=f"operations per token, top {count}", **lower)
            for count in self.top_k
        ]
        return (mean, mean_of("correct", "accuracy", **experts), *found, *costs)

    def curves(self, scores: pd.DataFrame) -> tuple[Metric, ...]:
        """The criticality of each layer."""
        return tuple(mean_of(c) for c in scores if c.startswith("criticality/"))


class ExpertInterventions(Interventions, LabelledTexts):
    """Interventions while texts are classified."""

    kind: Literal["expert_interventions"] = "expert_interventions"
    epsilon: Annotated[float, Field(ge=0)] = 0.0
    """Above 0 every text is attacked first (``embedding_pgd`` with that radius), and all is asked
    about the attacked ones."""
    steps: Annotated[int, Field(ge=1)] = 10
    """Of that attack."""

    def procedure(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        rows: Sequence[dict],
    ) -> Iterable[dict]:
        """The answers under each intervention (``probing.py``)."""
        from stages.evaluate.probing import Intervenor

        return Intervenor(self, model, tokenizer).run(rows)


GEOMETRY = {
    "disagreement": "disagreement of the two best experts",
    "disagreement_next": "disagreement of ranks K and K + 1",
    "disagreement_random": "disagreement of random experts",
    "cosine": "cosine of the two best experts",
    "router_margin": "margin of the two best probabilities",
    "logit_margin": "logit margin of the choice",
    "entropy": "entropy of the router",
    "radius_l2": "certified radius of the choice, l2",
    "radius_linf": "certified radius of the choice, l-infinity",
    "jump": "jump of the output at a tie",
    "routing_term": "routing term",
    "routing_jacobian": "router's part of the Jacobian",
    "smoothness": "dense over expert Lipschitz, minimum-norm fits",
    "smoothness_random": "the same, tokens dealt out at random",
    "smoothness_gain": "the same, the router's groups minus random ones",
    "smoothness_frobenius": "dense over expert Frobenius norm, minimum-norm fits",
    "smoothness_bound": "its lower bound",
    "smoothness_share": "dense over expert Lipschitz, in √E",
    "cancellation": "dense over summed expert squared norms",
    "overlap": "overlap of the experts' inputs",
    "eigenvalue": "largest eigenvalue of their projectors",
    "least_eigenvalue": "least eigenvalue of their projectors",
}


class Geometry(Evaluation):
    """Margins and certified radii of routers, disagreement of experts, and what they explain.

    Means over the tokens of an input, averaged over layers. Radii are in units of the router's own
    input and certify one layer, not the model.
    """

    quantities: ClassVar[dict[str, str]] = GEOMETRY
    axis: ClassVar[str] = "adversarial"
    primary: ClassVar[str] = "disagreement"

    def score(self, data: dict[str, pd.DataFrame], responses: dict[str, Response]) -> pd.DataFrame:
        """One row per example: each quantity Q of ``quantities``, ``Q/LAYER`` by layer, and
        ``loss_rise`` under the attack."""
        about, rows = self.about(data), []
        for found in results(about["example_id"], responses):
            row = {"prediction": found["prediction"], "answer": "", "loss_rise": found["loss_rise"]}
            for name in self.quantities:
                layers = {f"{name}/{k}": v[name] for k, v in found["layers"].items() if name in v}
                values = np.array([v for v in layers.values() if not np.isnan(v)])
                row[name] = float(values.mean()) if len(values) else np.nan
                row |= layers
            rows.append(row)
        return pd.concat([about, pd.DataFrame(rows)], axis=1)

    def metrics(self) -> tuple[Metric, ...]:
        """The mean of every quantity, and the correlation of the routing term with the loss."""
        lower = {
            "disagreement", "disagreement_next", "jump", "routing_term", "routing_jacobian",
            "overlap", "eigenvalue", "dropped",
        }  # fmt: skip
        return (
            *(
                mean_of(name, label=label, higher_is_better=name not in lower, of_experts=True)
                for name, label in self.quantities.items()
            ),
            correlation("routing_term", "loss_rise", "routing term with loss under attack"),
        )

    def curves(self, scores: pd.DataFrame) -> tuple[Metric, ...]:
        """Every quantity by layer."""
        return tuple(mean_of(c) for c in scores if c.split("/")[0] in self.quantities and "/" in c)


class RouterGeometry(Geometry, LabelledTexts):
    """Geometry at the tokens of prompts."""

    VERSION: ClassVar[int] = 4

    kind: Literal["router_geometry"] = "router_geometry"
    epsilon: Annotated[float, Field(gt=0)] = 0.1
    """Radius of an attack on the embeddings (``embedding_pgd``) whose loss rise the routing term is
    correlated with."""
    steps: Annotated[int, Field(ge=1)] = 5

    def procedure(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        rows: Sequence[dict],
    ) -> Iterable[dict]:
        """Means by layer (``probing.py``)."""
        from stages.evaluate.probing import Surveyor

        return Surveyor(self, model, tokenizer).run(rows)


BLOCK_SLOPES = {"block": "free", "block_random": "random", "block_frozen": "frozen"}
"""Columns and the kinds of ``probe/block_slopes.py``."""


class Lipschitz(Evaluation):
    """How steeply the outputs change with the inputs, with routes free and frozen, and those of
    each feed-forward block with its own inputs.

    Lower bounds of the Lipschitz constant around each example; l2 norms.
    """

    radii: tuple[Annotated[float, Field(gt=0)], ...] = ()
    """Other radii than ``radius``, in its unit, within which slopes are looked for as well. Where
    routes may change, a search within a smaller one finds a jump steeper; what it finds counts
    within the larger ones too."""
    block_radius: Annotated[float, Field(gt=0)] = 0.1
    """Of each token's ball around what a feed-forward block is given, in median norms of that."""
    steps: Annotated[int, Field(ge=1)] = 10
    restarts: Annotated[int, Field(ge=1)] = 2
    samples: Annotated[int, Field(ge=1)] = 16
    """Random directions."""

    axis: ClassVar[str] = "adversarial"
    primary: ClassVar[str] = "lipschitz"

    @property
    def sizes(self) -> dict[str, float]:
        """All radii by the end that they give the names of their columns, the smallest first."""
        sizes = {"": self.radius} | {f"/{radius:g}": radius for radius in self.radii}
        return dict(sorted(sizes.items(), key=lambda size: size[1]))

    def score(self, data: dict[str, pd.DataFrame], responses: dict[str, Response]) -> pd.DataFrame:
        """One row per example: ``lipschitz`` found by ascent, ``lipschitz_random``, ``jacobian``;
        of a model with experts also with each token kept at its experts (``lipschitz_frozen``), the
        ratio to that (``routing_share``) and with the weights kept as well (``jacobian_frozen``).
        The ones within another radius R are ``lipschitz/R``, ``lipschitz_random/R`` and
        ``lipschitz_frozen/R``. Each is the largest that was found within its radius or a smaller
        one.

        ``block/LAYER``, ``block_random/LAYER`` and ``block_frozen/LAYER`` are those of a
        feed-forward block, means over the tokens; ``block``, ``block_random`` and ``block_frozen``
        the means over all blocks, of which one without experts counts in each. NaN for an
        architecture whose blocks are not known.
        """
        about = self.about(data)
        rows = [
            {name: value for name, value in found.items() if name != "blocks"}
            | _blocks(found["blocks"])
            for found in results(about["example_id"], responses)
        ]
        found = pd.DataFrame(rows).assign(answer="")
        for name in ("lipschitz", "lipschitz_random", "lipschitz_frozen"):
            # The balls lie in each other, and a slope found in one is a slope in all larger ones.
            nested = [name + suffix for suffix in self.sizes]
            found[nested] = found[nested].cummax(axis=1)
        found["routing_share"] = found["lipschitz"] / found["lipschitz_frozen"]
        return pd.concat([about, found], axis=1)

    def metrics(self) -> tuple[Metric, ...]:
        """Means over the examples."""
        lower = {"higher_is_better": False}
        experts = lower | {"of_experts": True}
        return (
            mean_of("lipschitz", label="local Lipschitz constant, found", **lower),
            mean_of("lipschitz_random", label="the same, random directions", **lower),
            mean_of("jacobian", label="norm of the Jacobian", **lower),
            mean_of("lipschitz_frozen", label="found with experts frozen", **experts),
            mean_of("routing_share", label="found, free over frozen", **experts),
            mean_of("jacobian_frozen", label="norm of the Jacobian, routes frozen", **experts),
            *(
                mean_of(f"{name}/{radius:g}", label=f"{label}, radius {radius:g}", **fields)
                for radius in self.radii
                for name, label, fields in (
                    ("lipschitz", "local Lipschitz constant, found", lower),
                    ("lipschitz_random", "the same, random directions", lower),
                    ("lipschitz_frozen", "found with experts frozen", experts),
                )
            ),
            mean_of("block", label="feed-forward block on its own input, found", **lower),
            mean_of("block_random", label="the same, random directions", **lower),
            mean_of("block_frozen", label="block with its experts frozen, found", **experts),
        )

    def curves(self, scores: pd.DataFrame) -> tuple[Metric, ...]:
        """Blocks by layer."""
        kinds = tuple(f"{column}/" for column in BLOCK_SLOPES)
        return tuple(mean_of(c) for c in scores if c.startswith(kinds))


def _blocks(by_layer: dict[str, dict[str, float]]) -> dict[str, float]:
    """The columns of slopes of feed-forward blocks."""
    row = {}
    for column, routing in BLOCK_SLOPES.items():
        layers = {path: found[routing] for path, found in by_layer.items() if routing in found}
        # Means of both kinds are over the same blocks, or they could not be compared.
        means = [found.get(routing, found["free"]) for found in by_layer.values()]
        row[column] = float(np.mean(means)) if layers else np.nan
        row |= {f"{column}/{path}": value for path, value in layers.items()}
    return row


class LocalLipschitz(Lipschitz, LabelledTexts):
    """Slopes of the log-probabilities of the answers over the embeddings of a text's tokens; the
    norm of the Jacobian there is one that counts within every radius, experts frozen or not."""

    VERSION: ClassVar[int] = 5

    kind: Literal["local_lipschitz"] = "local_lipschitz"
    radius: Annotated[float, Field(gt=0)] = 0.1
    """Of each token's ball, in median norms of a token's embedding."""

    def procedure(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        rows: Sequence[dict],
    ) -> Iterable[dict]:
        """Slopes around each text (``probing.py``)."""
        from stages.evaluate.probing import Climber

        return Climber(self, model, tokenizer).run(rows)
