"""One claim of a hypothesis: a statistic on one side of a value."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd

from stages.compare.contrast import Contrast
from stages.compare.measured import VALUE
from stages.evaluate.base import Metric
from stages.evaluate.examples import correlation

LOG = Metric("log", VALUE.statistics, lambda sums: np.log(VALUE.value(sums)))
"""The logarithm of the mean of ``frame``."""
_PEARSON = correlation("routing_term", "loss_rise", "")


def _standardised(scores: pd.DataFrame) -> np.ndarray:
    """Sums of squares of columns far from 0 would drown the correlation in rounding."""
    both = scores[["routing_term", "loss_rise"]].astype(float)
    return _PEARSON.statistics((both - both.mean()) / both.std())


def _fisher(sums: np.ndarray) -> np.ndarray:
    """Fisher's transform of the correlation, whose spread does not depend on its size. Resamples of
    two distinct examples correlate perfectly; they count as finite."""
    most = 1 - 1e-6
    return np.arctanh(np.clip(_PEARSON.value(sums), -most, most))


FISHER = Metric("fisher", _standardised, _fisher)
"""The correlation of routing term and loss rise, on Fisher's scale."""
MATTER, ALIKE = "experts matter too little here", "the experts started alike"
"""Why little follows where a premise is not shown."""


@dataclass(frozen=True)
class Claim:
    """A statistic that is claimed to lie above (or below) ``found.null``."""

    label: str
    found: Contrast
    above: bool
    told: Callable[[float], float] = float
    """From the scale of the test to that in which it is told: ``np.exp`` for the logarithm of a
    ratio, ``np.tanh`` for a correlation."""
    premise: str = ""
    """Without it the others say nothing, for this reason (MATTER, ALIKE): it has to be shown for
    support, and refutes nothing."""

    @property
    def holds(self) -> bool:
        """The statistic lies on the side claimed."""
        return (self.found.value > self.found.null) == self.above

    def row(self) -> dict:
        """Its columns of the table of verdicts, in the unit in which it is told."""
        found = {key: getattr(self.found, key) for key in ("n", "documents", "seeds")}
        for key in ("null", "value", "ci_low", "ci_high"):
            found[key] = float(self.told(getattr(self.found, key)))
        return found | {
            "claim": self.label,
            "side": ">" if self.above else "<",
            "ratio": self.told is np.exp,
            "p_claim": self.found.p_value,
            "detectable": float(self.told(self.found.minimum_detectable)),
        }
