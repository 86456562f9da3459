"""Dropout acts on the outputs that it names, once, in every family that does not refuse it."""

from dataclasses import replace

import pytest
import torch

from stages.errors import StageFailed
from stages.finetune.dropout import attention_modules, residual_modules
from stages.finetune.evidence import Evidence
from stages.finetune.knobs import Knobs
from stages.finetune.refusals import inapplicable
from stages.models.families import FAMILIES
from stages.models.sources import Facts
from stages.models.tiny import tiny_model, tiny_tokenizer
from stages.models.tiny_shapes import TINY
from tests.stages.finetune.passes import recipe, run
from tests.stages.models.tiny_folders import dense_model

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


def test_residual_dropout_acts_on_both_blocks_of_a_moduleformer():
    model, seen = tiny_model("moduleformer", tiny_tokenizer(), seed=3), []
    layer = model.transformer.h[0]
    for block in (layer.attn, layer.mlpf):  # before the knob's own hooks
        block.register_forward_hook(lambda module, args, out: seen.append(out))
    layer.resid_dropout.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    _, _, evidence = run(model, dropout={"residual": 0.25})
    for before, after in (seen[-4:-2], seen[-2:]):  # after those of the trial
        dropped = after == 0
        assert dropped.float().mean().item() == pytest.approx(0.25, abs=0.03)
        torch.testing.assert_close(after[~dropped], before[~dropped] / 0.75)
    share = evidence.measured("dropout.residual")["share_of_outputs_dropped"]
    assert share == pytest.approx(0.25, abs=0.02)


TRAINED = [name for name, entry in FAMILIES.items() if entry.residual and not entry.no_training]


@pytest.mark.parametrize("name", TRAINED)
def test_the_registry_knows_the_blocks_on_the_residual_stream(name):
    """Two of each layer; that their outputs are plainly added is tried out where they are asked
    for."""
    if name in TINY:
        model = tiny_model(name, tiny_tokenizer(), seed=3)
    else:
        model = dense_model(name, **DENSE.get(name, {}))
    found = residual_modules(model.eval())
    layers = [path.rpartition(".")[0] for path in found]
    assert len(set(layers)) == model.config.num_hidden_layers and len(found) == 2 * len(set(layers))


DENSE = {"gemma": {"head_dim": 16}}


def test_blocks_behind_a_norm_are_found_out(monkeypatch):
    assert not {"olmo2", "gemma2", "flex_olmo", "granitemoeshared"} & set(TRAINED)
    entry = replace(FAMILIES["olmo2"], residual=FAMILIES["olmo"].residual)
    monkeypatch.setitem(FAMILIES, "olmo2", entry)
    with pytest.raises(StageFailed, match="dropout.residual: .* olmo2: .* not plainly added"):
        Knobs(dense_model("olmo2").eval(), recipe(dropout={"residual": 0.1}), Evidence())


@pytest.mark.parametrize(
    "name", [name for name, entry in FAMILIES.items() if entry.modality == "text"]
)
def test_the_registry_knows_whose_attention_dropout_can_be_set(name):
    if name in TINY:
        model = tiny_model(name, tiny_tokenizer(), seed=3)
    else:
        model = dense_model(name, **DENSE.get(name, {}))
    found = [model.get_submodule(path).attention_dropout for path in attention_modules(model)]
    # Falcon's is a module, read from elsewhere.
    assert any(isinstance(p, float) for p in found) == FAMILIES[name].attention_dropout
    refused = dict(inapplicable(recipe(dropout={"attention": 0.1}), Facts(family=name)))
    assert ("dropout.attention" in refused) != FAMILIES[name].attention_dropout
