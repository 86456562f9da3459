"""The adversarial paper's setting at its own scale: planned, not run."""

import pytest
import torch
from estimates import IMAGENET, estimator, planned
from transformers import AutoConfig

from stages.attack.image_spec import PAPER_BUDGETS
from stages.models.known import known
from stages.models.load import auto_class
from stages.models.size import measure
from stages.models.spec import indices
from stages.models.targets import configuration


def test_the_setting_of_the_adversarial_paper(tmp_path):
    plan = planned(IMAGENET)
    tuned = {key: node.spec for key, node in plan.nodes.items() if node.stage == "finetune"}
    spec = tuned["finetune/vmoe-b16-e8-k2-every2-released-seed0"]
    assert (spec.steps, spec.batch_size, spec.learning_rate, spec.warmup_steps) == (
        10_000, 1024, 0.03, 500)
    assert spec.optimizer.kind == "sgd" and spec.router.noise == "1/E"
    two = tuned["finetune/vmoe-b32-e2-k1-every2-released-two-experts-seed0"]
    assert (two.gshard_loss_weight, two.load_loss_weight) == (0.01, 0)
    assert len(tuned) == 3 * (11 + 2 + 3)
    curve, worst = (plan.sweep.evaluations[name] for name in ("curve", "worst"))
    assert curve.budgets == pytest.approx(PAPER_BUDGETS, rel=1e-9)
    assert curve.attacks["paper"].steps == 40 and "pgd" in curve.attacks
    routings = {attack.routing for attack in worst.attacks.values() if attack.kind == "apgd"}
    assert routings == {"as_is", "soft", "frozen", "joint"}
    # The verdicts are of the worst case, what transfers from the partner included.
    assert plan.sweep.hypotheses.attacks == "worst" and "transfer" in worst.counted
    from_whom = {
        key: plan.nodes[f"evaluate/{key}-seed0-worst"].spec.evaluation.attacks["transfer"].model
        for key in ("vit-b32-released", "vit-b32-released-two-experts", "vit-s32-scratch")}
    assert from_whom == {
        "vit-b32-released": "vmoe-b32-e8-k1-every2",
        "vit-b32-released-two-experts": "vmoe-b32-e2-k1-every2",
        "vit-s32-scratch": "vmoe-s32-e8-k2-last2"}
    layers = {name: indices(model.upcycle.layers, 24 if "-l" in name else 12)
              for name, model in plan.sweep.models.items() if model.upcycle}
    assert layers["vmoe-b16-e8-k2-every2"] == (1, 3, 5, 7, 9, 11)
    for name, model in plan.sweep.models.items():
        where = layers.get(name, model.vision.moe_layers if model.vision else ())
        count = {"every2": len(range(1, 24 if "-l" in name else 8 if "-s" in name else 12, 2)),
                 "last2": 2}.get(name.rpartition("-")[2], 0)
        assert len(where) == count and all(layer % 2 for layer in where)
        own = model.upcycle or model.vision
        if "vmoe" in name:
            assert f"-e{own.experts}-k{own.top_k}-" in name


@pytest.mark.parametrize("name", ["vmoe-b32-e8-k2-every2", "vmoe-l32-e8-k1-every2"])
def test_vision_twins_have_the_sizes_of_their_cards(name, tmp_path):
    found = estimator(IMAGENET, tmp_path)
    spec = found.plan.nodes[f"model/{name}"].spec
    source = found.plan.sweep.models[found.plan.sweep.models[name].upcycle.model].source
    fields = dict(known(source).config)
    old = AutoConfig.for_model(fields.pop("model_type"), **fields)
    config = configuration(
        "vit_moe", old, indices(spec.layers, old.num_hidden_layers), experts=spec.experts,
        top_k=spec.top_k, neurons=old.intermediate_size)
    with torch.device("meta"):
        card = measure(auto_class(config).from_config(config), name)
    size = found.size(f"model/{name}")
    assert (size.total, size.active, size.flops_per_token, size.tokens_per_image) == (
        card.total_parameters, card.active_parameters, card.flops_per_token,
        card.notes["tokens_per_image"])
    assert (size.flops_per_expert, size.top_k) == (card.flops_per_expert, card.top_k)
