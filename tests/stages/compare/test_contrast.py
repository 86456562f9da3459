"""The test of a weighted sum of models, against scipy and by hand."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from stages.compare.contrast import contrast
from stages.compare.measured import VALUE
from stages.evaluate.base import Metric

OPTIONS = {"resamples": 8000, "seed": 0}


def table(values, documents=None):
    values = np.asarray(values, dtype=float)
    ids = [str(i) for i in range(len(values))]
    return pd.DataFrame(
        {"example_id": ids, "document": ids if documents is None else documents, "value": values}
    )


def test_one_seed_is_the_paired_t_test():
    draw = np.random.default_rng(0)
    first = draw.normal(0.3, 1, 40)
    second = first + draw.normal(-0.3, 0.6, 40)
    found = contrast([[table(first)], [table(second)]], [1, -1], VALUE, **OPTIONS)
    exact = stats.ttest_rel(first, second)
    low, high = exact.confidence_interval()
    assert found.value == pytest.approx((first - second).mean())
    assert found.levels == (pytest.approx(first.mean()), pytest.approx(second.mean()))
    # The bootstrap's standard error has 1 % Monte Carlo noise at 8,000 resamples.
    assert found.p_value == pytest.approx(exact.pvalue, rel=0.1)
    assert (found.ci_low, found.ci_high) == (
        pytest.approx(low, abs=0.01), pytest.approx(high, abs=0.01))
    assert (found.n, found.documents, found.seeds) == (40, 40, 1)


def test_seeds_alone_are_the_t_test_over_seeds():
    """Where all examples agree, three runs are three numbers: two degrees of freedom."""
    levels = [0.1, 0.2, 0.4]
    found = contrast([[table([level] * 30) for level in levels]], [1], VALUE, **OPTIONS)
    exact = stats.ttest_1samp(levels, 0)
    low, high = exact.confidence_interval()
    assert found.p_value == pytest.approx(exact.pvalue, rel=1e-4)
    assert (found.ci_low, found.ci_high) == (pytest.approx(low), pytest.approx(high))
    reach = stats.t(2).ppf([0.975, 0.8]).sum() * np.std(levels, ddof=1) / np.sqrt(3)
    assert found.minimum_detectable == pytest.approx(reach)


def test_each_variance_counts_with_its_own_degrees_of_freedom():
    """20 examples with variance 1, three seeds with variance 0.01, by hand."""
    spread = np.tile([-1.0, 1.0], 10) * np.sqrt(19 / 20)  # unbiased variance 1
    runs = [table(0.5 + shift + spread) for shift in (-0.1, 0.0, 0.1)]
    found = contrast([runs], [1], VALUE, **OPTIONS)
    documents, seeds = 1 / 20, 0.01 / 3
    reach = np.sqrt(2.0930**2 * documents + 4.3027**2 * seeds)  # t of 19 and of 2 degrees
    assert (found.ci_low, found.ci_high) == (
        pytest.approx(0.5 - reach, abs=0.01), pytest.approx(0.5 + reach, abs=0.01))
    power = np.sqrt(0.8610**2 * documents + 1.0607**2 * seeds)
    assert found.minimum_detectable == pytest.approx(reach + power, rel=0.02)
    # The level whose interval just touches 0; one t with pooled degrees of freedom has .042.
    assert found.p_value == pytest.approx(0.060, abs=0.003)
    touching = contrast([runs], [1], VALUE, null=found.ci_low, **OPTIONS)
    assert touching.p_value == pytest.approx(0.05)


def test_documents_not_rows_are_counted():
    rows = np.repeat(np.random.default_rng(1).normal(0.3, 1, 12), 5)
    documents = [str(i // 5) for i in range(60)]
    found = contrast([[table(rows, documents)]], [1], VALUE, **OPTIONS)
    assert found.p_value == pytest.approx(stats.ttest_1samp(rows[::5], 0).pvalue, rel=0.1)
    assert (found.n, found.documents) == (60, 12)


def test_a_share_has_at_least_the_spread_of_the_null():
    """0 and 1 of 100 predictions changed, at most 5 % tolerated: the score test."""
    null = np.sqrt(0.05 * 0.95 / 100)
    for changed in (0, 1):
        values = (np.arange(100) < changed).astype(float)
        found = contrast([[table(values)]], [1], VALUE, null=0.05, share=True, **OPTIONS)
        statistic = (0.05 - changed / 100) / null
        # Where one example differs, its own spread gives the degrees of freedom, 99 as well.
        assert found.p_value == pytest.approx(2 * stats.t(99).sf(statistic), rel=1e-3)
        exact = 2 * stats.binomtest(changed, 100, 0.05, "less").pvalue
        assert 0.9 < found.p_value / exact < 2.1
    # Without it one rare event would be taken for certain.
    assert contrast([[table(values)]], [1], VALUE, null=0.05, **OPTIONS).p_value < 1e-3


def test_where_nothing_varies_the_sign_test_decides():
    ones, zeros = table(np.ones(6)), table(np.zeros(6))
    found = contrast([[ones], [zeros]], [1, -1], VALUE, **OPTIONS)
    assert (found.value, found.p_value) == (1.0, 2 * 0.5**6)
    assert np.isnan(found.ci_low)
    same = contrast([[ones], [ones]], [1, -1], VALUE, **OPTIONS)
    assert (same.value, same.p_value) == (0.0, 1.0)
    assert np.isnan(contrast([[table([1.0])]], [1], VALUE, **OPTIONS).p_value)


def test_a_ratio_of_means_is_a_difference_of_logarithms():
    log = Metric("log", VALUE.statistics, lambda sums: np.log(VALUE.value(sums)))
    first = np.random.default_rng(2).gamma(9, 1, 400)
    found = contrast([[table(first)], [table(2 * first)]], [1, -1], log, **OPTIONS)
    assert np.exp(found.value) == pytest.approx(0.5)


def test_three_seeds_rarely_show_what_is_not_there():
    """Runs differ, examples hardly: a bootstrap of three seeds would be wrong a quarter of the
    time, whenever all three lie on one side."""
    draw, false = np.random.default_rng(3), 0
    for _ in range(200):
        levels = draw.normal(0, 0.1, 3)
        runs = [table(level + draw.normal(0, 0.02, 20)) for level in levels]
        false += contrast([runs], [1], VALUE, resamples=200, seed=0).p_value < 0.05
    assert false <= 20  # 5 % expected; 20 of 200 has probability 0.002
