"""The study of vision models plans, and what cannot be is refused with its field."""

from pathlib import Path

import pytest

from pipeline.checks import check, check_plan
from pipeline.plan import build
from pipeline.sweep_file import load
from stages.attack.image_spec import PAPER_BUDGETS
from stages.compare.spec import Hypotheses
from stages.errors import BadInput

FILE = Path(__file__).parents[2] / "sweeps/adversarial_moe/vision_cpu.yaml"


def planned(*overrides, file=FILE):
    sweep = load(file, list(overrides))
    plan = build(sweep, check(sweep, file))
    check_plan(plan, file)
    return plan


def test_the_study_as_it_is_written():
    nodes = planned().nodes.values()
    stages = [node.stage for node in nodes]
    assert (stages.count("finetune"), stages.count("evaluate"), stages.count("data")) == (15, 30, 8)
    models = {node.name: node.spec for node in nodes if node.stage == "model"}
    assert [models[f"vmoe-{e}"].experts for e in (4, 8, 16)] == [4, 8, 16]
    # One expert, as wide as the dense block: only the routers are computed in addition.
    dense = models["vit"].counts()[2]
    for experts in (4, 8, 16):
        assert models[f"vmoe-{experts}"].counts()[2] - dense == 2 * 2 * experts * 64
    trained = {node.name: node.spec for node in nodes if node.stage == "finetune"}
    assert trained["vmoe-8-scratch-seed1"].router.noise == "1/E"
    assert trained["vit-scratch-seed1"].router.noise == 0
    left_out = {"importance_loss_weight": 0.005, "load_loss_weight": 0.005, "router.noise": "1/E"}
    assert trained["vit-scratch-seed1"].dropped == left_out
    attacks = next(n for n in nodes if n.name == "vmoe-8-scratch-seed0-attacks").spec.evaluation
    assert attacks.attacks["square"].queries == 500 and attacks.budgets == (0.02, 0.05)
    compare = planned().compare.spec
    assert compare.hypotheses == Hypotheses() and compare.upcycled == ()


def test_the_curve_is_of_the_same_models_at_the_papers_budgets():
    curve = planned(file=FILE.with_name("vision_curve_cpu.yaml")).nodes
    study = planned().nodes
    tuned = {key for key, node in curve.items() if node.stage == "finetune"}
    assert len(tuned) == 5
    assert all(curve[key].fingerprint == study[key].fingerprint for key in tuned)
    asked = next(n for n in curve.values() if n.stage == "evaluate").spec.evaluation
    assert asked.budgets == pytest.approx(PAPER_BUDGETS, rel=1e-9)


def test_heads_are_of_equal_size_and_ensembles_of_equal_operations():
    nodes = planned(file=FILE.with_name("heads_cpu.yaml")).nodes.values()
    sizes = {node.name: node.spec.counts() for node in nodes if node.stage == "model"}
    dense, soft, sparse = (sizes[f"head-{kind}"][0] for kind in ("dense", "soft", "sparse"))
    # Eight experts' biases and a router; 64 hidden neurons in all of them.
    assert soft == sparse == dense + 8 * 64 + 7 * 10
    assert sizes["e3"][2] == pytest.approx(sizes["deep"][2], rel=1e-3)
    trained = {node.name: node.spec for node in nodes if node.stage == "finetune"}
    assert trained["head-soft-scratch-seed0"].importance_loss_weight == 0.01
    asked = [n.spec.evaluation for n in nodes if n.name == "e3-scratch-seed0-sharpness_train"]
    assert asked[0].datasets() == {"mnist": "train"}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("datasets.noise1.task=prompts", "datasets.noise1.corruption: task prompts has no images"),
        ("recipes.scratch.data.0.template=sentiment", "template: images need none; remove it"),
        ("models.vit.vision.patch=5", "patch: 5 does not divide image_size 28"),
        ("models.vit={source: 'tiny:llama'}", "mnist is of task images, vit reads texts"),
        ("recipes.scratch.router.noise=0", "scratch.load_loss_weight: is a probability"),
        ("recipes.scratch.head=classification", "head"),
        ("hypotheses={attacks: images}", "hypotheses.attacks: no evaluation 'images' of kind "
         "image_attacks or text_attacks; known: attacks"),
        ("hypotheses={equal_flops: [vmoe-4 vs vitt]}", "hypotheses.equal_flops: unknown pair "
         "'vmoe-4 vs vitt'; did you mean 'vmoe-4 vs vit'?"),
        ("hypotheses={series: [vmoe-4, vit]}", "hypotheses.series: unknown MoE model of the pairs "
         "'vit'"),
        ("hypotheses={margins: 0.1}", "hypotheses.margins: unknown field; did you mean 'margin'?"),
        ("hypotheses={margin: 2}", "hypotheses.margin: input should be less than 1; found 2"),
        ("evaluations={images: {kind: image_classification, dataset: mnist}}",
         "hypotheses: no evaluation attacks the models; add image_attacks or text_attacks"),
        ("recipes.scratch.adversarial={kind: freelb}", "adversarial: vmoe-4: vit_moe reads images"),
        ("evaluations.attacks.attacks.pgd.norm=l2", "attacks: differ in norm"),
        ("models.vit.source=tiny:llama", "exactly one of source, upcycle, widen, vision"),
    ],
)
def test_what_cannot_be_is_refused(override, message):
    with pytest.raises(BadInput) as error:
        planned(override)
    assert message in str(error.value)
