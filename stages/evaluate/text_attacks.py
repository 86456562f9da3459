"""Adversarial robustness: classification of texts under attacks that hold the model.

Each example is classified as it is, under each attack, and under random edits of the same size. An
example counts as robust only where none of the attacks changes its label to a wrong one. On the way
the routes of a Mixture-of-Experts model are recorded, before and under attack.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import numpy as np
import pandas as pd
from pydantic import Field, model_validator

from stages.attack.text_spec import AnyTextAttack, EmbeddingPGD, GradientAttack, GreedyEdits
from stages.data.spec import Task
from stages.data.templates import TEMPLATES
from stages.evaluate import hygiene
from stages.evaluate.base import Evaluation, Metric, Request, Response, mean_of
from stages.evaluate.classification import check_labels
from stages.evaluate.examples import qualified, results

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BUDGETS = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Of the checks, in units of the attack's own."""
SWAPS = {"clean_attacked": "clean input, attacked routes",
         "attacked_clean": "attacked input, clean routes"}  # fmt: skip


class TextAttacks(Evaluation):
    """Robust accuracy over a closed set of labels, the worst of several attacks per example."""

    kind: Literal["text_attacks"] = "text_attacks"
    dataset: str
    split: str = "test"
    template: str
    """A name in ``stages/data/templates.py``; its last column is attacked."""
    attacks: Annotated[tuple[AnyTextAttack, ...], Field(min_length=1)]
    checked: Annotated[int, Field(ge=0)] = 8
    """Examples on which each attack is checked: with twice the effort, with other budgets and
    without a bound. 0 leaves the checks out that need further attacks."""
    chat: bool = False
    """Put the prompt through the tokenizer's chat template."""
    seed: int = 0

    axis: ClassVar[str] = "adversarial"
    primary: ClassVar[str] = "robust_accuracy"

    @model_validator(mode="after")
    def _sound(self) -> "TextAttacks":
        if self.technique is not None:
            raise ValueError("technique has no effect on attacks that hold the model; remove it")
        labels = [attack.label for attack in self.attacks]
        if len(set(labels)) < len(labels):
            raise ValueError("two attacks have the same name; give each its own `name`")
        return self

    def datasets(self) -> dict[str, str]:
        """The one data set and the split that is attacked."""
        return {self.dataset: self.split}

    @property
    def task(self) -> Task:
        """The task of the data set, which is the template's."""
        return TEMPLATES[self.template].task if self.template in TEMPLATES else "classification"

    def tasks(self) -> dict[str, Task]:
        """Data set to the task that it must be of."""
        return {self.dataset: self.task}

    def wordings(self) -> dict[str, str]:
        """The template's hash."""
        return {"template": TEMPLATES[self.template].hash}

    def requests(self, data: dict[str, pd.DataFrame]) -> list[Request]:
        """One per example: the prompt in three parts, the middle one to be attacked."""
        frame = data[self.dataset]
        check_labels(self.dataset, frame["label"], self.template)
        template = TEMPLATES[self.template]
        before, after = template.prompt.split(f"{{{template.columns[-1]}}}", 1)
        asked = []
        for index, (id, row) in enumerate(
            zip(qualified(self.dataset, frame["id"]), frame.to_dict("records"), strict=True)
        ):
            parts = {name: str(row[name]) for name in template.columns}
            asked.append(
                self.procedure_request(
                    id,
                    {
                        "id": id,
                        "before": _filled(before, parts),
                        "text": parts[template.columns[-1]],
                        "after": _filled(after, parts),
                        "label": row["label"],
                        "checked": index < self.checked,
                    },
                )
            )
        return asked

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

        Columns, for each attack A: ``correct/A`` and ``random/A`` (0 or 1, under attack and under
        the control), ``changed/A`` (the prediction is another), ``success/A`` (wrong, of those that
        were right), ``margin/A``, ``queries/A``, ``gradients/A``, ``edits/A``, and with routes
        ``routing_change/A``, ``routing_change_random/A``, each also by layer. ``noise`` is the
        routing change of the same input in another batch, ``chance`` that of two random choices.
        """
        frame = data[self.dataset]
        ids = qualified(self.dataset, frame["id"])
        found = results(ids, responses)
        rows = []
        for id, document, label, result in zip(
            ids, qualified(self.dataset, frame["document"]), frame["label"], found, strict=True
        ):
            worst = max(self.attacks, key=lambda a, r=result: r["attacks"][a.label]["margin"])
            under = result["attacks"][worst.label]
            right = result["prediction"] == label
            row = {
                "example_id": id,
                "document": document,
                "subset": "",
                "prompt": result["prompt"],
                "gold": label,
                "prediction": under["prediction"],
                "answer": under["text"],
                "clean": float(right),
                "correct": min(
                    float(result["attacks"][a.label]["prediction"] == label) for a in self.attacks
                ),
                "noise": _mean(result["noise"]),
                "chance": result["chance"],
            }
            for attack in self.attacks:
                row |= self._columns(attack.label, result, label, right)
            rows.append(row)
        return pd.DataFrame(rows)

    def _columns(self, name: str, result: dict, label: str, right: bool) -> dict:
        under = result["attacks"][name]
        wrong = float(under["prediction"] != label)
        row = {
            f"correct/{name}": 1 - wrong,
            f"random/{name}": float(under["random_prediction"] == label),
            f"changed/{name}": float(under["prediction"] != result["prediction"]),
            f"success/{name}": wrong if right else np.nan,
            f"routing_change/{name}": _mean(under["routing"]),
            f"routing_change_random/{name}": _mean(under["random_routing"]),
        }
        for key in ("margin", "queries", "gradients", "edits", "zero_gradients", "size"):
            row[f"{key}/{name}"] = under[key]
        for layer, change in under["routing"].items():
            row[f"routing_change/{name}/{layer}"] = change
        for layer, change in under["random_routing"].items():
            row[f"routing_change_random/{name}/{layer}"] = change
        for swap in SWAPS:
            for what in ("routes", "experts"):
                answer = under["swap"].get(f"{swap}/{what}")
                value = np.nan if answer is None else float(answer == label)
                row[f"swap_{swap}_{what}/{name}"] = value
        for key, answer in under["checks"].items():
            row[f"check/{name}/{key}"] = float(answer != label)
        return row

    def metrics(self) -> tuple[Metric, ...]:
        """Robust, clean and control accuracy, prediction and routing changes, routes swapped."""
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
            _routes("chance", "routing change, chance"),
        )

    def curves(self, scores: pd.DataFrame) -> tuple[Metric, ...]:
        """Routing change by layer, accuracy by budget."""
        layers = [c for c in scores if c.startswith("routing_change") and c.count("/") == 2]
        budgets = [c for c in scores if c.startswith("check/")]
        return tuple(mean_of(column) for column in (*layers, *budgets))

    def checks(self, scores: pd.DataFrame) -> list[dict]:
        """The hygiene report: one row per attack and check."""
        found = []
        for attack in self.attacks:
            found += self._checks_of(attack, scores)
        # One success rule for all, so that attacks can be compared example by example.
        for weaker in self.attacks:
            for stronger in self.attacks:
                if isinstance(stronger, GradientAttack) and _same_budget(stronger, weaker):
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
        control = (1 - scores[f"random/{name}"]).to_numpy().astype(bool)
        yield hygiene.not_weaker(name, "random edits of the same size", success, control)
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


def _same_budget(one: AnyTextAttack, other: AnyTextAttack) -> bool:
    """Two attacks within the same set of inputs, so that one may stand for the other."""
    if one.label == other.label or type(one) is not type(other):
        return False
    size = ("epsilon", "norm") if isinstance(one, EmbeddingPGD) else ("substitutions",)
    return all(getattr(one, field) == getattr(other, field) for field in size)


def _routes(column: str, label: str, higher_is_better: bool = False) -> Metric:
    return mean_of(column, label=label, higher_is_better=higher_is_better, of_experts=True)


def _filled(text: str, parts: dict[str, str]) -> str:
    return re.sub(r"\{(\w+)\}", lambda match: parts[match[1]], text)


def _mean(by_layer: dict[str, float]) -> float:
    return float(np.mean(list(by_layer.values()))) if by_layer else np.nan
