"""Each knob does to a forward pass what its definition says, and nothing outside of it."""

import itertools

import pytest
import torch
from transformers import AutoConfig

from stages.finetune.assignment import balanced_experts, random_experts
from stages.finetune.batches import Example, micro_batch
from stages.finetune.evidence import Evidence
from stages.finetune.knobs import Knobs
from stages.finetune.refusals import contradictions, inapplicable
from stages.finetune.router_losses import z_loss
from stages.models.modes import evaluating
from stages.models.routing import blocks
from stages.models.sources import Facts
from stages.models.tiny import tiny_model, tiny_tokenizer
from tests.stages.finetune.passes import TOKENS, plain, recipe, run


@pytest.fixture(scope="module")
def models():
    names = ("mixtral", "qwen2_moe", "llama", "nllb-moe")
    return {name: tiny_model(name, tiny_tokenizer(), seed=3) for name in names}


ALL = [
    ("router.noise", {"router": {"noise": 0.3}}),
    ("router.jitter", {"router": {"jitter": 0.2}}),
    ("router.top_k", {"router": {"top_k": 3}}),
    ("router.assignment", {"router": {"assignment": "random"}}),
    ("router.assignment", {"router": {"assignment": "balanced"}}),
    ("experts.dropout", {"experts": {"dropout": 0.2}}),
    ("experts.drop", {"experts": {"drop": 0.4}}),
    ("dropout.residual", {"dropout": {"residual": 0.2}}),
]


@pytest.mark.parametrize(
    ("name", "knob", "fields"),
    [
        *((name, *case) for name in ("mixtral", "qwen2_moe") for case in ALL),
        *(("nllb-moe", *case) for case in ALL if case[0] != "dropout.residual"),
    ],
)
def test_a_knob_changes_training_passes_alone_and_says_so(models, name, knob, fields):
    model = models[name]
    before = plain(model)
    logits, _, evidence = run(model, **fields)
    assert (logits - before).abs().max() > 1e-3
    assert torch.equal(plain(model), before)  # nothing is left behind
    assert evidence.measured(knob)
    again, *_ = run(model, **fields)
    assert torch.equal(again, logits)  # the seed decides


def test_default_recipe_changes_nothing(models):
    for model in models.values():
        logits, *_ = run(model)
        assert torch.equal(logits, plain(model))


def test_noise_is_added_to_the_logits_before_the_choice(models):
    model = models["mixtral"]
    _, clean, _ = run(model)
    _, noisy, evidence = run(model, router={"noise": 0.3})
    difference = noisy[0].logits - clean[0].logits
    assert difference.std().item() == pytest.approx(0.3, rel=0.15)
    assert abs(difference.mean().item()) < 0.06
    for routing in noisy:
        assert torch.equal(routing.experts, routing.logits.topk(2).indices)
    assert evidence.measured("router.noise")["mean_square_of_the_noise"] == pytest.approx(
        0.09, rel=0.15
    )


def test_jitter_moves_the_routers_input_and_not_the_experts(models):
    model, inputs = models["mixtral"], {}
    router, experts = next(iter(blocks(model).values()))
    hooks = [
        experts.register_forward_pre_hook(lambda m, a: inputs.update(experts=a[0])),
        router.register_forward_pre_hook(lambda m, a: inputs.update(router=a[0])),
    ]
    _, jittered, _ = run(model, router={"jitter": 0.2})
    for hook in hooks:
        hook.remove()
    # The hook above saw the router's input before the factor, and the experts got the same.
    assert torch.equal(inputs["experts"], inputs["router"].reshape(inputs["experts"].shape))
    _, clean, _ = run(model)
    assert (jittered[0].logits - clean[0].logits).abs().max() > 1e-2
    # Uniform in [0.8, 1.2], so the logits of one token move by at most 0.2 |w| |x| summed.
    bound = 0.2 * (inputs["experts"].abs() @ router.weight.abs().T)
    assert ((jittered[0].logits - clean[0].logits).abs() <= bound + 1e-5).all()


def test_top_k_is_the_familys_own_choice_of_another_size(models):
    _, routings, evidence = run(models["mixtral"], router={"top_k": 3})
    for routing in routings:
        assert routing.experts.shape[1] == 3
        torch.testing.assert_close(routing.weights.sum(-1), torch.ones(64))
    assert evidence.measured("router.top_k") == {"experts_per_token": 3.0}


def test_a_moduleformer_trains_with_the_experts_of_another_top_k():
    """In attention and feed-forward blocks, as one whose configuration says so."""
    model = tiny_model("moduleformer", tiny_tokenizer(), seed=3)
    three = AutoConfig.for_model(**model.config.to_dict() | {"k_att": 3, "k_mlp": 3})
    other = type(model)(three).eval()
    other.load_state_dict(model.state_dict())
    logits, routings, evidence = run(model, router={"top_k": 3})
    assert [tuple(routing.experts.shape) for routing in routings] == [(64, 3)] * 4
    assert evidence.measured("router.top_k") == {"experts_per_token": 3.0}
    torch.testing.assert_close(logits, plain(other))
    assert (plain(other) - plain(model)).abs().max() > 1e-2
    facts = Facts("moe", "moduleformer", experts=4, top_k=2)
    assert not list(inapplicable(recipe(router={"top_k": 3}), facts))
    refused = recipe(router={"top_k": 3, "assignment": "random"}, experts={"drop": 0.1})
    assert [f for f, _ in inapplicable(refused, facts)] == ["experts.drop"]


def test_random_experts_are_different_and_evenly_drawn():
    torch.manual_seed(0)
    chosen = random_experts(torch.zeros(6000, 4), 2)
    assert (chosen[:, 0] != chosen[:, 1]).all()
    share = torch.bincount(chosen.flatten(), minlength=4) / 12000
    assert share.tolist() == pytest.approx([0.25] * 4, abs=0.015)


def test_random_gate_keeps_the_weights_of_the_router(models):
    _, routings, _ = run(models["mixtral"], router={"assignment": "random"})
    probability = routings[0].logits.softmax(-1).gather(-1, routings[0].experts)
    expected = probability / probability.sum(-1, keepdim=True)
    torch.testing.assert_close(routings[0].weights, expected)


def test_balanced_assignment_worked_by_hand():
    # Both tokens prefer expert 0; the one that loses less by it yields.
    assert balanced_experts(torch.tensor([[5.0, 4.0], [5.0, 1.0]]), 1).tolist() == [[1], [0]]
    # With two experts for each of two tokens there is only one way.
    both = balanced_experts(torch.tensor([[5.0, 4.0], [5.0, 1.0]]), 2)
    assert both.sort(-1).values.tolist() == [[0, 1], [0, 1]]


def test_balanced_assignment_is_even_and_the_best_there_is():
    logits = torch.randn(6, 3, generator=torch.Generator().manual_seed(1))
    chosen = balanced_experts(logits, 1)
    assert torch.bincount(chosen.flatten()).tolist() == [2, 2, 2]
    best = max(
        sum(logits[t, e].item() for t, e in enumerate(p))
        for p in set(itertools.permutations([0, 0, 1, 1, 2, 2]))
    )
    assert logits.gather(1, chosen).sum().item() == pytest.approx(best)
    uneven = balanced_experts(torch.randn(7, 3), 2)
    assert (uneven[:, 0] != uneven[:, 1]).all()
    assert torch.bincount(uneven.flatten(), minlength=3).max() <= 2 * 3


def test_balanced_training_evens_the_load(models):
    _, routings, evidence = run(models["mixtral"], router={"assignment": "balanced"})
    for routing in routings:
        assert torch.bincount(routing.experts.flatten()).tolist() == [32] * 4
    measured = evidence.measured("router.assignment")
    assert measured["load_variation"] == 0 < measured["load_variation_of_the_router"]


INSIDE = ("jetmoe", "moduleformer", "switch_transformers")
"""Families that choose their experts inside their blocks."""


@pytest.mark.parametrize("name", INSIDE)
@pytest.mark.parametrize("way", ["random", "balanced"])
def test_an_assignment_acts_on_a_choice_inside_a_block(name, way):
    """The experts meet the tokens that the assignment gives them, with the router's weights."""
    model, met = tiny_model(name, tiny_tokenizer(), seed=3), []
    before = plain(model)
    hooks = [module.register_forward_hook(lambda m, args, out: met.append(out))
             for module, _ in blocks(model).values()]  # fmt: skip
    logits, routings, evidence = run(model, router={"assignment": way})
    for hook in hooks:
        hook.remove()
    assert (logits - before).abs().max() > 1e-3 and torch.equal(plain(model), before)
    assert len(routings) == len(blocks(model))
    for routing in routings:
        chosen, count = routing.experts, routing.experts.shape[1]
        assert all(len(set(row)) == count for row in chosen.tolist())
        if name == "jetmoe":
            expected = routing.logits.gather(-1, chosen).softmax(-1)
        else:
            expected = routing.logits.softmax(-1).gather(-1, chosen)
        torch.testing.assert_close(routing.weights, expected)
        if way == "balanced":
            assert torch.bincount(chosen.flatten()).tolist() == [64 * count // 4] * 4
    measured = evidence.measured("router.assignment")
    assert 0.05 < measured["share_of_choices_changed"] < 0.9
    assert way == "random" or measured["load_variation"] == 0
    again, *_ = run(model, router={"assignment": way})
    assert torch.equal(again, logits)


@pytest.mark.parametrize("name", INSIDE)
def test_an_assignment_of_what_the_router_chooses_changes_nothing(name, monkeypatch):
    model = tiny_model(name, tiny_tokenizer(), seed=3)
    for router, _ in blocks(model).values():
        router.expert_capacity = 64
    own = lambda logits, k: logits.topk(k).indices  # noqa: E731
    monkeypatch.setattr("stages.finetune.knobs.random_experts", own)
    logits, *_ = run(model, router={"assignment": "random"})
    torch.testing.assert_close(logits, plain(model), rtol=0, atol=1e-5)


def test_padding_takes_no_place_of_a_balanced_assignment():
    """Two prompts of 6 and 2 tokens: two of the eight for each of four experts, and padding moves
    nobody."""
    model = tiny_model("switch_transformers", tiny_tokenizer(), seed=3)
    examples = [Example((5, 6, 7, 8, 9, 10, 20, 21), 2), Example((11, 12, 22, 23), 2)]
    part = micro_batch(examples, model.config, torch.device("cpu"))
    knobs = Knobs(model, recipe(router={"assignment": "balanced"}), Evidence())
    knobs.attach()
    with torch.no_grad(), knobs.forward(part) as routings:
        model(**part.arguments, use_cache=False)
    encoder, decoder = part.without_padding(routings)
    assert torch.bincount(encoder.experts.flatten()).tolist() == [2] * 4
    assert torch.bincount(decoder.experts.flatten()).tolist() == [1] * 4
    assert len(routings[0].experts) == 12
    beside = recipe(router={"assignment": "balanced", "capacity": 3})
    refusal = "cannot act beside assignment, where no expert is full; keep one"
    assert ("router.capacity", refusal) in list(contradictions(beside))


def test_dropped_experts_add_nothing_and_the_others_more(models):
    model = models["mixtral"]
    _, clean, _ = run(model)
    _, routings, evidence = run(model, seed=1, experts={"drop": 0.5})
    first = routings[0]
    assert torch.equal(first.experts, clean[0].experts)
    gone = {e for e in range(4) if (first.weights[first.experts == e] == 0).all()}
    assert 0 < len(gone) < 4
    for expert in range(4):
        factor = 0.0 if expert in gone else 2.0  # 1 / (1 - 0.5)
        here = first.experts == expert
        torch.testing.assert_close(first.weights[here], clean[0].weights[here] * factor)
    dropped = evidence.measured("experts.drop")["share_of_experts_dropped"]
    zero = torch.cat([r.weights.flatten() == 0 for r in routings]).float().mean().item()
    assert evidence.measured("experts.drop")["share_of_choices_dropped"] == pytest.approx(zero)
    assert dropped in {n / 16 for n in range(17)}


def test_expert_dropout_touches_routed_outputs_and_no_shared_expert(models):
    model, outputs = models["qwen2_moe"], {}
    block = model.get_submodule("model.layers.1.mlp")

    def keep(name):
        return lambda module, args, out: outputs.update({name: out})

    def watched(**fields):
        outputs.clear()
        with_hooks = [
            getattr(block, name).register_forward_hook(keep(name))
            for name in ("shared_expert", "experts")
        ]
        with_hooks.append(block.register_forward_hook(keep("block")))
        run(model, **fields)
        for hook in with_hooks:
            hook.remove()
        return dict(outputs)

    clean, dropped = watched(), watched(experts={"dropout": 0.25})
    assert torch.equal(clean["shared_expert"], dropped["shared_expert"])
    # The hook above is older than the knob's, so it saw the experts before dropout.
    assert torch.equal(clean["experts"], dropped["experts"])
    shared = clean["block"].flatten(0, 1) - clean["experts"]
    routed = dropped["block"].flatten(0, 1) - shared
    zero = routed.abs() < 1e-6
    assert zero.float().mean().item() == pytest.approx(0.25, abs=0.03)
    torch.testing.assert_close(routed[~zero], clean["experts"][~zero] / 0.75, rtol=1e-3, atol=1e-5)


def test_residual_dropout_acts_on_both_blocks_of_each_layer(models):
    _, _, evidence = run(models["llama"], dropout={"residual": 0.1})
    share = evidence.measured("dropout.residual")["share_of_outputs_dropped"]
    assert share == pytest.approx(0.1, abs=0.01)


def test_attention_dropout_has_no_evidence_without_a_forward_pass(models):
    evidence = Evidence()
    knobs = Knobs(models["llama"], recipe(dropout={"attention": 0.5}), evidence)
    knobs.attach()
    with knobs.forward():
        pass
    assert evidence.measured("dropout.attention") == {}


def test_attention_dropout_acts_in_training_mode(models):
    model = models["llama"]
    own = model.model.layers[0].self_attn.attention_dropout
    model.train()
    try:
        logits, _, evidence = run(model, dropout={"attention": 0.5})
        assert (logits - plain(model)).abs().max() > 1e-2
    finally:
        model.eval()
    assert evidence.measured("dropout.attention") == {"modules": 4, "probability": 0.5}
    _, _, evidence = run(model, dropout={"attention": 0.5})
    assert evidence.measured("dropout.attention") == {"modules": 4, "probability": 0.0}
    assert model.model.layers[0].self_attn.attention_dropout == own


def test_evaluation_leaves_every_module_in_the_mode_it_was_in(models):
    model = models["llama"]
    model.train()
    model.model.layers[1].eval()
    before = [module.training for module in model.modules()]
    with evaluating(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == before
    model.eval()


@pytest.mark.parametrize("name", ["switch_transformers", "nllb-moe"])
def test_capacity_drops_tokens_in_training_passes_alone(name):
    model = tiny_model(name, tiny_tokenizer(), seed=3).train()  # no dropout of its own
    routers = [router for router, _ in blocks(model).values()]
    own, kept = routers[0].expert_capacity, []

    def largest(router, args, out):
        if name == "switch_transformers":
            kept.append(out[0].sum(-2).max().item())
        else:
            weights, experts, _ = out
            kept.append(torch.bincount(experts[weights > 0]).max().item())

    hook = routers[0].register_forward_hook(largest)
    before, *_ = run(model)
    limited, *_ = run(model, router={"capacity": 2})
    hook.remove()
    assert (limited - before).abs().max() > 1e-3 and kept[0] > kept[1] == 2
    assert all(router.expert_capacity == own for router in routers)
    given = recipe(router={"capacity": 2})
    assert [f for f, _ in inapplicable(given, Facts("moe", "mixtral"))] == ["router.capacity"]


UNSEEN = {
    "noise": {"router": {"noise": 0.5}},
    "jitter": {"router": {"jitter": 0.5}},
    "dropout": {"experts": {"dropout": 0.5}},
}


@pytest.mark.parametrize("name", ["jetmoe", "switch_transformers"])
@pytest.mark.parametrize("knob", UNSEEN)
def test_families_that_choose_inside_their_blocks_have_what_needs_no_choice(name, knob):
    model = tiny_model(name, tiny_tokenizer(), seed=3)

    def logits(**fields):
        evidence = Evidence()
        knobs = Knobs(model, recipe(**fields), evidence)
        knobs.attach()
        torch.manual_seed(0)
        with knobs.forward() as routings:
            out = model(input_ids=TOKENS, labels=TOKENS, use_cache=False).logits
        return out, routings

    plain, routings = logits()
    changed, _ = logits(**UNSEEN[knob])
    assert (changed - plain).abs().max() > 1e-3
    routers = [p for router, _ in blocks(model).values() for p in router.parameters()]
    gradients = torch.autograd.grad(z_loss(routings), routers)
    assert all(gradient.norm() > 0 for gradient in gradients)
    refused = recipe(router={"top_k": 2, "assignment": "random"}, experts={"drop": 0.1})
    facts = Facts("moe", name, experts=4, top_k=1)
    assert {field for field, _ in inapplicable(refused, facts)} == {
        "router.top_k", "experts.drop"}  # fmt: skip
