"""Tables of experts and features by hand, and scikit-learn's mutual information."""

import numpy as np
import pytest
from sklearn.metrics import mutual_info_score

from stages.probe.specialisation import information, purity, table

LN2 = np.log(2)


def test_a_table_counts_choices():
    chosen = np.array([[1, 1, 0], [0, 1, 1], [0, 1, 0]], dtype=bool)
    assert table(chosen, np.array([0, 1, 1]), 2).tolist() == [[1, 0], [1, 2], [0, 1]]


@pytest.mark.parametrize(
    ("counts", "told", "pure"),
    [
        ([[4, 0], [0, 4]], 1.0, 1.0),  # each expert serves one value
        ([[2, 2], [2, 2]], 0.0, 0.5),  # experts and values have nothing to do with each other
        ([[0, 0], [2, 2]], 0.0, 0.5),  # an expert that is never chosen does not count
        # The first expert is pure, the second has both alike: half of the choices tell 1 bit of
        # H(3/4, 1/4) less what is left.
        ([[4, 0], [2, 2]], 1 - 0.5 * LN2 / (2 * LN2 - 0.75 * np.log(3)), 0.75),
    ],
)
def test_information_and_purity_by_hand(counts, told, pure):
    assert information(np.array(counts)) == pytest.approx(told)
    assert purity(np.array(counts)) == pytest.approx(pure)


def test_many_tables_at_once_are_scikit_learns():
    rng = np.random.default_rng(0)
    tables = rng.integers(0, 30, size=(3, 5, 4, 6))
    found = information(tables)
    assert found.shape == (3, 5) == purity(tables).shape
    for place in np.ndindex(3, 5):
        counts = tables[place]
        share = counts.sum(0) / counts.sum()
        entropy = -(share * np.log(share)).sum()
        expected = mutual_info_score(None, None, contingency=counts) / entropy
        assert found[place] == pytest.approx(expected)
        assert purity(tables)[place] == counts.max(1).sum() / counts.sum()


def test_a_feature_of_one_value_tells_nothing_about():
    assert np.isnan(information(np.array([[3, 0], [1, 0]])))
    assert purity(np.array([[3, 0], [1, 0]])) == 1.0
