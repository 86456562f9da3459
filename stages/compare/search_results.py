"""What a search found, as numbers: the Pareto front, knobs' importance, best score by budget."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from stages.statistics import CONFIDENCE

FEWEST = 10
"""Trials below which no importance is given."""


def oriented(objectives: Sequence[Sequence[float]], maximize: Sequence[bool]) -> np.ndarray:
    """Objectives as an array of shape (trials, objectives) in which more is better."""
    values = np.asarray(objectives, dtype=float).reshape(-1, len(maximize))
    return np.where(maximize, values, -values)


def pareto_front(values: np.ndarray) -> np.ndarray:
    """Indices of the rows that no other row dominates; more is better in each column.

    A row dominates another that it nowhere falls behind and somewhere exceeds. Equal rows do not
    dominate each other; the first of them stands for all.
    """
    kept = []
    for index, row in enumerate(values):
        others = np.delete(values, index, axis=0)
        dominated = ((others >= row).all(axis=1) & (others > row).any(axis=1)).any()
        repeated = (values[:index] == row).all(axis=1).any()
        if not dominated and not repeated:
            kept.append(index)
    return np.array(kept, dtype=int)


def choose(
    objectives: Sequence[Sequence[float]], maximize: Sequence[bool], most: int
) -> list[int]:
    """Indices of the trials to train again, best in the first objective first.

    At most ``most`` members of the front: both ends, and between them those that lie most evenly
    in rank. With one objective that is the best trial, the earliest of equals.
    """
    values = oriented(objectives, maximize)
    front = pareto_front(values)
    front = front[np.argsort(-values[front, 0], kind="stable")]
    places = np.linspace(0, len(front) - 1, min(most, len(front)))
    return [int(front[i]) for i in np.unique(np.round(places).astype(int))]


def best_so_far(
    values: Sequence[float],
    costs: Sequence[int] | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """The best value that a budget buys, over random orders of the trials; more is better.

    The budget is a number of trials or, with the ``costs`` of the trials, a sum of costs, of which
    the trials of an order are paid in turn. Trials without a value (stopped or failed, NaN) cost
    what they cost and add nothing.

    Columns: ``budget`` (each number of trials, or as many even steps of the sum), ``mean``
    (expected best, trials drawn without replacement; NaN where in some order there is none yet),
    ``ci_low`` and ``ci_high`` (95 % of the orders).
    """
    found = np.asarray(values, dtype=float)
    number = len(found)
    orders = np.random.default_rng(seed).permuted(
        np.tile(np.arange(number), (resamples, 1)), axis=1)
    best = np.fmax.accumulate(found[orders], axis=1)
    budgets = np.arange(1, number + 1)
    if costs is not None:
        paid = np.cumsum(np.asarray(costs)[orders], axis=1)
        budgets = np.linspace(0, paid[0, -1], number + 1)[1:]
        # Column 0 stands for an order whose first trial is too dear.
        best = np.insert(best, 0, np.nan, axis=1)
        done = np.stack([np.searchsorted(order, budgets, side="right") for order in paid])
        best = np.take_along_axis(best, done, axis=1)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(best, [tail, 1 - tail], axis=0, method="nearest")
    return pd.DataFrame({
        "budget": budgets, "mean": best.mean(axis=0), "ci_low": low, "ci_high": high})


def importance(
    values: pd.DataFrame, objective: Sequence[float], resamples: int = 25, seed: int = 0
) -> pd.DataFrame:
    """How much of an objective's variance over the trials goes with each field.

    ``values`` has a row per trial and a column per field, ``objective`` a number per trial; trials
    without one are left out. A random forest is fitted to a bootstrap sample of the trials; on the
    trials that the sample lacks, each field is permuted in turn (Breiman 2001, "Random forests")
    and half the rise of the squared error, in units of the objective's variance, is the field's
    importance: for a forest that fits well, its total-effect index (Jansen 1999), which is the
    share of variance where fields do not interact.

    Columns: ``field``, ``importance`` (mean over the samples), ``ci_low``, ``ci_high`` (95 % of the
    samples: the uncertainty that comes from the choice of trials). Empty with fewer than
    ``FEWEST`` trials, or when the objective or every field has one value only.
    """
    from sklearn.ensemble import RandomForestRegressor
    from sklearn.inspection import permutation_importance

    target = np.asarray(objective, dtype=float)
    counted = np.isfinite(target)
    target, columns = target[counted], _codes(values[counted])
    variance = target.var() if len(target) else 0.0
    if len(target) < FEWEST or not variance or columns.empty:
        return pd.DataFrame(columns=["field", "importance", "ci_low", "ci_high"])
    generator = np.random.default_rng(seed)
    features, found = columns.to_numpy(), []
    for sample in range(resamples):
        drawn = generator.integers(len(target), size=len(target))
        out = np.setdiff1d(np.arange(len(target)), drawn)
        forest = RandomForestRegressor(n_estimators=30, random_state=seed + sample)
        forest.fit(features[drawn], target[drawn])
        rise = permutation_importance(
            forest, features[out], target[out], scoring="neg_mean_squared_error", n_repeats=5,
            random_state=seed + sample).importances_mean
        found.append(rise / (2 * variance))
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(found, [tail, 1 - tail], axis=0)
    return pd.DataFrame({
        "field": list(columns), "importance": np.mean(found, axis=0), "ci_low": low,
        "ci_high": high}).sort_values("importance", ascending=False, ignore_index=True)


def _codes(values: pd.DataFrame) -> pd.DataFrame:
    """The fields that vary, as numbers; a field that a condition switched off stays NaN."""
    codes = {}
    for name in values:
        column = values[name]
        if column.nunique(dropna=False) < 2:
            continue
        numeric = pd.api.types.is_numeric_dtype(column) and column.dtype != bool
        codes[name] = column.astype(float) if numeric else (
            pd.Series(pd.factorize(column, sort=True)[0], column.index, float).replace(-1, np.nan))
    return pd.DataFrame(codes, index=values.index)
