"""Classifier heads: by hand, counted, saved and loaded, and their routes seen and forced."""

import base64
import io
import json

import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from torch.nn.functional import gelu

from stages.attack.image_objective import Objective
from stages.attack.image_spec import APGD, PGD
from stages.evaluate.image_attacks import ImageAttacks
from stages.evaluate.vision import ImageClassification
from stages.models.card import ModelCard
from stages.models.images import Classifier, load_processor
from stages.models.load import load
from stages.models.roles import roles
from stages.models.routes import imposed, routed
from stages.models.routing import weighing
from stages.models.sources import describe
from stages.models.stage import run
from stages.models.vision import from_scratch
from stages.models.vision_spec import VisionSpec

LINEAR = VisionSpec(
    size="tiny", hidden=32, neurons=48, depth=2, patch=7, image_size=28, channels=1, labels=10
)
HEADS = {
    "dense": LINEAR.model_copy(update={"head": "dense", "head_neurons": 24}),
    "soft": LINEAR.model_copy(
        update={"head": "soft_moe", "head_neurons": 24, "head_experts": 4}
    ),
    "sparse": LINEAR.model_copy(
        update={"head": "sparse_moe", "head_neurons": 24, "head_experts": 4, "head_top_k": 2}
    ),
}
IMAGES = torch.rand(3, 1, 28, 28, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}
    for name, spec in HEADS.items():
        made[name] = tmp_path_factory.mktemp(name)
        run(spec, {}, made[name])
    return made


@pytest.fixture(scope="module")
def models(folders):
    return {name: load(folder) for name, folder in folders.items()}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"experts": 4}, "head: sparse_moe stands on a dense body"),
        ({"head_neurons": 25}, "25 cannot be shared equally by 4"),
        ({"head_top_k": 5}, "head_top_k: 5 is more than the 4 experts"),
    ],
)
def test_a_head_that_cannot_be_is_refused(change, reason):
    given = HEADS["sparse"].model_dump(mode="json") | change
    with pytest.raises(ValidationError, match=reason):
        VisionSpec.model_validate_json(json.dumps(given))


@torch.no_grad()
def test_logits_by_hand(models):
    """Each expert maps features to logits through one hidden layer; the softmax weighs them all,
    or, over the chosen ones alone, the two best."""

    def features(model):
        return model.vit(IMAGES).last_hidden_state[:, 0]

    dense = models["dense"]
    head = dense.classifier
    inner = gelu(features(dense) @ head.fc1.weight.T + head.fc1.bias)
    expected = inner @ head.fc2.weight.T + head.fc2.bias
    torch.testing.assert_close(dense(IMAGES).logits, expected)
    for name, chosen in (("soft", 4), ("sparse", 2)):
        model, head = models[name], models[name].classifier
        hidden, e = features(model), head.experts
        scores = hidden @ head.gate.weight.T
        best = scores.topk(chosen).indices
        kept = torch.full_like(scores, -torch.inf).scatter(1, best, scores.gather(1, best))
        expected = torch.zeros(3, 10)
        for expert in range(4):
            inner = gelu(hidden @ e.up_proj[expert].T + e.up_proj_bias[expert])
            logits = inner @ e.down_proj[expert].T + e.down_proj_bias[expert]
            expected += kept.softmax(1)[:, expert, None] * logits
        torch.testing.assert_close(model(IMAGES).logits, expected, atol=1e-5, rtol=1e-5)
        assert (e.up_proj[0] - e.up_proj[1]).abs().max() > 0.01  # drawn one by one


def test_a_single_expert_keeps_its_probability_so_that_the_router_learns():
    model, _ = from_scratch(HEADS["sparse"].model_copy(update={"head_top_k": 1}))
    model(IMAGES).logits.square().sum().backward()
    assert model.classifier.gate.weight.grad.abs().max() > 1e-4


def test_operations_and_parameters_by_hand(folders, models):
    cards = {name: ModelCard.read(folder) for name, folder in folders.items()}
    body = 49 * 32 + 2 * (4 * 32 * 32 + 2 * 32 * 48)
    heads = {"dense": 32 * 24 + 24 * 10, "soft": 4 * 32 + 4 * (32 * 6 + 6 * 10),
             "sparse": 4 * 32 + 2 * (32 * 6 + 6 * 10)}  # fmt: skip
    for name, card in cards.items():
        assert card.flops_per_token == 2 * body
        assert card.notes["flops_per_image"] == 2 * (17 * body + heads[name])
        assert card.total_parameters == sum(p.numel() for p in models[name].parameters())
        spec = HEADS[name]
        assert spec.counts() == (
            card.total_parameters, card.active_parameters, card.flops_per_token
        )
        facts = describe(spec)
        assert (facts.architecture, facts.family, facts.experts, facts.top_k, facts.moe_layers) == (
            card.architecture, card.family, card.experts, card.top_k, card.moe_layers
        )
    assert cards["sparse"].active_parameters == cards["sparse"].total_parameters - 2 * (
        33 * 6 + 7 * 10
    )
    # As many hidden neurons: the experts' biases and the router are all that a mixture has more.
    more = cards["sparse"].total_parameters - cards["dense"].total_parameters
    assert more == 4 * 32 + 3 * 10
    assert (cards["dense"].architecture, cards["soft"].top_k) == ("dense", 4)
    assert cards["soft"].origin.startswith("ViT-tiny/7, soft-MoE head of 24, E=4, K=4")


def test_every_part_has_its_role(models):
    found = roles(models["sparse"])
    assert found["classifier.gate.weight"] == "router"
    assert found["classifier.experts.down_proj_bias"] == "expert"
    assert "head" not in found.values()
    assert roles(models["dense"])["classifier.fc2.weight"] == "head"


@torch.no_grad()
def test_routes_of_a_head_are_seen_and_forced(models):
    model, other = models["sparse"], IMAGES.flip(0)
    with routed(model) as clean:
        logits = model(IMAGES).logits
    (routing,) = clean
    assert routing.layer == "classifier" and routing.experts.shape == (3, 2)
    with routed(model, imposed(clean)):
        assert torch.equal(model(IMAGES).logits, logits)
        forced = model(other).logits
    with routed(model) as own:
        free = model(other).logits
    assert torch.equal(own[0].logits, routing.logits.flip(0))
    if not torch.equal(own[0].experts, routing.experts):
        assert (forced - free).abs().max() > 1e-4
    weigh = weighing(model)
    torch.testing.assert_close(weigh(routing.logits, routing.experts), routing.weights)
    with routed(models["soft"]) as soft:
        models["soft"](IMAGES)
    assert sorted(soft[0].experts[0].tolist()) == [0, 1, 2, 3]
    torch.testing.assert_close(soft[0].weights.sum(1), torch.ones(3))


@pytest.mark.parametrize("routing", ["as_is", "soft", "frozen", "joint"])
def test_attacks_go_through_a_head(folders, models, routing):
    classifier = Classifier(models["sparse"], load_processor(folders["sparse"]))
    labels = torch.tensor([0, 1, 2])
    objective = Objective(classifier, APGD(routing=routing), IMAGES, labels)
    value, gradient = objective.climb(IMAGES)
    assert value.loss.shape == (3,) and (gradient.flatten(1).abs().amax(1) > 0).all()


def test_accuracy_is_asked_as_of_any_image_classifier(folders, models):
    file = io.BytesIO()
    Image.new("L", (28, 28), 90).save(file, "PNG")
    image = base64.b64encode(file.getvalue()).decode()
    row = {"id": "a", "image": image, "label": "3", "checked": True}
    for name, model in models.items():
        processor = load_processor(folders[name])
        (found,) = ImageClassification(dataset="x").procedure(model, processor, [row])
        with torch.no_grad():
            logits = Classifier(model, processor)(torch.full((1, 1, 28, 28), 90 / 255))
        assert found["prediction"] == str(logits.argmax().item())
        attacks = {"pgd": PGD(steps=2, restarts=1), "soft": APGD(steps=2, routing="soft")}
        asked = ImageAttacks(dataset="x", budgets=(0.1,), attacks=attacks)
        (attacked,) = asked.procedure(model, processor, [row])
        assert attacked["prediction"] == found["prediction"]
        assert [a["attack"] for a in attacked["attacks"]] == ["pgd", "soft", "random noise"]
        layers = {} if name == "dense" else {"classifier": 0}
        assert attacked["noise"].keys() == layers.keys()
