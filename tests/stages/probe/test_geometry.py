"""Certificates that are tight, jumps that are met, and differences worked out by hand."""

import pytest
import torch

from stages.errors import StageFailed
from stages.models.routing import Routing
from stages.models.tiny import tiny_model, tiny_tokenizer
from stages.probe.geometry import Watched, differences, margins, measured, radii, watched

GENERATOR = torch.Generator().manual_seed(0)


def routing_of(logits, count, normalised=True):
    top = logits.topk(count, -1)
    scores = logits.softmax(-1).gather(-1, top.indices)
    weights = scores / scores.sum(-1, keepdim=True) if normalised else scores
    return Routing("x", logits, top.indices, weights)


@pytest.mark.parametrize(("name", "norm"), [("radius_l2", 2), ("radius_linf", torch.inf)])
def test_the_choice_holds_within_its_radius_and_falls_just_beyond(name, norm):
    for _ in range(20):
        scorers = torch.randn(8, 16, generator=GENERATOR, dtype=torch.float64)
        hidden = torch.randn(100, 16, generator=GENERATOR, dtype=torch.float64)
        routing = routing_of(hidden @ scorers.T, 2)
        radius = radii(routing, scorers)[name]
        chosen = routing.experts.sort(-1).values

        def choice(moved, scorers=scorers):
            return (moved @ scorers.T).topk(2, -1).indices.sort(-1).values

        drawn = torch.randn(100, 16, generator=GENERATOR, dtype=torch.float64)
        drawn = drawn / drawn.norm(p=norm, dim=-1, keepdim=True)
        assert torch.equal(choice(hidden + 0.999 * radius[:, None] * drawn), chosen)
        # The worst direction of the pair that decides.
        gap = torch.full((100,), torch.inf, dtype=torch.float64)
        worst = torch.zeros(100, 16, dtype=torch.float64)
        for a in range(8):
            for b in range(8):
                row = scorers[b] - scorers[a]
                steep = row if norm == 2 else row.sign()
                dual = row.norm() if norm == 2 else row.abs().sum()
                pair = (routing.experts == a).any(-1) & (routing.experts != b).all(-1)
                here = (routing.logits[:, a] - routing.logits[:, b]) / dual if a != b else gap
                nearer = pair & (here < gap)
                gap = torch.where(nearer, here, gap)
                worst[nearer] = steep / steep.norm(p=norm)
        torch.testing.assert_close(gap, radius)
        beyond = choice(hidden + 1.001 * radius[:, None] * worst)
        assert (beyond != chosen).any(-1).all()


def test_a_choice_that_is_not_the_largest_logits_has_no_certificate():
    scorers = torch.eye(4, 6)
    routing = routing_of(torch.tensor([[4.0, 3.0, 2.0, 1.0], [1.0, 2.0, 3.0, 4.0]]), 2)
    other = routing.change(experts=torch.tensor([[0, 1], [0, 3]]))
    found = radii(other, scorers)["radius_l2"]
    assert found[0] == pytest.approx(1 / 2**0.5) and found[1].isnan()


def test_margins_by_hand():
    probabilities = torch.tensor([[0.5, 0.25, 0.125, 0.125]])
    found = margins(routing_of(probabilities.log(), 2))
    assert found["router_margin"].item() == pytest.approx(0.25)
    assert found["logit_margin"].item() == pytest.approx(0.6931472)
    assert found["entropy"].item() == pytest.approx(1.75 * 0.6931472)


def affine(experts, size):
    maps = torch.randn(experts, size, size, generator=GENERATOR, dtype=torch.float64)
    shifts = torch.randn(experts, size, generator=GENERATOR, dtype=torch.float64)
    return lambda h, n: (maps[n] @ h[..., None])[..., 0] + shifts[n]


@pytest.mark.parametrize("normalised", [True, False])
def test_the_jump_at_a_tie_is_met(normalised):
    """On the hyperplane between ranks K and K + 1, a step to each side."""
    expert = affine(5, 12)
    scorers = torch.randn(5, 12, generator=GENERATOR, dtype=torch.float64)
    hidden = torch.randn(1, 12, generator=GENERATOR, dtype=torch.float64)
    a, b = (hidden @ scorers.T)[0].topk(3).indices[1:]
    across = scorers[b] - scorers[a]
    tie = hidden - (hidden @ across)[:, None] * across / across.square().sum()

    def output(h):
        routing = routing_of(h @ scorers.T, 2, normalised)
        outputs = torch.stack([expert(h, routing.experts[:, k]) for k in range(2)], dim=1)
        return (outputs * routing.weights[..., None]).sum(1), routing

    step = 1e-7 * across
    (one, routing), (other, after) = output(tie - step), output(tie + step)
    assert set(routing.experts[0].tolist()) != set(after.experts[0].tolist())
    found = differences(
        Watched(routing, (tie - step), scorers.float(), expert), torch.Generator())
    assert found["jump"].item() == pytest.approx((one - other).norm().item(), rel=1e-4)


def test_differences_of_two_experts_by_hand():
    """Expert e maps everything to (e, 0, 0)."""
    scorers = torch.eye(3)

    def expert(hidden, numbers):
        return torch.nn.functional.pad(numbers[:, None].float(), (0, 2))

    routing = Routing("x", torch.tensor([[0.0, 2.0, 1.0]]), torch.tensor([[2, 1]]),
                      torch.tensor([[0.3, 0.7]]))
    found = differences(Watched(routing, torch.zeros(1, 3), scorers, expert), torch.Generator())
    # The two best are 1 and 2: distance 1, mean length 1.5; the last of them is 2, the next is 0.
    assert found["disagreement"].item() == pytest.approx(1 / 1.5)
    assert found["cosine"].item() == 1.0
    assert found["disagreement_next"].item() == pytest.approx(2 / 1)
    assert found["jump"].item() == pytest.approx(0.3 * 2)
    assert found["routing_term"].item() == pytest.approx(0.7 * 0.3 * 1 * 2**0.5)


def test_where_all_experts_are_chosen_there_is_no_next_one():
    expert, scorers = affine(3, 12), torch.randn(3, 12, generator=GENERATOR, dtype=torch.float64)
    hidden = torch.randn(4, 12, generator=GENERATOR, dtype=torch.float64)
    routing = routing_of(hidden @ scorers.T, 3)
    found = differences(Watched(routing, hidden, scorers.float(), expert), torch.Generator())
    assert found["jump"].isnan().all() and found["disagreement_next"].isnan().all()
    first, second = routing.experts[:, :2].unbind(-1)
    one, other = expert(hidden, first).float(), expert(hidden, second).float()
    mean = (one.norm(dim=-1) + other.norm(dim=-1)) / 2
    torch.testing.assert_close(found["disagreement"], (one - other).norm(dim=-1) / mean)


@pytest.mark.parametrize("count", [1, 2])
def test_a_token_without_room_is_left_out_and_counted(count):
    """What hangs on the choice is told of the tokens that all their experts had room for, whichever
    others are among them."""
    expert, scorers = affine(5, 12), torch.randn(5, 12, generator=GENERATOR, dtype=torch.float64)
    hidden = torch.randn(8, 12, generator=GENERATOR, dtype=torch.float64)
    routing = routing_of(hidden @ scorers.T, count, normalised=False)
    kept = torch.ones_like(routing.weights)
    kept[1, 0] = kept[4, -1] = kept[5] = 0
    full = kept.bool().all(-1)
    assert full.sum() == 5

    def told(weights, tokens=slice(None)):
        part = routing.change(weights=weights).only(tokens)
        block = Watched(part, hidden[tokens], scorers.float(), expert)
        found = margins(part) | differences(block, torch.Generator()) | radii(part, scorers)
        return found, measured(block, torch.Generator())

    whole, _ = told(routing.weights)
    found, means = told(routing.weights * kept)
    of_choice = set(found) - {"router_margin", "entropy"}
    assert {"logit_margin", "disagreement", "disagreement_next", "jump", "routing_term",
            "routing_jacobian", "radius_l2", "cosine"} <= of_choice
    for name in found:
        known = full if name in of_choice else torch.ones_like(full)
        assert torch.equal(found[name].isnan(), ~known)
        torch.testing.assert_close(found[name][known], whole[name][known])
        assert means[name] == pytest.approx(whole[name][known].mean().item())
    assert means["dropped"] == pytest.approx(3 / 8)
    # Where no token is left there is no number, also where the same rank of all had no room.
    for rank in range(count):
        _, none = told(routing.weights.index_fill(-1, torch.tensor(rank), 0))
        assert all(none[name] != none[name] for name in of_choice) and none["dropped"] == 1


def test_a_model_is_watched_block_by_block():
    model = tiny_model("mixtral", tiny_tokenizer(), seed=3)
    outputs = []
    hooks = [m.mlp.experts.register_forward_hook(lambda m, a, o: outputs.append(o))
             for m in model.model.layers]
    with torch.no_grad(), watched(model) as found:
        model(input_ids=torch.arange(3, 23)[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    assert [each.routing.layer for each in found] == [f"model.layers.{i}.mlp" for i in range(4)]
    for each, output in zip(found, outputs, strict=True):
        parts = [each.routing.weights[:, k, None] * each.expert(
            each.hidden, each.routing.experts[:, k]) for k in range(2)]
        torch.testing.assert_close(sum(parts), output, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            each.hidden @ each.scorers.T, each.routing.logits, rtol=1e-4, atol=1e-5)
        assert radii(each.routing, each.scorers)["radius_l2"].gt(0).all()
    with pytest.raises(StageFailed, match="llama: has no experts that can be asked one by one"):
        with watched(tiny_model("llama", tiny_tokenizer(), seed=3)):
            pass
