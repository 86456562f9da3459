"""Attacks that act through, around or on the choice of experts of a vision model."""

import pytest
import torch

from stages.attack.image_objective import Objective
from stages.attack.image_spec import APGD, PGD, PaperPGD
from stages.attack.images import attack_images
from stages.attack.objectives import leaning
from stages.models.balance import importance_loss
from stages.models.families import family
from stages.models.images import Classifier
from stages.models.routing import blocks, intercept, weighing
from stages.models.vision import from_scratch
from stages.models.vision_spec import VisionSpec

SPEC = VisionSpec(
    size="tiny", hidden=16, neurons=32, depth=2, heads=2, patch=4, image_size=8, channels=1,
    labels=4, experts=4, top_k=1, layers=(1,), shared_start=False,
)
generator = torch.Generator().manual_seed(0)
IMAGES = torch.rand(12, 1, 8, 8, generator=generator)
SEEDS = [(0, i) for i in range(12)]


@pytest.fixture(scope="module")
def classifier():
    found = Classifier(*from_scratch(SPEC))
    # So that the images lie on both sides of borders between experts.
    for router in family(found.model).modules(found.model, "router").values():
        router.weight.data *= 2
    return found.requires_grad_(False)


@pytest.fixture(scope="module")
def labels(classifier):
    return classifier(IMAGES).argmax(1)


def chosen(classifier, images):
    """Chosen experts per image and token, (B, S)."""
    seen = []
    with torch.no_grad(), intercept(blocks(classifier.model), choice=seen.append):
        classifier(images)
    return seen[0].experts[:, 0].view(len(images), -1)


def value_at(classifier, labels, images, attack, targets=None):
    return Objective(classifier, attack, IMAGES, labels, targets).climb(images)


def test_soft_routing_is_the_same_forward_and_sees_other_experts_backward(classifier, labels):
    as_is, gradient = value_at(classifier, labels, IMAGES, PGD())
    soft, through = value_at(classifier, labels, IMAGES, PGD(routing="soft"))
    torch.testing.assert_close(soft.loss, as_is.loss, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(soft.logits, as_is.logits, atol=1e-5, rtol=1e-5)
    assert (gradient - through).abs().max() > 1e-4


def test_soft_routing_has_a_gradient_where_the_plain_attack_has_none(classifier, labels):
    """With one expert whose weight is made 1, the router's scores have no gradient at all."""
    model = classifier.model
    gate = model.vit.layers[1].mlp.gate
    gate.norm_topk_prob = model.config.norm_topk_prob = gate.weight.requires_grad = True
    try:
        norms = {}
        for routing in ("as_is", "soft"):
            objective = Objective(classifier, PGD(routing=routing), IMAGES, labels)
            loss = objective(IMAGES).loss.sum()
            (found,) = torch.autograd.grad(loss, gate.weight)
            norms[routing] = found.norm().item()
    finally:
        gate.norm_topk_prob = model.config.norm_topk_prob = gate.weight.requires_grad = False
    assert norms["as_is"] < 1e-6 < 1e-3 < norms["soft"]


def test_frozen_routing_keeps_the_clean_images_experts(classifier, labels):
    """The loss at other images is that of the model whose tokens stay at their experts."""
    other = IMAGES.flip(0)
    assert (chosen(classifier, other) != chosen(classifier, IMAGES)).any()
    value, _ = value_at(classifier, labels, other, PGD(routing="frozen"))
    clean = chosen(classifier, IMAGES).view(-1, 1)

    def force(found):
        return found.change(
            experts=clean, weights=found.logits.softmax(-1).gather(1, clean)
        )

    with torch.no_grad(), intercept(blocks(classifier.model), choice=force):
        forced = classifier(other)
    expected = torch.nn.functional.cross_entropy(forced, labels, reduction="none")
    torch.testing.assert_close(value.loss, expected, atol=1e-5, rtol=1e-5)
    # Success is judged by the model's own choice.
    with torch.no_grad():
        torch.testing.assert_close(value.logits, classifier(other), atol=1e-5, rtol=1e-5)
    same, _ = value_at(classifier, labels, IMAGES, PGD(routing="frozen"))
    torch.testing.assert_close(same.logits, classifier(IMAGES), atol=1e-6, rtol=1e-6)


def test_what_a_capacity_left_out_stays_out_in_frozen_routing():
    tight = SPEC.model_copy(update={"top_k": 2, "eval_capacity_factor": 0.6})
    found = Classifier(*from_scratch(tight)).requires_grad_(False)
    seen = []
    with torch.no_grad(), intercept(blocks(found.model), choice=seen.append):
        logits = found(IMAGES)
    left_out = seen[0].weights == 0
    assert 0.2 < left_out.float().mean() < 0.6
    # The rule is that of the weights that are left.
    expected = seen[0].logits.softmax(-1).gather(1, seen[0].experts)
    torch.testing.assert_close(weighing(found.model)(seen[0].logits, seen[0].experts), expected)
    labels = logits.argmax(1)
    value = Objective(found, PGD(routing="frozen"), IMAGES, labels)(IMAGES)
    kept = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(value.loss, kept, atol=1e-5, rtol=1e-5)


def test_the_routing_loss_by_hand_and_what_it_does(classifier, labels):
    seen = []
    with torch.no_grad(), intercept(blocks(classifier.model), choice=seen.append):
        classifier(IMAGES)
    logits, experts = seen[0].logits, seen[0].experts[:, 0]
    expected = torch.tensor([
        sum(row[e].item() / 3 for e in range(4) if e != own) - row[own].item()
        for row, own in zip(logits, experts.tolist(), strict=True)
    ]).view(12, -1).mean(1)
    targeted = PGD(steps=10, routing="targeted")
    value, _ = value_at(classifier, labels, IMAGES, targeted)
    torch.testing.assert_close(value.loss, expected, atol=1e-5, rtol=1e-5)
    plain, _ = value_at(classifier, labels, IMAGES, PGD())
    joint, _ = value_at(classifier, labels, IMAGES, PGD(routing="joint", routing_weight=0.5))
    torch.testing.assert_close(joint.loss, plain.loss + 0.5 * expected, atol=1e-5, rtol=1e-5)

    def changed(attack):
        images = attack_images(classifier, attack, IMAGES, labels, 0.1, SEEDS).images
        return (chosen(classifier, images) != chosen(classifier, IMAGES)).float().mean()

    assert changed(targeted) > changed(PGD(steps=10)) + 0.05


def test_how_much_a_router_leans_away_does_not_grow_with_the_number_of_experts():
    logits = torch.tensor([[3.0, 1.0, 0.0], [0.0, 2.0, 4.0]])
    chosen = torch.tensor([[True, False, False], [True, False, True]])
    # (1 + 0) / 2 - 3 and 2 - (0 + 4) / 2.
    assert leaning(logits, chosen).tolist() == [-2.5, 0.0]
    # Every expert there three times, and three times as many that are not chosen.
    assert leaning(logits.repeat(1, 3), chosen.repeat(1, 3)).tolist() == [-2.5, 0.0]
    more = torch.cat([chosen, torch.zeros(2, 4, dtype=torch.bool)], dim=1)
    others = torch.tensor([[1.0, 0.0], [2.0, 2.0]]).repeat(1, 2)
    many = torch.cat([logits, others], dim=1).requires_grad_()
    found = leaning(many, more)
    assert found.tolist() == [-2.5, 0.0]
    found.sum().backward()
    # What lowers the chosen ones weighs as much as all that raises the others.
    assert many.grad[0].tolist() == pytest.approx([-1] + 6 * [1 / 6])
    # One that the token cannot have is none of the others.
    closed = torch.tensor([[3.0, 1.0, -torch.inf]], requires_grad=True)
    value = leaning(closed, chosen[:1])
    value.sum().backward()
    assert value.tolist() == [-2.0] and closed.grad.tolist() == [[-1.0, 1.0, 0.0]]


def test_the_auxiliary_loss_is_attacked_or_not(classifier, labels):
    seen = []
    with torch.no_grad(), intercept(blocks(classifier.model), choice=seen.append):
        classifier(IMAGES)
    plain, gradient = value_at(classifier, labels, IMAGES, PaperPGD())
    both, joined = value_at(
        classifier, labels, IMAGES, PaperPGD(importance_loss_weight=3.0)
    )
    torch.testing.assert_close(both.loss, plain.loss + 3 * importance_loss(seen))
    assert (gradient - joined).abs().max() > 1e-4


def test_every_way_counts_its_evaluations(classifier, labels):
    passes = {"as_is": 5, "soft": 5, "frozen": 11, "targeted": 6, "joint": 6}
    for routing, forwards in passes.items():
        attack = APGD(steps=5, routing=routing)
        outcome = attack_images(classifier, attack, IMAGES, labels, 0.1, SEEDS)
        assert (outcome.gradients, outcome.forwards[0]) == (5, forwards)
