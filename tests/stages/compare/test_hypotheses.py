"""Verdicts from made-up scores whose statistics are known."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from stages.compare.hypotheses import TITLES, decide
from stages.compare.table import number
from stages.statistics import holm
from tests.stages.compare import attacked
from tests.stages.compare.attacked import (
    EVALUATIONS,
    MANY,
    attacks,
    card,
    claim,
    geometry,
    interventions,
    of,
    slopes,
    spec_of,
    text_spec,
    text_study,
    verdicts,
)


def by_model(make, **levels):
    """A table for each model: ``make(level, moe)``."""
    return {
        f"{model.replace('_', '-')}/{make.__name__}": make(level, model != "vit")
        for model, level in levels.items()
    }


ROBUST = {
    "supported": {"vit": 0.4, "vmoe_4": 0.6, "vmoe_8": 0.6},
    "refuted": {"vit": 0.6, "vmoe_4": 0.4, "vmoe_8": 0.4},
    "undecided": {"vit": 0.5, "vmoe_4": 0.5, "vmoe_8": 0.5},
}


@pytest.mark.parametrize("verdict", ROBUST)
def test_h1_needs_more_robust_and_less_steep(tmp_path, verdict):
    table = verdicts(
        tmp_path,
        **by_model(attacks, **ROBUST[verdict]),
        **by_model(slopes, vit=2.0, vmoe_4=1.0, vmoe_8=1.5),
    )
    found = of(table, "H1")
    assert found["verdict"][0] == verdict
    # Worst case at the first budget, half of it at the second: 3/4 of the level.
    robust = 0.75 * (ROBUST[verdict]["vmoe_4"] - ROBUST[verdict]["vit"])
    assert found["value"].tolist() == pytest.approx([robust, np.sqrt(0.5 * 0.75)])
    assert found["side"].tolist() == [">", "<"] and found["null"].tolist() == [0, 1]
    assert found["ratio"].tolist() == [False, True]
    assert (found["n"][0], found["documents"][0], found["seeds"][0]) == (40, 40, 3)
    assert "vmoe-4 vs vit, vmoe-8 vs vit" in found["compared"][0]


def test_h1_tells_how_slopes_go_with_size(tmp_path):
    """Beside the law of robustness; a line through three sizes, of which two are one alone."""
    sizes = {"vit": 1_000_000, "vmoe-4": 2_000_000, "vmoe-8": 8_000_000}
    cards = {name: card(name, total_parameters=size) for name, size in sizes.items()}
    levels = {"vit": [3.0, 3.3, 3.6], "vmoe-4": [2.0] * 3, "vmoe-8": [1.0, 0.8, 1.1]}

    def table(model, seed):
        return slopes(levels[model][seed], model != "vit")

    at = np.log(list(sizes.values()))
    lines = [stats.linregress(at, np.log([levels[model][seed] for model in sizes])).slope
             for seed in range(3)]  # fmt: skip
    told = of(verdicts(tmp_path / "three", cards=cards, slopes=table), "H1")["compared"][0]
    mean, margin = np.mean(lines), stats.t.ppf(0.975, 2) * stats.sem(lines)
    assert (f"over that of all parameters has slope {number(mean, True)} "
            f"[{number(mean - margin, True)}, {number(mean + margin, True)}] (the lower") in told
    two = cards | {"vmoe-4": card("vmoe-4", total_parameters=1_000_000)}
    assert "slope" not in of(
        verdicts(tmp_path / "two", cards=two, slopes=table), "H1")["compared"][0]


def test_h1_is_refuted_by_steeper_models_though_they_are_more_robust(tmp_path):
    tables = by_model(slopes, vit=1.0, vmoe_4=2.0, vmoe_8=2.0)
    found = of(verdicts(tmp_path, **by_model(attacks, **ROBUST["supported"]), **tables), "H1")
    assert found["verdict"][0] == "refuted"
    # Twice the p-value of the contrary claim: either of the two could have refuted it.
    assert found["p_value"][0] == pytest.approx(2 * found["p_claim"][1])


def test_the_p_value_of_one_seed_is_the_t_tests(tmp_path):
    spec = spec_of(seeds=(0,), pairs=(("vmoe-4", "vit"),), resamples=4000)
    found = of(verdicts(tmp_path, spec, **by_model(attacks, vit=0.4, vmoe_4=0.7)), "H1")
    moe, dense = attacks(0.7), attacks(0.4)
    exact = stats.ttest_rel(moe["robust"], dense["robust"])
    assert found["p_claim"][0] == pytest.approx(exact.pvalue, rel=0.1)


def test_h1_compares_pairs_of_equal_flops_alone(tmp_path):
    large = {"vmoe-8": card("vmoe-8", flops_per_token=440_000)}
    tables = by_model(attacks, vit=0.4, vmoe_4=0.6, vmoe_8=0.9)
    found = of(verdicts(tmp_path / "one", cards=large, **tables), "H1")
    assert found["value"][0] == pytest.approx(0.75 * 0.2)
    assert found["compared"][0].startswith("vmoe-4 vs vit, whose FLOPs")
    # The sweep may name them itself.
    named = spec_of(hypotheses={"equal_flops": ["vmoe-8 vs vit"]})
    found = of(verdicts(tmp_path / "named", named, cards=large, **tables), "H1")
    assert found["value"][0] == pytest.approx(0.75 * 0.5)
    none = large | {"vmoe-4": card("vmoe-4", flops_per_token=800_000)}
    found = of(verdicts(tmp_path / "none", cards=none, **tables), "H1")
    assert found["verdict"][0] == "not tested"
    assert found["reason"][0] == (
        "no pair has equal FLOPs per token (vmoe-4 vs vit: the MoE takes 2.00 times the FLOPs; "
        "vmoe-8 vs vit: the MoE takes 1.10 times the FLOPs)"
    )


@pytest.mark.parametrize(
    ("small", "large", "verdict"),
    [(0.4, 0.8, "supported"), (0.8, 0.4, "refuted"), (0.6, 0.6, "undecided")],
)
def test_h2_is_the_slope_over_doublings(tmp_path, small, large, verdict):
    found = of(verdicts(tmp_path, **by_model(attacks, vit=0.5, vmoe_4=small, vmoe_8=large)), "H2")
    assert found["verdict"][0] == verdict
    assert found["value"][0] == pytest.approx(0.75 * (large - small))
    assert f"{0.75 * small:.3f} at E = 4, {0.75 * large:.3f} at E = 8" in found["compared"][0]


def test_h2_is_least_squares_over_three_sizes(tmp_path, monkeypatch):
    monkeypatch.setitem(attacked.EXPERTS, "vmoe-32", 32)
    spec = spec_of(pairs=[(f"vmoe-{e}", "vit") for e in (32, 4, 8)])
    levels = {"vit": 0.5, "vmoe_4": 0.4, "vmoe_8": 0.7, "vmoe_32": 0.8}
    found = of(verdicts(tmp_path, spec, **by_model(attacks, **levels)), "H2")
    line = stats.linregress([2, 3, 5], [0.75 * 0.4, 0.75 * 0.7, 0.75 * 0.8])
    assert found["value"][0] == pytest.approx(line.slope)
    assert found["compared"][0].startswith("vmoe-4, vmoe-8, vmoe-32, which differ in E alone")


def test_h2_needs_models_that_differ_in_experts_alone(tmp_path):
    other = {"vmoe-8": card("vmoe-8", top_k=2)}
    found = of(verdicts(tmp_path / "k", cards=other), "H2")
    assert found["verdict"][0] == "not tested" and "number of experts alone" in found["reason"][0]
    # Named by the sweep, they are compared all the same.
    spec = spec_of(hypotheses={"series": ["vmoe-4", "vmoe-8"]})
    assert of(verdicts(tmp_path / "named", spec, cards=other), "H2")["verdict"][0] == "undecided"


@pytest.mark.parametrize(
    ("fields", "verdict"),
    [
        ({"change": 0.6}, "supported"),
        ({"change": 0.3}, "refuted"),  # 1.5 times the change at random is not far above it
        ({"kept": 0.8}, "refuted"),  # a fifth of the predictions falls with the routes
        ({"kept": 0.96}, "undecided"),
        ({"change": 0.4}, "undecided"),  # exactly twice
    ],
)
def test_h3_routes_change_far_more_and_do_no_harm(tmp_path, fields, verdict):
    def table(model, seed):
        return attacks(0.5, model != "vit", n=MANY, **fields)

    found = of(verdicts(tmp_path, attacks=table), "H3")
    assert found["verdict"][0] == verdict
    change, kept = fields.get("change", 0.6), fields.get("kept", 1.0)
    # The attack on the routes and the control do not count in the change.
    # Without any expert's output .95 - .1 of the predictions change.
    assert found["value"].tolist() == pytest.approx([change - 0.4, change, 1 - kept, 0.85])
    assert found["null"].tolist() == [0, 0, 0.05, 0.05]
    assert found["claim"][3] == "predictions changed with no expert's output"
    for text in ("random perturbation 0.200", "again 0.000", "independent choices 0.820"):
        assert text in found["compared"][0]


def test_h3_takes_margin_and_far_from_the_sweep(tmp_path):
    spec = spec_of(hypotheses={"margin": 0.3, "far": 1.2})

    def table(model, seed):
        return attacks(0.5, model != "vit", change=0.3, kept=0.8, n=MANY)

    found = of(verdicts(tmp_path, spec, attacks=table), "H3")
    assert found["verdict"][0] == "supported"
    assert found["value"][0] == pytest.approx(0.3 - 1.2 * 0.2)


@pytest.mark.parametrize(("slope", "verdict"), [
    (1.0, "supported"), (-1.0, "refuted"), (0.0, "undecided"),
])
def test_h4_is_the_correlation(tmp_path, slope, verdict):
    found = of(verdicts(tmp_path, geometry=geometry(slope)), "H4")
    assert found["verdict"][0] == verdict
    scores = geometry(slope)
    exact = stats.pearsonr(scores["routing_term"], scores["loss_rise"])
    assert found["value"][0] == pytest.approx(exact.statistic)
    low, high = exact.confidence_interval()
    assert (found["ci_low"][0], found["ci_high"][0]) == (
        pytest.approx(low, abs=0.12), pytest.approx(high, abs=0.12))
    assert -1 < found["ci_low"][0] < found["ci_high"][0] < 1


def test_h4_does_not_drown_in_the_size_of_its_columns(tmp_path):
    far = geometry(1.0).assign(loss_rise=lambda scores: scores["loss_rise"] + 1e5)
    plain, moved = (of(verdicts(tmp_path / name, geometry=scores), "H4")
                    for name, scores in (("plain", geometry(1.0)), ("far", far)))  # fmt: skip
    assert moved["ci_low"][0] == pytest.approx(plain["ci_low"][0], abs=1e-4)


@pytest.mark.parametrize(
    ("second", "drawn", "verdict"),
    [
        (0.94, 0.3, "supported"),
        (0.5, 0.3, "refuted"),  # second-best experts cost much
        (0.6, 0.94, "refuted"),  # and random ones less
        (0.92, 0.3, "undecided"),
        (0.94, 0.935, "undecided"),
    ],
)
def test_h5_second_best_cost_little_and_random_more(tmp_path, second, drawn, verdict):
    found = of(verdicts(tmp_path, interventions=interventions(second, drawn, n=MANY)), "H5")
    assert found["verdict"][0] == verdict
    assert found["value"].tolist() == pytest.approx([0.95 - second, drawn - second, 0.85])
    assert found["side"].tolist() == ["<", "<", ">"] and found["reason"][0] == ""
    assert f"second-best experts {second:.3f}" in found["compared"][0]


def test_holm_runs_over_the_hypotheses_that_were_tested(tmp_path):
    left = {name: EVALUATIONS[name] for name in ("attacks", "slopes", "geometry")}
    table = verdicts(tmp_path, spec_of(evaluations=left))
    assert table["hypothesis"].unique().tolist() == list(TITLES)
    untested = of(table, "H5")
    assert untested["verdict"][0] == "not tested" and np.isnan(untested["p_holm"][0])
    for name in ("H3", "H5"):
        assert "add image_interventions or expert_interventions" in of(table, name)["reason"][0]
    tested = table[table["verdict"] != "not tested"].drop_duplicates("hypothesis")
    assert len(tested) == 3
    assert tested["p_holm"].tolist() == pytest.approx(holm(tested["p_value"]).tolist())


def test_all_claims_must_hold_and_one_contrary_refutes():
    assert decide([claim(0.001, 1), claim(0.04, -1, above=False)]) == (0.04, "supported")
    assert decide([claim(0.001, 1), claim(0.04, 1, above=False)]) == (0.08, "refuted")
    assert decide([claim(0.001, -1), claim(0.04, 1, above=False)]) == (0.002, "refuted")
    assert decide([claim(0.7, -1), claim(0.001, 1)]) == (1.0, "refuted")


def test_few_seeds_that_differ_leave_it_undecided(tmp_path):
    """One run of three is worse: the mean is the same as with three equal runs."""
    levels = {0: 0.95, 1: 0.75, 2: 0.1}

    def table(model, seed):
        moe = model != "vit"
        return attacks(levels[seed] if moe else 0.4, moe)

    found = of(verdicts(tmp_path / "three", attacks=table, **by_model(slopes, vit=3.0)), "H1")
    assert found["verdict"][0] == "undecided"
    steady = of(verdicts(tmp_path / "steady", **by_model(attacks, **ROBUST["supported"]),
                         **by_model(slopes, vit=3.0)), "H1")  # fmt: skip
    assert steady["verdict"][0] == "supported"
    assert steady["value"][0] == pytest.approx(found["value"][0])


def test_without_common_scores_nothing_is_tested_and_the_reason_is_told(tmp_path):
    role = "scores/vit/scratch/{}/slopes"
    gone = [role.format(seed) for seed in (0, 1, 2)]
    gaps = dict.fromkeys(gone, "the worker died")
    table = verdicts(tmp_path, without=gone, gaps=gaps)
    found = of(table, "H1")
    assert found["verdict"][0] == "not tested"
    assert found["reason"][0] == (
        "no seed has scores of all models; slopes: vit scratch seed 0, 1, 2: the worker died")


def test_a_missing_seed_is_left_out_for_all_and_told(tmp_path):
    gone = "scores/vmoe-8/scratch/1/attacks"
    table = verdicts(tmp_path, without=[gone], gaps={gone: "out of memory"})
    for name, seeds in (("H1", 2), ("H2", 2), ("H4", 3)):
        found = of(table, name)
        assert found["seeds"][0] == seeds
        told = "attacks: vmoe-8 scratch seed 1: out of memory"
        assert (found["caution"][0] == told) == (name != "H4")


def test_a_model_without_any_scores_is_told(tmp_path):
    gone = [f"scores/vmoe-8/scratch/{seed}/geometry" for seed in (0, 1, 2)]
    found = of(verdicts(tmp_path, without=gone, gaps=dict.fromkeys(gone, "no memory")), "H4")
    assert found["compared"][0] == "Pearson's correlation over examples: vmoe-4 +0.893"
    assert found["caution"][0] == "geometry: vmoe-8 scratch seed 0, 1, 2: no memory"


def test_a_recipe_of_some_models_is_judged_by_those(tmp_path):
    """vmoe-8 is not in it, so that its missing scores are no gap."""
    spec = spec_of(recipes=("scratch", "trades"), models_of={"trades": ("vmoe-4", "vit")})
    table = verdicts(tmp_path, spec)
    table = table[table["recipe"] == "trades"]
    assert of(table, "H1")["compared"][0].startswith("vmoe-4 vs vit, whose")
    assert of(table, "H2")["verdict"][0] == "not tested"
    for name in ("H3", "H4", "H5"):
        assert of(table, name)["caution"][0] == ""
        assert "vmoe-8" not in of(table, name)["compared"][0]


@pytest.mark.parametrize(
    ("changes", "hypothesis", "reason"),
    [
        ({"attacks": lambda model, seed: attacks(0.5, model != "vit").drop(
            columns=["swap_clean_attacked/8", "swap_clean_attacked/16"])},
         "H3", "the scores of attacks have no swap_clean_attacked"),
        ({"interventions": interventions().drop(
            columns=["correct/random_0.5", "correct/random_1"])},
         "H5", "name both in substitutions"),
        ({"interventions": interventions().drop(
            columns=["correct/drop_output_0.5", "correct/drop_output_1"])},
         "H3", "it is not known whether they matter; name drop_output in substitutions"),
        ({"geometry": geometry().head(1)}, "H4", "no number (0 documents)"),
    ],
)  # fmt: skip
def test_scores_that_lack_something_are_not_tested(tmp_path, changes, hypothesis, reason):
    found = of(verdicts(tmp_path, **changes), hypothesis)
    assert found["verdict"][0] == "not tested" and reason in found["reason"][0]


def test_texts_are_judged_by_the_same_rule(tmp_path):
    table = verdicts(tmp_path, text_spec(), attacks=text_study)
    robust = of(table, "H1")
    assert robust["value"][0] == pytest.approx(0.2)
    assert "worst case over 3 attacks) 0.600 against 0.400" in robust["compared"][0]
    routes = of(table, "H3")
    assert routes["verdict"][0] == "supported"
    # Two attacks on the loss change 0.3, random edits 0.1; accuracy under attacked routes is clean.
    assert routes["value"].tolist() == pytest.approx([0.1, 0.28, 0.0, 0.85])
    assert routes["claim"][2] == "clean accuracy lost under the attacked routes"
    assert routes["claim"][3] == "accuracy lost with no expert's output"


def test_verdicts_carry_the_failed_checks_of_their_attacks(tmp_path):
    table = verdicts(tmp_path, text_spec(), attacks=text_study)
    of_moe = ("attacks: vmoe-4 scratch fails checks of the attack: "
              "not weaker than joint (embedding_pgd: 0.10 of 400)")
    assert of(table, "H3")["caution"][0] == of_moe
    assert of(table, "H1")["caution"][0].splitlines() == [
        of_moe,
        "attacks: vit scratch fails checks of the attack: "
        "not weaker than joint (embedding_pgd: 0.10 of 400)",
    ]
    assert of(table, "H4")["caution"][0] == ""


def test_no_verdicts_unless_they_are_asked_for(tmp_path):
    assert len(verdicts(tmp_path, spec_of(hypotheses=None))) == 0
    assert spec_of(hypotheses=False).hypotheses is None


def test_each_recipe_has_its_verdicts(tmp_path):
    spec = spec_of(recipes=("scratch", "trades"))
    table = verdicts(tmp_path, spec)
    firsts = table.drop_duplicates(["recipe", "hypothesis"])
    assert firsts.groupby("recipe").size().to_dict() == {"scratch": 5, "trades": 5}
    assert firsts["p_holm"].tolist() == pytest.approx(holm(firsts["p_value"]).tolist())
    assert pd.api.types.is_float_dtype(table["p_holm"])
