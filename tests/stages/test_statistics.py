import warnings
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from scipy.optimize import brentq

from stages import statistics
from stages.errors import StageFailed
from stages.evaluate.base import Metric, mean_of
from stages.evaluate.examples import mean_of_sets, mean_where
from stages.statistics import (
    EXACT_SWAP,
    MCNEMAR,
    MDD_FACTOR,
    STUDENT,
    SWAP,
    _exact_swap_p,
    estimate,
    holm,
    paired,
    summarise,
)

CORRECT = mean_of("correct")


def scores(values, documents=None, column="correct"):
    n = len(values)
    return pd.DataFrame(
        {
            "example_id": [f"e{i}" for i in range(n)],
            "document": range(n) if documents is None else documents,
            "subset": "all",
            column: np.asarray(values, dtype=float),
        }
    )


def f1_metric():
    """F1 of the positive class from (true positive, false positive, false negative) counts."""

    def statistics(s):
        p, g = s["prediction"].to_numpy(), s["gold"].to_numpy()
        return np.stack([p & g, p & ~g, ~p & g], axis=1).astype(float)

    def value(t):
        return 2 * t[..., 0] / (2 * t[..., 0] + t[..., 1] + t[..., 2])

    return Metric("f1", statistics, value)


def test_wilson_interval_by_hand():
    # 8 of 10: centre (0.8 + z²/20) / (1 + z²/10), half width by Wilson's formula.
    z = stats.norm.ppf(0.975)
    centre = (0.8 + z**2 / 20) / (1 + z**2 / 10)
    half = z / (1 + z**2 / 10) * np.sqrt(0.8 * 0.2 / 10 + z**2 / 400)
    got = estimate([scores([1] * 8 + [0] * 2)], CORRECT)
    assert (got.value, got.n, got.documents) == (0.8, 10, 10)
    assert (got.ci_low, got.ci_high) == pytest.approx((centre - half, centre + half), abs=1e-12)


def test_wilson_interval_is_scipys_to_the_last_digit():
    for right, of in ((0, 7), (7, 7), (1, 3), (55, 60), (817, 1319)):
        got = estimate([scores(np.arange(of) < right)], CORRECT, resamples=4)
        exact = stats.binomtest(right, of).proportion_ci(0.95, "wilson")
        assert (got.ci_low, got.ci_high) == (exact.low, exact.high)


def test_missing_scores_and_other_subsets_are_left_out_of_n():
    table = scores([1, 0, np.nan, 1, 1])
    table["subset"] = ["a", "a", "a", "b", "b"]
    got = summarise(table, [CORRECT, mean_of("correct", "a_only", "a")])
    assert (got["correct"]["value"], got["correct"]["n"]) == (0.75, 4)
    assert (got["a_only"]["value"], got["a_only"]["n"]) == (0.5, 2)


def test_bootstrap_of_a_mean_matches_the_standard_error():
    x = np.random.default_rng(0).normal(3, 2, size=400)
    got = estimate([scores(x)], CORRECT, resamples=20_000)
    error = x.std(ddof=1) / np.sqrt(400)
    low, high = x.mean() - 1.96 * error, x.mean() + 1.96 * error
    assert (got.ci_low, got.ci_high) == pytest.approx((low, high), abs=0.05 * error)


def test_documents_of_several_rows_match_the_cluster_robust_standard_error():
    rng = np.random.default_rng(1)
    documents = np.repeat(np.arange(100), 8)
    x = (rng.random(800) < np.repeat(rng.beta(1, 1, 100), 8)).astype(float)
    clustered = estimate([scores(x, documents)], CORRECT, resamples=20_000)
    residuals = np.bincount(documents, x - x.mean())
    error = np.sqrt(100 / 99 * (residuals**2).sum()) / 800
    width = clustered.ci_high - clustered.ci_low
    assert width == pytest.approx(2 * 1.96 * error, rel=0.03)
    independent = estimate([scores(x)], CORRECT)
    assert width > 1.5 * (independent.ci_high - independent.ci_low)


def test_all_correct_in_few_documents_does_not_give_an_interval_of_width_zero():
    got = estimate([scores([1] * 12, np.repeat([0, 1, 2, 3], 3))], CORRECT)
    # Wilson with 4 of 4: low end n / (n + z²).
    assert (got.ci_low, got.ci_high) == pytest.approx((4 / (4 + 1.959964**2), 1), abs=1e-6)


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_paired_interval_covers_the_truth_as_often_as_it_says(share):
    """300 samples of 120 pairs whose true difference is ``share`` * 0.5."""
    rng = np.random.default_rng(2)
    covered = 0
    for _ in range(300):
        second = rng.random(120) < 0.3
        first = second | ((rng.random(120) < share) & (rng.random(120) < 0.5 / 0.7))
        got = paired([scores(first)], [scores(second)], CORRECT, resamples=500)
        covered += got.ci_low <= share * 0.5 <= got.ci_high
    # Binomial(300, 0.95) has a standard deviation of 3.8.
    assert 300 * 0.95 - 15 <= covered <= 300 * 0.95 + 12


def test_mcnemar_by_hand():
    # 9 examples only the first has right, 2 only the second: 2 * P(Bin(11, 1/2) <= 2).
    first = [1] * 9 + [0] * 2 + [1] * 30 + [0] * 9
    second = [0] * 9 + [1] * 2 + [1] * 30 + [0] * 9
    got = paired([scores(first)], [scores(second)], CORRECT)
    assert got.test == MCNEMAR
    assert got.p_value == pytest.approx(2 * (1 + 11 + 55) / 2**11, abs=1e-12)
    assert got.p_value == pytest.approx(stats.binomtest(9, 11).pvalue, abs=1e-12)
    assert got.difference == pytest.approx(7 / 50)
    delta = np.subtract(first, second)
    assert got.effect_size == pytest.approx(delta.mean() / delta.std(ddof=1))
    error = delta.std(ddof=1) / np.sqrt(50)
    assert got.minimum_detectable == pytest.approx(MDD_FACTOR * error, rel=0.05)
    assert MDD_FACTOR == pytest.approx(2.8016, abs=1e-4)


def test_exact_swap_equals_the_enumeration_of_all_sign_flips():
    totals = np.array([3, -1, 2, 2, 0, 1, -1, 4])
    signs = np.array(np.meshgrid(*[[-1, 1]] * 8)).reshape(8, -1)
    sums = np.abs(totals @ signs)
    assert _exact_swap_p(totals) == pytest.approx((sums >= totals.sum()).mean(), abs=1e-12)


def test_documents_of_several_rows_are_swapped_whole():
    # 12 documents of 5 rows in which the first wins all 5: McNemar over rows would say 2^-59,
    # the 12 independent documents can say no more than 2 * 2^-12.
    first, second = scores([1] * 60, np.repeat(range(12), 5)), scores([0] * 60)
    second["document"] = first["document"]
    got = paired([first], [second], CORRECT)
    assert (got.test, got.documents, got.n) == (EXACT_SWAP, 12, 60)
    assert got.p_value == pytest.approx(2 * 2**-12)


def test_random_swaps_agree_with_the_exact_test():
    rng = np.random.default_rng(3)
    first, second = rng.random(200) < 0.62, rng.random(200) < 0.5
    exact = paired([scores(first)], [scores(second)], CORRECT)
    # The same metric without the promise that it is a mean takes the random permutations.
    general = Metric("correct", CORRECT.statistics, CORRECT.value)
    drawn = paired([scores(first)], [scores(second)], general, resamples=20_000)
    assert (exact.test, drawn.test) == (MCNEMAR, SWAP)
    p = exact.p_value
    assert 0.001 < p < 0.2
    assert drawn.p_value == pytest.approx(p, abs=4 * np.sqrt(p / 20_000))


def test_a_metric_that_is_no_mean_is_resampled_through_its_sums():
    rng = np.random.default_rng(4)
    table = scores(np.zeros(300))
    table["gold"] = rng.random(300) < 0.4
    table["prediction"] = np.where(rng.random(300) < 0.8, table["gold"], ~table["gold"])
    other = table.assign(prediction=rng.random(300) < 0.5)
    metric = f1_metric()
    got = paired([table], [other], metric)
    tp = (table["gold"] & table["prediction"]).sum()
    by_hand = 2 * tp / (table["gold"].sum() + table["prediction"].sum())
    assert got.first.value == pytest.approx(by_hand)
    reference = []
    for _ in range(2000):
        i = rng.integers(300, size=300)
        sums = metric.statistics(table).astype(float)[i].sum(0)
        reference.append(metric.value(sums) - metric.value(metric.statistics(other)[i].sum(0)))
    low, high = np.quantile(reference, [0.025, 0.975])
    assert (got.ci_low, got.ci_high) == pytest.approx((low, high), abs=0.015)
    assert got.p_value < 0.01 and np.isnan(got.effect_size)


def by_hand(deltas, variance, documents):
    """Interval and p-value of a mean of the seeds' differences, whose variance over documents is
    given: reach² = t² V of both parts, and the level at which it equals the mean."""
    mean, of_seeds = np.mean(deltas), np.var(deltas, ddof=1) / len(deltas)

    def reach(level):
        t = stats.t.isf(level / 2, [documents - 1, len(deltas) - 1])
        return np.sqrt(t**2 @ [variance, of_seeds])

    p_value = brentq(lambda level: reach(level) - abs(mean), 1e-12, 1)
    return mean - reach(0.05), mean + reach(0.05), p_value


def test_several_seeds_add_the_variance_between_them():
    rng = np.random.default_rng(5)
    base, other = rng.random(2000), rng.random(2000)
    first = [scores(base < level) for level in (0.50, 0.56, 0.62)]
    second = [scores(other < level) for level in (0.46, 0.47, 0.45)]
    got = paired(first, second, CORRECT, resamples=20_000)
    rows = np.stack([f["correct"] - s["correct"] for f, s in zip(first, second, strict=True)])
    assert (got.test, got.seeds, got.documents) == (STUDENT, 3, 2000)
    assert got.difference == pytest.approx(rows.mean())
    variance = rows.mean(axis=0).var(ddof=1) / 2000
    low, high, p_value = by_hand(rows.mean(axis=1), variance, 2000)
    assert (got.ci_low, got.ci_high) == pytest.approx((low, high), abs=1e-3)
    assert 0.05 < p_value < 0.2 and got.p_value == pytest.approx(p_value, rel=0.01)
    # Some three standard errors of what three trainings differ by, which does not suffice.
    assert got.difference > 2.5 * np.sqrt(variance + rows.mean(axis=1).var(ddof=1) / 3)
    one = paired(first[1:2], second[1:2], CORRECT)
    assert one.test == MCNEMAR and one.p_value < 1e-6
    assert got.minimum_detectable > 2 * one.minimum_detectable


def test_several_seeds_of_a_metric_that_is_no_mean():
    """F1; the variance over 100 documents of three rows by a jackknife."""
    rng = np.random.default_rng(6)
    gold, documents, metric = rng.random(300) < 0.4, np.repeat(np.arange(100), 3), f1_metric()

    def run(share):
        table = scores(np.zeros(300), documents)
        right = rng.random(300) < share
        return table.assign(gold=gold, prediction=np.where(right, gold, ~gold))

    first, second = ([run(share) for share in of] for of in ((0.9, 0.86), (0.72, 0.7)))
    got = paired(first, second, metric, resamples=20_000)
    sums = np.stack([metric.statistics(t).reshape(100, 3, -1).sum(1) for t in first + second])
    values = metric.value(sums.sum(axis=1))
    without = metric.value(sums.sum(axis=1, keepdims=True) - sums)  # (4, 100)
    jackknife = (without[:2] - without[2:]).mean(axis=0)
    variance = 99 / 100 * ((jackknife - jackknife.mean()) ** 2).sum()
    low, high, p_value = by_hand(values[:2] - values[2:], variance, 100)
    assert (got.ci_low, got.ci_high) == pytest.approx((low, high), abs=0.01)
    assert got.p_value == pytest.approx(p_value, rel=0.03)


def test_an_untuned_model_beside_several_seeds_has_none():
    """Its level is that of one run, and the seeds' variance is the tuned model's own."""
    rng = np.random.default_rng(8)
    before = scores(rng.random(400) < 0.5)
    tuned = [scores(rng.random(400) < level) for level in (0.7, 0.75, 0.78)]
    got = paired(tuned, [before] * 3, CORRECT, resamples=20_000)
    assert got.second == estimate([before], CORRECT)
    rows = np.stack([table["correct"] - before["correct"] for table in tuned])
    low, high, _ = by_hand(rows.mean(axis=1), rows.mean(axis=0).var(ddof=1) / 400, 400)
    assert (got.ci_low, got.ci_high) == pytest.approx((low, high), abs=2e-3)


def test_the_level_of_several_seeds_is_wilsons_of_as_many_examples_as_have_that_spread():
    """Two seeds, 97 and 99 of 100 examples right, the third wrong one of the first being the
    second's: V over documents of 0.97 + 0.99 = 97 × 1, 2 × 0.5, 1 × 0; over seeds 0.0001."""

    def of_as_many(reach):
        z = reach**2 / (0.98 * 0.02)  # squared quantile over the number of examples
        half = np.sqrt(z * (0.98 * 0.02 + z / 4)) / (1 + z)
        middle = (0.98 + z / 2) / (1 + z)
        return middle - half, middle + half

    runs = [scores(np.arange(100) >= wrong) for wrong in (3, 1)]
    got = estimate(runs, CORRECT, resamples=20_000)
    of_documents = np.array([0] + [0.5] * 2 + [1] * 97).var(ddof=1) / 100
    reach = np.sqrt(1.9842**2 * of_documents + 12.7062**2 * 0.0001)
    low, high = stats.binomtest(98, 100).proportion_ci(0.95, "wilson")
    assert (got.ci_low < low, got.ci_high > high, got.ci_high < 1) == (True, True, True)
    assert (got.ci_low, got.ci_high) == pytest.approx(of_as_many(reach), abs=1e-3)
    # So has a mean of budgets whose scores may be halves, where it is said to lie between 0 and 1.
    halves = [scores(np.where(np.arange(100) >= wrong, 1.0, 0.5)) for wrong in (6, 2)]
    got = estimate(halves, replace(CORRECT, bounded=True), resamples=20_000)
    of_documents = np.array([0.5] * 2 + [0.75] * 4 + [1] * 94).var(ddof=1) / 100
    reach = np.sqrt(1.9842**2 * of_documents + 12.7062**2 * 0.0001)
    assert (got.ci_low, got.ci_high) == pytest.approx(of_as_many(reach), abs=1e-3)
    plain = estimate(halves, CORRECT, resamples=20_000)
    assert (plain.ci_low, plain.ci_high) == pytest.approx((0.98 - reach, 0.98 + reach), abs=1e-3)
    assert plain.ci_high > 1 > got.ci_high
    # Scores that are no shares have the plain interval.
    values = [scores(np.arange(100) / 50 + shift) for shift in (0.0, 0.1)]
    got = estimate(values, CORRECT, resamples=20_000)
    reach = np.sqrt(1.9842**2 * values[0]["correct"].var() / 100 + 12.7062**2 * 0.05**2)
    assert (got.ci_low, got.ci_high) == pytest.approx((1.04 - reach, 1.04 + reach), abs=2e-3)


def test_a_metric_without_any_score_has_no_number():
    nothing = scores([np.nan] * 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of a mean over nothing
        got = paired([nothing], [nothing], CORRECT)
    assert (got.n, got.documents, got.identical) == (0, 0, False)
    assert np.isnan([got.difference, got.ci_low, got.ci_high, got.p_value]).all()


def test_identical_answers_get_the_rule_of_three():
    same = scores([1, 0] * 50)
    got = paired([same], [same], CORRECT)
    assert (got.difference, got.p_value, got.identical) == (0.0, 1.0, True)
    assert got.ci_high == -got.ci_low == pytest.approx(1 - 0.05**0.01)
    assert got.ci_high == pytest.approx(3 / 100, abs=1e-3)
    assert np.isnan(got.minimum_detectable)


def test_scores_that_are_not_0_or_1_get_no_interval_from_the_rule_of_three():
    """Points of 100: a document can differ by more than 1."""
    same = [scores([20.0, 40.0, 60.0])]
    got = paired(same, same, CORRECT)
    assert got.identical and np.isnan([got.ci_low, got.ci_high, got.minimum_detectable]).all()


def test_a_difference_that_all_documents_show_is_not_certain():
    ones, zeros = [scores([1] * 40)], [scores([0] * 40)]
    got = paired(ones, zeros, CORRECT)
    bound = 1 - 0.05 ** (1 / 40)
    assert (got.difference, got.identical) == (1, False)
    assert (got.ci_low, got.ci_high) == pytest.approx((1 - 2 * bound, 1))
    assert np.isnan(got.minimum_detectable)


def test_seeds_that_all_have_none_are_not_certain_of_none():
    one, three = (estimate([scores([0] * 40)] * runs, CORRECT) for runs in (1, 3))
    assert (three.value, three.n) == (0, 40)
    assert (three.ci_low, three.ci_high) == pytest.approx((one.ci_low, one.ci_high))
    assert one.ci_high == pytest.approx(0.088, abs=1e-3)


def test_the_mean_over_sets_of_one_size_is_the_mean_of_all_rows():
    """Two sets: of five rows each, tested as one of ten; of six and four, as the two that they
    are."""
    first, second = scores([1, 1, 1, 0, 1, 1, 0, 1, 1, 1]), scores([1, 0, 0, 0, 1, 0, 0, 1, 0, 0])

    def both(size):
        parts = [mean_where("correct", name, "domain", (name,)) for name in "ab"]
        domain = ["a"] * size + ["b"] * (10 - size)
        metric = mean_of_sets("mean", parts, "correct")
        tables = [table.assign(domain=domain) for table in (first, second)]
        return paired(*([table] for table in tables), metric), metric, tables

    (equal, metric, _), pooled = both(5), paired([first], [second], CORRECT)
    assert equal.test == MCNEMAR and equal.p_value == pooled.p_value
    assert equal.p_value == pytest.approx(2 * 0.5**5)
    for mine, other in ((equal.first, pooled.first), (equal.second, pooled.second)):
        assert vars(mine) == pytest.approx(vars(other))  # Wilson's intervals
    assert equal.effect_size == pooled.effect_size
    assert equal.difference == pytest.approx(0.5) and equal.n == 10
    same, _ = both(5)[2]
    assert paired([same], [same], metric).ci_high == pytest.approx(1 - 0.05**0.1)
    unequal, _, tables = both(6)
    assert unequal.first.value == pytest.approx((5 / 6 + 3 / 4) / 2)
    assert unequal.second.value == pytest.approx((2 / 6 + 1 / 4) / 2)
    assert unequal.test == SWAP and np.isnan(unequal.effect_size)
    # The sum of both sets' differences under all 32 ways to swap the five documents that differ:
    # 3 of six and 2 of four, 3/6 + 2/4 = 1 in two of them.
    assert unequal.p_value == pytest.approx(2 / 32, abs=0.01)


def test_a_metric_that_no_row_has_a_score_of_has_no_number():
    none = scores([np.nan] * 5)
    got = paired([none], [none], CORRECT)
    assert (got.n, got.documents, got.identical) == (0, 0, False)
    numbers = (got.first.value, got.difference, got.ci_low, got.ci_high, got.p_value,
               got.minimum_detectable, got.effect_size)
    assert np.isnan(numbers).all()


def test_rows_are_matched_by_example_id_and_unmatched_ones_are_named():
    first, second = scores([1, 1, 0, 1]), scores([0, 1, 0, 1])
    got = paired([first], [second.iloc[::-1]], CORRECT)
    assert got.first.value - got.second.value == got.difference == 0.25
    assert got.effect_size == pytest.approx(0.5)  # differences 1, 0, 0, 0
    with pytest.raises(StageFailed, match=r"differ in 1 example ids \(e2\)"):
        paired([first], [second.drop(index=2)], CORRECT)


def test_holm_by_hand():
    # Sorted 0.005, 0.01, 0.03, 0.04 times 4, 3, 2, 1 = 0.02, 0.03, 0.06, 0.04 -> running maximum.
    got = holm([0.01, 0.04, np.nan, 0.03, 0.005])
    assert got == pytest.approx([0.03, 0.06, np.nan, 0.06, 0.02], nan_ok=True)
    assert holm([0.6, 0.7]) == pytest.approx([1.0, 1.0])


@pytest.mark.parametrize("cells", [37 * 4, 37 * 100, 1])
def test_resamples_in_blocks_are_those_of_one_block(monkeypatch, cells):
    drawn = np.random.default_rng([3, 37]).integers(37, size=(90, 36))
    counts = np.stack([np.bincount(row, minlength=37) for row in drawn])
    moved = np.random.default_rng([3, 2]).integers(2, size=(90, 37), dtype=np.int8)
    monkeypatch.setattr(statistics, "CELLS", cells)
    weights, swaps = list(statistics._weights(37, 90, 3)), list(statistics._swaps(37, 90, 3))
    assert np.array_equal(np.concatenate(weights), counts)
    assert np.array_equal(np.concatenate(swaps), moved)
    assert max(map(len, swaps)) <= max(4, cells // 37)
