"""What is what inside a model: the one place that knows it, per Hugging Face ``model_type``.

Everything that freezes, perturbs, records, forces or counts a part of a model asks here. A part is
named by the path of its module, compared component by component with ``*`` standing for one
component (``model.layers.*.mlp.gate`` is a router and ``model.layers.*.mlp.gate_proj`` is not). A
new architecture is one entry of ``FAMILIES``; what an entry says is in ``family.py``.

Light to import: neither torch nor transformers is needed to describe a configuration.
"""

import difflib
from collections.abc import Mapping
from typing import TYPE_CHECKING

from stages.errors import BadInput
from stages.models.family import Family, decoder
from stages.models.sparse_layers import (
    SWITCH_LAYERS,
    after,
    ernie_layers,
    every_layer,
    flint_layers,
    jamba_layers,
    listed,
    nllb_layers,
    qwen2_moe_layers,
    switch_layers,
)
from stages.models.unsupported import NO_FAMILY

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


_NO_VLLM = "vLLM has no class of its own for it"
_AUX = ("aux_loss",)
_JITTER = {"jitter": "model.layers.*.mlp.jitter_noise"}
_FIRST = "first_k_dense_replace"
_LOCAL = {"num_experts": "num_local_experts"}
_GATE_BIAS = "model.layers.*.mlp.gate.e_score_correction_bias"
_BIASED_BLOCK = {
    "scores": "sigmoid",
    "choice_bias": "model.layers.*.mlp.e_score_correction_bias",
}
_DEEPSEEK_V3 = {
    "shared": "mlp.shared_experts",
    "num_experts": "n_routed_experts",
    "scores": "sigmoid",
    "normalised": "norm_topk_prob",
    "choice_bias": _GATE_BIAS,
}
_KIMI_LINEAR = _DEEPSEEK_V3 | {
    "num_experts": "num_experts",
    "top_k": "num_experts_per_token",
    "normalised": "moe_renormalize",
    "recurrent": True,
}
_INDEXED = {"no_gradient": "model.layers.*.self_attn.indexer.*.*"}
_GRANITE = {
    "block": "block_sparse_moe",
    "router": "router",
    "scores": "softmax of the chosen",
    "auxiliary_loss": _AUX,
    **_LOCAL,
}
_QWEN = {
    "shared": "mlp.shared_expert",
    "shared_gate": "mlp.shared_expert_gate",
    "auxiliary_loss": _AUX,
}
_QWEN3_NEXT = _QWEN | {"mixers": ("self_attn", "linear_attn"), "recurrent": True}
_GPT_NEOX = "gpt_neox.layers.*.attention gpt_neox.layers.*.mlp"
_T5_READ = (
    "encoder decoder.block.*.layer.*.EncDecAttention.k "
    "decoder.block.*.layer.*.EncDecAttention.v"
)
_VISION = {"modality": "image", "head": "classifier", "embedding": "vit.embeddings"}
_MEMBERS = _VISION | {"head": "members.*.classifier", "embedding": "members.*.vit.embeddings"}
_MOE = (
    decoder("mixtral", auxiliary_loss=_AUX, **_LOCAL, **_JITTER),
    decoder(
        "qwen2_moe",
        sparse_layers=qwen2_moe_layers,
        normalised="norm_topk_prob",
        **_QWEN,
    ),
    decoder(
        "qwen3_moe",
        sparse_layers=qwen2_moe_layers,
        normalised="norm_topk_prob",
        auxiliary_loss=_AUX,
    ),
    decoder("olmoe", normalised="norm_topk_prob", auxiliary_loss=_AUX),
    decoder("flex_olmo", mixers=(), normalised="norm_topk_prob", auxiliary_loss=_AUX),
    decoder(
        "deepseek_v2",
        shared="mlp.shared_experts",
        sparse_layers=after(_FIRST, 0),
        num_experts="n_routed_experts",
        normalised=False,
    ),
    decoder("deepseek_v3", sparse_layers=after(_FIRST, 3), **_DEEPSEEK_V3),
    decoder("deepseek_v32", sparse_layers=listed(3, _FIRST), **_DEEPSEEK_V3, **_INDEXED),
    decoder("glm_moe_dsa", sparse_layers=listed(3, _FIRST), **_DEEPSEEK_V3, **_INDEXED),
    decoder("axk1", sparse_layers=listed(1, _FIRST, "moe_layer_freq"), **_DEEPSEEK_V3),
    decoder(
        "axk2",
        sparse_layers=listed(1, _FIRST, "moe_layer_freq"),
        no_vllm=_NO_VLLM,
        **_DEEPSEEK_V3,
        **_INDEXED,
    ),
    decoder("glm4_moe", sparse_layers=after(_FIRST, 1), **_DEEPSEEK_V3),
    decoder("glm4_moe_lite", sparse_layers=listed(1), **_DEEPSEEK_V3),
    decoder("dots1", sparse_layers=after(_FIRST, 0), no_vllm=_NO_VLLM, **_DEEPSEEK_V3),
    decoder("solar_open", no_vllm=_NO_VLLM, **_DEEPSEEK_V3),
    decoder(
        "exaone_moe",
        sparse_layers=listed(1, _FIRST),
        **_DEEPSEEK_V3 | {"num_experts": "num_experts"},
    ),
    decoder("mimo_v2_flash", sparse_layers=listed(1), **_DEEPSEEK_V3 | {"shared": ""}),
    decoder(
        "afmoe",
        mixers=(),
        router="router",
        shared="mlp.shared_experts",
        sparse_layers=after("num_dense_layers", 1),
        scores="sigmoid",
        choice_bias="model.layers.*.mlp.expert_bias",
        masks_by_position=False,
    ),
    decoder("hy_v3", shared="mlp.shared_experts", sparse_layers=listed(1), **_BIASED_BLOCK),
    decoder("minimax_m2", auxiliary_loss=_AUX, **_BIASED_BLOCK, **_LOCAL, **_JITTER),
    decoder(
        "laguna",
        shared="mlp.shared_experts",
        sparse_layers=listed(1),
        scores="sigmoid",
        choice_bias=_GATE_BIAS,
        auxiliary_loss=_AUX,
    ),
    decoder("granitemoe", **_GRANITE),
    decoder("granitemoeshared", mixers=(), shared="shared_mlp", **_GRANITE),
    decoder("granitemoe_swa", mixers=(), shared="shared_mlp", **_GRANITE),
    decoder(
        "gpt_oss",
        router="router",
        scores="softmax of the chosen",
        auxiliary_loss=_AUX,
        masks_by_position=False,
        **_LOCAL,
    ),
    decoder(
        "phimoe",
        router="router",
        scores="sparsemixer",
        # Not ``router_jitter_noise``, which bounds the choice in evaluation as well.
        jitter=(
            "model.layers.*.mlp.input_jitter_noise model.layers.*.mlp.router.input_jitter_noise"
        ),
        normalised=False,
        auxiliary_loss=_AUX,
        no_vllm=_NO_VLLM,
        **_LOCAL,
    ),
    decoder(
        "ernie4_5_moe",
        shared="mlp.shared_experts",
        sparse_layers=ernie_layers,
        num_experts="moe_num_experts",
        top_k="moe_k",
        choice_bias="model.layers.*.mlp.gate.moe_statics.e_score_correction_bias",
        auxiliary_loss=_AUX,
    ),
    decoder("hunyuan_v1_moe", shared="mlp.shared_mlp", top_k="moe_topk"),
    decoder(
        "aria_text",
        router="router",
        shared="mlp.shared_experts",
        num_experts="moe_num_experts",
        top_k="moe_topk",
        scores="softmax of the chosen",
        no_vllm=_NO_VLLM,
    ),
    decoder("mellum", sparse_layers=listed(0), normalised="norm_topk_prob", auxiliary_loss=_AUX),
    decoder(
        "cohere2_moe",
        shared="mlp.shared_experts",
        sparse_layers=listed(0, _FIRST),
        scores="softmax of the chosen",
    ),
    decoder(
        "minimax",
        mixers=(),
        auxiliary_loss=_AUX,
        recurrent=True,
        factors=("slope_rate", "query_decay", "key_decay", "diagonal_decay"),
        no_vllm=_NO_VLLM,
        **_LOCAL,
        **_JITTER,
    ),
    decoder(
        "granitemoehybrid",
        mixers=(),
        shared="shared_mlp",
        recurrent=True,
        **_GRANITE,
    ),
    decoder(
        "qwen3_next",
        sparse_layers=qwen2_moe_layers,
        normalised="norm_topk_prob",
        **_QWEN3_NEXT,
    ),
    decoder("qwen3_5_moe_text", **_QWEN3_NEXT),
    decoder(
        "flint",
        shared="mlp.shared_expert",
        sparse_layers=flint_layers,
        scores="sigmoid",
        normalised="norm_topk_prob",
        auxiliary_loss=_AUX,
        no_vllm=_NO_VLLM,
    ),
    decoder(
        "bailing_hybrid", sparse_layers=listed(2, _FIRST), no_vllm=_NO_VLLM, **_KIMI_LINEAR
    ),
    decoder("kimi_linear", sparse_layers=listed(1, _FIRST), **_KIMI_LINEAR),
    decoder(
        "jamba",
        block="feed_forward",
        mixers=("self_attn", "mamba"),
        router="router",
        sparse_layers=jamba_layers,
        normalised=False,
        auxiliary_loss=_AUX,
        recurrent=True,
    ),
    decoder(
        "lfm2_moe",
        block="feed_forward",
        mixers=("self_attn", "conv"),
        sparse_layers=after("num_dense_layers", 2),
        scores="sigmoid",
        normalised="norm_topk_prob",
        choice_bias="model.layers.*.feed_forward.expert_bias",
        recurrent=True,
        attention_dropout=False,
    ),
    Family(
        "gpt_neox_moe",  # stages/models/gpt_neox_moe.py
        router="gpt_neox.layers.*.mlp.gate",
        experts="gpt_neox.layers.*.mlp.experts",
        residual=_GPT_NEOX,
        sparse_layers=qwen2_moe_layers,
        scores="softmax of the chosen",
        auxiliary_loss=_AUX,
        no_export="it is a class of this project, which other programs lack",
    ),
    decoder(
        "llama_moe",  # stages/models/llama_moe.py
        top_k="num_selects",
        scores="softmax of the chosen",
        no_gradient="model.layers.*.mlp.gate.weight_noise.weight",
        no_export="it is a class of this project, which other programs lack",
    ),
    Family(
        "vit_moe",  # stages/models/vision_moe.py
        router="vit.layers.*.mlp.gate",
        experts="vit.layers.*.mlp.experts",
        sparse_layers=lambda config: tuple(config.get("moe_layers") or ()),
        normalised="norm_topk_prob",
        **_VISION,
    ),
    Family(
        "vit_moe_ensemble",  # stages/models/vision_ensembles.py
        router="members.*.vit.layers.*.mlp.gate",
        experts="members.*.vit.layers.*.mlp.experts",
        sparse_layers=lambda config: tuple(config.get("moe_layers") or ()),
        normalised="norm_topk_prob",
        **_MEMBERS,
    ),
    Family(
        "vit_moe_head",  # stages/models/vision_heads.py
        router="classifier.gate",
        experts="classifier.experts",
        sparse_layers=lambda config: (config["num_hidden_layers"],),  # behind the last one
        normalised="norm_topk_prob",
        **_VISION,
    ),
    Family(
        "jetmoe",  # its own auxiliary loss counts the routers of attention twice, training once
        router="model.layers.*.mlp.router model.layers.*.self_attention.experts.router",
        experts=(
            "model.layers.*.mlp.input_linear model.layers.*.mlp.output_linear "
            "model.layers.*.self_attention.experts.input_linear "
            "model.layers.*.self_attention.experts.output_linear"
        ),
        routed_sum="model.layers.*.mlp.forward model.layers.*.self_attention.experts.reduce",
        residual="model.layers.*.self_attention model.layers.*.mlp",
        num_experts="num_local_experts",
        sparse_layers=every_layer,
        scores="softmax of the chosen",
        logits=4,
        weights=None,
        index=None,
        auxiliary_loss=_AUX,
        no_vllm=_NO_VLLM,
    ),
    Family(
        "moduleformer",  # stages/models/moduleformer.py
        router="transformer.h.*.mlpf.gate transformer.h.*.attn.q_proj.gate",
        experts=(
            "transformer.h.*.mlpf.experts transformer.h.*.mlpf.output_experts "
            "transformer.h.*.attn.q_proj.experts transformer.h.*.attn.q_proj.output_experts"
        ),
        routed_sum="transformer.h.*.mlpf.reduced transformer.h.*.attn.q_proj.reduced",
        residual="transformer.h.*.attn transformer.h.*.mlpf",
        num_experts="n_mlp_experts",
        top_k="k_mlp",
        layer_counts=("n_layer",),
        attention_dropout=False,
        sparse_layers=lambda config: tuple(range(config["n_layer"])),
        normalised=False,
        logits=4,
        weights=None,
        index=None,
        router_decides_top_k=True,
        masks_by_position=False,
        no_export="it is a class of this project, which other programs lack",
    ),
    Family(
        "switch_transformers",
        router="*coder.block.*.layer.*.mlp.router",
        experts="*coder.block.*.layer.*.mlp.experts",
        top_k=1,
        layer_counts=SWITCH_LAYERS,
        sparse_layers=switch_layers,
        normalised=False,
        logits=2,
        weights=1,
        index=None,
        auxiliary_loss=("encoder_aux_loss", "decoder_aux_loss"),
        balanced_by_sequence=True,
        jitter="*coder.block.*.layer.*.mlp.router.jitter_noise",
        capacity=True,
        read=_T5_READ,
        attention_dropout=False,
    ),
    Family(
        "nllb-moe",  # stages/models/nllb_moe.py
        router="model.*coder.layers.*.ffn.router",
        experts="model.*coder.layers.*.ffn.experts",
        top_k=2,
        layer_counts=("encoder_layers", "decoder_layers"),
        sparse_layers=nllb_layers,
        logits=2,
        weights=0,
        index=1,
        auxiliary_loss=("encoder_aux_loss", "decoder_aux_loss"),
        capacity=True,
        read=(
            "model.encoder model.decoder.layers.*.cross_attention.k_proj "
            "model.decoder.layers.*.cross_attention.v_proj"
        ),
        attention_dropout=False,
        no_export="other programs send its tokens to experts 0 and 1, as transformers does",
    ),
)
_DENSE = (
    *("cohere", "gemma", "granite", "llama", "mistral", "olmo", "phi", "phi3"),
    *("qwen2", "qwen3", "smollm3", "stablelm", "starcoder2"),
)
_NORM_AFTER_BLOCK = ("gemma2", "gemma3_text", "olmo2", "olmo3")
# Neither takes positions that start again for the beginning of another sequence.
_GPT2 = "transformer.h.*.attn transformer.h.*.mlp"
_PADDED = {"masks_by_position": False, "attention_dropout": False}
_T5 = Family("t5", layer_counts=SWITCH_LAYERS, read=_T5_READ, attention_dropout=False)
FAMILIES: dict[str, Family] = {
    entry.model_type: entry
    for entry in (
        *_MOE,
        *(Family(name, residual="model.layers.*.self_attn model.layers.*.mlp") for name in _DENSE),
        *map(Family, _NORM_AFTER_BLOCK),
        Family("gpt_neox", residual=_GPT_NEOX),
        Family("gpt2", residual=_GPT2, attention_dropout=False),
        *(Family(name, **_PADDED) for name in ("falcon", "opt")),
        _T5,
        *(Family(name, **_VISION) for name in ("vit", "vit_head")),
        Family("vit_ensemble", **_MEMBERS),
    )
}


def family(model: "PreTrainedModel | PretrainedConfig | Mapping") -> Family:
    """The family of a model, its configuration, or the content of its ``config.json``.

    Raises BadInput for a ``model_type`` that has no entry, with the reason where it is known to
    have experts, else with the nearest one that has.
    """
    config = getattr(model, "config", model)
    name = config.get("model_type") if isinstance(config, Mapping) else config.model_type
    if name in NO_FAMILY:
        raise BadInput(f"model_type {name!r} is refused: {NO_FAMILY[name]}; choose another model")
    if name not in FAMILIES:
        near = difflib.get_close_matches(str(name), FAMILIES, n=1, cutoff=0)[0]
        raise BadInput(
            f"model_type {name!r} is not a known architecture (nearest: {near}); "
            "add an entry to stages/models/families.py"
        )
    return FAMILIES[name]
