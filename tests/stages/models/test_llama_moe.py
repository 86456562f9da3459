"""LLaMA-MoE: checkpoints in the released layout are read, computed and written back as they are."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from stages.errors import BadInput
from stages.evaluate.base import Request
from stages.evaluate.engine import Engine
from stages.evaluate.techniques import ExpertCount, applied
from stages.models.llama_moe import LlamaMoeForCausalLM
from stages.models.load import load
from stages.models.routing import weighing
from stages.models.tiny import tiny_tokenizer

EXPERTS, CHOSEN, NEURONS, HIDDEN, SCALE = 4, 2, 8, 32, 2.5
CONFIG = {
    "architectures": ["LlamaMoEForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_llama_moe.LlamaMoEConfig",
        "AutoModelForCausalLM": "modeling_llama_moe_hf.LlamaMoEForCausalLM",
    },
    "model_type": "llama_moe",
    "hidden_size": HIDDEN,
    "intermediate_size": EXPERTS * NEURONS,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 300,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 128,
    "num_experts": EXPERTS,
    "num_selects": CHOSEN,
    "size_experts": [[NEURONS] * EXPERTS] * 2,
    "gate_type": "TopKBalancedNoisyGate",
    "gate_network": "mlp",
    "gate_use_softmax": True,
    "gate_add_noise": True,
    "score_scale_factor": SCALE,
    "torch_dtype": "float32",
}
TOKENS = torch.randint(3, 259, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A folder as it is released, with random weights, and those weights."""
    folder = tmp_path_factory.mktemp("released")
    torch.manual_seed(0)
    shape = {k: CONFIG[k] for k in list(CONFIG)[3:11]}
    state = LlamaForCausalLM(LlamaConfig(**shape)).state_dict()
    state = {name: tensor for name, tensor in state.items() if ".mlp." not in name}
    for layer in range(2):
        block = f"model.layers.{layer}.mlp"
        gate, experts = f"{block}.gate", f"{block}.calculator.experts"
        state[f"{gate}.gate_network.0.weight"] = torch.randn(EXPERTS, HIDDEN) / math.sqrt(HIDDEN)
        state[f"{gate}.gate_network.2.weight"] = torch.randn(EXPERTS, EXPERTS)
        state[f"{gate}.weight_noise.weight"] = torch.randn(EXPERTS, HIDDEN)
        for e in range(EXPERTS):
            for kind in ("gate", "up"):
                state[f"{experts}.weight_{kind}.{e}"] = torch.randn(NEURONS, HIDDEN) / 4
            state[f"{experts}.weight_down.{e}"] = torch.randn(HIDDEN, NEURONS) / 4
    save_file({k: v.contiguous() for k, v in state.items()}, folder / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    (folder / "config.json").write_text(json.dumps(CONFIG))
    tiny_tokenizer().save_pretrained(folder)
    return folder, state


def block_by_hand(state, layer, hidden):
    """The released block's output, token by token and expert by expert."""
    gate = f"model.layers.{layer}.mlp.gate.gate_network"
    logits = torch.tanh(hidden @ state[f"{gate}.0.weight"].T) @ state[f"{gate}.2.weight"].T
    output = torch.zeros_like(hidden)
    for token, row in enumerate(logits):
        top, chosen = row.topk(CHOSEN)
        for weight, e in zip(top.softmax(0), chosen.tolist(), strict=True):
            experts = f"model.layers.{layer}.mlp.calculator.experts.weight"
            gated = F.silu(state[f"{experts}_gate.{e}"] @ hidden[token])
            inner = gated * (state[f"{experts}_up.{e}"] @ hidden[token])
            output[token] += SCALE * weight * (state[f"{experts}_down.{e}"] @ inner)
    return output


@torch.no_grad()
def test_released_weights_compute_what_the_released_code_describes(released):
    folder, state = released
    model = load(folder)
    assert type(model) is LlamaMoeForCausalLM  # not the code that auto_map names
    hidden = torch.randn(1, 9, HIDDEN, generator=torch.Generator().manual_seed(1))
    for layer in range(2):
        got = model.model.layers[layer].mlp(hidden)[0]
        torch.testing.assert_close(got, block_by_hand(state, layer, hidden[0]))
    assert model.model.rotary_emb.config.rope_parameters["rope_theta"] == 10000.0
    # The rest is Llama: with the same blocks, the same logits.
    llama = LlamaForCausalLM(LlamaConfig(**{k: CONFIG[k] for k in list(CONFIG)[3:11]})).eval()
    llama.load_state_dict({k: v for k, v in state.items() if ".mlp." not in k}, strict=False)
    for layer, block in enumerate(llama.model.layers):
        block.mlp = model.model.layers[layer].mlp
    torch.testing.assert_close(llama(TOKENS).logits, model(TOKENS).logits)


@torch.no_grad()
def test_implementations_of_experts_agree_and_the_routing_rule_is_found(released):
    model = load(released[0])
    expected = model(TOKENS).logits
    for implementation in ("eager", "batched_mm", "grouped_mm"):
        model.set_experts_implementation(implementation)
        torch.testing.assert_close(model(TOKENS).logits, expected, atol=1e-5, rtol=1e-5)
    logits, chosen = torch.tensor([[0.0, 1.0, 2.0, 3.0]]), torch.tensor([[3, 1]])
    expected = SCALE * torch.tensor([[math.exp(3.0), math.exp(1.0)]]) / (math.exp(3) + math.exp(1))
    torch.testing.assert_close(weighing(model)(logits, chosen), expected)


def test_it_is_saved_in_the_released_layout_and_read_again(released, tmp_path):
    folder, state = released
    load(folder).save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() == state.keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in state.items())
    config = json.loads((tmp_path / "config.json").read_text())
    assert {k: config[k] for k in ("num_experts", "num_selects", "score_scale_factor")} == {
        "num_experts": 4, "num_selects": 2, "score_scale_factor": SCALE}  # fmt: skip
    with torch.no_grad():
        assert torch.equal(load(tmp_path)(TOKENS).logits, load(folder)(TOKENS).logits)


def test_an_evaluation_scores_it_with_fewer_experts(released):
    engine = Engine(released[0])
    asked = [Request("a", "one two", (" three", " four"))]
    plain, fewer = engine.respond(asked + applied(ExpertCount(kind="expert_count", top_k=1), asked))
    assert plain.logprobs != fewer.logprobs


@pytest.mark.parametrize(
    "field, value",
    [
        ("size_experts", [[4, 12, 8, 8]] * 2),
        ("score_scale_factor", [1.0, 2.0]),
        ("gate_network", "linear"),
        ("add_weight_norm", True),
    ],
)
def test_what_it_cannot_compute_is_refused(released, tmp_path, field, value):
    for file in released[0].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {field: value}))
    with pytest.raises(BadInput, match=field):
        load(tmp_path)
