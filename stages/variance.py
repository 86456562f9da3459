"""Student's t for a mean over training seeds and documents, of any metric.

What a metric would have been with other documents and with other trainings are two variances. Both
are estimated from the numbers at hand, that of the seeds from very few. Each therefore counts with
degrees of freedom of its own.
"""

from dataclasses import dataclass

import numpy as np
from scipy import stats
from scipy.optimize import brentq

CONFIDENCE = 0.95
POWER = 0.80
_NOISE = 1e-6
"""A standard error below this is single-precision rounding, not spread."""
_LEAST = 1e-150
"""Tails are not looked for below this, where the square of t of one degree is still finite."""


@dataclass(frozen=True)
class Variance:
    """The estimated variance of a mean over ``seeds`` and ``documents``, in its two parts.

    An interval reaches ``sqrt(t_s² V_s + t_d² V_d)`` to either side, with the quantiles of
    Student's t of seeds - 1 and of documents - 1 (Banerjee 1960, Sankhyā 22:357). It covers at
    least what it says, also far in the tail, where Holm's correction reads it and where one t with
    the degrees of freedom of Welch and Satterthwaite is wrong too often: the variance of three
    seeds is small by chance too often. It covers more where models of different seeds disagree on
    single documents, which is in both parts. Few rare events estimate their own spread badly, as
    they do in a bootstrap of one seed.
    """

    documents: int
    seeds: int
    of_documents: float
    of_seeds: float

    @classmethod
    def estimate(cls, by_seed: np.ndarray, drawn: np.ndarray, documents: int) -> "Variance":
        """From a statistic of each seed (seeds,) on all documents, and the same under resampled
        documents, which the seeds share (resamples, seeds). NaN where there is no number, or one
        document."""
        seeds = len(by_seed)
        known = documents > 1 and not np.isnan(by_seed).any()
        return cls(
            documents=documents,
            seeds=seeds,
            of_documents=float(np.nanvar(drawn.mean(axis=1))) if known else np.nan,
            of_seeds=float(by_seed.var(ddof=1)) / seeds if seeds > 1 else 0.0,
        )

    @property
    def none(self) -> bool:
        """Nothing varies."""
        return bool(np.sqrt(self.of_documents + self.of_seeds) < _NOISE)

    @property
    def reach(self) -> float:
        """How far the 95 % interval reaches to one side."""
        return self._reach((1 - CONFIDENCE) / 2)

    @property
    def detectable(self) -> float:
        """The smallest true distance from the null that a test like this finds with 80 % power at
        p < 0.05 (Bloom 1995, for Student's t; the two quantiles add)."""
        return self.reach + self._reach(1 - POWER)

    def p_value(self, distance: float) -> float:
        """Twice the tail with which an interval reaches as far as the null is away: the level at
        which it first contains the null. Where nothing varies it is the sign test's over documents.
        """
        distance = abs(distance)
        if np.isnan(distance + self.of_documents):
            return np.nan
        if self.none:
            return 1.0 if distance < _NOISE else 2 * 0.5**self.documents
        freedom, variances = self._parts
        if len(variances[variances > 0]) == 1:
            error = np.sqrt(variances.sum())
            return 2 * float(stats.t.sf(distance / error, freedom[variances > 0][0]))
        if distance == 0:
            return 1.0
        least = np.log(_LEAST)
        if self._reach(_LEAST) < distance:
            return 2 * _LEAST
        tail = brentq(lambda log: self._reach(np.exp(log)) - distance, least, np.log(0.5))
        return 2 * float(np.exp(tail))

    @property
    def _parts(self) -> tuple[np.ndarray, np.ndarray]:
        """Degrees of freedom and variances, of the documents and, of several, of the seeds."""
        freedom = np.array([self.documents - 1, self.seeds - 1])
        variances = np.array([self.of_documents, self.of_seeds])
        return (freedom, variances) if self.seeds > 1 else (freedom[:1], variances[:1])

    def _reach(self, tail: float) -> float:
        """How far to one side an interval reaches that leaves out ``tail`` there."""
        freedom, variances = self._parts
        return float(np.sqrt(stats.t.isf(tail, freedom) ** 2 @ variances))
