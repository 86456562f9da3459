"""Routes of V-MoE: the recorded ones give the same bits, others act, also under a capacity."""

import pytest
import torch

from stages.models import routes
from stages.models.routes import routed, selected
from stages.models.routing import Routing, weighing
from stages.models.vision import from_scratch
from stages.models.vision_spec import VisionSpec

SPEC = VisionSpec(
    size="tiny", hidden=16, neurons=32, depth=4, heads=2, patch=4, image_size=8, channels=1,
    labels=4, experts=4, top_k=2, layers=(1, 3), shared_start=False,
)  # fmt: skip
IMAGES, OTHERS = torch.rand(2, 6, 1, 8, 8, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits_of(model, images=IMAGES):
    return model(pixel_values=images).logits


def model_of(**changes):
    model = from_scratch(SPEC.model_copy(update=changes))[0]
    for layer in (1, 3):
        model.vit.layers[layer].mlp.gate.weight.data *= 3  # so that tokens choose differently
    return model


@pytest.mark.parametrize("capacity", [None, 0.5])
def test_forcing_the_recorded_routes_gives_the_same_bits(capacity):
    model = model_of(eval_capacity_factor=capacity, group_size=3 if capacity else None)
    plain, free = logits_of(model), logits_of(model, OTHERS)
    with routed(model) as clean:
        assert torch.equal(logits_of(model), plain)
    assert [r.layer for r in clean] == ["vit.layers.1.mlp", "vit.layers.3.mlp"]
    for r in clean:
        assert r.logits.shape == (30, 4) and r.experts.shape == r.weights.shape == (30, 2)
        dropped = (selected(r).sum(-1) < 2).any()
        assert dropped == (capacity is not None)
    with routed(model, routes.imposed(clean)) as forced:
        assert torch.equal(logits_of(model), plain)
    assert all(torch.equal(a.weights, b.weights) for a, b in zip(clean, forced, strict=True))
    with routed(model, routes.imposed(clean)) as forced:
        held = logits_of(model, OTHERS)
    assert all(torch.equal(a.experts, b.experts) for a, b in zip(clean, forced, strict=True))
    assert not torch.equal(held, free) and torch.equal(logits_of(model), plain)


def test_every_policy_acts():
    model = model_of()
    plain = logits_of(model)
    with routed(model) as clean:
        logits_of(model)
    weigh = weighing(model)
    policies = [
        routes.at_random(0), routes.permuted(0), routes.without_first(), routes.without_output(),
        routes.fixed([2, 0]), routes.next_ranked(), routes.next_ranked(weigh),
        routes.masked({r.layer: [0] for r in clean}, weigh), routes.soft(weigh),
        routes.at_share(routes.next_ranked(), 0.5, 0),
        routes.imposed(clean[::-1], layers=()),
    ]  # fmt: skip
    for policy in policies[:-1]:
        with routed(model, policy):
            changed = logits_of(model)
        assert changed.isfinite().all() and not torch.equal(changed, plain)
    with routed(model, policies[-1]):  # no layer is named
        assert torch.equal(logits_of(model), plain)


def test_what_had_no_room_stays_dropped():
    """Other experts take the tokens that were served and no others."""
    model = model_of(eval_capacity_factor=0.5, group_size=1)
    with routed(model) as clean:
        plain = logits_of(model)
    weigh, first = weighing(model), clean[0]
    served = selected(first).sum(-1)
    assert {0, 1, 2} == set(served.tolist())

    def under(policy):
        with routed(model, policy) as found:
            changed = logits_of(model)
        # The second sparse block has tokens of its own, and drops some of them too.
        assert (selected(found[1]).sum(-1) < 2).any()
        return changed, found[0]

    for policy in (routes.next_ranked(weigh), routes.at_random(0, weigh), routes.next_ranked(),
                   routes.at_random(0)):  # fmt: skip
        changed, found = under(policy)
        assert torch.equal(selected(found).sum(-1), served) and not torch.equal(changed, plain)
    for policy in (routes.next_ranked(weigh), routes.next_ranked()):
        _, found = under(policy)
        assert (found.experts[:, :, None] != first.experts[:, None]).all()
    for expert in range(4):
        changed, found = under(routes.masked({first.layer: [expert]}, weigh))
        assert torch.equal(found.weights != 0, first.weights != 0)
        assert torch.equal(found.experts == first.experts, first.experts != expert)
        assert (found.experts != expert).all()
        # No expert takes a token twice, and those that stay have the weights that they had.
        assert (found.experts[:, 0] != found.experts[:, 1]).all()
        stay = first.experts != expert
        torch.testing.assert_close(found.weights[stay], first.weights[stay])
    # An expert that took no token is not missed.
    idle = first.change(experts=first.experts.clamp(max=2))
    left = routes.masked({first.layer: [3]}, weigh)(idle)
    assert torch.equal(left.experts, idle.experts)


@pytest.mark.parametrize("weigh", [None, lambda logits, experts: logits.gather(-1, experts)])
def test_an_expert_without_room_is_no_second_best(weigh):
    """Ranks 3 and 4 of five, in the place of two experts of which both, one or none had room."""
    logits = torch.tensor([[3.0, 5.0, 4.0, 1.0, 2.0]]).expand(4, -1)
    weights = torch.tensor([[0.6, 0.3], [0.6, 0.0], [0.0, 0.3], [0.0, 0.0]])
    routing = Routing("x", logits, torch.tensor([[1, 2]]).expand(4, -1), weights)
    found = routes.next_ranked(weigh)(routing)
    assert found.experts.tolist() == [[0, 4]] * 4
    serve = [row.nonzero().flatten().tolist() for row in selected(found)]
    assert serve == [[0, 4], [0], [0], []]
    own = [[0.6, 0.3], [0.6, 0.0], [0.3, 0.0], [0.0, 0.0]]
    assert torch.equal(found.weights, torch.tensor(own) if weigh is None else torch.tensor(
        [[3.0, 2.0], [3.0, 0.0], [3.0, 0.0], [0.0, 0.0]]))  # fmt: skip
    assert routes.chosen(routing).tolist() == [[False, True, True, False, False]] * 4
    late = routing.change(experts=torch.where(weights > 0, routing.experts, routes.DROPPED))
    assert torch.equal(routes.chosen(late), selected(routing))


def test_another_k_and_dropped_outputs_by_hand():
    """K = 1 is the same weights with one expert; without experts the block adds nothing."""
    model, one = model_of(), model_of(top_k=1)
    one.load_state_dict(model.state_dict())
    with routes.another_k(model, 1), routed(model) as found:
        assert torch.equal(logits_of(model), logits_of(one))
    assert all(r.experts.shape == (30, 1) for r in found)
    inputs, outputs = [], []
    block = model.vit.layers[3]
    hooks = [block.register_forward_hook(lambda m, a, o: outputs.append(o)),
             block.layernorm_after.register_forward_hook(lambda m, a, o: inputs.append(a[0]))]
    with routed(model, routes.without_output()):
        logits_of(model)
    for hook in hooks:
        hook.remove()
    assert torch.equal(outputs[0], inputs[0])


@pytest.mark.parametrize("changes", [
    {}, {"eval_capacity_factor": 0.5, "group_size": 1}, {"experts": 8, "ensemble": 2},
    {"ensemble": 2, "ensemble_of": "models"},
    *({"experts": 0, "head": head, "head_experts": 4, "head_neurons": 16}
      for head in ("soft_moe", "sparse_moe")),
], ids=["", "capacity", "E3", "ensemble", "soft head", "head"])  # fmt: skip
def test_the_configured_k_is_the_model_as_it_is(changes):
    model = from_scratch(SPEC.model_copy(update=changes))[0]
    with routed(model) as clean:
        plain = logits_of(model)
    own = clean[0].experts.shape[1]
    for rule in (None, weighing(model)):
        with routes.another_k(model, own, rule) as policy, routed(model, policy) as forced:
            assert torch.equal(logits_of(model), plain)
        for before, after in zip(clean, forced, strict=True):
            assert torch.equal(before.experts, after.experts)
            assert torch.equal(before.weights, after.weights)
        with routes.another_k(model, 1, rule) as policy, routed(model, policy):
            assert not torch.equal(logits_of(model), plain)
    assert torch.equal(logits_of(model), plain)


@pytest.mark.parametrize("head", ["soft_moe", "sparse_moe"])
def test_fewer_experts_of_a_head_are_weighed_against_each_other(head):
    """Where all are chosen, weights that were divided by their sum look like those that were not.
    """
    changes = {"experts": 0, "head": head, "head_experts": 4, "head_neurons": 16}
    model = from_scratch(SPEC.model_copy(update=changes))[0]
    with routes.another_k(model, 2), routed(model) as two:
        logits_of(model)
    assert two[0].experts.shape == (6, 2)
    found = weighing(model)(two[0].logits, two[0].experts)
    expected = two[0].logits.gather(1, two[0].experts).softmax(-1)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(two[0].weights, expected)
