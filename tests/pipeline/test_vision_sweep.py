"""The study of vision models plans, and what cannot be is refused with its field."""

from argparse import Namespace
from pathlib import Path

import pytest

from pipeline.checks import check, check_plan
from pipeline.execute import _units
from pipeline.plan import Builder, build, build_evaluations
from pipeline.single import single_model
from pipeline.sweep_file import load
from stages.attack.image_spec import PAPER_BUDGETS
from stages.compare.spec import Hypotheses
from stages.errors import BadInput
from stages.finetune.recipe import Alternate, Trades

FILE = Path(__file__).parents[2] / "sweeps/adversarial_moe/vision_cpu.yaml"


def planned(*overrides, file=FILE):
    sweep = load(file, list(overrides))
    plan = build(sweep, check(sweep, file))
    check_plan(plan, file)
    return plan


def test_the_study_as_it_is_written():
    nodes = planned().nodes.values()
    stages = [node.stage for node in nodes]
    assert (stages.count("finetune"), stages.count("evaluate"), stages.count("data")) == (15, 81, 8)
    models = {node.name: node.spec for node in nodes if node.stage == "model"}
    assert [models[f"vmoe-{e}"].experts for e in (4, 8, 16)] == [4, 8, 16]
    # One expert, as wide as the dense block: only the routers are computed in addition.
    dense = models["vit"].counts()[2]
    for experts in (4, 8, 16):
        assert models[f"vmoe-{experts}"].counts()[2] - dense == 2 * 2 * experts * 64
    trained = {node.name: node.spec for node in nodes if node.stage == "finetune"}
    assert trained["vmoe-8-scratch-seed1"].router.noise == "1/E"
    assert trained["vit-scratch-seed1"].router.noise == 0
    left_out = {"importance_loss_weight": 0.0025, "load_loss_weight": 0.0025, "router.noise": "1/E"}
    assert trained["vit-scratch-seed1"].dropped == left_out
    attacks = next(n for n in nodes if n.name == "vmoe-8-scratch-seed0-attacks").spec.evaluation
    assert attacks.attacks["square"].queries == 500 and attacks.budgets == (0.02, 0.05)
    joint = [a.routing_weight for a in attacks.counted.values()
             if getattr(a, "routing", "") == "joint"]
    assert joint == [0.03, 1.0]  # one near in strength to the plain attack, one on the routes
    # Experts trained from scratch need no untuned twin beside them; a dense model has none.
    probed = {n.name.rpartition("-")[2] for n in nodes if n.stage == "evaluate"
              and n.name.startswith("vit-scratch-seed0")}
    assert probed == {"images", "attacks", "slopes"}
    compare = planned().compare.spec
    asked = Hypotheses(interventions="interventions")
    assert compare.hypotheses == asked and compare.upcycled == ()


def test_attacks_and_probes_are_in_float32_whatever_the_scoring_is():
    """Of a text model in a pass of their own; all else that it is asked is as the sweep says."""
    text = FILE.with_name("text_cpu.yaml")
    asked = ("evaluations.edits={kind: character_edits, dataset: amazon, template: sentiment, "
             "edits: 4}")
    for dtype, passes in (("bfloat16", 2), ("float32", 1)):
        plan = planned(asked, f"scoring_dtype={dtype}", file=text)
        nodes = [n for n in plan.nodes.values() if n.stage == "evaluate"
                 and n.inputs["checkpoint"] == "model/smollm2-moe"]
        dtypes = {n.name.rpartition("-")[2]: n.spec.dtype for n in nodes}
        edits = dtypes.pop("edits")
        assert edits == dtype and len(dtypes) > 5 and set(dtypes.values()) == {"float32"}
        units = _units(plan, {n.key for n in nodes})
        assert len(units) == passes and sum(len(unit.nodes) for unit in units) == len(nodes)
        for unit in units:
            assert len({node.spec.dtype for node in unit.nodes}) == 1
    images = planned("scoring_dtype=bfloat16").nodes.values()
    assert {n.spec.dtype for n in images if n.stage == "evaluate"} == {"float32"}


@pytest.mark.parametrize(
    ("named", "surrogates"),
    [("", {"vit": "vmoe-4", "vit-wide": "vmoe-8", "vmoe-4": "vit", "vmoe-8": "vit",
           "vmoe-16": "vit"}),
     ("vmoe-16", {"vit": "vmoe-16", "vit-wide": "vmoe-16", "vmoe-4": "vmoe-16",
                  "vmoe-8": "vmoe-16", "vmoe-16": "vit"})],
)
def test_transfer_is_from_the_checkpoint_of_the_same_recipe_and_seed(named, surrogates):
    override = [f"evaluations.attacks.attacks.transfer.from={named}"] if named else []
    plan = planned(*override)
    keys = list(plan.nodes)
    for model, other in surrogates.items():
        for seed in (0, 2):
            node = plan.nodes[f"evaluate/{model}-scratch-seed{seed}-attacks"]
            upstream = f"finetune/{other}-scratch-seed{seed}"
            # The last seed's other one is the first.
            again = f"finetune/{model}-scratch-seed{(seed + 1) % 3}"
            assert {role: key for role, key in node.inputs.items() if "surrogate" in role} == {
                f"surrogate/{other}": upstream, f"surrogate/{model}/other-seed": again}
            assert node.spec.evaluation.attacks["transfer"].model == other
            assert node.spec.evaluation.attacks["transfer_seed"].surrogate == (model, True)
            assert max(map(keys.index, (upstream, again))) < keys.index(node.key)
    # Another partner is another result; the other evaluations do not know of it.
    fine = "evaluate/vit-scratch-seed0-attacks"
    assert (plan.nodes[fine].fingerprint == planned().nodes[fine].fingerprint) == (not named)


def test_another_seed_needs_two_trainings():
    told = "evaluations.attacks: transfer from another seed needs two trainings; give two seeds"
    with pytest.raises(BadInput, match=told):
        planned("seeds=[1]")
    # Untuned models have one checkpoint: it is the partner's then.
    node = planned("untuned=true").nodes["evaluate/vmoe-4-none-attacks"]
    assert node.inputs["surrogate/vit/other-seed"] == node.inputs["surrogate/vit"] == "model/vit"
    other = "evaluations.attacks.attacks.transfer_seed.from=vit"
    node = planned(other).nodes["evaluate/vmoe-4-scratch-seed1-attacks"]
    assert node.inputs["surrogate/vit/other-seed"] == "finetune/vit-scratch-seed2"


def test_each_seed_draws_its_weights_anew():
    plan = planned()
    for seed, key in ((0, "model/vmoe-4"), (1, "model/vmoe-4-seed1"), (2, "model/vmoe-4-seed2")):
        assert plan.nodes[f"finetune/vmoe-4-scratch-seed{seed}"].inputs["model"] == key
        assert plan.nodes[key].spec.seed == seed
    # Those of a model that is made of one with drawn weights as well; published ones stay.
    text = load(FILE, ["models.up={upcycle: {from: vit, experts: 4, layers: [1, 3]}}"])
    builder = Builder(text, {})
    assert builder.plan.nodes[builder.model("up", 2)].inputs["dense"] == "model/vit-seed2"
    smoke = Builder(load(FILE.parents[1] / "smoke.yaml", []), {})
    assert smoke.checkpoint("tiny-moe", "sft", 2) == "finetune/tiny-moe-sft-seed2"
    assert smoke.plan.nodes["finetune/tiny-moe-sft-seed2"].inputs["model"] == "model/tiny-moe"


def test_one_model_alone_is_attacked_from_a_model_of_the_sweep():
    def alone(override):
        other = "evaluations.attacks.attacks.transfer_seed="
        options = Namespace(sweep=FILE, set=[override, other + "{kind: transfer, from: vmoe-4}"],
                            evaluations="attacks", model="google/vit-base-patch32-384")
        sweep = single_model(options).sweep
        return build_evaluations(sweep, check(sweep, FILE))

    nodes = alone("evaluations.attacks.attacks.transfer.from=vmoe-4").nodes
    node = nodes["evaluate/vit-base-patch32-384-none-attacks"]
    assert node.inputs["surrogate/vmoe-4"] == "model/vmoe-4"
    with pytest.raises(BadInput, match="evaluations.attacks.attacks: transfer to vit-base-patch32-"
                                       "384 has no other model to attack; name one of the sweep"):
        alone("name=again")


def test_a_trial_of_a_search_has_no_partner():
    builder = Builder(load(FILE, []), {})
    with pytest.raises(BadInput, match="search: attacks attacks another checkpoint"):
        builder.scores("label", builder.model("vit"), "vit", "attacks")


def test_the_curve_is_of_the_same_models_at_the_papers_budgets():
    curve = planned(file=FILE.with_name("vision_curve_cpu.yaml")).nodes
    study = planned().nodes
    tuned = {key for key, node in curve.items() if node.stage == "finetune"}
    assert len(tuned) == 5
    assert all(curve[key].fingerprint == study[key].fingerprint for key in tuned)
    asked = next(n for n in curve.values() if n.stage == "evaluate").spec.evaluation
    assert asked.budgets == pytest.approx(PAPER_BUDGETS, rel=1e-9)


def test_robust_training_is_attacked_recipe_by_recipe():
    nodes = planned(file=FILE.with_name("robust_cpu.yaml")).nodes
    tuned = {node.name: node.spec for node in nodes.values() if node.stage == "finetune"}
    recipes = {"vit": ("scratch", "pgd", "trades"), "vmoe-4": ("scratch", "pgd", "trades", "turns")}
    assert set(tuned) == {f"{model}-{r}-seed0" for model, of in recipes.items() for r in of}
    fields = {name: {"kind": name, "budget": 0.05, "steps": 5} for name in ("pgd", "trades")}
    for model in recipes:
        assert tuned[f"{model}-scratch-seed0"].adversarial is None
        for name, expected in fields.items():
            asked = tuned[f"{model}-{name}-seed0"].adversarial
            assert expected == {key: getattr(asked, key) for key in expected}
            assert getattr(asked, "router_beta", 0) == 0
    turns = tuned["vmoe-4-turns-seed0"]
    assert turns.alternate == Alternate(every=1, first="router")
    assert turns.adversarial == Trades(budget=0.05, steps=5, router_beta=6)
    # Nothing else tells the recipes apart.
    whole = {name: spec.model_dump(exclude={"adversarial", "alternate"})
             for name, spec in tuned.items() if name.startswith("vmoe-4")}
    assert all(spec == whole["vmoe-4-scratch-seed0"] for spec in whole.values())
    for name in tuned:
        attacks = nodes[f"evaluate/{name}-attacks"]
        assert attacks.inputs["checkpoint"] == f"finetune/{name}"
        assert list(attacks.spec.evaluation.attacks) == ["pgd", "apgd_ce", "noise"]
        # What is trained against is among what is attacked with.
        assert attacks.spec.evaluation.budgets == (0.02, 0.05)
    data = nodes["data/mnist"]
    assert data.spec.rows["test"] == 100
    assert data.fingerprint == planned().nodes["data/mnist"].fingerprint


def test_heads_are_of_equal_size_and_ensembles_of_equal_operations():
    nodes = planned(file=FILE.with_name("heads_cpu.yaml")).nodes.values()
    sizes = {node.name: node.spec.counts() for node in nodes if node.stage == "model"}
    dense, soft, sparse = (sizes[f"head-{kind}"][0] for kind in ("dense", "soft", "sparse"))
    # Eight experts' biases and a router; 64 hidden neurons in all of them.
    assert soft == sparse == dense + 8 * 64 + 7 * 10
    assert sizes["e3"][2] == pytest.approx(sizes["deep"][2], rel=1e-3)
    trained = {node.name: node.spec for node in nodes if node.stage == "finetune"}
    # A sum over layers: the head's one, and two of e3.
    assert trained["head-soft-scratch-seed0"].importance_loss_weight == 0.01
    assert trained["e3-scratch-ensembles-seed0"].importance_loss_weight == 0.01 / 2
    assert len(trained) == 5
    name = "e3-scratch-ensembles-seed0-sharpness_train"
    asked = [n.spec.evaluation for n in nodes if n.name == name]
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
        ("models.vmoe-4.vision.eval_capacity_factor=1.5", "evaluations.slopes: image_lipschitz: "
         "the images of a batch share the capacity of vmoe-4's experts; leave"),
        ("hypotheses={attacks: images}", "hypotheses.attacks: no evaluation 'images' of kind "
         "image_attacks or text_attacks; known: attacks"),
        ("evaluations.more={kind: image_attacks, dataset: mnist, budgets: [0.1], "
         "attacks: {pgd: {kind: pgd}}}",
         "hypotheses.attacks: attacks, more are of kind image_attacks or text_attacks; name the "
         "one that the verdicts are from"),
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
        ("evaluations.attacks.attacks.transfer.from=vmo-4",
         "evaluations.attacks.attacks: from: unknown model 'vmo-4'"),
        ("recipes.scratch.models=[vmoe-8]",
         "transfer from vit, which recipe scratch does not train"),
        ("evaluations.interventions.top_k=[5]",
         "evaluations.interventions.top_k: 5 is more than the 4 experts of vmoe-4"),
        ("evaluations.interventions.template=sentiment", "unknown field"),
        ("models.vit.source=tiny:llama", "exactly one of source, upcycle, widen, vision"),
    ],
)
def test_what_cannot_be_is_refused(override, message):
    with pytest.raises(BadInput) as error:
        planned(override)
    assert message in str(error.value)


def test_experts_that_members_share_are_counted_member_by_member():
    """Of 4 experts each of 2 members has 2 and chooses 1."""
    with pytest.raises(BadInput) as error:
        planned("models.vmoe-4.vision.ensemble=2")
    told, field = str(error.value), "evaluations.interventions."
    for message in (
        f"{field}top_k: 4 is more than the 2 experts of a member of vmoe-4; lower it",
        f"{field}prune: 2 of the 2 experts of a member of vmoe-4 leave fewer than the 1 that a",
        f"{field}random_masks: half of the 4 experts of vmoe-4 may leave fewer than the 1 that a",
    ):
        assert message in told
    assert "next_ranked" not in told and "prune: 1 of" not in told
    planned("models.vmoe-4.vision.ensemble=2", "evaluations.interventions.top_k=[1, 2]",
            "evaluations.interventions.prune=[1]", "evaluations.interventions.random_masks=0")
