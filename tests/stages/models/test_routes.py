"""Routes of every family are recorded and forced; the recorded ones give the same bits."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from stages.errors import StageFailed
from stages.finetune.loop import start_distributed
from stages.models import routes
from stages.models.expert_parallel import convert
from stages.models.families import FAMILIES
from stages.models.routes import routed, selected
from stages.models.routing import blocks, weighing
from stages.models.tiny import tiny_model, tiny_tokenizer
from stages.models.tiny_shapes import TINY

MOE = [name for name in TINY if FAMILIES[name].is_moe and not FAMILIES[name].no_evaluation]
SEEN = [name for name in MOE if FAMILIES[name].index is not None]
TOKENS = torch.arange(3, 33)[None]
OTHERS = torch.arange(40, 70)[None]


def model_of(name):
    return tiny_model(name, tiny_tokenizer(), seed=3)


@pytest.fixture(scope="module")
def mixtral():
    return model_of("mixtral")


@torch.no_grad()
def logits_of(model, tokens=TOKENS):
    inputs = {"input_ids": tokens, "use_cache": False}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = tokens[:, :7]
    return model(**inputs).logits


@pytest.mark.parametrize("name", MOE)
def test_forcing_the_recorded_routes_gives_the_same_bits(name):
    model = model_of(name)
    plain = logits_of(model)
    with routed(model) as clean:
        assert torch.equal(logits_of(model), plain)
    assert [r.layer for r in clean] and len({r.layer for r in clean}) == len(clean)
    experts, count = FAMILIES[name].experts_of(model.config.to_dict())
    for r in clean:
        assert r.logits.shape == (len(r.experts), experts)
        assert r.experts.shape == r.weights.shape == (len(r.experts), count)
        assert r.experts.max() < experts and selected(r).sum(-1).max() <= count
    with routed(model, routes.imposed(clean)) as forced:
        assert torch.equal(logits_of(model), plain)
    for before, after in zip(clean, forced, strict=True):
        assert torch.equal(before.experts, after.experts)
        assert torch.equal(before.weights, after.weights)
    # On another input they are what is computed, and they change the outcome.
    free = logits_of(model, OTHERS)
    with routed(model, routes.imposed(clean)) as forced:
        held = logits_of(model, OTHERS)
    assert all(torch.equal(a.experts, b.experts) for a, b in zip(clean, forced, strict=True))
    assert held.isfinite().all() and not torch.equal(held, free)
    assert torch.equal(logits_of(model), plain)


def test_a_dense_model_has_no_routes_and_a_broken_family_says_why(monkeypatch):
    with routed(model_of("llama")) as clean:
        pass
    assert clean == []
    broken = replace(FAMILIES["mixtral"], no_evaluation="its experts are not the chosen ones")
    monkeypatch.setitem(FAMILIES, "mixtral", broken)
    with pytest.raises(StageFailed, match="mixtral: routes cannot be seen: its experts are not"):
        with routed(SimpleNamespace(config=SimpleNamespace(model_type="mixtral"))):
            pass


def test_nothing_is_left_behind(mixtral):
    with routed(mixtral, routes.without_output()):
        logits_of(mixtral)
    for router, experts in blocks(mixtral).values():
        assert "forward" not in vars(router)
        assert not experts._forward_pre_hooks and not experts._forward_hooks


@pytest.mark.parametrize("name", SEEN)
def test_every_policy_acts_in_every_family(name):
    model = model_of(name)
    plain = logits_of(model)
    with routed(model) as clean:
        logits_of(model)
    policies = [routes.at_random(0), routes.permuted(0), routes.without_first(),
                routes.without_output(), routes.fixed(range(clean[0].experts.shape[1]))]
    if 2 * clean[0].experts.shape[1] <= clean[0].logits.shape[1]:
        policies.append(routes.next_ranked())
    if FAMILIES[name].scores != "sparsemixer":
        weigh = weighing(model)
        policies += [routes.masked({r.layer: [0] for r in clean}, weigh), routes.soft(weigh)]
    for policy in policies:
        with routed(model, policy):
            changed = logits_of(model)
        assert changed.isfinite().all() and not torch.equal(changed, plain)


@pytest.mark.parametrize("name", [name for name in MOE if name not in SEEN])
def test_where_the_choice_is_inside_the_blocks_nothing_is_weighed_anew(name):
    """Policies that take the weights that are there act all the same."""
    model = model_of(name)
    plain = logits_of(model)
    with routed(model) as clean:
        logits_of(model)
    count = clean[0].experts.shape[1]
    for policy in (routes.at_random(0), routes.permuted(0), routes.without_first(),
                   routes.without_output(), routes.fixed(range(count)), routes.next_ranked()):
        with routed(model, policy) as forced:
            changed = logits_of(model)
        assert changed.isfinite().all() and not torch.equal(changed, plain)
        assert len(forced) == len(clean)
    with routed(model, routes.fixed(range(count))) as forced:
        logits_of(model)
    assert all(r.experts.tolist() == [[*range(count)]] * len(r.experts) for r in forced)
    told = f"{name}: chooses its experts inside its blocks, so others cannot be weighed"
    with pytest.raises(StageFailed, match=told):
        weighing(model)
    assert torch.equal(logits_of(model), plain)


def one(mixtral, policy):
    """The first block's routes as they were and as they are under a policy."""
    with routed(mixtral) as clean:
        logits_of(mixtral)
    with routed(mixtral, policy) as forced:
        logits_of(mixtral)
    return clean[0], forced[0]


def test_next_ranks_are_those_that_topk_leaves(mixtral):
    clean, forced = one(mixtral, routes.next_ranked())
    assert torch.equal(forced.experts, clean.logits.topk(4).indices[:, 2:])
    assert torch.equal(forced.weights, clean.weights.sort(-1, descending=True).values)
    _, forced = one(mixtral, routes.next_ranked(weighing(mixtral)))
    expected = clean.logits.softmax(-1).gather(-1, forced.experts)
    torch.testing.assert_close(forced.weights, expected / expected.sum(-1, keepdim=True))
    with pytest.raises(StageFailed, match="chooses 3 of 4 experts, so there are no ranks 4 to 6"):
        routes.next_ranked()(clean.change(experts=torch.zeros(30, 3, dtype=torch.long)))


def output_of(mixtral, policy):
    """What the first block makes of some hidden states, its inputs and its experts."""
    path, (router, experts) = next(iter(blocks(mixtral).items()))
    generator = torch.Generator().manual_seed(4)
    hidden = torch.randn(1, 6, mixtral.config.hidden_size, generator=generator)
    with torch.no_grad(), routed(mixtral, policy):
        return mixtral.get_submodule(path)(hidden)[0], hidden[0], router, experts


def of_each(experts, hidden):
    """The outputs (T, E, D) of all experts."""
    count = experts.down_proj.shape[0]
    numbers = [torch.full((len(hidden), 1), e) for e in range(count)]
    with torch.no_grad():
        return torch.stack([experts(hidden, n, torch.ones(len(hidden), 1)) for n in numbers], dim=1)


def test_fixed_experts_take_the_weights_by_rank(mixtral):
    clean, forced = one(mixtral, routes.fixed([3, 0]))
    assert forced.experts.tolist() == [[3, 0]] * 30
    assert torch.equal(forced.weights, clean.weights.sort(-1, descending=True).values)
    output, hidden, router, experts = output_of(mixtral, routes.fixed([3, 0]))
    # Mixtral's two largest probabilities, made to sum to 1.
    two = (hidden @ router.weight.T).softmax(-1).topk(2).values
    first, second = (two / two.sum(-1, keepdim=True))[..., None].unbind(1)
    each = of_each(experts, hidden)
    torch.testing.assert_close(output, first * each[:, 3] + second * each[:, 0])


def test_soft_routing_is_the_sum_over_all_experts(mixtral):
    output, hidden, router, experts = output_of(mixtral, routes.soft(weighing(mixtral)))
    weights = (hidden @ router.weight.T).softmax(-1)
    expected = (weights[..., None] * of_each(experts, hidden)).sum(1)
    torch.testing.assert_close(output, expected)
    _, forced = one(mixtral, routes.soft(weighing(mixtral)))
    assert forced.experts.tolist() == [[0, 1, 2, 3]] * 30
    torch.testing.assert_close(forced.weights, forced.logits.softmax(-1))


def test_random_experts_differ_and_are_the_same_next_time(mixtral):
    clean, forced = one(mixtral, routes.at_random(5))
    assert (forced.experts[:, 0] != forced.experts[:, 1]).all()
    assert torch.equal(one(mixtral, routes.at_random(5))[1].experts, forced.experts)
    assert not torch.equal(one(mixtral, routes.at_random(6))[1].experts, forced.experts)


def test_masked_experts_are_replaced_by_the_next_best(mixtral):
    layer = one(mixtral, routes.without_first())[0].layer
    clean, forced = one(mixtral, routes.masked({layer: [1]}, weighing(mixtral)))
    left = clean.logits.clone()
    left[:, 1] = -torch.inf
    assert torch.equal(forced.experts.sort(-1).values, left.topk(2).indices.sort(-1).values)
    untouched = (clean.experts != 1).all(-1)
    assert untouched.any()
    torch.testing.assert_close(
        forced.weights[untouched].sort(-1).values, clean.weights[untouched].sort(-1).values)
    with pytest.raises(StageFailed, match="1 of 4 experts remain and a token needs 2; mask fewer"):
        one(mixtral, routes.masked({layer: [0, 1, 2]}, weighing(mixtral)))


def test_dropping_and_permuting_by_hand(mixtral):
    clean, forced = one(mixtral, routes.without_first())
    assert torch.equal(forced.weights.max(-1).values, clean.weights.min(-1).values)
    assert (forced.weights.min(-1).values == 0).all()
    assert (selected(forced).sum(-1) == 1).all()
    clean, forced = one(mixtral, routes.permuted(0))
    moves = {(a, b) for a, b in zip(
        clean.experts.flatten().tolist(), forced.experts.flatten().tolist(), strict=True)}
    assert len({a for a, _ in moves}) == len({b for _, b in moves}) == len(moves) == 4


def test_a_share_of_the_tokens(mixtral):
    clean, whole = one(mixtral, routes.next_ranked())
    _, half = one(mixtral, routes.at_share(routes.next_ranked(), 0.5, seed=0))
    moved = (half.experts == whole.experts).all(-1)
    assert torch.equal(half.experts[~moved], clean.experts[~moved]) and 5 < moved.sum() < 25
    assert torch.equal(one(mixtral, routes.at_share(routes.next_ranked(), 1.0, 0))[1].experts,
                       whole.experts)


def test_a_policy_for_each_input_of_a_batch(mixtral):
    pair = torch.cat([OTHERS, TOKENS])
    with routed(mixtral) as clean:
        logits_of(mixtral, pair)
    with routed(mixtral, routes.per_input([lambda routing: None, routes.at_random(5)])) as forced:
        logits_of(mixtral, pair)
    (first, second), (free, _) = forced[0].split(2), clean[0].split(2)
    assert torch.equal(first.experts, free.experts) and torch.equal(first.weights, free.weights)
    # What the other is given is what it is given alone.
    assert torch.equal(second.experts, one(mixtral, routes.at_random(5))[1].experts)


def under_k(model, count, rule=None):
    """The logits with another number of experts, and the routes."""
    with routes.another_k(model, count, rule) as policy, routed(model, policy) as found:
        return logits_of(model), found


@pytest.mark.parametrize("name", [name for name in SEEN if FAMILIES[name].counts_experts])
def test_the_configured_k_is_the_model_as_it_is(name):
    """The very experts and weights, whatever the choice depends on beside the logits."""
    model = model_of(name)
    with routed(model) as clean:
        plain = logits_of(model)
    own = clean[0].experts.shape[1]
    for rule in (None, weighing(model)):
        found, forced = under_k(model, own, rule)
        assert torch.equal(found, plain)
        for before, after in zip(clean, forced, strict=True):
            assert torch.equal(before.experts, after.experts)
            assert torch.equal(before.weights, after.weights)
        # One expert more or less is another choice, and nothing of it stays.
        other = own - 1 or own + 1
        changed, forced = under_k(model, other, rule)
        assert not torch.equal(changed, plain) and torch.equal(logits_of(model), plain)
        assert all(r.experts.shape[1] == other for r in forced)
    for router, _ in blocks(model).values():
        assert router.top_k == own and not router._forward_hooks


ASIDE = ("deepseek_v2", "deepseek_v3", "ernie4_5_moe", "minimax_m2", "lfm2_moe", "mixtral")


@pytest.mark.parametrize("name", ASIDE)
def test_another_k_is_a_model_of_that_configuration(name):
    """Of families that choose by a bias or within groups of experts, and of one that does not."""
    model = model_of(name)
    key = FAMILIES[name].top_k
    aside = 0
    for count in (1, 3):
        other = type(model)(type(model.config)(**(model.config.to_dict() | {key: count}))).eval()
        other.load_state_dict(model.state_dict())
        found, forced = under_k(model, count)
        assert torch.equal(found, logits_of(other))
        for r in forced:
            largest = r.logits.topk(count).indices.sort(-1).values
            aside += (r.experts.sort(-1).values != largest).any(-1).sum()
    assert (aside > 0) == (name != "mixtral")


def test_where_the_number_cannot_be_set_it_is_refused():
    for name in ("phimoe", "jetmoe"):
        with pytest.raises(StageFailed, match=f"{name} .*their number per token cannot be set"):
            under_k(model_of(name), 1)


def test_another_k_can_be_weighed_by_the_other_rule(mixtral):
    """Two are chosen: one keeps its share of them, a third and fourth are weighed against them."""
    for count in (1, 2, 3, 4):
        _, forced = under_k(mixtral, count, weighing(mixtral))
        best = forced[0].logits.softmax(-1).sort(descending=True)
        assert torch.equal(forced[0].experts, best.indices[:, :count])
        expected = best.values / best.values[:, :2].sum(-1, keepdim=True)
        torch.testing.assert_close(forced[0].weights, expected[:, :count])
        # The family's own rule sums to 1.
        ruled = under_k(mixtral, count)[1][0].weights
        torch.testing.assert_close(ruled.sum(-1), torch.ones(30))
    # A softmax over all experts that is not divided by what was chosen: the sum stays.
    model = model_of("qwen2_moe")
    own = next(iter(blocks(model).values()))[0].top_k
    _, forced = under_k(model, 3, weighing(model))
    shares = forced[0].logits.softmax(-1).topk(3).values
    torch.testing.assert_close(under_k(model, 3)[1][0].weights, shares)
    kept = shares[:, :own].sum(-1, keepdim=True) / shares.sum(-1, keepdim=True)
    torch.testing.assert_close(forced[0].weights, shares * kept)
    # By a bias the third is not the third by its logits, and still is weighed against two.
    model = model_of("deepseek_v3")
    two, three = (under_k(model, count)[1][0] for count in (2, 3))
    scores = three.logits.sigmoid()
    expected = scores.gather(1, three.experts) / scores.gather(1, two.experts).sum(1, keepdim=True)
    scaled = expected * two.weights.sum(1, keepdim=True)
    torch.testing.assert_close(under_k(model, 3, weighing(model))[1][0].weights, scaled)


def gradient(model):
    embedded = model.get_input_embeddings()(TOKENS).detach().requires_grad_()
    logits = model(inputs_embeds=embedded, use_cache=False).logits
    return logits.detach(), torch.autograd.grad(logits.square().sum(), embedded)[0]


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_soft_backward_leaves_the_outputs_and_gives_soft_gradients(name):
    model = model_of(name)
    plain, hard = gradient(model)
    with routes.soft_backward(model, weighing(model)):
        values, straight = gradient(model)
    assert torch.equal(values, plain) and not torch.allclose(straight, hard, rtol=1e-2)


def test_the_straight_through_gradient_of_one_block_by_hand():
    """K = 1 with weights that sum to 1: the router has no gradient at all but this one."""
    model = model_of("mixtral")
    for router, _ in blocks(model).values():
        router.top_k = 1
    path = "model.layers.0.mlp"
    router, experts = blocks(model)[path]
    block = model.get_submodule(path)
    hidden = torch.randn(1, 5, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    every = torch.arange(4).expand(5, 4)

    def router_gradient(output):
        return torch.autograd.grad(output.sum(), router.weight, allow_unused=True)[0]

    plain = router_gradient(block(hidden)).abs().max()
    assert plain < 1e-5  # rounding of the normalisation
    weights = (hidden[0] @ router.weight.T).softmax(-1)
    expected = router_gradient(experts(hidden[0], every, weights))
    with routes.soft_backward(model, weighing(model)):
        found = router_gradient(block(hidden))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert expected.abs().max() > 1e-2


def test_with_spread_experts_the_same_routes_are_forced(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    start_distributed()
    model = model_of("mixtral")
    with routed(model) as clean:
        logits_of(model)
    with routed(model, routes.imposed(clean)):
        expected = logits_of(model, OTHERS)
    convert(model, 1, grouped_mm=True)
    with routed(model, routes.imposed(clean)) as forced:
        held = logits_of(model, OTHERS)
    assert torch.equal(forced[2].experts, clean[2].experts)
    torch.testing.assert_close(held, expected, rtol=1e-5, atol=1e-5)
    with routed(model, routes.imposed(clean)):
        assert torch.equal(logits_of(model), logits_of(model))
