"""Metrics of labelled texts that are functions of confusion counts, and so of sums over rows.

Sets differ in how often each label occurs, so accuracy stands beside them. They are resampled
exactly: a bootstrap draws rows, whose counts add up.
"""

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd

from stages.data.templates import TEMPLATES
from stages.evaluate.base import Metric
from stages.evaluate.free_answers import OUT_OF_SET


def of_counts(
    name: str,
    function: Callable[[np.ndarray], np.ndarray],
    template: str,
    column: str,
    values: Sequence[str],
    over: Callable[..., np.ndarray] = np.mean,
    **fields: object,
) -> Metric:
    """A function of confusion counts, (..., labels, labels and one) to (...) between 0 and 1, of
    each group of rows, averaged (or ``over``) over the groups.

    Labels are those of a template. Each value of a score column is a group; other rows are left
    out. Rows of counts are gold labels, columns predictions, the last of them of no label.
    """

    # Looked up late: a sweep's check names the metrics before it refuses a template's name.
    def shape() -> tuple[int, int, int]:
        labels = len(TEMPLATES[template].labels)
        return len(values), labels, labels + 1

    def statistics(scores: pd.DataFrame) -> np.ndarray:
        labels = list(TEMPLATES[template].labels)
        columns = [*labels, OUT_OF_SET]
        gold = scores["gold"].map(labels.index).to_numpy()
        prediction = scores["prediction"].map(columns.index).to_numpy()
        counts = np.zeros((len(scores), *shape()))
        for index, value in enumerate(values):
            rows = np.flatnonzero(scores[column] == value)
            counts[rows, index, gold[rows], prediction[rows]] = 1
        return counts.reshape(len(scores), -1)

    def value(sums: np.ndarray) -> np.ndarray:
        return over(function(sums.reshape(*sums.shape[:-1], *shape())), axis=-1)

    return Metric(name, statistics, value, bounded=True, **fields)


def macro_f1(counts: np.ndarray) -> np.ndarray:
    """Mean over classes of F1, from confusion counts of shape (..., gold, prediction).

    Further columns count predictions of no class. A class that is neither in the gold labels nor
    predicted is left out, as scikit-learn does.
    """
    hits = np.diagonal(counts, axis1=-2, axis2=-1)
    either = counts.sum(axis=-1) + counts[..., : counts.shape[-2]].sum(axis=-2)
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
