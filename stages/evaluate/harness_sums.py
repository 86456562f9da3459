"""How the harness's values of examples become its numbers: by sums over examples, all of them.

A number that is a function of sums (a perplexity, F1, BLEU) is stored as what is summed. For one
that a task computes by a function of its own over all its examples, each example's *influence* on
it is stored: the number is their mean, and what leaving examples out does to it is their spread. So
intervals and paired tests are made as for every metric, and a report needs no harness.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pandas as pd

BLOCKS = 500
"""Most times that a task's own function is called on all examples but some."""


@dataclass(frozen=True)
class Aggregation:
    """How per-example values of the harness become its number, by sums."""

    parts: tuple[str, ...]
    """Suffixes of the columns that a value is stored in."""
    split: Callable[[Any], tuple]
    """A value of the harness, as its columns."""
    statistics: Callable[[np.ndarray], np.ndarray]
    """Columns (n, parts) to what is summed (n, k)."""
    value: Callable[[np.ndarray], np.ndarray]
    """Sums (..., k) to the number (...)."""
    mean: bool = False
    """The number is the mean of one column."""

    @property
    def sums(self) -> int:
        """How many sums a metric takes with the number of its examples, which a mean has anyway."""
        return self.statistics(np.zeros((0, len(self.parts)))).shape[1] + (not self.mean)


def _plain(value: object) -> tuple:
    return (float(value),)


def _pair(value: tuple) -> tuple:
    return tuple(float(part) for part in value)


def _same(columns: np.ndarray) -> np.ndarray:
    return columns


def _counted(columns: np.ndarray) -> np.ndarray:
    return np.concatenate([columns, np.ones((len(columns), 1))], axis=1)


def _ratio(sums: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore"):
        return sums[..., 0] / sums[..., 1]


def _brier(value: tuple) -> tuple:
    """Squared distance of the probabilities from the right answer."""
    gold, probabilities = value
    right = np.eye(len(probabilities))[gold]
    return (float(((np.asarray(probabilities) - right) ** 2).sum()),)


def _outcomes(columns: np.ndarray) -> np.ndarray:
    """True and false positives, false and true negatives of (gold, prediction)."""
    gold, prediction = columns[:, 0] == 1, columns[:, 1] == 1
    return np.stack(
        [gold & prediction, ~gold & prediction, gold & ~prediction, ~gold & ~prediction], axis=1
    ).astype(float)


def _f1(sums: np.ndarray) -> np.ndarray:
    tp, fp, fn = sums[..., 0], sums[..., 1], sums[..., 2]
    return 2 * tp / np.maximum(2 * tp + fp + fn, 1)


def _matthews(sums: np.ndarray) -> np.ndarray:
    tp, fp, fn, tn = np.moveaxis(sums, -1, 0)
    spread = np.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    return (tp * tn - fp * fn) / np.where(spread > 0, spread, 1)


@cache
def _sacrebleu(name: str, **options: int) -> Any:
    from sacrebleu import metrics

    return getattr(metrics, name)(**options)


def _segments(name: str, **options: int) -> Callable[[Any], tuple]:
    """What sacrebleu sums over segments for a metric of its, of (references, prediction)."""

    def split(value: tuple) -> tuple:
        references, prediction = value
        references = [references] if isinstance(references, str) else references
        prediction = prediction if isinstance(prediction, str) else prediction[0]
        # What a metric sums is not public there; every number is checked against its own.
        extract = _sacrebleu(name, **options)._extract_corpus_statistics
        return _pair(extract([prediction], [[reference] for reference in references])[0])

    return split


def _bleu(sums: np.ndarray) -> np.ndarray:
    """BLEU in percent with NIST's smoothing (method 3 of Chen and Cherry 2014, WMT): each order
    without a match counts as half as much as the one before. Sums (..., 10): length, reference
    length, correct and all n-grams of orders 1 to 4."""
    length, reference = sums[..., 0], sums[..., 1]
    correct, total = sums[..., 2:6], sums[..., 6:]
    with np.errstate(invalid="ignore", divide="ignore"):
        brevity = np.where(length < reference, np.exp(1 - reference / length), 1.0)
        smoothed = 0.5 ** np.cumsum(correct == 0, axis=-1)
        precision = np.where(correct > 0, correct, smoothed) / total
        score = 100 * brevity * np.exp(np.log(precision).mean(axis=-1))
    return np.where((correct > 0).any(axis=-1) & (total > 0).all(axis=-1), score, 0.0)


def _chrf(sums: np.ndarray) -> np.ndarray:
    """chrF2 in percent (Popović 2015, WMT): F of the mean precision and recall over the orders
    that both sides have. Sums (..., 3 orders): n-grams of prediction, of reference, of both."""
    predicted, wanted, both = np.moveaxis(sums.reshape(*sums.shape[:-1], -1, 3), -1, 0)
    there = (predicted > 0) & (wanted > 0)
    orders = np.maximum(there.sum(axis=-1), 1)
    precision, recall = (
        np.where(there, both / np.maximum(side, 1), 0.0).sum(axis=-1) / orders
        for side in (predicted, wanted)
    )
    weighed = 4 * precision + recall
    return 100 * 5 * precision * recall / np.where(weighed > 0, weighed, 1)


def _ter(sums: np.ndarray) -> np.ndarray:
    """Edits per word of the reference, in percent."""
    edits, words = sums[..., 0], sums[..., 1]
    return 100 * np.where(words > 0, edits / np.where(words > 0, words, 1), edits > 0)


def _orders(*names: str, most: int) -> tuple[str, ...]:
    return tuple(f".{name}_{order}" for order in range(1, most + 1) for name in names)


_OVERLAP = ("predicted", "wanted", "both")
_BLEU = (
    ".length", ".reference_length", *_orders("correct", most=4), *_orders("total", most=4)
)  # fmt: skip
WEIGHED = (".logprob", ".weight")
AGGREGATIONS = {
    "mean": Aggregation(("",), _plain, _counted, _ratio, mean=True),
    "nanmean": Aggregation(("",), _plain, _counted, _ratio, mean=True),
    "brier_score": Aggregation(("",), _brier, _counted, _ratio, mean=True),
    "perplexity": Aggregation(("",), _plain, _counted, lambda s: np.exp(-_ratio(s))),
    "weighted_perplexity": Aggregation(WEIGHED, _pair, _same, lambda s: np.exp(-_ratio(s))),
    "bits_per_byte": Aggregation(WEIGHED, _pair, _same, lambda s: -_ratio(s) / np.log(2)),
    "f1": Aggregation((".gold", ".prediction"), _pair, _outcomes, _f1),
    "matthews_corrcoef": Aggregation((".gold", ".prediction"), _pair, _outcomes, _matthews),
    "bleu": Aggregation(_BLEU, _segments("BLEU"), _same, _bleu),
    "chrf": Aggregation(_orders(*_OVERLAP, most=6), _segments("CHRF"), _same, _chrf),
    "chrf++": Aggregation(
        _orders(*_OVERLAP, most=8), _segments("CHRF", word_order=2), _same, _chrf
    ),
    "ter": Aggregation((".edits", ".words"), _segments("TER"), _same, _ter),
}
"""The harness's aggregations that are functions of sums over examples."""
INFLUENCE = Aggregation((".influence",), _plain, _counted, _ratio, mean=True)
"""Any other: see ``influences``."""
ROUGH = {"median"}
"""Aggregations that jump where examples are left out, so that influences say nothing of them."""


def aggregation(name: str) -> Aggregation | None:
    """What stands for one of the harness's or of a task's own; None where nothing can."""
    return None if name in ROUGH else AGGREGATIONS.get(name, INFLUENCE)


def influences(
    function: Callable[[list], float], items: list, documents: Sequence[str]
) -> np.ndarray:
    """Each item's influence (n,) on a number that ``function`` computes from all of them.

    Their mean is the number. That of a document's is how far the number moves where the document is
    left out: the jackknife's pseudo-values with documents of unequal size (Busing, Meijer and van
    der Leeden 1999, Statistics and Computing 9:3), less their bias. Items of one document have one
    value. Of a mean they are the items' own means. Where there are more than ``BLOCKS`` documents,
    blocks of them drawn at random are left out, and as a block's mean spreads less than a document
    by the root of their number, deviations are larger by that.

    Raises ValueError where the function gives no number, or another each time.
    """
    number = _number(function, items)
    if number != _number(function, items):
        raise ValueError("it is drawn at random")
    document, names = pd.factorize(np.asarray(documents))
    block, size = document, 1.0
    if len(names) > BLOCKS:
        block = (np.random.default_rng(0).permutation(len(names)) % BLOCKS)[document]
        size = len(names) / BLOCKS
    rows = np.bincount(block)
    if len(rows) < 2:
        return np.full(len(items), number)
    without = np.array([
        _number(function, [item for item, of in zip(items, block, strict=True) if of != left])
        for left in range(len(rows))
    ])  # fmt: skip
    moved = (np.sqrt(size) * (len(items) - rows) / rows * (number - without))[block]
    values = number + moved - moved.mean()
    # What is a mean of whole numbers up to rounding is taken for one, with its exact tests.
    whole = values.round()
    return np.where(np.abs(values - whole) < 1e-9, whole, values)


def _number(function: Callable[[list], float], items: list) -> float:
    try:
        number = float(function(items))
    except Exception as error:  # of a task's own code
        reason = (str(error).strip().splitlines() or [""])[0][:200]
        raise ValueError(f"it fails with {type(error).__name__}: {reason}") from error
    if not np.isfinite(number):
        raise ValueError("it gives no number of some examples")
    return number
