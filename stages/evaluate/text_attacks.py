"""Adversarial robustness: classification of texts under attacks that hold the model.

Each example is classified as it is, under each attack, and under random edits of the same budget.
An example counts as robust only where none of the attacks changes its label to a wrong one. On the
way the routes of a Mixture-of-Experts model are recorded, before and under attack.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import numpy as np
import pandas as pd
from pydantic import Field, model_validator

from stages.attack import wordnet
from stages.attack.text_spec import (
    GCG,
    AnyTextAttack,
    DeepWordBug,
    EmbeddingPGD,
    GradientAttack,
    GreedyEdits,
    WordNeighbours,
)
from stages.evaluate import hygiene
from stages.evaluate.base import Metric, Request, Response, mean_of
from stages.evaluate.examples import results
from stages.evaluate.labelled_texts import LabelledTexts

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BUDGETS = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Of the checks, in units of the attack's own."""
UNBOUNDED = 100.0
"""Radius, in norms of an embedding, that leaves nothing of the original."""
EVERY_TOKEN = 1_000_000
"""Substitutions that no text has room for."""
UNBOUNDED_STEPS = 4
"""Times as many steps for a search that may replace every token."""
SWAPS = {"clean_attacked": "clean input, attacked routes",
         "attacked_clean": "attacked input, clean routes"}  # fmt: skip


class TextAttacks(LabelledTexts):
    """Robust accuracy over a closed set of labels, the worst of several attacks per example."""

    kind: Literal["text_attacks"] = "text_attacks"
    attacks: Annotated[tuple[AnyTextAttack, ...], Field(min_length=1)]
    checked: Annotated[int, Field(ge=0)] = 8
    """Examples on which each attack is checked: with twice the effort, with other budgets and
    without a bound. 0 leaves the checks out that need further attacks."""
    swap_layers: bool = False
    """Exchange the routes of the clean and the attacked text also in one layer at a time."""

    axis: ClassVar[str] = "adversarial"
    VERSION: ClassVar[int] = 6
    primary: ClassVar[str] = "robust_accuracy"

    @model_validator(mode="after")
    def _sound(self) -> "TextAttacks":
        labels = [attack.label for attack in self.attacks]
        if len(set(labels)) < len(labels):
            raise ValueError("two attacks have the same name; give each its own `name`")
        return self

    def wordings(self) -> dict[str, str]:
        """The template's hash, and that of WordNet's files where an attack takes words from it."""
        asked = any(getattr(attack, "synonyms", "") == "wordnet" for attack in self.attacks)
        found = {"wordnet": wordnet.digest(wordnet.folder())} if asked else {}
        return super().wordings() | found

    def requests(self, data: dict[str, pd.DataFrame]) -> list[Request]:
        """One per example; the first ones are those that attacks are checked on."""
        return [
            self.procedure_request(row["id"], row | {"checked": index < self.checked})
            for index, row in enumerate(self.rows(data[self.dataset]))
        ]

    def procedure(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        rows: Sequence[dict],
    ) -> Iterable[dict]:
        """What each attack did to each example (``text_attacking.py``)."""
        from stages.evaluate.text_attacking import Attacker

        return Attacker(self, model, tokenizer).run(rows)

    def score(self, data: dict[str, pd.DataFrame], responses: dict[str, Response]) -> pd.DataFrame:
        """One row per example.

        Columns, for each attack A: ``correct/A`` (0 or 1: right without the attack and under it)
        and ``random/A`` (the same of the control), ``changed/A`` (the prediction is another),
        ``success/A`` (wrong, of those that were right), ``margin/A``, ``queries/A``,
        ``gradients/A``, ``edits/A``, ``size/A`` (how far a perturbation moves a token at most,
        in half the median distance of an embedding to the nearest other: below 1 a token at that
        distance stays nearest to its own), and with routes ``routing_change/A``,
        ``routing_change_random/A``, each also by layer, ``routing_change_untouched/A`` over the
        tokens that the attack left as they were, and ``experts_first_changed/A``,
        ``experts_kept/A`` and ``experts_none/A`` (``probe/change.py``); ``swap_…`` (0 or 1) under
        the routes of the other text. ``noise`` is the routing change of the same input in another
        batch, ``noise_bfloat16`` in that precision, ``chance`` that of two random choices.
        """
        about = self.about(data)
        rows = []
        for label, result in zip(
            about["gold"], results(about["example_id"], responses), strict=True
        ):
            worst = max(self.attacks, key=lambda a, r=result: r["attacks"][a.label]["margin"])
            under = result["attacks"][worst.label]
            right = result["prediction"] == label
            row = {
                "prediction": under["prediction"],
                "answer": under["text"],
                "clean": float(right),
                "correct": float(
                    right
                    and all(r["prediction"] == label for r in result["attacks"].values())
                ),
                "noise": _mean(result["noise"]),
                "noise_bfloat16": _mean(result["noise_bfloat16"]),
                "chance": result["chance"],
            }
            for attack in self.attacks:
                row |= self._columns(attack.label, result, label, right)
            rows.append(row)
        return pd.concat([about, pd.DataFrame(rows)], axis=1)

    def _columns(self, name: str, result: dict, label: str, right: bool) -> dict:
        under = result["attacks"][name]
        held = float(right and under["prediction"] == label)
        row = {
            f"correct/{name}": held,
            f"random/{name}": float(right and under["random_prediction"] == label),
            f"changed/{name}": float(under["prediction"] != result["prediction"]),
            f"success/{name}": 1 - held if right else np.nan,
            f"routing_change/{name}": _mean(under["routing"]),
            f"routing_change_random/{name}": _mean(under["random_routing"]),
            f"routing_change_untouched/{name}": _mean(under["untouched_routing"]),
        }
        for key in ("margin", "queries", "gradients", "edits", "zero_gradients", "size"):
            row[f"{key}/{name}"] = under[key]
        for key, value in under["choices"].items():
            row[f"{key}/{name}"] = value
        for layer, change in under["routing"].items():
            row[f"routing_change/{name}/{layer}"] = change
        for layer, change in under["random_routing"].items():
            row[f"routing_change_random/{name}/{layer}"] = change
        for swap in SWAPS:
            for what in ("routes", "experts"):
                answer = under["swap"].get(f"{swap}/{what}")
                value = np.nan if answer is None else float(answer == label)
                row[f"swap_{swap}_{what}/{name}"] = value
                for layer, answers in under["swap_layers"].items():
                    if f"{swap}/{what}" in answers:
                        right_there = float(answers[f"{swap}/{what}"] == label)
                        row[f"swap_{swap}_{what}/{name}/{layer}"] = right_there
        for key, answer in under["checks"].items():
            row[f"check/{name}/{key}"] = float(not right or answer != label)
        return row

    def metrics(self) -> tuple[Metric, ...]:
        """Robust, clean and control accuracy, prediction and routing changes, routes swapped, sizes
        of perturbations and the margins that they reach."""
        found = [
            mean_of("correct", "robust_accuracy", label="robust accuracy, worst attack"),
            mean_of("clean", "clean_accuracy", label="accuracy, clean"),
        ]
        lower = {"higher_is_better": False}
        for attack in self.attacks:
            name, title = attack.label, attack.label.replace("_", " ")
            found += [
                mean_of(f"correct/{name}", label=f"accuracy, {title}"),
                mean_of(f"random/{name}", label=f"accuracy, random edits like {title}"),
                mean_of(f"success/{name}", label=f"success of {title}, was right", **lower),
                mean_of(f"changed/{name}", label=f"predictions changed by {title}", **lower),
                mean_of(f"queries/{name}", label=f"queries of {title}"),
                _routes(f"routing_change/{name}", f"routing change, {title}"),
                _routes(f"routing_change_random/{name}", f"routing change, random like {title}"),
                _routes(f"routing_change_untouched/{name}", f"the same of other tokens, {title}"),
            ]
            if isinstance(attack, EmbeddingPGD):
                unit = "in half distances to the nearest token"
                # It climbs on where the answer is wrong, which the other attacks end with.
                margin = f"margin of a wrong label under {title} (nats)"
                found += [
                    mean_of(f"size/{name}", label=f"size of {title}, {unit}"),
                    mean_of(f"margin/{name}", label=margin, **lower),
                ]
            if not isinstance(attack, GreedyEdits):
                found += [
                    _routes(
                        f"swap_{swap}_{what}/{name}",
                        f"accuracy, {text} ({what}), {title}",
                        higher_is_better=True,
                    )
                    for swap, text in SWAPS.items()
                    for what in ("routes", "experts")
                ]
        return (
            *found,
            _routes("noise", "routing change, other batch"),
            _routes("noise_bfloat16", "routing change, bfloat16"),
            _routes("chance", "routing change, chance"),
        )

    def curves(self, scores: pd.DataFrame) -> tuple[Metric, ...]:
        """Routing change and exchanged routes by layer, what else is told of the choice of experts,
        accuracy by budget."""
        by_layer = ("routing_change", "swap_")
        layers = [c for c in scores if c.startswith(by_layer) and c.count("/") == 2]
        others = [c for c in scores if c.startswith(("experts_", "check/"))]
        return (*(mean_of(c, bounded=True) for c in layers), *map(mean_of, others))

    def checks(self, scores: pd.DataFrame) -> list[dict]:
        """The hygiene report: one row per attack and check."""
        found = []
        for attack in self.attacks:
            found += self._checks_of(attack, scores)
        # One success rule for all, so that attacks can be compared example by example.
        for weaker in self.attacks:
            for stronger in self.attacks:
                if isinstance(stronger, GradientAttack) and _comparable(stronger, weaker):
                    success = 1 - scores[[f"correct/{a.label}" for a in (stronger, weaker)]]
                    success = success.to_numpy().astype(bool)
                    found.append(
                        hygiene.not_weaker(
                            stronger.label, weaker.label, success[:, 0], success[:, 1]
                        )
                    )
        return found

    def _checks_of(self, attack: AnyTextAttack, scores: pd.DataFrame) -> Iterator[dict]:
        name = attack.label
        success = (1 - scores[f"correct/{name}"]).to_numpy().astype(bool)
        if not _aims_elsewhere(attack):
            control = (1 - scores[f"random/{name}"]).to_numpy().astype(bool)
            yield hygiene.not_weaker(name, "random edits of the same budget", success, control)
        if isinstance(attack, GradientAttack):
            yield hygiene.gradients(name, scores[f"zero_gradients/{name}"].to_numpy())
        prefix = f"check/{name}/"
        columns = [c.removeprefix(prefix) for c in scores if c.startswith(prefix)]
        if not columns:
            return
        run = scores[scores[f"{prefix}{columns[0]}"].notna()]
        further = {c: run[f"{prefix}{c}"].to_numpy().astype(bool) for c in columns}
        base = success[scores.index.isin(run.index)]
        for key, words in (("steps", "twice the steps"), ("restarts", "twice the restarts")):
            if key in further:
                yield hygiene.more_effort(name, words, base, further[key])
        budgets = sorted(
            (float(c.removeprefix("budget ")), c) for c in columns if c.startswith("budget ")
        )
        if budgets:
            yield hygiene.monotone(name, [further[column] for _, column in budgets])
        if "unbounded" in further:
            yield hygiene.unbounded(name, further["unbounded"])


def _comparable(strong: GradientAttack, weak: AnyTextAttack) -> bool:
    """Whether an attack with the gradient must find what another one does.

    The plain attack must find what the same one finds through, around or on the choice of experts
    with no more effort: it was blind to that otherwise. And a search of tokens must find what edits
    of no more words find, where each puts a word of one token (a near one in the embedding) in the
    place of a word: most words of a text are one token too, and the search may put that one there
    or any other. Edits of letters and synonyms make several tokens of a word, which as many
    substitutions do not reach; and a perturbation of embeddings has no budget in edits.
    """
    if isinstance(strong, GCG) and isinstance(weak, WordNeighbours):
        near = weak.synonyms == "embedding" and weak.edits <= strong.substitutions
        return near and not _aims_elsewhere(strong)
    if type(strong) is not type(weak) or strong.loss != weak.loss:
        return False
    if not strong.routing == "as_is" != weak.routing:
        return False
    pgd = isinstance(strong, EmbeddingPGD)
    same, effort = (
        (("epsilon", "norm"), ("steps", "restarts"))
        if pgd
        else (("substitutions",), ("steps", "candidates", "top"))
    )
    return all(getattr(strong, field) == getattr(weak, field) for field in same) and all(
        getattr(strong, field) >= getattr(weak, field) for field in effort
    )


def _aims_elsewhere(attack: AnyTextAttack) -> bool:
    """Whether an attack does not raise the task's loss, and need not break anything."""
    return isinstance(attack, GradientAttack) and attack.routing == "targeted"


def _routes(column: str, label: str, higher_is_better: bool = False) -> Metric:
    return mean_of(
        column, label=label, higher_is_better=higher_is_better, of_experts=True, bounded=True
    )


def _mean(by_layer: dict[str, float]) -> float:
    return float(np.mean(list(by_layer.values()))) if by_layer else np.nan


def variants(attack: AnyTextAttack) -> Iterator[tuple[str, AnyTextAttack]]:
    """The same attack with twice the effort, with other budgets and, where it can reach every input
    then, without a bound, each with the name of the check that it serves.

    Edits of every word do not reach every text, and a model may call all that they reach by one
    label: there is nothing that they must break.
    """
    if isinstance(attack, EmbeddingPGD):
        yield "steps", attack.model_copy(update={"steps": 2 * attack.steps})
        yield "restarts", attack.model_copy(update={"restarts": 2 * attack.restarts})
        for factor in BUDGETS:
            epsilon = factor * attack.epsilon
            yield f"budget {epsilon:g}", attack.model_copy(update={"epsilon": epsilon})
        yield "unbounded", attack.model_copy(update={"epsilon": UNBOUNDED})
        return
    field = "substitutions" if isinstance(attack, GCG) else "edits"
    if isinstance(attack, GCG):
        yield "steps", attack.model_copy(update={"steps": 2 * attack.steps})
        # Its draws are those of its name.
        yield "restarts", attack.model_copy(update={"name": f"{attack.label}/again"})
        free = {"substitutions": EVERY_TOKEN, "steps": UNBOUNDED_STEPS * attack.steps}
        yield "unbounded", attack.model_copy(update=free)
    elif isinstance(attack, DeepWordBug) and attack.draws:
        yield "restarts", attack.model_copy(update={"name": f"{attack.label}/again"})
    size = getattr(attack, field)
    for budget in sorted({max(1, size // 2), size, 2 * size}):
        yield f"budget {budget}", attack.model_copy(update={field: budget})
