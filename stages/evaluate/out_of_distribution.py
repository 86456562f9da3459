"""Classification of one reference set and of others: out of distribution, or made to be hard.

Sets differ in how often each label occurs, so accuracy stands beside macro-F1 and balanced
accuracy. All are functions of summed confusion counts and so are resampled exactly.
"""

from collections.abc import Callable
from typing import Annotated, ClassVar, Literal

import numpy as np
import pandas as pd
from pydantic import Field, model_validator

from stages.evaluate.base import Metric, Request, Response
from stages.evaluate.classification import Classification, check_labels, correct
from stages.evaluate.confusion import balanced_accuracy, macro_f1, of_counts
from stages.evaluate.examples import (
    clusters,
    difference,
    mean_of_sets,
    mean_where,
    qualified,
    worst,
)


class LabelledSets(Classification):
    """One set to compare with and others on which a model may do worse."""

    VERSION: ClassVar[int] = Classification.VERSION + 2
    split: str = "test"

    @property
    def reference(self) -> str:
        """The set to compare with."""
        raise NotImplementedError

    @property
    def others(self) -> tuple[str, ...]:
        """The sets on which a model may do worse."""
        raise NotImplementedError

    @model_validator(mode="after")
    def _sets_differ(self) -> "LabelledSets":
        if len(set(self.sets)) < len(self.sets):
            raise ValueError("names a data set twice; name each set once")
        return self

    @property
    def sets(self) -> tuple[str, ...]:
        """All data sets, the reference first."""
        return (self.reference, *self.others)

    def datasets(self) -> dict[str, str]:
        """Every set and the split."""
        return dict.fromkeys(self.sets, self.split)

    def sources(self) -> dict[str, tuple[str, str]]:
        """The sets and, under a key of their own, the answered examples."""
        return super().sources() | self.shot_source()

    def requests(self, data: dict[str, pd.DataFrame]) -> list[Request]:
        """One request per row, set by set."""
        requests = []
        for name in self.sets:
            check_labels(name, data[name]["label"], self.template)
            requests += self.asked(qualified(name, data[name]["id"]), data[name], data)
        return [*requests, *self.calibration(data)]

    def score(self, data: dict[str, pd.DataFrame], responses: dict[str, Response]) -> pd.DataFrame:
        """One row per example: ``domain`` (its set) and ``correct``, 0 or 1."""
        parts = []
        for name in self.sets:
            frame = data[name]
            ids = qualified(name, frame["id"])
            found = self.answered(ids, responses)
            parts.append(
                pd.DataFrame(
                    {
                        "example_id": ids,
                        "document": clusters(name, frame["document"], digests=True),
                        "subset": self.subsets[name != self.reference],
                        "prompt": self.prompts(frame, data),
                        "gold": frame["label"].tolist(),
                        **found,
                        "domain": name,
                        "correct": correct(frame["label"], found),
                    }
                )
            )
        return pd.concat(parts, ignore_index=True)

    subsets: ClassVar[tuple[str, str]]
    """Names of the reference's rows and of the others'."""
    names: ClassVar[tuple[str, str, str]]
    """Beginnings of the metrics' names for the reference and the others, and the gap's name."""
    titles: ClassVar[tuple[str, str]]
    """The two in tables."""

    def metrics(self) -> tuple[Metric, ...]:
        """Mean, pooled, worst and per-set accuracy and macro-F1, and the robustness gap.

        First comes the unweighted mean over sets, as the protocol of MoE-RBench has it; pooled
        over examples a large set outweighs the others.
        """
        one, others = [self.reference], list(self.others)
        (before, after, gap), (inside, outside) = self.names, self.titles
        reference = _accuracy(f"{before}_accuracy", one, f"accuracy {inside}")
        accuracies = [_accuracy(f"accuracy/{d}", [d], f"accuracy on {d}") for d in others]
        mean = _accuracy(f"{after}_accuracy", others, f"accuracy {outside}")
        several = ()
        if len(others) > 1:
            mean = mean_of_sets(
                f"{after}_accuracy",
                accuracies,
                "correct",
                label=f"accuracy {outside}, mean of sets",
                bounded=True,
            )
            several = (
                _accuracy(f"{after}_pooled_accuracy", others, f"accuracy {outside}, pooled"),
                worst(
                    f"{after}_worst_accuracy",
                    accuracies,
                    label=f"accuracy {outside}, worst",
                    bounded=True,
                ),
                self._from_counts(
                    f"{after}_worst_macro_f1",
                    others,
                    macro_f1,
                    f"macro-F1 {outside}, worst",
                    np.min,
                ),
            )
        return (
            mean,
            reference,
            self._from_counts(
                f"{before}_balanced_accuracy",
                one,
                balanced_accuracy,
                f"balanced accuracy {inside}",
            ),
            self._from_counts(f"{before}_macro_f1", one, macro_f1, f"macro-F1 {inside}"),
            difference(
                gap,
                [reference],
                accuracies,
                higher_is_better=False,
                label=f"accuracy lost {outside}, mean",
            ),
            self._from_counts(
                f"{after}_macro_f1", others, macro_f1, f"macro-F1 {outside}, mean of sets"
            ),
            *several,
            *accuracies,
            *(
                self._from_counts(f"macro_f1/{d}", [d], macro_f1, f"macro-F1 on {d}")
                for d in others
            ),
            *self.out_of_set_rate(),
        )

    def _from_counts(
        self,
        name: str,
        domains: list[str],
        function: Callable[[np.ndarray], np.ndarray],
        label: str,
        over: Callable[..., np.ndarray] = np.mean,
    ) -> Metric:
        """A function of the sets' confusion matrices, averaged (or ``over``) over the sets."""
        return of_counts(
            name,
            function,
            self.template,
            "domain",
            domains,
            over,
            label=label,
            datasets=tuple(domains),
        )


class OutOfDistribution(LabelledSets):
    """How much of the accuracy in distribution is left on other domains."""

    kind: Literal["out_of_distribution"] = "out_of_distribution"
    in_distribution: str
    out_of_distribution: Annotated[tuple[str, ...], Field(min_length=1)]

    axis: ClassVar[str] = "out_of_distribution"
    primary: ClassVar[str] = "ood_accuracy"
    subsets = ("in_distribution", "out_of_distribution")
    names = ("id", "ood", "id_minus_ood")
    titles = ("in distribution", "out of distribution")

    @property
    def reference(self) -> str:
        """The domain of the training."""
        return self.in_distribution

    @property
    def others(self) -> tuple[str, ...]:
        """The other domains."""
        return self.out_of_distribution

    @property
    def outside(self) -> tuple[str, ...]:
        """The other domains."""
        return self.out_of_distribution


class AdversarialSets(LabelledSets):
    """How much of the accuracy on a standard test set is left on sets made to be hard.

    Such as the rounds of ANLI beside SNLI, SNLI-hard, AdvGLUE, or counterfactual rewrites.
    """

    kind: Literal["adversarial_sets"] = "adversarial_sets"
    standard: str
    adversarial: Annotated[tuple[str, ...], Field(min_length=1)]

    axis: ClassVar[str] = "adversarial"
    primary: ClassVar[str] = "adversarial_accuracy"
    subsets = ("standard", "adversarial")
    names = ("standard", "adversarial", "robustness_gap")
    titles = ("on the standard set", "on adversarial sets")

    @property
    def reference(self) -> str:
        """The standard test set."""
        return self.standard

    @property
    def others(self) -> tuple[str, ...]:
        """The hard ones."""
        return self.adversarial


def _accuracy(name: str, domains: list[str], label: str) -> Metric:
    return mean_where("correct", name, "domain", domains, label=label, datasets=tuple(domains))
