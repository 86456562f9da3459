"""The level of what attacks and probes measured has the interval that the same scores have in the
comparison of models."""

import pytest

from stages.compare.measured import Measured
from stages.evaluate.base import mean_of
from stages.statistics import estimate
from tests.stages.compare.attacked import attacks, spec_of, study


@pytest.fixture
def measured(tmp_path):
    """Robust accuracies and changes of routes that differ from seed to seed."""

    def table(model, seed):
        return attacks((0.8, 0.9, 1.0)[seed], model != "vit", change=(0.9, 0.93, 0.96)[seed])

    spec = spec_of()
    return Measured(spec, study(tmp_path, spec, attacks=table), {})


@pytest.mark.parametrize(
    ("columns", "same", "bounded"),
    [
        (("worst/8", "worst/16"), "robust", True),
        (("worst/8",), "worst/8", True),
        (("routing_change/pgd/8",), "routing_change/pgd/8", True),
        (("loss_rise/pgd/8",), "loss_rise/pgd/8", True),  # which is 0 throughout here
    ],
)
def test_numbers_between_0_and_1(measured, columns, same, bounded):
    tables = [measured.table("attacks", "vmoe-4", "scratch", seed) for seed in (0, 1, 2)]
    options = {"resamples": measured.spec.resamples, "seed": measured.spec.seed}
    level = measured.level("attacks", columns, "vmoe-4", "scratch")
    expected = estimate(tables, mean_of(same, bounded=bounded), **options)
    assert (level.value, level.ci_low, level.ci_high) == pytest.approx(
        (expected.value, expected.ci_low, expected.ci_high))  # fmt: skip
    assert 0 <= level.ci_low and level.ci_high <= 1
    plain = estimate(tables, mean_of(same), **options)
    if same in ("robust", "routing_change/pgd/8"):
        assert plain.ci_high > level.ci_high + 0.01


def test_slopes_have_no_bound(measured):
    spec = measured.spec
    tables = [measured.table("lipschitz", "vmoe-4", "scratch", seed) for seed in (0, 1, 2)]
    level = measured.level("lipschitz", ("block",), "vmoe-4", "scratch")
    assert tables[0]["block"].between(0, 1).all()  # by chance
    plain = estimate(tables, mean_of("block"), resamples=spec.resamples, seed=spec.seed)
    assert (level.ci_low, level.ci_high) == pytest.approx((plain.ci_low, plain.ci_high))
