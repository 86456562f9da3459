"""A weighted sum of models' metrics, tested so that few training seeds decide little."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats

from stages.evaluate.base import Metric
from stages.statistics import CONFIDENCE, POWER, bootstrap, document_sums

_NOISE = 1e-6
"""A standard error below this is single-precision rounding, not spread."""


@dataclass(frozen=True)
class Contrast:
    """A statistic, its 95 % interval and the two-sided test against ``null``."""

    value: float
    ci_low: float
    ci_high: float
    null: float
    p_value: float
    minimum_detectable: float
    """Smallest true distance from ``null`` that a test like this finds with 80 % power at
    p < 0.05 (Bloom 1995, for Student's t)."""
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

    ``models[j]`` holds one score table per seed, all over the same examples. The variance is that
    of the mean over seeds, plus that of a bootstrap over documents, in which all models and seeds
    share the resampled documents. Both are estimated from few numbers, so the test is Student's t
    with the degrees of freedom of Welch and Satterthwaite (Satterthwaite 1946, Biometrics Bulletin
    2:110): three seeds that differ leave about two. For one seed and the mean of a column over
    single-row documents this is the one-sample t-test.

    ``share`` says that the statistic is a share of the examples, or a difference of two, and
    ``null`` the largest one that is tolerated. Few rare events estimate their own spread badly, so
    the standard error is then at least that of independent documents at the null,
    ``sqrt(null * (1 - null) / documents)`` (a score test).

    Where nothing varies, the p-value is the sign test's over documents.

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
    of_documents = float(np.nanvar(np.einsum("j,rjs->r", weights, drawn) / seeds))
    of_seeds = float(by_seed.var(ddof=1)) / seeds if seeds > 1 else 0.0
    error, degrees = _error(of_documents, of_seeds, data.documents, seeds)
    if share:
        error = max(error, np.sqrt(null * (1 - null) / data.documents))
    if error < _NOISE:
        p_value = 1.0 if abs(value - null) < _NOISE else 2 * 0.5**data.documents
        return found(np.nan, np.nan, p_value, np.nan)
    student = stats.t(degrees)
    reach = student.ppf((1 + CONFIDENCE) / 2)
    return found(
        value - reach * error,
        value + reach * error,
        2 * student.sf(abs(value - null) / error),
        (reach + student.ppf(POWER)) * error,
    )


def _error(
    of_documents: float, of_seeds: float, documents: int, seeds: int
) -> tuple[float, float]:
    """Standard error and degrees of freedom of a sum of two independent variances."""
    total = of_documents + of_seeds
    if np.sqrt(total) < _NOISE:
        return 0.0, documents - 1
    parts = of_documents**2 / (documents - 1) + (of_seeds**2 / (seeds - 1) if seeds > 1 else 0.0)
    return float(np.sqrt(total)), total**2 / parts
