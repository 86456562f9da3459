"""Intervals and paired tests over score rows.

A metric is a function of sums of per-row statistics (``stages/evaluate/base.py``), so everything
here works on one (documents, k) array of sums per model: a bootstrap over documents is a matrix
product with multinomial weights, and a paired permutation swaps the two models' rows.

Rows of one document (snippets of one review, questions on one passage) are not independent.
Documents, not rows, are therefore what is resampled and what is swapped.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pandas as pd
from scipy import stats

from stages.errors import StageFailed
from stages.evaluate.base import Metric
from stages.variance import CONFIDENCE, POWER, Variance

RESAMPLES = 2000
CELLS = 2**22
"""Resamples times documents that are in memory at once."""
_Z = float(stats.norm.ppf((1 + CONFIDENCE) / 2))
MDD_FACTOR = _Z + float(stats.norm.ppf(POWER))
"""Smallest detectable difference in standard errors, 2.80 (Bloom 1995, Evaluation Review 19:547:
"Minimum detectable effects", two-sided test)."""

MCNEMAR = "exact McNemar"
EXACT_SWAP = "exact swap of documents"
SWAP = "swap of documents"
STUDENT = "Student's t of seeds and documents"


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval; ``n`` rows in ``documents`` independent documents."""

    value: float
    ci_low: float
    ci_high: float
    n: int
    documents: int


@dataclass(frozen=True)
class Paired:
    """Two models on the same examples; the difference is the first minus the second."""

    first: Estimate
    second: Estimate
    difference: float
    ci_low: float
    ci_high: float
    p_value: float
    test: str
    effect_size: float
    """Cohen's d_z: mean over standard deviation of the rows' differences (NaN unless the metric
    is the mean of a column)."""
    minimum_detectable: float
    """Smallest true difference that a sample like this one finds with 80 % power at p < 0.05."""
    n: int
    documents: int
    seeds: int
    identical: bool
    """The two models score the same on every document: the interval is then the rule of three."""


@dataclass(frozen=True)
class DocumentSums:
    """One metric's statistics of several runs of the same examples, summed by document."""

    sums: np.ndarray  # (runs, documents, k)
    rows: np.ndarray  # (runs, n, k), rows without any statistic left out
    document: np.ndarray  # (n,), index of each row's document

    @property
    def n(self) -> int:
        """Rows with a statistic."""
        return self.rows.shape[1]

    @property
    def documents(self) -> int:
        """Documents of these rows."""
        return self.sums.shape[1]


def summarise(
    scores: pd.DataFrame, metrics: Sequence[Metric], *, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, dict[str, float | int]]:
    """Every metric of one model's scores: value, ci_low, ci_high, n, documents by metric name.

    The interval is Wilson's where the metric is the mean of 0/1 scores and each document has one
    row, otherwise the percentile bootstrap over documents.
    """
    return {
        metric.name: vars(estimate([scores], metric, resamples=resamples, seed=seed))
        for metric in metrics
    }


def estimate(
    runs: Sequence[pd.DataFrame], metric: Metric, *, resamples: int = RESAMPLES, seed: int = 0
) -> Estimate:
    """One metric of one model, the mean over its runs (seeds), with its 95 % interval."""
    data = document_sums(runs, metric)
    return _estimate(data, metric, bootstrap(data, metric, resamples, seed))


def paired(
    first: Sequence[pd.DataFrame],
    second: Sequence[pd.DataFrame],
    metric: Metric,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Paired:
    """Compare two models on the same examples, ``first`` minus ``second``, seed by seed.

    The lists hold one score table per seed, in the same order; an untuned model's is there as often
    as the other has seeds. Of one seed the interval is a percentile bootstrap over documents, and
    the p-value comes from swapping the two models' answers document by document. For means of
    integer scores that distribution is computed exactly; where each document has one 0/1 row it is
    the exact McNemar test (binomial on the discordant pairs).

    Neither can see that another seed would have given another model. Of several seeds interval and
    p-value are therefore Student's t of two variances (``stages/variance.py``): that of the
    bootstrap over documents, which models and seeds share, and that of the differences seed by
    seed. It is of differences, because one seed shows both models the same examples in the same
    order: what that does to both alike cancels, and of trainings that have nothing in common it is
    the sum of the two models' variances. An untuned model adds nothing to it.

    Raises:
        StageFailed: the two did not answer the same examples.
    """
    runs = len(first)
    both = document_sums([*first, *second], metric)
    values = metric.value(both.sums.sum(axis=1))  # (2 * runs,)
    difference = float((values[:runs] - values[runs:]).mean())
    boot = bootstrap(both, metric, resamples, seed)  # (resamples, 2 * runs)
    deltas = _row_differences(both, metric, runs)
    # Where no row has a score there is nothing to be identical.
    identical = both.documents > 0 and bool(np.array_equal(both.sums[:runs], both.sums[runs:]))
    by_seed, drawn = values[:runs] - values[runs:], boot[:, :runs] - boot[:, runs:]
    if runs > 1:
        variance = Variance.estimate(by_seed, drawn, both.documents)
        test, p_value = STUDENT, variance.p_value(difference)
        ci_low, ci_high = difference - variance.reach, difference + variance.reach
        alike, detectable = identical or variance.none, variance.detectable
    else:
        test, p_value = _swap_test(both, metric, deltas, resamples, seed)
        ci_low, ci_high = _percentiles(drawn[:, 0])
        alike, detectable = identical or ci_low == ci_high, MDD_FACTOR * _spread(drawn[:, 0])
    # Every document shows the same difference, so that no resample shows another.
    if alike:
        ci_low, ci_high = _rule_of_three(difference, _binary(both, metric), both.documents)

    spread = deltas.std(ddof=1) if deltas is not None and both.n > 1 else np.nan
    return Paired(
        first=_estimate(_part(both, 0, runs), metric, boot[:, :runs]),
        second=_estimate(_part(both, runs, 2 * runs), metric, boot[:, runs:]),
        difference=difference,
        ci_low=ci_low,
        ci_high=ci_high,
        p_value=p_value,
        test=test,
        effect_size=float(deltas.mean() / spread) if spread > 0 else np.nan,
        minimum_detectable=np.nan if alike else detectable,
        n=both.n,
        documents=both.documents,
        seeds=runs,
        identical=identical,
    )


def holm(p_values: Sequence[float]) -> np.ndarray:
    """Holm's step-down adjusted p-values (Holm 1979); NaN entries are no test and stay NaN."""
    p = np.asarray(p_values, dtype=float)
    adjusted = np.full(p.shape, np.nan)
    tested = np.flatnonzero(~np.isnan(p))
    order = tested[np.argsort(p[tested], kind="stable")]
    factors = len(order) - np.arange(len(order))
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * factors), 1.0)
    return adjusted


def document_sums(runs: Sequence[pd.DataFrame], metric: Metric) -> DocumentSums:
    """Statistics of the runs over the same rows in the same order, and their sums by document."""
    reference = runs[0].set_index("example_id", verify_integrity=True)
    frames = [reference]
    for run in runs[1:]:
        other = run.set_index("example_id", verify_integrity=True)
        unmatched = reference.index.symmetric_difference(other.index)
        if len(unmatched):
            named = ", ".join(map(str, unmatched[:3]))
            raise StageFailed(
                f"{metric.name}: the two score tables differ in {len(unmatched)} example ids "
                f"({named}{', …' if len(unmatched) > 3 else ''}); evaluate both on the same data"
            )
        frames.append(other.loc[reference.index])
    rows = np.stack([np.asarray(metric.statistics(f), dtype=float) for f in frames])
    counted = (rows != 0).any(axis=(0, 2))
    document, names = pd.factorize(reference["document"].to_numpy()[counted])
    rows = rows[:, counted]
    sums = np.zeros((len(runs), len(names), rows.shape[2]))
    for totals, run in zip(sums, rows, strict=True):
        np.add.at(totals, document, run)
    return DocumentSums(sums, rows, document)


def _part(data: DocumentSums, start: int, stop: int) -> DocumentSums:
    return DocumentSums(data.sums[start:stop], data.rows[start:stop], data.document)


def _weights(documents: int, resamples: int, seed: int) -> Iterable[np.ndarray]:
    """How often each document is drawn: (resamples, documents), rows summing to documents - 1.

    In blocks of some resamples, so that memory does not grow with the documents; a small table is
    kept, because every metric asks for it.

    Drawing one fewer than there are makes the bootstrap variance of a mean the unbiased one
    (McCarthy and Snowden 1985), which matters for two or three seeds. Single precision holds the
    counts exactly and halves the memory.
    """
    if documents * resamples <= CELLS:
        return _kept_weights(documents, resamples, seed)
    return _drawn_weights(documents, resamples, seed)


@lru_cache(maxsize=2)
def _kept_weights(documents: int, resamples: int, seed: int) -> tuple[np.ndarray, ...]:
    return tuple(_drawn_weights(documents, resamples, seed))


def _drawn_weights(documents: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    rng = np.random.default_rng([seed, documents])
    for rows in _blocks(documents, resamples):
        drawn = rng.integers(documents, size=(rows, documents - 1))
        drawn += np.arange(rows)[:, None] * documents
        counts = np.bincount(drawn.ravel(), minlength=rows * documents)
        yield counts.reshape(rows, documents).astype(np.float32)


def _blocks(documents: int, resamples: int) -> Iterator[int]:
    """How many resamples are worked on at once: a multiple of four, so that random numbers, which
    are drawn in words of up to four, are the same in one block and in many."""
    most = max(4, CELLS // documents // 4 * 4)
    for start in range(0, resamples, most):
        yield min(most, resamples - start)


def bootstrap(data: DocumentSums, metric: Metric, resamples: int, seed: int) -> np.ndarray:
    """The metric of every run under the same resampled documents: (resamples, runs)."""
    runs, documents, k = data.sums.shape
    if documents < 2:
        return np.full((resamples, runs), np.nan)
    flat = data.sums.transpose(1, 0, 2).reshape(documents, runs * k).astype(np.float32)
    blocks = _weights(documents, resamples, seed)
    totals = np.concatenate([weights @ flat for weights in blocks])
    return metric.value(totals.reshape(resamples, runs, k).astype(float))


def _spread(values: np.ndarray) -> float:
    return np.nan if np.isnan(values).all() else float(np.nanstd(values))


def _percentiles(values: np.ndarray) -> tuple[float, float]:
    if np.isnan(values).all():
        return np.nan, np.nan
    tail = (1 - CONFIDENCE) / 2
    low, high = np.nanquantile(values, [tail, 1 - tail])
    return float(low), float(high)


def _estimate(data: DocumentSums, metric: Metric, boot: np.ndarray) -> Estimate:
    """A model's level: Wilson for independent 0/1 rows of one run, otherwise the bootstrap; of
    several runs Student's t (``Variance``), for metrics between 0 and 1 as Wilson's interval of so
    many trials as have that reach by their standard error (effective sample size: Korn and Graubard
    1998, Survey Methodology 24:193), which covers what it says near 0 and 1 as well.
    """
    if (data.rows == data.rows[:1]).all():  # an untuned model beside several seeds
        data, boot = _part(data, 0, 1), boot[:, :1]
    values = metric.value(data.sums.sum(axis=1))
    value = float(values.mean())
    binary = _binary(data, metric) and not np.isnan(value)
    if binary and len(values) == 1 and data.documents == data.n:
        low, high = _wilson(float(_row_scores(data, metric).mean()), data.n)
    elif binary and value in (0.0, 1.0):
        # A resample of equal documents has no spread; each of them then counts as one trial.
        low, high = _wilson(value, data.documents)
    elif len(values) == 1:
        low, high = _percentiles(boot[:, 0])
    else:
        reach = Variance.estimate(values, boot, data.documents).reach
        low, high = value - reach, value + reach
        if (binary or metric.bounded) and reach > 0:
            low, high = _wilson(value, value * (1 - value) * (_Z / reach) ** 2)
    return Estimate(value, float(low), float(high), data.n, data.documents)


def _wilson(share: float, trials: float) -> tuple[float, float]:
    """Wilson's interval of a share of independent trials, which need not be a whole number."""
    width = 2 * (trials + _Z**2)
    middle = (2 * trials * share + _Z**2) / width
    reach = _Z / width * np.sqrt(4 * trials * share * (1 - share) + _Z**2)
    return (0.0 if share == 0 else middle - reach), (1.0 if share == 1 else middle + reach)


def _row_scores(data: DocumentSums, metric: Metric) -> np.ndarray | None:
    """The scores (runs, n) of which a metric is the mean; none unless it is that of a column which
    has a score for the same rows in all runs.

    A mean over sets has two statistics of each, and is the mean of all rows where the sets are of
    one size.
    """
    if metric.column is None:
        return None
    values, counted = data.rows[..., 0::2], data.rows[..., 1::2]
    sizes = counted.sum(axis=1)
    if not (counted.sum(axis=-1) == 1).all() or (sizes != sizes[:1, :1]).any():
        return None
    return values.sum(axis=-1)


def _row_differences(both: DocumentSums, metric: Metric, runs: int) -> np.ndarray | None:
    """Per row, the mean over seeds of first minus second (n,), where there are ``_row_scores``."""
    scores = _row_scores(both, metric)
    return None if scores is None else (scores[:runs] - scores[runs:]).mean(axis=0)


def _binary(data: DocumentSums, metric: Metric) -> bool:
    """Whether a metric is the mean of scores that are all 0 or 1."""
    scores = _row_scores(data, metric)
    return scores is not None and bool(np.isin(scores, (0, 1)).all())


def _rule_of_three(difference: float, binary: bool, documents: int) -> tuple[float, float]:
    """Interval of a difference of 0/1 scores that all documents show alike; none of other scores.

    At most 1 - 0.05 ** (1 / documents), about 3 / documents, of all documents can then show another
    one (95 % bound), which is -1 at least and 1 at most.
    """
    if not binary:
        return np.nan, np.nan
    bound = float(1 - (1 - CONFIDENCE) ** (1 / documents))
    return difference - bound * (1 + difference), difference + bound * (1 - difference)


def _swap_test(
    both: DocumentSums, metric: Metric, deltas: np.ndarray | None, resamples: int, seed: int
) -> tuple[str, float]:
    """Name and two-sided p-value of the paired permutation test over documents (one seed)."""
    if both.documents == 0:
        return SWAP, np.nan
    if deltas is not None and np.array_equal(deltas, deltas.round()):
        totals = np.bincount(both.document, deltas, minlength=both.documents).round().astype(int)
        singletons = both.documents == both.n and np.isin(both.rows, (0, 1)).all()
        return (MCNEMAR if singletons else EXACT_SWAP), _exact_swap_p(totals)
    first, second = both.sums
    change = second - first
    blocks = _swaps(both.documents, resamples, seed)
    moved = np.concatenate([swaps @ change for swaps in blocks])  # (resamples, k)
    null = metric.value(first.sum(axis=0) + moved) - metric.value(second.sum(axis=0) - moved)
    observed = float(metric.value(first.sum(axis=0)) - metric.value(second.sum(axis=0)))
    if np.isnan(observed):
        return SWAP, np.nan
    # The tolerance keeps permutations that equal the observed one up to rounding.
    extreme = (np.abs(null) >= abs(observed) - 1e-12).sum()
    return SWAP, float((1 + extreme) / (1 + resamples))


def _swaps(documents: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """1 where a document's two answers change places: (resamples, documents), in blocks of some
    resamples."""
    rng = np.random.default_rng([seed, 2])
    for rows in _blocks(documents, resamples):
        yield rng.integers(2, size=(rows, documents), dtype=np.int8).astype(float)


def _exact_swap_p(totals: np.ndarray) -> float:
    """P(|sum of ±totals| >= |observed sum|) with independent fair signs, totals being integers.

    The documents with the same absolute total v contribute v * (2 * Binomial(count, 1/2) - count);
    the distribution of the sum is the convolution over the distinct v.
    """
    distribution = np.ones(1)
    sizes, counts = np.unique(np.abs(totals[totals != 0]), return_counts=True)
    for size, count in zip(sizes, counts, strict=True):
        steps = np.zeros(2 * size * count + 1)
        steps[:: 2 * size] = stats.binom.pmf(np.arange(count + 1), count, 0.5)
        distribution = np.convolve(distribution, steps)
    middle = len(distribution) // 2
    extreme = np.abs(np.arange(len(distribution)) - middle) >= abs(int(totals.sum()))
    return float(min(distribution[extreme].sum(), 1.0))
