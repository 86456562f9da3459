"""The shapes of the ``tiny:`` models: every part of the architecture, a few thousand parameters.

What follows from the tokenizer is added when the model is made.
"""

_SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
# Experts that are narrower than a dense layer, as in most architectures since 2024.
_MOE = _SHAPE | {"num_experts_per_tok": 2, "moe_intermediate_size": 64}
_TWO_SPARSE = {"mlp_layer_types": ["dense", "sparse", "dense", "sparse"]}
_GROUPED = {"n_group": 2, "topk_group": 1, "norm_topk_prob": True, "routed_scaling_factor": 1.5}
# Latent attention: 16 entries of a head without position and 16 with one.
_LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
}
# Each query attends to the keys that a scorer of its own ranks first: as in released models, to all
# of a sequence that is trained on. Which of two equal scores comes first is a matter of rounding.
_INDEXED = _LATENT | {"index_topk": 64, "index_head_dim": 32, "index_n_heads": 16}
# Norms inside recurrent layers divide what is nearly zero in so small a model. With the 1e-6 of
# released models, a loop whose weights are off by 1e-7 ends ten steps with a loss off by up to 8e-6
# (Jamba), 3e-5 (Qwen3-Next) and 2e-3 (Qwen3.5), where no error could be told from rounding; with
# this, by less than 1e-6.
_STEADY = {"rms_norm_eps": 1e-2}
_KIMI_LINEAR = (
    _MOE
    | _STEADY
    | _LATENT
    | _TWO_SPARSE
    | {
        "tie_word_embeddings": False,
        "q_lora_rank": None,
        "num_experts": 8,
        "num_shared_experts": 1,
        "num_expert_group": 2,
        "topk_group": 1,
        "moe_renormalize": True,
        "num_experts_per_token": 2,
        "routed_scaling_factor": 1.5,
        "layer_types": ["linear_attention", "full_attention"] * 2,
    }
)
_GATED_DELTA = (
    _MOE
    | _STEADY
    | {
        "num_experts": 4,
        "shared_expert_intermediate_size": 64,
        "head_dim": 16,
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
    }
)

_ENCODER_DECODER = {
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 128,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "dropout_rate": 0.0,
    "tie_word_embeddings": True,
}

TINY: dict[str, dict] = {
    "llama": _SHAPE,
    "mixtral": _SHAPE | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": _MOE
    | {"num_experts": 4, "shared_expert_intermediate_size": 64, "mlp_only_layers": [0, 2]},
    "qwen3_moe": _MOE | {"num_experts": 4, "head_dim": 16, "norm_topk_prob": True},
    "olmoe": _SHAPE | {"num_experts": 4, "num_experts_per_tok": 2},
    "flex_olmo": _SHAPE | {"num_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v2": _MOE
    | _LATENT
    | {
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "topk_method": "group_limited_greedy",
        "n_group": 2,
        "topk_group": 1,
        "routed_scaling_factor": 1.5,
    },
    "deepseek_v3": _MOE
    | _LATENT
    | _GROUPED
    | {"n_routed_experts": 8, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "deepseek_v32": _MOE
    | _INDEXED
    | _GROUPED
    | _TWO_SPARSE
    | {"n_routed_experts": 8, "n_shared_experts": 1},
    "glm_moe_dsa": _MOE
    | _INDEXED
    | _GROUPED
    | _TWO_SPARSE
    | {
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "indexer_types": ["full", "shared", "full", "shared"],
    },
    "axk1": _MOE
    | _LATENT
    | _GROUPED
    | _TWO_SPARSE
    | {"n_routed_experts": 8, "n_shared_experts": 1},
    "axk2": _MOE
    | _INDEXED
    | _GROUPED
    | _TWO_SPARSE
    | {"n_routed_experts": 8, "n_shared_experts": 1},
    "glm4_moe": _MOE
    | _GROUPED
    | {"n_routed_experts": 8, "n_shared_experts": 1, "first_k_dense_replace": 1, "head_dim": 16},
    "glm4_moe_lite": _MOE
    | _LATENT
    | _GROUPED
    | _TWO_SPARSE
    | {"n_routed_experts": 8, "n_shared_experts": 1},
    "dots1": _MOE
    | _GROUPED
    | {"n_routed_experts": 8, "n_shared_experts": 1, "first_k_dense_replace": 1, "head_dim": 16},
    "solar_open": _MOE | _GROUPED | {"n_routed_experts": 8, "n_shared_experts": 1, "head_dim": 16},
    "exaone_moe": _MOE
    | _GROUPED
    | _TWO_SPARSE
    | {"num_experts": 8, "num_shared_experts": 1, "head_dim": 16, "sliding_window": 64},
    "mimo_v2_flash": _MOE
    | _GROUPED
    | _TWO_SPARSE
    | {"n_routed_experts": 8, "head_dim": 16, "v_head_dim": 16, "sliding_window": 64},
    "afmoe": _MOE
    | {
        "num_experts": 4,
        "num_shared_experts": 1,
        "num_dense_layers": 1,
        "head_dim": 16,
        "sliding_window": 64,
    },
    "hy_v3": _MOE | _TWO_SPARSE | {"num_experts": 4, "num_shared_experts": 1, "head_dim": 16},
    "minimax_m2": _SHAPE | {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16},
    "laguna": _MOE
    | _TWO_SPARSE
    | {"num_experts": 4, "shared_expert_intermediate_size": 64, "head_dim": 16},
    "granitemoe": _SHAPE | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "granitemoeshared": _SHAPE
    | {"num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 64},
    "granitemoe_swa": _SHAPE
    | {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 64,
        "sliding_window": 64,
        "attention_multiplier": 0.25,  # by default 1, too sharp to follow for ten steps
    },
    "gpt_oss": _SHAPE
    | {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "sliding_window": 64},
    "phimoe": _SHAPE
    | {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "input_jitter_noise": 0.0,
        "tie_word_embeddings": False,
    },
    "ernie4_5_moe": _SHAPE
    | {
        "moe_intermediate_size": 64,
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 1,
    },
    "hunyuan_v1_moe": _SHAPE | {"num_experts": 4, "moe_topk": 2, "head_dim": 16},
    "aria_text": _SHAPE
    | {"intermediate_size": 64, "moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1},
    "mellum": _MOE | _TWO_SPARSE | {"num_experts": 4, "head_dim": 16, "norm_topk_prob": True},
    "cohere2_moe": _MOE
    | _TWO_SPARSE
    | {
        "num_experts": 4,
        "num_shared_experts": 1,
        "head_dim": 16,
        "sliding_window": 64,
        "logit_scale": 1.0,
    },
    "granitemoehybrid": _SHAPE
    | {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 64,
        "layer_types": ["mamba", "attention", "mamba", "attention"],
        "mamba_n_heads": 8,
        "mamba_d_head": 16,
        "mamba_d_state": 16,
        "mamba_chunk_size": 16,
    },
    "qwen3_next": _GATED_DELTA,
    "qwen3_5_moe_text": _GATED_DELTA,
    "flint": _MOE
    | {
        "num_experts": 4,
        "shared_expert_intermediate_size": 64,
        "mlp_only_layers": [0, 2],
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "head_dim": 16,
        "sliding_window": 64,
    },
    "bailing_hybrid": _KIMI_LINEAR | {"head_dim": 16},
    "kimi_linear": _KIMI_LINEAR | {"linear_head_dim": 16, "linear_num_heads": 4},
    "jamba": _SHAPE
    | _STEADY
    | {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
    },
    "lfm2_moe": _MOE
    | {
        "num_experts": 4,
        "num_dense_layers": 1,
        "layer_types": ["conv", "full_attention", "conv", "full_attention"],
    },
    "moduleformer": {
        "n_embd": 64,
        "att_hidden": 32,
        "ffd_hidden": 64,
        "n_layer": 2,
        "n_head": 2,
        "gating_size": 16,
        "n_att_experts": 4,
        "k_att": 2,
        "n_mlp_experts": 4,
        "k_mlp": 2,
    },
    "llama_moe": _SHAPE
    | {"num_experts": 4, "num_selects": 2, "score_scale_factor": 2.0, "tie_word_embeddings": False},
    "gpt_neox_moe": _MOE | {"num_experts": 4, "mlp_only_layers": [0, 2]},
    "jetmoe": {
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "kv_channels": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
    },
    "t5": _ENCODER_DECODER,
    "switch_transformers": _ENCODER_DECODER
    | {
        "num_experts": 4,
        "num_sparse_encoder_layers": 1,
        "num_sparse_decoder_layers": 1,
        "expert_capacity": 8,
        "router_jitter_noise": 0.0,
    },
    # Experts whose capacity some tokens of a micro-batch exceed in training.
    "nllb-moe": {
        "d_model": 64,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 128,
        "decoder_ffn_dim": 128,
        "encoder_sparse_step": 2,
        "decoder_sparse_step": 2,
        "num_experts": 4,
        "expert_capacity": 16,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "moe_token_dropout": 0.0,
    },
    "minimax": _SHAPE | {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16},
}
"""Configuration of each ``tiny:`` family, by its ``model_type``."""
