"""Sparse upcycling (arXiv 2212.05055): a Mixture-of-Experts model that computes what its dense
model computes.

Every expert is a copy of its layer's feed-forward block and the chosen experts' weights sum to 1,
so the function is preserved whatever the router says; this is measured, then noise makes the
experts differ (with equal experts the router would get no gradient).

Experts in every layer make a Mixtral. Experts in some layers make a Qwen2-MoE, the architecture of
transformers that can hold dense layers between sparse ones: its attention biases are switched off
and its shared expert, which cannot be, is one neuron of zeros. Such a neuron gets a zero gradient
and stays zero; none at all would be cleaner, but ZeRO-3 cannot hold empty parameters.
"""

import torch
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)
from transformers import PreTrainedTokenizerBase as Tokenizer

from stages.models import twin
from stages.models.families import family
from stages.models.load import filled
from stages.models.spec import UpcycleSpec

# Shape letters: E experts, F feed-forward neurons, D hidden size.

SHARED_CONFIG = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "hidden_act"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "attention_dropout"),
    *("max_position_embeddings", "rope_parameters", "rms_norm_eps", "initializer_range"),
    *("tie_word_embeddings", "use_cache", "bos_token_id", "eos_token_id", "pad_token_id"),
)
"""Configuration fields that mean the same in the dense model and in its twin."""


@torch.no_grad()
def upcycle(
    dense: PreTrainedModel, tokenizer: Tokenizer, spec: UpcycleSpec
) -> tuple[PreTrainedModel, dict]:
    """The upcycled twin of a float32 model, and the notes of its card.

    Raises StageFailed for a dense model that is not Llama-like or whose function was not kept.
    """
    twin.require_llama_like(dense)
    model = _build(dense, spec)
    dense_probe = twin.probe(dense, tokenizer)
    before = twin.require_same_function(twin.probe(model, tokenizer)[0], dense_probe[0])
    generator = torch.Generator().manual_seed(spec.seed)
    for experts in family(model).modules(model, "expert").values():
        for gate_up_2FD, down_DF in zip(experts.gate_up_proj, experts.down_proj, strict=True):
            for matrix in (*gate_up_2FD.chunk(2), down_DF):
                twin.add_noise(matrix, spec.noise, generator)
    after = twin.probe(model, tokenizer)
    return model, twin.noise_notes(before, dense_probe, after, spec.noise, spec.seed)


def _build(dense: PreTrainedModel, spec: UpcycleSpec) -> PreTrainedModel:
    layers = range(dense.config.num_hidden_layers) if spec.layers == "all" else spec.layers
    shared = {name: getattr(dense.config, name) for name in SHARED_CONFIG}
    if spec.layers == "all":
        config = MixtralConfig(
            **shared,
            num_local_experts=spec.experts,
            num_experts_per_tok=spec.top_k,
            sliding_window=None,
        )
        kind = MixtralForCausalLM
    else:
        config = Qwen2MoeConfig(
            **shared,
            num_experts=spec.experts,
            num_experts_per_tok=spec.top_k,
            norm_topk_prob=True,
            moe_intermediate_size=dense.config.intermediate_size,
            shared_expert_intermediate_size=1,
            decoder_sparse_step=1,
            mlp_only_layers=[i for i in range(dense.config.num_hidden_layers) if i not in layers],
            qkv_bias=False,
        )
        kind = Qwen2MoeForCausalLM

    generator = torch.Generator().manual_seed(spec.seed)
    state = dense.state_dict()
    for layer in layers:
        block = f"model.layers.{layer}.mlp"
        gate_FD = state.pop(f"{block}.gate_proj.weight")
        up_FD = state.pop(f"{block}.up_proj.weight")
        down_DF = state.pop(f"{block}.down_proj.weight")
        gate_up_2FD = torch.cat([gate_FD, up_FD])
        state[f"{block}.experts.gate_up_proj"] = gate_up_2FD.expand(spec.experts, -1, -1)
        state[f"{block}.experts.down_proj"] = down_DF.expand(spec.experts, -1, -1)
        router_ED = torch.randn(spec.experts, config.hidden_size, generator=generator)
        state[f"{block}.gate.weight"] = router_ED * config.initializer_range
        if spec.layers != "all":
            zeros_1D = torch.zeros(1, config.hidden_size)
            state[f"{block}.shared_expert.gate_proj.weight"] = zeros_1D
            state[f"{block}.shared_expert.up_proj.weight"] = zeros_1D
            state[f"{block}.shared_expert.down_proj.weight"] = zeros_1D.T
            state[f"{block}.shared_expert_gate.weight"] = zeros_1D
    model = filled(kind, config, state)
    model.generation_config = dense.generation_config
    return model
