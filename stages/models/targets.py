"""The Mixture-of-Experts architectures that dense models become: configuration and weights.

A dense model's layers go over as they are; only the chosen feed-forward blocks are replaced.
"""

import torch
from transformers import (
    FlexOlmoConfig,
    FlexOlmoForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PretrainedConfig,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from stages.models.gpt_neox_moe import GPTNeoXMoeConfig, GPTNeoXMoeForCausalLM
from stages.models.vision_moe import ViTMoeConfig, ViTMoeForImageClassification

CLASSES = {
    "mixtral": MixtralForCausalLM,
    "qwen2_moe": Qwen2MoeForCausalLM,
    "qwen3_moe": Qwen3MoeForCausalLM,
    "flex_olmo": FlexOlmoForCausalLM,
    "gpt_neox_moe": GPTNeoXMoeForCausalLM,
    "vit_moe": ViTMoeForImageClassification,
}
UNGATED = {"gpt_neox_moe": ("dense_h_to_4h", "dense_4h_to_h"), "vit_moe": ("fc1", "fc2")}
"""Twins with ungated, biased experts, and the two layers of the dense block."""
SHARED_CONFIG = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "hidden_act", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "attention_dropout", "max_position_embeddings"),
    *("rope_parameters", "rms_norm_eps", "initializer_range", "tie_word_embeddings", "use_cache"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
)
"""Fields that mean the same in a dense model with RMSNorm and gated blocks and in its twin."""


def configuration(
    name: str,
    old: PretrainedConfig,
    layers: tuple[int, ...],
    *,
    experts: int,
    top_k: int,
    neurons: int,
) -> PretrainedConfig:
    """The configuration of a twin of architecture ``name``.

    ``layers`` have experts of ``neurons`` each; the others keep their dense blocks.
    """
    dense = [i for i in range(old.num_hidden_layers) if i not in layers]
    if name == "gpt_neox_moe":
        fields = {k: v for k, v in old.to_dict().items() if k != "model_type"}
        return GPTNeoXMoeConfig(
            **fields | {"architectures": None},
            num_experts=experts,
            num_experts_per_tok=top_k,
            moe_intermediate_size=neurons,
            mlp_only_layers=dense,
        )
    if name == "vit_moe":
        fields = {k: v for k, v in old.to_dict().items() if k != "model_type"}
        return ViTMoeConfig(
            **fields | {"architectures": None},
            num_experts=experts,
            num_experts_per_tok=top_k,
            moe_intermediate_size=neurons,
            moe_layers=list(layers),
            norm_topk_prob=True,
        )
    # OLMo 2 has no head_dim of its own.
    shared = {field: getattr(old, field) for field in SHARED_CONFIG if hasattr(old, field)}
    shared["num_experts_per_tok"] = top_k
    if name == "mixtral":
        return MixtralConfig(
            **shared,
            num_local_experts=experts,
            intermediate_size=neurons,
            sliding_window=getattr(old, "sliding_window", None),
        )
    shared |= {"num_experts": experts, "norm_topk_prob": True}
    if name == "flex_olmo":
        return FlexOlmoConfig(
            **shared, intermediate_size=neurons, attention_bias=old.attention_bias
        )
    mixed = {
        "intermediate_size": old.intermediate_size,
        "moe_intermediate_size": neurons,
        "decoder_sparse_step": 1,
        "mlp_only_layers": dense,
    }
    if name == "qwen3_moe":
        return Qwen3MoeConfig(
            **shared,
            **mixed,
            attention_bias=old.attention_bias,
            use_sliding_window="sliding_attention" in old.layer_types,
            sliding_window=old.sliding_window,
        )
    return Qwen2MoeConfig(
        **shared,
        **mixed,
        shared_expert_intermediate_size=1,
        qkv_bias=old.model_type == "qwen2",
    )


def expert(name: str, block: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The parameters of one expert, by their names in a sparse block, from a dense block's."""
    if name in UNGATED:
        up, down = UNGATED[name]
        return {
            "experts.up_proj": block[f"{up}.weight"],
            "experts.up_proj_bias": block[f"{up}.bias"],
            "experts.down_proj": block[f"{down}.weight"],
            "experts.down_proj_bias": block[f"{down}.bias"],
        }
    return {
        "experts.gate_up_proj": torch.cat([block["gate_proj.weight"], block["up_proj.weight"]]),
        "experts.down_proj": block["down_proj.weight"],
    }


def shared_expert(name: str, hidden: int) -> dict[str, torch.Tensor]:
    """The parameters of a shared expert that adds nothing, where the architecture has one.

    Qwen2-MoE's cannot be switched off: it is one neuron of zeros, which gets a zero gradient and
    stays zero. None at all would be cleaner, but ZeRO-3 cannot hold empty parameters.
    """
    if name != "qwen2_moe":
        return {}
    zeros_1D = torch.zeros(1, hidden)
    return {
        "shared_expert.gate_proj.weight": zeros_1D,
        "shared_expert.up_proj.weight": zeros_1D,
        "shared_expert.down_proj.weight": zeros_1D.T,
        "shared_expert_gate.weight": zeros_1D,
    }
