"""H3 and H5 say nothing where the experts do not matter."""

import numpy as np
import pytest
from scipy import stats

from stages.compare.claim import MATTER
from stages.compare.hypotheses import decide, trivial
from tests.stages.compare.attacked import (
    MANY,
    attacks,
    claim,
    interventions,
    of,
    spec_of,
    verdicts,
)


def test_a_premise_is_needed_for_support_and_refutes_nothing():
    holds, fails = claim(0.03, 1, premise=MATTER), claim(0.001, -1, premise=MATTER)
    assert decide([claim(0.001, 1), holds]) == (0.03, "supported")
    assert decide([claim(0.001, 1), fails]) == (1.0, "undecided")
    # It is no claim that could have been refuted: one claim, not two.
    assert decide([claim(0.001, -1), fails]) == (0.001, "refuted")
    assert trivial([claim(0.001, 1), holds]) == ""
    unsure = trivial([claim(0.001, 1), claim(0.2, 1, premise=MATTER)])
    assert "not shown to be more than the margin" in unsure


@pytest.mark.parametrize(
    ("dropped", "verdict", "beside"),
    [
        (0.95, "undecided", "costs 0.000"),
        (0.93, "undecided", "costs 0.020"),
        (0.88, "undecided", "costs 0.070"),  # 1.6 standard errors above the margin
        (0.85, "supported", ""),
    ],
)
def test_experts_that_do_not_matter_support_nothing(tmp_path, dropped, verdict, beside):
    """Of 400 examples the accuracy is .95 as routed; no exchange of experts or routes costs more
    than .01, which is trivial where dropping all experts' output costs next to nothing."""
    changes = {
        "attacks": lambda model, seed: attacks(0.5, model != "vit", n=MANY),
        "interventions": interventions(second=0.94, drawn=0.6, dropped=dropped, n=MANY),
    }
    table = verdicts(tmp_path, spec_of(resamples=4000), **changes)
    for name in ("H3", "H5"):
        found = of(table, name)
        assert found["verdict"][0] == verdict
        premise = found.iloc[-1]
        assert premise["value"] == pytest.approx(0.95 - dropped) and premise["side"] == ">"
        # The standard error is at least that of the null, sqrt(.05 * .95 / 400) = .0109, and that
        # of the share itself, here of three equal seeds: sqrt(share * (1 - share) / 399).
        error = max(0.0109, np.sqrt((0.95 - dropped) * (0.05 + dropped) / 399))
        expected = 2 * stats.t(399).sf(abs(0.9 - dropped) / error)
        assert premise["p_claim"] == pytest.approx(expected, rel=0.3)
        if verdict == "supported":
            assert found["reason"][0] == ""
        else:
            assert found["reason"][0].startswith("experts matter too little here: dropping them "
                                                 f"all {beside} (")
            told = "not shown to be more than" if dropped == 0.88 else "no more than"
            assert f"{told} the margin of 0.05" in found["reason"][0]


def test_experts_that_do_not_matter_can_still_be_worse_than_nothing(tmp_path):
    """Second-best experts cost .45 and dropping all nothing: that they cost little is false."""
    tables = {"interventions": interventions(second=0.5, drawn=0.3, dropped=0.95, n=MANY)}
    found = of(verdicts(tmp_path, **tables), "H5")
    assert found["verdict"][0] == "refuted" and found["reason"][0] == ""
