"""Ensembles of vision models: partitioned experts and deep ensembles, against their parts."""

import base64
import io
import json

import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from stages.attack.image_objective import Objective
from stages.attack.image_spec import APGD, PGD
from stages.errors import StageFailed
from stages.evaluate.image_attacks import ImageAttacks
from stages.finetune.assignment import balanced_experts, random_experts
from stages.finetune.telemetry import RoutingTelemetry
from stages.models.averaging import averaged
from stages.models.balance import gshard_loss, importance_loss, load_loss
from stages.models.card import ModelCard
from stages.models.families import family
from stages.models.images import Classifier, load_processor
from stages.models.load import load
from stages.models.roles import roles
from stages.models.routes import at_random, imposed, masked, next_ranked, routed, selected
from stages.models.routing import blocks, intercept, weighing
from stages.models.sources import describe
from stages.models.spec import SourceSpec
from stages.models.stage import run
from stages.models.vision import from_scratch
from stages.models.vision_spec import VisionSpec
from stages.probe.change import chance
from stages.probe.geometry import margins, radii, watched

DENSE = VisionSpec(
    size="tiny", hidden=32, neurons=48, depth=4, patch=7, image_size=28, channels=1, labels=10,
    shared_start=False,
)  # fmt: skip
SPARSE = VisionSpec(
    **DENSE.model_dump() | {"experts": 4, "layers": (1, 3), "ensemble_of": "experts"}
)
SHARED = SPARSE.model_copy(update={"ensemble": 2})
DEEP = {
    "dense": DENSE.model_copy(update={"ensemble": 3}),
    "sparse": SPARSE.model_copy(update={"ensemble": 3, "ensemble_of": "models", "top_k": 2}),
}
IMAGES = torch.rand(3, 1, 28, 28, generator=torch.Generator().manual_seed(0))
TOKENS = 17


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}
    for name, spec in {"shared": SHARED, **DEEP}.items():
        made[name] = tmp_path_factory.mktemp(name)
        run(spec, {}, made[name])
    return made


@pytest.fixture(scope="module")
def shared(folders):
    return load(folders["shared"])


@pytest.mark.parametrize(
    ("spec", "change", "reason"),
    [
        (SHARED, {"ensemble": 3}, "3 does not divide the 4 experts"),
        (SHARED, {"top_k": 3}, "more than the 2 experts of a member"),
        (DENSE, {"ensemble": 2, "ensemble_of": "experts"}, "a dense model has no experts"),
        (DENSE, {"ensemble": 2, "head": "dense"}, "members have linear heads, not dense"),
    ],
)
def test_an_ensemble_that_cannot_be_is_refused(spec, change, reason):
    with pytest.raises(ValidationError, match=reason):
        VisionSpec.model_validate_json(json.dumps(spec.model_dump(mode="json") | change))


def test_what_is_shared_follows_from_the_model():
    given = {"labels": 2, "ensemble": 2}
    assert VisionSpec(**given).ensemble_of == "models"
    assert VisionSpec(**given, experts=4).ensemble_of == "experts"


@torch.no_grad()
def test_one_member_is_v_moe():
    plain = from_scratch(SPARSE)[0]
    alone = from_scratch(SHARED.model_copy(update={"ensemble": 1}))[0]
    assert torch.equal(plain(IMAGES).logits, alone(IMAGES).logits)


@torch.no_grad()
def test_a_member_is_a_v_moe_of_its_own_experts(shared):
    """Each member's logits are those of a plain V-MoE that holds its half of the experts, and the
    ensemble's are the logarithms of their mean probabilities."""
    members, state = [], shared.state_dict()
    for member in range(2):
        own = slice(2 * member, 2 * member + 2)
        model = from_scratch(SPARSE.model_copy(update={"experts": 2}))[0]
        part = {
            n: t[own] if ".experts." in n or n.endswith("gate.weight") else t
            for n, t in state.items()
        }
        model.load_state_dict(part)
        members.append(model(IMAGES).logits)
    out = shared(IMAGES, labels=torch.tensor([1, 2, 3]))
    torch.testing.assert_close(out.member_logits, torch.stack(members, 1), atol=1e-5, rtol=1e-5)
    mean = sum(logits.softmax(1) for logits in members) / 2
    torch.testing.assert_close(out.logits.exp(), mean)
    torch.testing.assert_close(out.logits.exp().sum(1), torch.ones(3))
    assert (members[0] - members[1]).abs().max() > 1e-3
    losses = [torch.nn.functional.cross_entropy(m, torch.tensor([1, 2, 3])) for m in members]
    torch.testing.assert_close(out.loss, sum(losses) / 2)


@torch.no_grad()
def test_no_member_uses_the_experts_of_another(shared):
    with routed(shared) as routes:
        logits = shared(IMAGES).logits
    assert [routing.layer for routing in routes] == ["vit.layers.1.mlp", "vit.layers.3.mlp"]
    for force in (None, next_ranked(), at_random(0), imposed(routes)):
        with routed(shared, force) as seen:
            again = shared(IMAGES).logits
        for routing in seen:
            chosen = routing.experts.view(3, 2, TOKENS)
            assert ((chosen // 2) == torch.arange(2)[None, :, None]).all()
            assert torch.isinf(routing.logits).sum(1).tolist() == [2] * 6 * TOKENS
    assert torch.equal(again, logits)
    weigh = weighing(shared)
    torch.testing.assert_close(weigh(routes[0].logits, routes[0].experts), routes[0].weights)
    # An image's experts do not depend on the images beside it.
    with routed(shared) as alone:
        shared(IMAGES[1:2])
    middle = slice(2 * TOKENS, 4 * TOKENS)
    assert torch.equal(alone[1].experts, routes[1].experts[middle])


def test_a_member_with_two_experts_has_no_ranks_three_and_four():
    model, _ = from_scratch(SHARED.model_copy(update={"top_k": 2}))
    with pytest.raises(StageFailed, match="chooses 2 of 2 experts, so there are no ranks 3 to 4"):
        with routed(model, next_ranked()):
            model(IMAGES)
    # And none is left whose logit would be the next one.
    with torch.no_grad(), watched(model.eval()) as found:
        model(IMAGES)
    assert margins(found[0].routing)["logit_margin"].isnan().all()


@torch.no_grad()
def test_radii_of_a_member_are_over_its_own_experts(shared):
    with watched(shared) as found:
        shared(IMAGES)
    for block in found:
        logits = block.routing.logits
        rows = block.scorers
        two = logits.isfinite().nonzero()[:, 1].view(-1, 2)  # a member's experts, token by token
        gap = (logits.gather(1, two)[:, 0] - logits.gather(1, two)[:, 1]).abs()
        norm = (rows[two[:, 0]] - rows[two[:, 1]]).norm(dim=1)
        expected = (gap / norm).double()
        torch.testing.assert_close(radii(block.routing, rows)["radius_l2"], expected, rtol=1e-4,
                                   atol=1e-7)


def test_noise_and_auxiliary_losses_see_what_a_token_can_choose(shared):
    clean, seen = {}, []

    def noisy(layer, logits):
        clean[layer] = logits
        return logits + 0.25 * torch.randn(logits.shape, generator=generator)

    generator = torch.Generator().manual_seed(0)
    with intercept(blocks(shared), logits=noisy, choice=lambda r: seen.append(r)):
        shared(IMAGES)
    total = importance_loss(seen) + gshard_loss(seen) + load_loss(seen, clean, 0.25)
    gates = [shared.vit.layers[i].mlp.gate.weight for i in (1, 3)]
    gradients = torch.autograd.grad(total, gates)
    assert total.isfinite() and all(g.isfinite().all() and g.any() for g in gradients)
    # Half of the tokens can choose a member's experts, each with a quarter of all probability.
    even = seen[0].change()
    probabilities = torch.zeros_like(even.logits).masked_fill(even.logits.isinf(), -torch.inf)
    balanced = type(even)(even.layer, probabilities, even.experts, even.weights)
    assert importance_loss([balanced]).item() == pytest.approx(0, abs=1e-6)
    for choose in (random_experts, balanced_experts):
        chosen = choose(seen[0].logits.detach(), 1)
        assert torch.isfinite(seen[0].logits.gather(1, chosen)).all()
    telemetry = RoutingTelemetry("softmax")
    telemetry.add(seen)
    assert telemetry.sums.isfinite().all() and telemetry.layers == ["layer_1", "layer_3"]


@torch.no_grad()
def test_capacity_counts_the_tokens_of_all_members(shared):
    """round(K T C / E) of the 2 x 17 tokens of an image: C = 1/2 is 4."""
    seen = []
    shared.config.group_size, shared.config.eval_capacity_factor = 1, 0.5
    try:
        with intercept(blocks(shared), choice=lambda r: seen.append(r)):
            shared(IMAGES)
    finally:
        shared.config.group_size = shared.config.eval_capacity_factor = None
    for routing in seen:
        for image in range(3):
            part = slice(2 * TOKENS * image, 2 * TOKENS * (image + 1))
            load = torch.bincount(routing.experts[part].flatten(), minlength=4)
            kept = selected(routing)[part].sum(0)
            assert kept.tolist() == load.clamp(max=4).tolist()


@torch.no_grad()
@pytest.mark.parametrize("name", DEEP)
def test_a_deep_ensemble_is_its_members_run_one_by_one(folders, name):
    model = load(folders[name])
    each = [member(IMAGES).logits for member in model.members]
    out = model(IMAGES)
    assert torch.equal(out.member_logits, torch.stack(each, 1))
    torch.testing.assert_close(out.logits.exp(), sum(x.softmax(1) for x in each) / 3)
    assert (each[0] - each[1]).abs().max() > 1e-2  # drawn one by one


def test_operations_by_hand(folders):
    attention, block, patches = 4 * 32 * 32, 2 * 32 * 48, 49 * 32
    layer, router = attention + block, 4 * 32
    cards = {name: ModelCard.read(folder) for name, folder in folders.items()}
    per_token = {
        # One layer before the members part, three behind; K = 1.
        "shared": patches + layer + 2 * (3 * layer + 2 * router),
        "dense": 3 * (patches + 4 * layer),
        "sparse": 3 * (patches + 4 * layer + 2 * (router + block)),
    }
    heads = {"shared": 2, "dense": 3, "sparse": 3}
    for name, spec in {"shared": SHARED, **DEEP}.items():
        card, count = cards[name], per_token[name]
        assert card.flops_per_token == 2 * count
        assert card.notes["flops_per_image"] == 2 * (TOKENS * count + heads[name] * 320)
        total = sum(p.numel() for p in load(folders[name]).parameters())
        assert spec.counts() == (total, card.active_parameters, 2 * count)
        assert spec.flops_per_expert == card.flops_per_expert
        assert card.total_parameters == total
        facts = describe(spec)
        assert (facts.architecture, facts.family, facts.experts, facts.top_k, facts.moe_layers) == (
            card.architecture, card.family, card.experts, card.top_k, card.moe_layers
        )
        folder = describe(SourceSpec(source=f"file:{folders[name]}"))
        assert facts.members == folder.members == (2 if name == "shared" else 1)
        assert facts.choice == facts.experts // facts.members
    expert = block + 48 + 32
    assert cards["shared"].total_parameters - cards["shared"].active_parameters == 2 * 2 * expert
    assert cards["dense"].origin.startswith("deep ensemble of 3: ViT-tiny/7")


def test_every_part_has_its_role(folders):
    model = load(folders["sparse"])
    found = roles(model)
    assert found["members.2.vit.layers.1.mlp.gate.weight"] == "router"
    assert found["members.0.vit.layers.3.mlp.experts.up_proj"] == "expert"
    assert found["members.1.classifier.bias"] == "head"
    assert found["members.1.vit.embeddings.cls_token"] == "embedding"
    assert len(family(model).modules(model, "router")) == 6
    with torch.no_grad(), routed(model) as routes:
        logits = model(IMAGES).logits
        with routed(model, imposed(list(routes))):
            assert torch.equal(model(IMAGES).logits, logits)


@pytest.mark.parametrize("name", ["shared", "sparse"])
@pytest.mark.parametrize("routing", ["as_is", "soft", "frozen", "targeted", "joint"])
def test_attacks_climb_on_the_averaged_prediction(folders, name, routing):
    classifier = Classifier(load(folders[name]), load_processor(folders[name]))
    labels = torch.tensor([0, 1, 2])
    objective = Objective(classifier, APGD(routing=routing), IMAGES, labels)
    value, gradient = objective.climb(IMAGES)
    assert value.loss.isfinite().all() and (gradient.flatten(1).abs().amax(1) > 0).all()
    if routing == "as_is":
        expected = -classifier(IMAGES).softmax(1)[range(3), labels].log()
        torch.testing.assert_close(value.loss, expected.detach())


@pytest.mark.parametrize("name", ["shared", *DEEP])
def test_an_ensemble_is_attacked_as_one_model(folders, name):
    model, processor = load(folders[name]), load_processor(folders[name])
    file = io.BytesIO()
    Image.new("L", (28, 28), 90).save(file, "PNG")
    image = base64.b64encode(file.getvalue()).decode()
    rows = [{"id": "a", "image": image, "label": "3", "checked": True}]
    asked = ImageAttacks(
        dataset="x", budgets=(0.1,), attacks={"pgd": PGD(steps=2, restarts=1)}
    )
    (found,) = asked.procedure(model, processor, rows)
    with torch.no_grad():
        logits = Classifier(model, processor)(torch.full((1, 1, 28, 28), 90 / 255))
    assert found["prediction"] == str(logits.argmax().item())
    if name != "dense":
        assert set(found["noise"]) == set(blocks(model))
        # A member chooses 1 of 2, a whole model 2 of 4.
        assert found["chance"] == pytest.approx(chance(2, 1) if name == "shared" else chance(4, 2))


def test_no_member_loses_all_its_experts(shared):
    """Experts 0 and 1 are the first member's, and all that its tokens can be given to."""
    weigh = weighing(shared)
    with torch.no_grad(), routed(shared) as clean:
        shared(IMAGES)
    layers = [routing.layer for routing in clean]
    with torch.no_grad(), routed(shared, masked(dict.fromkeys(layers, [1, 2]), weigh)) as left:
        shared(IMAGES)
    for routing in left:
        assert sorted(set(routing.experts.flatten().tolist())) == [0, 3]
        assert (selected(routing).sum(-1) == 1).all()
    told = "layers.1.mlp: 0 of 2 experts remain and a token needs 1; mask fewer"
    with pytest.raises(StageFailed, match=told):
        with torch.no_grad(), routed(shared, masked({layers[0]: [0, 1]}, weigh)):
            shared(IMAGES)


def test_averaging_by_hand():
    logits = torch.log(torch.tensor([[[1.0, 3.0], [3.0, 1.0]], [[1.0, 1.0], [3.0, 1.0]]]))
    torch.testing.assert_close(
        averaged(logits).logits.exp(), torch.tensor([[0.5, 0.5], [0.625, 0.375]])
    )
