"""Fronts, importance and best-so-far curves against hand-worked cases and closed forms."""

from math import comb

import numpy as np
import pandas as pd
import pytest

from stages.compare.search_results import best_so_far, choose, importance, oriented, pareto_front


def test_front_by_hand():
    #                       kept    kept    by 0    by 1    equal to 1: the first stands for both
    points = np.array([[1.0, 5.0], [3.0, 3.0], [0.5, 5.0], [3.0, 2.0], [3.0, 3.0], [5.0, 0.0]])
    assert pareto_front(points).tolist() == [0, 1, 5]


def test_front_equals_its_definition_on_random_points():
    generator = np.random.default_rng(0)
    for columns in (2, 3):
        points = generator.integers(0, 6, size=(60, columns)).astype(float)
        front = {tuple(points[i]) for i in pareto_front(points)}
        expected = {tuple(p) for p in points if not any(
            all(q >= p) and any(q > p) for q in points)}
        assert front == expected


def test_the_single_best_trial_is_the_earliest_of_equals_in_either_direction():
    scores = [[0.2], [0.8], [0.1], [0.8], [0.1]]
    assert choose(scores, [True], 1) == [1]
    assert choose(scores, [False], 1) == [2]


def test_members_of_a_front_are_both_ends_and_what_lies_between():
    scores = [[x, 10 - x] for x in (0, 3, 1, 4, 2)]  # all on the front, accuracy against a rate
    assert choose(scores, [True, True], 3) == [3, 4, 0]
    assert choose(scores, [True, True], 9) == [3, 1, 4, 2, 0]
    assert choose(scores, [True, False], 3) == [3]  # more of the first, less of the second
    assert oriented([[1.0, 2.0]], [True, False]).tolist() == [[1.0, -2.0]]


def test_expected_best_equals_its_closed_form():
    """The expected best of k of n values without replacement is a sum of order statistics."""
    values = [0.1, 0.5, 0.2, 0.9, 0.3, 0.7]
    ordered = sorted(values)
    exact = [sum(v * comb(i, k - 1) for i, v in enumerate(ordered)) / comb(6, k)
             for k in range(1, 7)]
    found = best_so_far(values, resamples=20_000)
    assert found["budget"].tolist() == [1, 2, 3, 4, 5, 6]
    assert found["mean"].to_numpy() == pytest.approx(exact, abs=0.01)
    assert found["ci_low"].iloc[-1] == 0.9
    assert found.loc[0, ["ci_low", "ci_high"]].tolist() == [0.1, 0.9]


def test_a_trial_without_a_value_costs_its_place():
    found = best_so_far([0.5, np.nan, np.nan, 0.5], resamples=4000)
    assert found["mean"].isna().tolist() == [True, True, False, False]
    assert found["mean"].iloc[2] == 0.5  # of three places, one holds a value in every order


def test_expected_best_by_cost_by_hand():
    """Of the six orders of trials that cost 1, 1 and 2, a budget of 8/3 pays the first two in two
    (best 3 and 3), else the first alone (1, 3, 2 and 2): 14/6 on average."""
    found = best_so_far([1.0, 3.0, 2.0], [1, 1, 2], resamples=20_000)
    assert found["budget"].tolist() == pytest.approx([4 / 3, 8 / 3, 4])
    assert np.isnan(found["mean"].iloc[0])  # an order that begins with the dear one has nothing yet
    assert found["mean"].iloc[1:].tolist() == pytest.approx([14 / 6, 3], abs=0.02)
    assert found.loc[1, ["ci_low", "ci_high"]].tolist() == [1, 3]


@pytest.fixture
def trials():
    generator = np.random.default_rng(1)
    return pd.DataFrame({
        "rate": generator.uniform(size=150), "kind": generator.choice(["a", "b"], size=150),
        "idle": generator.uniform(size=150), "fixed": 1.0})


def test_importance_is_the_share_of_variance_of_an_additive_function(trials):
    """Var(6x) = 3, Var(2 [kind = b]) = 1, so shares 3/4 and 1/4; noise has none."""
    objective = 6 * trials["rate"] + 2 * (trials["kind"] == "b")
    found = importance(trials, objective).set_index("field")
    assert list(found.index) == ["rate", "kind", "idle"]
    assert found["importance"].to_numpy() == pytest.approx([0.75, 0.25, 0.0], abs=0.12)
    for field, share in (("rate", 0.75), ("kind", 0.25), ("idle", 0.0)):
        assert found.loc[field, "ci_low"] <= share + 0.02 <= found.loc[field, "ci_high"] + 0.1
    assert found.loc["idle", "ci_low"] < 0.01 < found.loc["kind", "ci_low"]


def test_importance_counts_a_field_that_a_condition_switched_off(trials):
    trials = trials.assign(depth=np.where(trials["kind"] == "b", trials["idle"], np.nan))
    found = importance(trials[["depth", "rate"]], np.where(trials["kind"] == "b", 1.0, 0.0))
    assert found["field"].iloc[0] == "depth" and found["importance"].iloc[0] > 0.5


def test_too_few_trials_give_no_importance(trials):
    assert importance(trials[:9], trials["rate"][:9]).empty
    missing = trials["rate"].where(trials.index < 9)
    assert importance(trials, missing).empty
