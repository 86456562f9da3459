"""A sparse block that computes something else once it is spread out is refused by its name.

One process, whose group of ranks is itself; what two ranks exchange wrongly is in test_loop.py.
"""

import pytest
import torch

from stages.errors import StageFailed
from stages.finetune.loop import start_distributed
from stages.models.block_check import check_blocks, observe_blocks
from stages.models.expert_parallel import convert
from stages.models.families import FAMILIES
from stages.models.tiny import tiny_model, tiny_tokenizer
from stages.models.tiny_shapes import TINY

SPREAD = [n for n in TINY if FAMILIES[n].is_moe and not FAMILIES[n].no_expert_parallel]
MIXTRAL, DEEPSEEK, QWEN = "model.layers.2.mlp", "model.layers.3.mlp", "model.layers.1.mlp"


@pytest.fixture(autouse=True)
def group(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    start_distributed()


def observed(name):
    """A converted model, and what its blocks did before."""
    model = tiny_model(name, tiny_tokenizer(), seed=3)
    before = observe_blocks(model)
    convert(model, 1, grouped_mm=True)
    return model, before


def called(entry, arguments):
    """The experts that an experts module's call is for."""
    if entry.index is not None:
        return set(arguments[1].flatten().tolist())
    if entry.chooses_largest:  # how many tokens each has
        return {expert for expert, tokens in enumerate(arguments[1]) if tokens}
    return set(arguments[1].nonzero()[:, -1].tolist())


@pytest.mark.parametrize("name", SPREAD)
def test_every_block_and_every_expert_is_looked_at(name):
    model, before = observed(name)
    entry, experts = FAMILIES[name], getattr(model.config, FAMILIES[name].num_experts)
    for path in entry.modules(model, "expert"):
        assert called(entry, before[path].arguments) == set(range(experts)), path
    blocks = before.keys() - entry.modules(model, "expert").keys()
    assert len(blocks) == len(entry.modules(model, "router"))
    for role in ("router", "expert"):
        for path in entry.modules(model, role):
            assert any(path.startswith(f"{block}.") for block in blocks), path
    check_blocks(model, before)


@pytest.mark.parametrize("expert", range(4))
def test_an_expert_that_computes_something_else_is_named(expert):
    model, before = observed("mixtral")
    with torch.no_grad():
        model.get_submodule(f"{MIXTRAL}.experts").down_proj[expert, 5] *= 1.01
    with pytest.raises(StageFailed, match=rf"{MIXTRAL}\.experts: the expert-parallel layer"):
        check_blocks(model, before)


def softmax_scores(block):
    """As a preset does that takes the family's router for Mixtral's."""

    def forward(hidden_states):
        logits = hidden_states.flatten(0, -2) @ block.gate.weight.T
        weights, experts = logits.softmax(-1).topk(block.gate.top_k)
        return logits, weights / weights.sum(-1, keepdim=True), experts

    block.gate.forward = forward


def no_correction_bias(block):
    block.gate.e_score_correction_bias.zero_()


def no_shared_expert(block):
    block.shared_experts.down_proj.weight.data.zero_()


def no_shared_expert_gate(block):
    block.shared_expert_gate.weight.data.zero_()  # half of the shared expert for every token


@pytest.mark.parametrize(
    ("name", "path", "preset"),
    [
        ("deepseek_v3", DEEPSEEK, softmax_scores),
        ("deepseek_v3", DEEPSEEK, no_correction_bias),
        ("deepseek_v3", DEEPSEEK, no_shared_expert),
        ("qwen2_moe", QWEN, no_shared_expert_gate),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_block_with_a_wrong_router_or_shared_expert_is_named(name, path, preset, dtype):
    model, before = observed(name)
    model.to(dtype)
    check_blocks(model, before)
    preset(model.get_submodule(path))
    with pytest.raises(StageFailed, match=rf"{path}: the block with its router and all experts"):
        check_blocks(model, before)


def test_a_block_that_adds_nothing_yet_is_compared_as_well():
    model = tiny_model("mixtral", tiny_tokenizer(), seed=3)
    experts = model.get_submodule(f"{MIXTRAL}.experts")
    with torch.no_grad():
        experts.down_proj.zero_()
    before = observe_blocks(model)
    convert(model, 1, grouped_mm=True)
    check_blocks(model, before)
    for value, size in ((1e-3, r"\S+"), (float("nan"), "inf")):
        with torch.no_grad():
            model.get_submodule(f"{MIXTRAL}.experts").down_proj[1] = value
        with pytest.raises(StageFailed, match=rf"{MIXTRAL}\.experts: .* differs .* by {size} of"):
            check_blocks(model, before)
