"""A weighted sum of models' metrics, tested so that few training seeds decide little."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from stages.evaluate.base import Metric
from stages.statistics import bootstrap, document_sums
from stages.variance import Variance


@dataclass(frozen=True)
class Contrast:
    """A statistic, its 95 % interval and the two-sided test against ``null``."""

    value: float
    ci_low: float
    ci_high: float
    null: float
    p_value: float
    minimum_detectable: float
    """Smallest true distance from ``null`` that a test like this finds (``Variance``)."""
    levels: tuple[float, ...]
    """The metric of each model, mean over seeds."""
    n: int
    documents: int
    seeds: int


def contrast(
    models: Sequence[Sequence[pd.DataFrame]],
    weights: Sequence[float],
    metric: Metric,
    *,
    resamples: int,
    seed: int,
    null: float = 0.0,
    share: bool = False,
) -> Contrast:
    """``sum_j weights[j] * metric(model j)``, mean over seeds.

    ``models[j]`` holds one score table per seed, all over the same examples. A seed is one
    statistic, of which the variance over seeds is taken; that over documents comes from a bootstrap
    in which all models and seeds share the resampled documents. Interval and p-value are Student's
    t of the two (``stages/variance.py``). For one seed and the mean of a column over single-row
    documents this is the one-sample t-test.

    ``share`` says that the statistic is a share of the examples, or a difference of two, and
    ``null`` the largest one that is tolerated. Few rare events estimate their own spread badly, so
    the standard error is then at least that of independent documents at the null (a larger V_d),
    ``sqrt(null * (1 - null) / documents)`` (a score test).

    Raises:
        StageFailed: the models did not answer the same examples.
    """
    seeds = len(models[0])
    data = document_sums([table for runs in models for table in runs], metric)
    weights = np.asarray(weights, dtype=float)
    levels = metric.value(data.sums.sum(axis=1)).reshape(len(models), seeds)
    by_seed = weights @ levels
    value = float(by_seed.mean())

    def found(low: float, high: float, p_value: float, detectable: float) -> Contrast:
        return Contrast(
            value, float(low), float(high), null, float(p_value), float(detectable),
            tuple(levels.mean(axis=1)), data.n, data.documents, seeds,
        )  # fmt: skip

    if np.isnan(value) or data.documents < 2:
        return found(np.nan, np.nan, np.nan, np.nan)
    drawn = bootstrap(data, metric, resamples, seed).reshape(resamples, len(models), seeds)
    drawn = np.einsum("j,rjs->rs", weights, drawn)
    variance = Variance.estimate(by_seed, drawn, data.documents)
    if share:
        least = null * (1 - null) / data.documents - variance.of_seeds
        variance = replace(variance, of_documents=max(variance.of_documents, least))
    p_value = variance.p_value(value - null)
    if variance.none:
        return found(np.nan, np.nan, p_value, np.nan)
    return found(value - variance.reach, value + variance.reach, p_value, variance.detectable)
