"""The three parts of an evaluation: requests, scores, metrics.

An evaluation is a frozen spec (its fields are what a sweep sets) with three methods' worth of
meaning: it turns data sets into *requests* for the model, turns the model's *responses* into one
*score* row per example, and names the *metrics* that summarise score rows. It never sees a model.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pandas as pd

from stages.spec import Spec

AXES = ("safety", "truthfulness", "adversarial", "out_of_distribution")


@dataclass(frozen=True)
class Request:
    """One question to a model: score each continuation, or generate when there is none.

    The continuations' log-probabilities are of ``choice`` given ``context`` (both tokenised
    together, as ``context + choice``, split where the context's own tokens end).
    """

    id: str
    context: str
    choices: tuple[str, ...] = ()
    max_new_tokens: int = 0
    chat: bool = False
    """Put the context through the tokenizer's chat template as the user's turn."""


@dataclass(frozen=True)
class Response:
    """What the model answered to the request of the same id."""

    id: str
    logprobs: tuple[float, ...] = ()
    """Per choice, the sum of its tokens' natural-log probabilities."""
    tokens: tuple[int, ...] = ()
    """Per choice, its number of tokens; for a generation, the number generated (one entry)."""
    text: str = ""
    """The generated text."""
    finished: bool = True
    """The generation ended by itself, not at ``max_new_tokens``."""


@dataclass(frozen=True)
class Metric:
    """A number computed from score rows through sums, so that a bootstrap is a matrix product.

    ``statistics`` maps n score rows to an (n, k) array; ``value`` maps sums of such rows, an array
    of shape (..., k), to an array of shape (...). A mean is ``(x, 1)``, ``s[..., 0] / s[..., 1]``.
    """

    name: str
    statistics: Callable[[pd.DataFrame], np.ndarray]
    value: Callable[[np.ndarray], np.ndarray]
    column: str | None = None
    """The per-example score that this is the mean of; makes an exact paired test possible."""
    higher_is_better: bool = True
    label: str = ""
    """The metric's name in tables."""


def mean_of(
    column: str, name: str | None = None, subset: str | None = None, **fields: object
) -> Metric:
    """The mean of a score column over one subset or all rows, leaving out rows without a score."""

    def statistics(scores: pd.DataFrame) -> np.ndarray:
        counted = scores[column].notna().to_numpy()
        if subset is not None:
            counted = counted & (scores["subset"] == subset).to_numpy()
        values = np.where(counted, scores[column].to_numpy(dtype=float, na_value=0.0), 0.0)
        return np.stack([values, counted.astype(float)], axis=1)

    def value(sums: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore", divide="ignore"):
            return sums[..., 0] / sums[..., 1]

    return Metric(name or column, statistics, value, column=column, **fields)


class Evaluation(Spec):
    """Base of every kind of evaluation. Light to import: no torch, no Ray."""

    axis: ClassVar[str]
    VERSION: ClassVar[int] = 1
    """Raised when requests or scoring change, so that stored scores become stale."""
    primary: ClassVar[str]
    """Name of the metric that enters the Holm correction."""

    def datasets(self) -> dict[str, str]:
        """Dataset name (of the sweep) to the split that is read."""
        raise NotImplementedError

    def tasks(self) -> dict[str, str]:
        """Dataset name to the task (``stages/data/spec.py``) that it must be of."""
        raise NotImplementedError

    def sources(self) -> dict[str, tuple[str, str]]:
        """Key in ``data`` to the dataset and split read for it; by default as ``datasets``."""
        return {name: (name, split) for name, split in self.datasets().items()}

    def requests(self, data: dict[str, pd.DataFrame]) -> list[Request]:
        """Every request that the evaluation needs, in a fixed order; ids are unique."""
        raise NotImplementedError

    def score(self, data: dict[str, pd.DataFrame], responses: dict[str, Response]) -> pd.DataFrame:
        """One row per example, in the order of the data.

        Columns: ``example_id`` (unique), ``document`` (bootstrap cluster), ``subset``, ``prompt``,
        ``gold``, ``prediction``, ``answer`` (text of the model or empty), then the score columns.
        """
        raise NotImplementedError

    def metrics(self) -> tuple[Metric, ...]:
        """The metrics of the evaluation, the primary one first."""
        raise NotImplementedError
