"""ModuleFormer, the architecture of MoLM (arXiv 2306.04640): experts in attention and feed-forward.

transformers lacks it (its JetMoE is the successor), and the code that the checkpoints bring along
is never run; this class reads their configuration and weights. Attention breaks a stick instead of
taking a softmax: from the nearest key back, each takes its share of what the later ones left, so
that no positions are needed. Each chosen expert of an attention layer has queries and an output
projection of its own; keys and values are shared.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PretrainedConfig
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Transpose, WeightConverter
from transformers.generation import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.models.jetmoe.modeling_jetmoe import JetMoeParallelExperts as Experts

from stages.errors import BadInput

# Shape letters: B batch, S sequence, T tokens, E experts, K chosen experts, D hidden size, H heads,
# N pairs of a token and a chosen expert, in the order of the experts.


class ModuleFormerConfig(PretrainedConfig):
    """The configuration under the names of the released checkpoints.

    Raises BadInput for one that this class cannot compute.
    """

    model_type = "moduleformer"
    attribute_map = {
        "hidden_size": "n_embd",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    }

    vocab_size: int = 50295
    history_length: int = 512
    n_embd: int = 1024
    n_layer: int = 24
    n_head: int = 8
    att_hidden: int = 512
    ffd_hidden: int = 2048
    activation_function: str = "gelu_new"
    resid_pdrop: float = 0.0
    moe_pdrop: float = 0.0
    sample_topk: int = 0
    gating_size: int = 256
    n_att_experts: int = 32
    k_att: int = 2
    n_mlp_experts: int = 32
    k_mlp: int = 2
    initializer_range: float = 0.02
    gate_type: str = "mlp"
    bos_token_id: int | None = 50256
    eos_token_id: int | list[int] | None = 50256
    pad_token_id: int | None = None
    tie_word_embeddings: bool = False
    use_cache: bool = True

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        counts = (self.n_att_experts, self.k_att) == (self.n_mlp_experts, self.k_mlp)
        shared = self.att_hidden == self.n_embd and self.n_head == 1
        for wrong, field, reason in (
            (not counts, "n_att_experts", "attention and feed-forward blocks with other experts"),
            (self.gate_type != "mlp", "gate_type", f"a router of type {self.gate_type!r}"),
            (self.sample_topk, "sample_topk", "a choice by chance"),
            (shared, "n_head", "attention without keys and values of its own"),
        ):
            if wrong:
                raise BadInput(
                    f"config.json: {field}: {reason} is not known here; use a released MoLM"
                )


class ModuleFormerRouter(nn.Module):
    """Scores the experts of each token and chooses the best."""

    def __init__(self, config: ModuleFormerConfig, top_k: int):
        super().__init__()
        self.top_k, self.num_experts = top_k, config.n_mlp_experts
        self.w_gate = nn.Sequential(
            nn.Linear(config.n_embd, config.gating_size),
            nn.GELU(),
            nn.Dropout(config.moe_pdrop),
            nn.Linear(config.gating_size, self.num_experts, bias=False),
        )

    def forward(self, hidden_TD: torch.Tensor) -> tuple:
        """As JetMoE's: places of the N pairs among (token, choice), tokens (N,), weights (N,),
        number of pairs of each expert, logits (T, E). The weights are not normalised."""
        first, *between, last = self.w_gate
        # The logits are the first product by ``linear``, as in every router (``routing.py``).
        inner = torch.addmm(first.bias, hidden_TD, first.weight.T)
        for module in between:
            inner = module(inner)
        logits_TE = F.linear(inner, last.weight)
        weights_TK, chosen_TK = logits_TE.softmax(dim=-1).topk(self.top_k)
        chosen, order_N = chosen_TK.flatten().sort()
        sizes = torch.bincount(chosen, minlength=self.num_experts).tolist()
        return order_N, order_N // self.top_k, weights_TK.flatten()[order_N], sizes, logits_TE


class ModuleFormerExperts(nn.Module):
    """A router and two matrices per expert, between which the caller may do more."""

    def __init__(self, config: ModuleFormerConfig, inner: int, top_k: int, activation=None):
        super().__init__()
        self.experts = Experts(config.n_mlp_experts, config.n_embd, inner)
        self.output_experts = Experts(config.n_mlp_experts, inner, config.n_embd)
        self.gate = ModuleFormerRouter(config, top_k)
        self.activation = activation

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states of shape (B, S, D), and the same out."""
        hidden_TD = hidden.reshape(-1, hidden.shape[-1])
        routed = self.gate(hidden_TD)
        inner = self.experts(hidden_TD[routed[1]], routed[3])
        return self.reduced(self.activation(inner), routed, hidden_TD).view_as(hidden)

    def reduced(self, inner: torch.Tensor, routed: tuple, like_TD: torch.Tensor) -> torch.Tensor:
        """The weighted sum (T, D) of what the experts make of their inner states (N, inner)."""
        _, tokens_N, weights_N, sizes, _ = routed
        outer_ND = self.output_experts(inner, sizes) * weights_N[:, None].to(inner.dtype)
        return torch.zeros_like(like_TD).index_add(0, tokens_N, outer_ND.to(like_TD.dtype))


class ModuleFormerAttention(nn.Module):
    """Stick-breaking attention whose queries and outputs are experts."""

    def __init__(self, config: ModuleFormerConfig, layer_idx: int):
        super().__init__()
        self.layer_idx, self.n_head, self.top_k = layer_idx, config.n_head, config.k_att
        self.q_proj = ModuleFormerExperts(config, config.att_hidden, config.k_att)
        self.k_proj = nn.Linear(config.n_embd, config.att_hidden)
        self.v_proj = nn.Linear(config.n_embd, config.att_hidden)

    def forward(
        self, hidden: torch.Tensor, seen: torch.Tensor, past: Cache | None = None
    ) -> torch.Tensor:
        """Hidden states (B, S, D); ``seen`` (B, 1, 1, S, keys), which keys a token may attend."""
        batch, length, size = hidden.shape
        hidden_TD = hidden.reshape(-1, size)
        order_N, *_ = routed = self.q_proj.gate(hidden_TD)
        top_k = len(order_N) // len(hidden_TD)
        mapped = self.q_proj.experts(hidden_TD[routed[1]], routed[3])
        queries = torch.empty_like(mapped).index_copy(0, order_N, mapped)
        queries = queries.view(batch, length, top_k, self.n_head, -1).permute(0, 2, 3, 1, 4)
        keys, values = (
            layer(hidden).view(batch, length, self.n_head, -1).transpose(1, 2)
            for layer in (self.k_proj, self.v_proj)
        )
        if past is not None:
            keys, values = past.update(keys, values, self.layer_idx)
        attention = stick_breaking(queries, keys[:, None], seen) @ values[:, None]
        inner = attention.permute(0, 3, 1, 2, 4).reshape(len(order_N), -1)[order_N]
        return self.q_proj.reduced(inner, routed, hidden_TD).view_as(hidden)


def stick_breaking(queries: torch.Tensor, keys: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """Attention weights (..., queries, keys) of queries and keys (..., tokens, head size).

    Key j of query i weighs sigmoid(z_ij) times the product of 1 - sigmoid(z_il) over the keys l
    between j and i; ``seen`` is false for keys that are no part of it.
    """
    logits = queries @ keys.transpose(-1, -2) / math.sqrt(queries.shape[-1])
    taken = logits.sigmoid().masked_fill(~seen, 0)
    left = F.logsigmoid(-logits).masked_fill(~seen, 0)
    later = left.flip(-1).cumsum(-1).flip(-1) - left
    return taken * later.exp()


class ModuleFormerBlock(GradientCheckpointingLayer):
    """Attention and feed-forward block of a layer, each after a norm and on a residual stream."""

    def __init__(self, config: ModuleFormerConfig, layer_idx: int):
        super().__init__()
        # The released code leaves epsilon at PyTorch's own.
        self.ln_1, self.ln_2 = nn.LayerNorm(config.n_embd), nn.LayerNorm(config.n_embd)
        self.attn = ModuleFormerAttention(config, layer_idx)
        activation = ACT2FN[config.activation_function]
        self.mlpf = ModuleFormerExperts(config, config.ffd_hidden, config.k_mlp, activation)
        self.resid_dropout = nn.Dropout(config.resid_pdrop)

    def forward(
        self, hidden: torch.Tensor, seen: torch.Tensor, past: Cache | None = None
    ) -> torch.Tensor:
        """Hidden states of shape (B, S, D), and the same out."""
        hidden = hidden + self.resid_dropout(self.attn(self.ln_1(hidden), seen, past))
        return hidden + self.resid_dropout(self.mlpf(self.ln_2(hidden)))


class ModuleFormerPreTrainedModel(PreTrainedModel):
    """What all models of the architecture share."""

    config: ModuleFormerConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ["ModuleFormerBlock"]
    _keys_to_ignore_on_load_unexpected = [r"attn\.mask$", r"attn\.cum_weight$"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Experts):
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)


class ModuleFormerModel(ModuleFormerPreTrainedModel):
    """The decoder without a head."""

    def __init__(self, config: ModuleFormerConfig):
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.h = nn.ModuleList(ModuleFormerBlock(config, i) for i in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        """The embedding of tokens."""
        return self.wte

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Put another embedding in its place."""
        self.wte = value

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool = False,
        **_,
    ) -> BaseModelOutputWithPast:
        """Tokens (B, S), or their embeddings (B, S, D); ``attention_mask`` (B, keys) is 0 for
        padding, one of shape (B, 1, S, keys) is 0 for the keys that each token sees. Positions are
        ignored, there are none."""
        hidden = self.wte(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        before = past_key_values.get_seq_length() if past_key_values is not None else 0
        length = hidden.shape[1]
        seen = torch.ones(length, before + length, dtype=torch.bool, device=hidden.device)
        seen = seen.tril(before)[None, None, None]
        if attention_mask is not None and attention_mask.ndim == 4:
            seen = attention_mask[:, :, None] == 0
        elif attention_mask is not None:
            seen = seen & attention_mask.bool()[:, None, None, None]
        states = [hidden]
        for block in self.h:
            hidden = block(hidden, seen, past_key_values)
            states.append(hidden)
        hidden = self.ln_f(hidden)
        return BaseModelOutputWithPast(
            last_hidden_state=hidden,
            past_key_values=past_key_values,
            hidden_states=(*states[:-1], hidden) if output_hidden_states else None,
        )


class ModuleFormerForCausalLM(ModuleFormerPreTrainedModel, GenerationMixin):
    """The language model."""

    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}

    def __init__(self, config: ModuleFormerConfig):
        super().__init__(config)
        self.transformer = ModuleFormerModel(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Arguments and outputs as those of transformers' language models."""
        outputs = self.transformer(input_ids, **kwargs)
        last = isinstance(logits_to_keep, int)
        kept = slice(-logits_to_keep, None) if last else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            size = self.config.vocab_size
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=size)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )


# The released matrices stand the other way round: one row per input.
register_checkpoint_conversion_mapping(
    "moduleformer",
    [
        WeightConverter(
            source_patterns=f"{part}.weight",
            target_patterns=f"{part}.weight",
            operations=[Transpose(1, 2)],
        )
        for part in ("q_proj.experts", "mlpf.experts", "output_experts")
    ],
)
AutoConfig.register("moduleformer", ModuleFormerConfig)
AutoModel.register(ModuleFormerConfig, ModuleFormerModel)
AutoModelForCausalLM.register(ModuleFormerConfig, ModuleFormerForCausalLM)
