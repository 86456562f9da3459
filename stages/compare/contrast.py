"""A weighted sum of models' metrics, tested so that few training seeds decide little."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats
from scipy.optimize import brentq

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
    p < 0.05 (Bloom 1995, for Student's t; with two variances its quantiles add as in the test)."""
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
    share the resampled documents. Both are estimated from few numbers, each with degrees of freedom
    of its own, so the interval reaches ``sqrt(t_s² V_s + t_d² V_d)`` to either side, with the
    quantiles of Student's t of seeds - 1 and of documents - 1 (Banerjee 1960, Sankhyā 22:357). It
    covers at least what it says, also far in the tail, where Holm's correction reads it and where
    one t with the degrees of freedom of Welch and Satterthwaite is wrong too often: the variance of
    three seeds is small by chance too often. The p-value is the level at which the interval
    touches ``null``. For one seed and the mean of a column over single-row documents this is the
    one-sample t-test.

    ``share`` says that the statistic is a share of the examples, or a difference of two, and
    ``null`` the largest one that is tolerated. Few rare events estimate their own spread badly, so
    the standard error is then at least that of independent documents at the null (a larger V_d),
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
    if share:
        least = null * (1 - null) / data.documents
        of_documents += max(0.0, least - of_documents - of_seeds)
    if np.sqrt(of_documents + of_seeds) < _NOISE:
        p_value = 1.0 if abs(value - null) < _NOISE else 2 * 0.5**data.documents
        return found(np.nan, np.nan, p_value, np.nan)
    variances = {data.documents - 1: of_documents}
    if seeds > 1:
        variances[seeds - 1] = variances.get(seeds - 1, 0.0) + of_seeds
    reach = _reach(variances, (1 - CONFIDENCE) / 2)
    return found(
        value - reach,
        value + reach,
        _p_value(variances, abs(value - null)),
        reach + _reach(variances, 1 - POWER),
    )


def _reach(variances: Mapping[int, float], tail: float) -> float:
    """How far to one side an interval reaches that leaves out ``tail`` there, of a sum whose parts'
    estimated variances are given by their degrees of freedom."""
    return float(np.sqrt(sum(stats.t(df).isf(tail) ** 2 * v for df, v in variances.items())))


def _p_value(variances: Mapping[int, float], distance: float) -> float:
    """Twice the tail with which an interval reaches as far as the null is away."""
    there = {df: v for df, v in variances.items() if v > 0}
    if len(there) == 1:
        ((df, variance),) = there.items()
        return 2 * float(stats.t(df).sf(distance / np.sqrt(variance)))
    if distance == 0:
        return 1.0
    least = np.log(1e-300)
    if _reach(there, np.exp(least)) < distance:
        return 2e-300
    tail = brentq(lambda log: _reach(there, np.exp(log)) - distance, least, np.log(0.5))
    return 2 * float(np.exp(tail))
