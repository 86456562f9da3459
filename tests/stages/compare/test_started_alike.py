"""Verdicts on experts that were copies of one block: the level and the change from untuned."""

import numpy as np
import pytest

from tests.stages.compare.attacked import (
    MANY,
    geometry,
    interventions,
    of,
    text_attacks,
    text_spec,
    text_study,
    verdicts,
)


def test_of_experts_that_started_alike_the_change_from_untuned_is_judged_too(tmp_path):
    spec = text_spec(recipes=("none", "scratch"), upcycled=("vmoe-4",))
    before = {
        "vmoe-4/none/0/attacks": text_attacks(0.5, change=0.25, n=MANY),
        "vmoe-4/none/0/interventions": interventions(second=0.93, drawn=0.85),
        "vmoe-4/none/0/geometry": geometry(slope=0.2),
    }
    table = verdicts(tmp_path, spec, attacks=text_study, **before)
    assert set(table["recipe"]) == {"scratch"}
    routes = of(table, "H3")
    # 0.3 - 2 × 0.1 trained and 0.25 - 2 × 0.1 untuned; noise 0.01; nothing lost either time.
    assert routes["value"].tolist() == pytest.approx([0.1, 0.05, 0.28, 0.05, 0, 0, 0.85])
    told = routes["claim"].str.endswith(", change from untuned").tolist()
    assert told == [False, True] * 3 + [False]
    assert "under attack 0.300 (untuned 0.250)" in routes["compared"][0]
    assert routes["verdict"][0] == "supported"
    other = of(table, "H5")
    # Ranks K + 1 to 2K: 0.95 - 0.9 and 0.95 - 0.925 (37 of 40); random: 0.3 and 0.85 (34 of 40).
    expected = [0.05, 0.025, -0.6, -0.6 + 0.075, 0.85]
    assert other["value"].tolist() == pytest.approx(expected)
    assert "second-best experts 0.900 (untuned 0.925)" in other["compared"][0]
    trained, untuned = (
        np.corrcoef(g["routing_term"], g["loss_rise"])[0, 1]
        for g in (geometry(), geometry(slope=0.2))
    )
    slope = of(table, "H4")
    change = np.arctanh(trained) - np.arctanh(untuned)
    assert slope["value"].tolist() == pytest.approx([trained, change])
    assert slope["claim"][1].endswith("change from untuned (Fisher's z)")
    assert f"vmoe-4 +{trained:.3f}" in slope["compared"][0]
    # Robustness is no result on routes.
    assert of(table, "H1")["value"][0] == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("trained", "untuned", "verdict"),
    [
        # Far above the baseline, and so it was before.
        ({"change": 0.3}, {"change": 0.3}, "undecided"),
        ({"change": 0.3}, {"change": 0.25}, "supported"),
        # More than before, and still no more than twice the baseline: contrary.
        ({"change": 0.15}, {"change": 0.05}, "refuted"),
        # Less than before, and far above the baseline all the same: that refutes nothing.
        ({"change": 0.5}, {"change": 0.7}, "undecided"),
    ],
)
def test_a_change_without_the_level_supports_nothing_and_refutes_nothing(
    tmp_path, trained, untuned, verdict
):
    spec = text_spec(recipes=("none", "scratch"), upcycled=("vmoe-4",))
    tables = {f"vmoe-4/{recipe}/0/attacks": text_attacks(0.6, n=MANY, **fields)
              for recipe, fields in (("none", untuned), ("scratch", trained))}
    found = of(verdicts(tmp_path, spec, attacks=text_study, **tables), "H3")
    assert found["verdict"][0] == verdict
    if verdict == "undecided":
        assert found["reason"][0].startswith(
            "the experts started alike: change of routes minus 2 × that under a random "
            "perturbation, change from untuned ")


def test_experts_that_started_alike_need_their_untuned_twin(tmp_path):
    table = verdicts(tmp_path, text_spec(upcycled=("vmoe-4",)), attacks=text_study)
    for hypothesis in ("H3", "H4", "H5"):
        assert of(table, hypothesis)["reason"][0] == (
            "the experts of vmoe-4 started alike, and there are no scores of them trained and "
            "untuned to tell a change from; set untuned: true"
        )
    assert of(table, "H1")["verdict"][0] != "not tested"
