"""Out of distribution: classification on the training domain and on domains never trained on.

Domains differ in how often each label occurs, so accuracy stands beside macro-F1 and balanced
accuracy. All are functions of summed confusion counts and so are resampled exactly.
"""

from collections.abc import Callable
from typing import Annotated, ClassVar, Literal

import numpy as np
import pandas as pd
from pydantic import Field, model_validator

from stages.data.templates import TEMPLATES
from stages.evaluate.base import Evaluation, Metric, Request, Response
from stages.evaluate.examples import (
    answers,
    check_labels,
    difference,
    label_requests,
    mean_where,
    predicted_labels,
    qualified,
)


class OutOfDistribution(Evaluation):
    """How much of the accuracy in distribution is left on other domains."""

    kind: Literal["out_of_distribution"] = "out_of_distribution"
    in_distribution: str
    out_of_distribution: Annotated[tuple[str, ...], Field(min_length=1)]
    split: str = "test"
    template: str
    """A name in ``stages/data/templates.py``, which has a word for every label."""

    axis: ClassVar[str] = "out_of_distribution"
    primary: ClassVar[str] = "ood_accuracy"

    @model_validator(mode="after")
    def _domains_differ(self) -> "OutOfDistribution":
        if len(set(self.domains)) < len(self.domains):
            raise ValueError("names a data set twice; name each domain once")
        return self

    @property
    def domains(self) -> tuple[str, ...]:
        """All data sets, the one in distribution first."""
        return (self.in_distribution, *self.out_of_distribution)

    def datasets(self) -> dict[str, str]:
        """Every domain and the split."""
        return {domain: self.split for domain in self.domains}

    def tasks(self) -> dict[str, str]:
        """Data set to the task that it must be of."""
        return {domain: "classification" for domain in self.domains}

    def requests(self, data: dict[str, pd.DataFrame]) -> list[Request]:
        """One request per text, domain by domain, with the template's label words as choices."""
        requests = []
        for domain in self.domains:
            frame = data[domain]
            check_labels(domain, frame["label"], self.template)
            ids = qualified(domain, frame["id"])
            requests += label_requests(TEMPLATES[self.template], ids, frame["text"])
        return requests

    def score(self, data: dict[str, pd.DataFrame], responses: dict[str, Response]) -> pd.DataFrame:
        """One row per text: ``domain`` and ``correct``, 0 or 1."""
        template = TEMPLATES[self.template]
        parts = []
        for domain in self.domains:
            frame = data[domain]
            ids = qualified(domain, frame["id"])
            predictions = predicted_labels(template, answers(ids, responses))
            gold = frame["label"].tolist()
            inside = domain == self.in_distribution
            parts.append(
                pd.DataFrame(
                    {
                        "example_id": ids,
                        "document": qualified(domain, frame["document"]),
                        "subset": "in_distribution" if inside else "out_of_distribution",
                        "prompt": [template.render(text) for text in frame["text"]],
                        "gold": gold,
                        "prediction": predictions,
                        "answer": "",
                        "domain": domain,
                        "correct": [float(p == g) for p, g in zip(predictions, gold, strict=True)],
                    }
                )
            )
        return pd.concat(parts, ignore_index=True)

    def metrics(self) -> tuple[Metric, ...]:
        """Pooled and per-domain accuracy, macro-F1, and the gap to the training domain."""
        inside, outside = self.in_distribution, list(self.out_of_distribution)
        id_accuracy = _accuracy("id_accuracy", [inside], "accuracy in distribution")
        accuracies = [_accuracy(f"accuracy/{d}", [d], f"accuracy on {d}") for d in outside]
        return (
            _accuracy("ood_accuracy", outside, "accuracy out of distribution, pooled"),
            id_accuracy,
            self._from_counts(
                "id_balanced_accuracy",
                [inside],
                balanced_accuracy,
                "balanced accuracy in distribution",
            ),
            self._from_counts("id_macro_f1", [inside], macro_f1, "macro-F1 in distribution"),
            difference(
                "id_minus_ood",
                [id_accuracy],
                accuracies,
                higher_is_better=False,
                label="accuracy lost: in distribution minus mean of domains",
            ),
            self._from_counts("ood_macro_f1", outside, macro_f1, "macro-F1, mean of domains"),
            *accuracies,
            *(
                self._from_counts(f"macro_f1/{d}", [d], macro_f1, f"macro-F1 on {d}")
                for d in outside
            ),
        )

    def _from_counts(
        self,
        name: str,
        domains: list[str],
        function: Callable[[np.ndarray], np.ndarray],
        label: str,
    ) -> Metric:
        """The mean over domains of a function of each domain's confusion matrix."""
        labels = list(TEMPLATES[self.template].labels)

        def statistics(scores: pd.DataFrame) -> np.ndarray:
            gold = scores["gold"].map(labels.index).to_numpy()
            prediction = scores["prediction"].map(labels.index).to_numpy()
            counts = np.zeros((len(scores), len(domains), len(labels), len(labels)))
            for index, domain in enumerate(domains):
                rows = np.flatnonzero(scores["domain"] == domain)
                counts[rows, index, gold[rows], prediction[rows]] = 1
            return counts.reshape(len(scores), -1)

        def value(sums: np.ndarray) -> np.ndarray:
            counts = sums.reshape(*sums.shape[:-1], len(domains), len(labels), len(labels))
            return function(counts).mean(axis=-1)

        return Metric(name, statistics, value, label=label)


def _accuracy(name: str, domains: list[str], label: str) -> Metric:
    return mean_where("correct", name, "domain", domains, label=label)


def macro_f1(counts: np.ndarray) -> np.ndarray:
    """Mean over classes of F1, from confusion counts of shape (..., gold, prediction).

    A class that is neither in the gold labels nor predicted is left out, as scikit-learn does.
    """
    hits = np.diagonal(counts, axis1=-2, axis2=-1)
    either = counts.sum(axis=-1) + counts.sum(axis=-2)
    return _mean_over(2 * hits, either)


def balanced_accuracy(counts: np.ndarray) -> np.ndarray:
    """Mean recall of the classes that occur, from counts of shape (..., gold, prediction)."""
    return _mean_over(np.diagonal(counts, axis1=-2, axis2=-1), counts.sum(axis=-1))


def _mean_over(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Mean over the last axis of the quotients whose denominator is not 0."""
    occurs = denominator > 0
    quotients = numerator / np.where(occurs, denominator, 1)
    with np.errstate(invalid="ignore"):
        return quotients.sum(axis=-1) / occurs.sum(axis=-1)
