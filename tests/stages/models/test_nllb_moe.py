"""NLLB-MoE: the published formulas token by token, released weights, and what is refused."""

import math

import pytest
import torch
from transformers import NllbMoeConfig
from transformers.models.nllb_moe import modeling_nllb_moe as installed

from stages.errors import BadInput
from stages.models.load import load
from stages.models.nllb_moe import Block, NllbMoeForConditionalGeneration
from stages.models.routing import weighing
from stages.models.tiny import tiny_model, tiny_tokenizer

EXPERTS, HIDDEN = 4, 64
# Of each token the first and the second choice, 12 tokens: mostly neither expert 0 nor expert 1.
CHOICES = [(3, 2), (3, 2), (2, 3), (3, 1), (3, 2), (2, 0), (1, 3), (3, 2), (2, 3), (3, 0), (0, 3),
           (2, 1)]  # fmt: skip
PADDED = (2, 10, 11)


def config(**fields):
    shape = {
        "vocab_size": 40, "d_model": HIDDEN, "num_experts": EXPERTS, "expert_capacity": 3,
        **{f"{half}_{part}": value for half in ("encoder", "decoder") for part, value in
           {"layers": 2, "ffn_dim": 16, "attention_heads": 4, "sparse_step": 2}.items()},
    }  # fmt: skip
    return NllbMoeConfig(**shape | {"dropout": 0.0, "attention_dropout": 0.0} | fields)


def model_of(**fields):
    torch.manual_seed(0)
    model = NllbMoeForConditionalGeneration(config(**fields))
    for block in (m for m in model.modules() if isinstance(m, Block)):
        torch.nn.init.normal_(block.router.classifier.weight, std=HIDDEN**-0.5)
        for expert in range(EXPERTS):
            torch.nn.init.normal_(block.experts[f"expert_{expert}"].fc2.bias)
    return model.eval()


def hand_set(block):
    """Hidden states whose tokens go where ``CHOICES`` says, each with logits of its own."""
    router = block.router.classifier
    with torch.no_grad():
        router.weight.copy_(torch.eye(EXPERTS, HIDDEN))
    hidden = torch.randn(len(CHOICES), HIDDEN, generator=torch.Generator().manual_seed(1))
    for token, (first, second) in enumerate(CHOICES):
        hidden[token, :EXPERTS] = -1 - 0.1 * torch.arange(EXPERTS)
        hidden[token, first], hidden[token, second] = 1 + 0.3 * (token * 5 % 7), 0.5
    return hidden


def by_hand(block, hidden, padding=(), training=False, before=False, prioritised=False):
    """The block's output token by token and expert by expert: softmax, the best two, a queue of
    ``expert_capacity`` places in training in which all first choices stand before all second
    ones, weights divided by their sum over the two (or, after drops, over those kept)."""
    probabilities = [(h @ block.router.classifier.weight.T).softmax(0).tolist() for h in hidden]
    ranked = [sorted(range(EXPERTS), key=lambda e, p=p: -p[e])[:2] for p in probabilities]
    order = [t for t in range(len(hidden)) if t not in padding]
    if prioritised:
        order.sort(key=lambda t: -max(probabilities[t]))
    capacity = block.router.expert_capacity if training else math.inf
    queue, kept = dict.fromkeys(range(EXPERTS), 0), {}
    for choice in (0, 1):
        for token in order:
            expert = ranked[token][choice]
            kept[token, choice] = queue[expert] < capacity
            queue[expert] += 1
    output = torch.zeros_like(hidden)
    for token in order:
        counted = [c for c in (0, 1) if before or kept[token, c]]
        total = sum(probabilities[token][ranked[token][c]] for c in counted)
        for choice in (0, 1):
            if kept[token, choice]:
                expert = ranked[token][choice]
                neurons = block.experts[f"expert_{expert}"]
                inner = torch.relu(neurons.fc1.weight @ hidden[token] + neurons.fc1.bias)
                outer = neurons.fc2.weight @ inner + neurons.fc2.bias
                output[token] += probabilities[token][expert] / total * outer
    return output, kept


@pytest.mark.parametrize("prioritised", [False, True])
@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("training", [False, True])
@torch.no_grad()
def test_a_block_is_the_published_formula(training, before, prioritised):
    block = model_of(
        moe_token_dropout=0.0,
        normalize_router_prob_before_dropping=before,
        batch_prioritized_routing=prioritised,
    ).model.encoder.layers[1].ffn.train(training)  # fmt: skip
    hidden = hand_set(block)
    for padding in ((), PADDED):
        expected, kept = by_hand(block, hidden, padding, training, before, prioritised)
        assert all(kept.values()) != training
        # Two sequences of six, as attention adds it to its scores: the last query sees all keys.
        mask = torch.zeros(len(hidden))
        mask[list(padding)] = torch.finfo(torch.float32).min
        mask = mask.view(2, 1, 1, 6).expand(2, 1, 6, 6)
        found = block(hidden.view(2, 6, HIDDEN), mask if padding else None)
        torch.testing.assert_close(found.view(-1, HIDDEN), expected, rtol=1e-5, atol=1e-6)
        assert all((found.view(-1, HIDDEN)[t] == 0).all() for t in padding)


@torch.no_grad()
def test_order_of_service_matters_in_the_case_above():
    block = model_of().model.encoder.layers[1].ffn
    hidden = hand_set(block)
    in_order, by_weight = (by_hand(block, hidden, (), True, True, p)[1] for p in (False, True))
    assert in_order != by_weight


@torch.no_grad()
def test_the_models_logits_are_those_of_blocks_by_hand():
    """Encoder and decoder, a padded batch; released settings but for the size."""
    model = model_of(normalize_router_prob_before_dropping=True)
    ids = torch.arange(3, 19).view(2, 8)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    given = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": ids[:, :6],
             "decoder_attention_mask": mask[:, :6]}  # fmt: skip
    logits = model(**given).logits
    used = set()

    def replaced(block, args, output):
        hidden, added = args
        padding = (mask[:, : hidden.shape[1]].flatten() == 0).nonzero().flatten().tolist()
        expected, _ = by_hand(block, hidden.flatten(0, 1), padding)
        used.update(block.router(hidden.flatten(0, 1), added)[1].flatten().tolist())
        # Expert output masking, whose expectation is used outside training.
        return (1 - 0.2) * expected.view_as(hidden)

    hooks = [m.register_forward_hook(replaced) for m in model.modules() if isinstance(m, Block)]
    torch.testing.assert_close(model(**given).logits, logits, rtol=1e-5, atol=1e-6)
    assert len(hooks) == 2 and used == {0, 1, 2, 3}


def test_the_installed_transformers_is_still_wrong():
    """When this fails, transformers has mended it: see whether stages/models/nllb_moe.py can go."""
    experts = installed.NllbMoeExperts(NllbMoeConfig(d_model=8, num_experts=4), ffn_dim=8)
    asked = set()
    for name, expert in experts.items():
        if name.startswith("expert_"):
            expert.register_forward_hook(lambda *_, name=name: asked.add(name))
    chosen = torch.nn.functional.one_hot(torch.tensor([2, 3, 3]), 4)
    experts(torch.randn(3, 8), chosen, chosen.float())
    assert asked == {"expert_0", "expert_1"}
    router = installed.NllbMoeTop2Router(NllbMoeConfig(d_model=8, num_experts=4)).eval()
    router(torch.randn(3, 8))
    assert router.expert_capacity == 3  # of 64: what training would go on with


def test_released_weights_load_unchanged_and_back(tmp_path):
    """The folder is what transformers' own class writes, and what it reads again."""
    plain = installed.NllbMoeForConditionalGeneration(config())
    plain.save_pretrained(tmp_path / "released")
    model = load(tmp_path / "released")
    assert type(model) is NllbMoeForConditionalGeneration
    model.save_pretrained(tmp_path / "exported")
    kind = installed.NllbMoeForConditionalGeneration
    again, report = kind.from_pretrained(tmp_path / "exported", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    expected = plain.state_dict()
    for state in (model.state_dict(), again.state_dict()):
        assert state.keys() == expected.keys()
        assert all(torch.equal(value, expected[name]) for name, value in state.items())


def test_expert_output_masking_takes_whole_outputs_away():
    block = model_of(moe_token_dropout=0.25).model.encoder.layers[1].ffn
    weights = torch.rand(4000, 2) + 0.5
    torch.manual_seed(0)
    masked = block.experts.train().masked(weights)
    gone = masked == 0
    assert gone.float().mean().item() == pytest.approx(0.25, abs=0.02)
    torch.testing.assert_close(masked[~gone], weights[~gone])  # as published, not scaled up
    torch.testing.assert_close(block.experts.eval().masked(weights), 0.75 * weights)


@torch.no_grad()
def test_evaluation_does_not_change_the_capacity_of_training():
    model = model_of(moe_token_dropout=0.0)
    block = model.model.encoder.layers[1].ffn
    hidden = hand_set(block)
    before = block.train()(hidden[None])
    block.eval()(hidden[None, :2])
    assert torch.equal(block.train()(hidden[None]), before)
    assert block.router.expert_capacity == 3


def test_weights_are_normalised_softmax_and_layers_are_never_skipped():
    model = model_of(encoder_layerdrop=1.0, decoder_layerdrop=1.0).train()
    logits = torch.randn(5, EXPERTS)
    experts = logits.topk(2).indices
    scores = logits.softmax(-1).gather(-1, experts)
    torch.testing.assert_close(
        weighing(model.eval())(logits, experts), scores / scores.sum(-1, keepdim=True)
    )
    ran = []
    for layer in (*model.model.encoder.layers, *model.model.decoder.layers):
        layer.register_forward_hook(lambda *_: ran.append(1))
    model.train()(input_ids=torch.arange(3, 9)[None], decoder_input_ids=torch.arange(3, 6)[None])
    assert len(ran) == 4


def test_a_bf16_models_routers_keep_their_type_and_positions_take_it():
    """transformers turns a router's matrix into another tensor, and fails where, as in training
    under DeepSpeed, parameters alone are bf16."""
    model = tiny_model("nllb-moe", tiny_tokenizer(), seed=0)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    before = {name: p.data_ptr() for name, p in model.named_parameters()}
    tokens = torch.arange(3, 9)[None]
    out = model(input_ids=tokens, labels=tokens)
    assert out.logits.isfinite().all()
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == before


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("second_expert_policy", "random", "draws the second expert of a token at random"),
        ("moe_eval_capacity_token_fraction", 0.25, "depend on the others of its batch"),
    ],
)
def test_what_makes_answers_random_or_depend_on_their_batch_is_refused(field, value, reason):
    with pytest.raises(BadInput, match=f"config.json: {field} .*{reason}"):
        NllbMoeForConditionalGeneration(config(**{field: value}))
