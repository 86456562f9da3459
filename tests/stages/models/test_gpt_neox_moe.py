"""GPT-NeoX with experts, as a model of its own: what transformers and this project ask of one."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from stages.finetune.batches import Example
from stages.finetune.export import padded_logits, training_logits
from stages.models.gpt_neox_moe import GPTNeoXMoeForCausalLM
from tests.stages.models.tiny_folders import dense_model, plain

TOKENS = torch.randint(3, 259, (2, 30), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model():
    dense_model("gpt_neox")  # transformers keeps what it finds out about a class
    config = AutoConfig.for_model(
        "gpt_neox_moe",
        vocab_size=259,
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=128,
        moe_intermediate_size=32,
        num_experts=6,
        num_experts_per_tok=2,
        mlp_only_layers=[0, 2],
        initializer_range=0.125,
        max_position_embeddings=128,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    return model


def test_it_is_registered_and_saved_without_code(model, tmp_path):
    assert type(model) is GPTNeoXMoeForCausalLM
    model.save_pretrained(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["model_type"], config["mlp_only_layers"]) == ("gpt_neox_moe", [0, 2])
    assert "auto_map" not in config
    with torch.no_grad():
        assert torch.equal(plain(tmp_path)(TOKENS).logits, model(TOKENS).logits)


@torch.no_grad()
def test_all_implementations_of_experts_agree(model):
    assert model.config._experts_implementation == "grouped_mm"  # not one expert after the other
    expected = model(TOKENS).logits
    for implementation in ("eager", "batched_mm", "grouped_mm"):
        model.set_experts_implementation(implementation)
        torch.testing.assert_close(model(TOKENS).logits, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_cached_step_equals_the_whole_sequence(model):
    whole = model(TOKENS).logits
    first = model(TOKENS[:, :20], use_cache=True)
    rest = model(TOKENS[:, 20:], past_key_values=first.past_key_values).logits
    torch.testing.assert_close(rest, whole[:, 20:], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model(TOKENS, logits_to_keep=3).logits, whole[:, -3:])
    places = torch.tensor([4, 17])
    torch.testing.assert_close(model(TOKENS, logits_to_keep=places).logits, whole[:, places])
    greedy = model.generate(TOKENS[:1, :5], max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert greedy[0, 5] == whole[0, 4].argmax()


def test_packed_sequences_do_not_see_each_other(model):
    examples = [Example(TOKENS[0, :n].tolist(), n - 1) for n in (5, 30, 12)]
    packed, padded = training_logits(model, examples), padded_logits(model, examples)
    assert (packed - padded).abs().max() < 1e-5


def test_the_auxiliary_loss_is_switchs(model):
    """E times the sum over experts of the share of assignments and the mean probability."""
    out = model(TOKENS, labels=TOKENS, output_router_logits=True)
    assert [logits.shape for logits in out.router_logits] == [(60, 6)] * 2
    probabilities = torch.cat(out.router_logits).softmax(dim=-1)
    chosen = torch.zeros_like(probabilities).scatter(
        1, probabilities.topk(2, dim=1).indices, 1
    )
    expected = 6 * (chosen.mean(dim=0) * probabilities.mean(dim=0)).sum()
    torch.testing.assert_close(out.aux_loss, expected)
    plain_loss = model(TOKENS, labels=TOKENS).loss
    torch.testing.assert_close(out.loss, plain_loss + 0.001 * expected)
    out.aux_loss.backward()
    for layer in (1, 3):
        assert model.gpt_neox.layers[layer].mlp.gate.weight.grad.norm() > 1e-4
    model.zero_grad()
