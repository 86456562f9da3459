"""Routing is seen and changed exactly, in every family that calls its experts with the choice."""

import pytest
import torch

from stages.errors import StageFailed
from stages.models.families import FAMILIES
from stages.models.routing import blocks, intercept, weighing
from stages.models.tiny import tiny_model, tiny_tokenizer
from stages.models.tiny_shapes import TINY

SEEN = [n for n in TINY if FAMILIES[n].is_moe and FAMILIES[n].index is not None]
OWN_RULE = [n for n in SEEN if FAMILIES[n].scores == "sparsemixer"]
TOKENS = torch.arange(3, 43)[None]


def model_of(name):
    return tiny_model(name, tiny_tokenizer(), seed=3)


@pytest.fixture(scope="module")
def mixtral():
    return model_of("mixtral")


def logits_of(model):
    with torch.no_grad():
        asked = {"labels": TOKENS} if model.config.is_encoder_decoder else {}
        return model(input_ids=TOKENS, **asked, use_cache=False).logits


def test_watching_changes_nothing_and_leaves_no_trace(mixtral):
    before, seen = logits_of(mixtral), []
    with intercept(blocks(mixtral), choice=seen.append):
        watched = logits_of(mixtral)
    assert torch.equal(watched, before) and torch.equal(logits_of(mixtral), before)
    assert [r.layer for r in seen] == [f"model.layers.{i}.mlp" for i in range(4)]
    for router, experts in blocks(mixtral).values():
        assert "forward" not in vars(router) and not experts._forward_pre_hooks
    first = seen[0]
    assert first.logits.shape == (40, 4) and first.experts.shape == first.weights.shape == (40, 2)
    assert torch.equal(first.logits.topk(2).indices, first.experts)


@pytest.mark.parametrize("name", SEEN)
def test_weights_follow_from_logits_and_choice_by_the_familys_rule(name):
    model, seen = model_of(name), []
    if name in OWN_RULE:
        with pytest.raises(StageFailed, match="a rule of its own.*router.assignment"):
            weighing(model)
        return
    weigh = weighing(model)
    with intercept(blocks(model), choice=seen.append):
        logits_of(model)
    assert len(seen) == len(blocks(model)) > 0
    for routing in seen:
        weights = weigh(routing.logits, routing.experts)
        torch.testing.assert_close(weights, routing.weights.float(), rtol=1e-4, atol=1e-6)


def test_changed_logits_go_through_the_familys_own_choice(mixtral):
    shift, seen = torch.tensor([0.0, 9.0, 0.0, 9.0]), []
    with intercept(blocks(mixtral), logits=lambda _, x: x + shift, choice=seen.append):
        logits_of(mixtral)
    for routing in seen:
        assert set(routing.experts.flatten().tolist()) == {1, 3}
        expected = routing.logits.softmax(-1).gather(-1, routing.experts)
        torch.testing.assert_close(routing.weights, expected / expected.sum(-1, keepdim=True))


def test_a_forced_choice_is_what_the_experts_compute(mixtral):
    path, (_, experts) = next(iter(blocks(mixtral).items()))
    inputs, outputs = [], []
    hooks = [
        experts.register_forward_hook(lambda m, a, o: inputs.append(a)),
        experts.register_forward_hook(lambda m, a, o: outputs.append(o)),
    ]
    forced = torch.tensor([[2, 0]]).repeat(40, 1)
    weights = torch.full((40, 2), 0.25)

    def choice(routing):
        return routing.change(experts=forced, weights=weights) if routing.layer == path else None

    with intercept(blocks(mixtral), choice=choice):
        changed = logits_of(mixtral)
    for hook in hooks:
        hook.remove()
    hidden = inputs[0][0]
    expected = sum(0.25 * _expert(experts, e, hidden) for e in (2, 0))
    torch.testing.assert_close(outputs[0], expected, rtol=1e-5, atol=1e-6)
    assert (changed - logits_of(mixtral)).abs().max() > 1e-3


def _expert(experts, number, hidden):
    gate, up = (hidden @ experts.gate_up_proj[number].T).chunk(2, dim=-1)
    return (experts.act_fn(gate) * up) @ experts.down_proj[number].T


def test_gradients_reach_the_router_through_what_was_seen():
    model, seen = model_of("deepseek_v3"), []
    with intercept(blocks(model), choice=seen.append):
        model(input_ids=TOKENS, use_cache=False)
    routers = [router.weight for router, _ in blocks(model).values()]
    gradients = torch.autograd.grad(sum(r.logits.square().sum() for r in seen), routers)
    assert all(gradient.abs().sum() > 0 for gradient in gradients)
