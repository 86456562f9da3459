"""Dropout acts on the outputs that it names, once, in every family that does not refuse it."""

import pytest
import torch

from stages.models.tiny import tiny_model, tiny_tokenizer
from tests.stages.finetune.passes import run

INSIDE = {
    "jetmoe": ("model.layers.0.self_attention", "model.layers.0.mlp"),
    "moduleformer": ("transformer.h.0.attn", "transformer.h.0.mlpf"),
}


@pytest.mark.parametrize(("name", "block"), [(n, b) for n in INSIDE for b in INSIDE[n]])
def test_expert_dropout_touches_the_sum_of_experts_that_their_block_adds_up(name, block):
    """Once: not the queries, which are experts' too, nor the pairs of a token and an expert before
    the router weighs them; and before the bias of the block."""
    model, seen = tiny_model(name, tiny_tokenizer(), seed=3), {}
    block = model.get_submodule(block)
    bias = torch.zeros(64)
    if name == "jetmoe":
        bias = getattr(block, "experts", block).bias
        torch.nn.init.normal_(bias)

    def keep(module, args, kwargs, out):
        seen.update(args=args, kwargs=kwargs, out=out)

    hook = block.register_forward_hook(keep, with_kwargs=True)
    _, _, evidence = run(model, experts={"dropout": 0.25})
    hook.remove()
    with torch.no_grad():
        before = block(*seen["args"], **seen["kwargs"])
    before, after = (out[0] if isinstance(out, tuple) else out for out in (before, seen["out"]))
    dropped = after == bias
    assert dropped.float().mean().item() == pytest.approx(0.25, abs=0.03)
    expected = (before - bias)[~dropped] / 0.75
    torch.testing.assert_close((after - bias)[~dropped], expected, rtol=1e-4, atol=1e-5)
    measured = evidence.measured("experts.dropout")["share_of_outputs_dropped"]
    assert measured == pytest.approx(0.25, abs=0.02)
