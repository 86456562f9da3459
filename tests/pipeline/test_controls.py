"""What is to be hard in the whole sweeps stands beside a set that differs in that alone."""

from pathlib import Path

import pytest

from pipeline.asked import recipe_evaluations
from pipeline.checks import check
from pipeline.sweep_file import load
from stages.data.catalogue import find
from stages.evaluate.out_of_distribution import AdversarialSets

FOLDER = Path(__file__).parents[2] / "sweeps" / "moe_rbench"


@pytest.mark.parametrize(
    ("name", "source"),
    [("cpu", "file:cpu/{}_premises.jsonl"), ("paper", "catalogue:freshqa_{}_premises"),
     ("modern", "catalogue:freshqa_{}_premises")])
def test_corrections_of_false_premises_have_true_ones_as_their_control(name, source):
    """A model that negates whatever it is asked would correct them all."""
    sweep = load(FOLDER / f"{name}.yaml")
    evaluation = sweep.evaluations["false_premises"]
    for premises in ("false", "true"):
        (dataset,) = getattr(evaluation, premises)
        assert sweep.datasets[dataset].source == source.format(premises)
    assert {"corrected_rate", "contradicted_rate"} <= {m.name for m in evaluation.metrics()}


STANDARDS = {
    "adv_glue_mnli": {"mnli#validation_matched"},
    "adv_glue_mnli_mismatched": {"mnli#validation_mismatched"},
    "adv_glue_rte": {"rte#validation"},
    "adv_glue_qnli": {"qnli#validation"},
    "adv_glue_qqp": {"qqp#validation"},
    "adv_glue_sst2": {"sst2#validation"},
    "counterfactual_snli": {"counterfactual_snli_original#test"},
    "counterfactual_imdb": {"counterfactual_imdb_original#test"},
}
"""Adversarial set to the set that its texts were made from."""


def published(sweep, dataset):
    """Name and split in the catalogue."""
    _, _, name = sweep.datasets[dataset].source.partition(":")
    return f"{name.partition('#')[0]}#{find(name, dataset)[1]}"


@pytest.mark.parametrize("name", ["paper", "modern"])
def test_an_attacked_set_stands_beside_the_set_that_it_was_made_from(name):
    """Else the gap would be a change of domain as well."""
    sweep = load(FOLDER / f"{name}.yaml")
    check(sweep, FOLDER / f"{name}.yaml")
    found = {}
    for evaluation in sweep.evaluations.values():
        if isinstance(evaluation, AdversarialSets):
            standard = published(sweep, evaluation.standard)
            for dataset in evaluation.adversarial:
                attacked = published(sweep, dataset).partition("#")[0]
                found.setdefault(attacked, set()).add(standard)
            if evaluation.shots is not None:  # of the standard set's own training split
                shots = published(sweep, evaluation.shots.dataset)
                assert shots.partition("#")[0] == standard.partition("#")[0].replace(
                    "counterfactual_snli_original", "snli")
    beside_snli = dict.fromkeys(("snli_hard", "anli_r1", "anli_r2", "anli_r3"),
                                {"snli#validation" if name == "paper" else "snli#test"})
    assert found == STANDARDS | beside_snli


def test_attacked_pairs_and_their_standards_are_kept_from_what_is_trained_on():
    sweep = load(FOLDER / "paper.yaml")
    pairs = {"snli", "snli_whole", "anli_r1", "anli_r2", "anli_r3", "mnli"}
    for name in ("mnli_validation", "mnli_validation_mismatched", "counterfactual_snli_original",
                 "adv_glue_mnli", "adv_glue_mnli_mismatched", "counterfactual_snli"):
        assert pairs <= set(sweep.kept_from(name)), name
    # Models that were trained on a set's own kind of pairs are scored on the attacked ones.
    attacked = {"mnli_adversarial", "mnli_mismatched_adversarial"}
    for plain, headed, own in (
        ("snli-hard-switch", "snli-hard-molm-350m-4b", {"snli_hard", "snli_counterfactual"}),
        ("boss-nli-switch", "boss-nli-molm", {"boss_nli"}),
    ):
        asked = attacked | own
        assert set(recipe_evaluations(sweep, plain)) == asked
        assert set(recipe_evaluations(sweep, headed)) == {f"{each}_head" for each in asked}
