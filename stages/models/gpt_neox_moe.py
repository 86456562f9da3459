"""GPT-NeoX (Pythia) with experts: the Mixture-of-Experts architecture that transformers lacks.

Everything but the feed-forward blocks of the sparse layers is transformers' GPT-NeoX. A sparse
block has a softmax router over ungated experts with biases, and the weights of the chosen ones are
normalised to sum to 1, as Mixtral's. Importing this module registers the architecture with
transformers' Auto classes; a folder of it is an ordinary configuration with safetensors.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GPTNeoXModel,
    GPTNeoXPreTrainedModel,
)
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.integrations import use_experts_implementation
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXAttention, GPTNeoXLayer
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from transformers.utils import can_return_tuple
from transformers.utils.output_capturing import OutputRecorder

# Shape letters: T tokens, E experts, K chosen experts, F neurons of an expert, D hidden size.


class GPTNeoXMoeConfig(GPTNeoXConfig):
    """GPT-NeoX's configuration, and that of its experts.

    ``moe_intermediate_size`` are the neurons of one expert, ``mlp_only_layers`` the indices of the
    layers that stay dense, with ``intermediate_size`` neurons.
    """

    model_type = "gpt_neox_moe"

    num_experts: int = 8
    num_experts_per_tok: int = 2
    moe_intermediate_size: int = 24576
    mlp_only_layers: list[int] | None = None
    output_router_logits: bool = False
    router_aux_loss_coef: float = 0.001


class GPTNeoXMoeRouter(nn.Module):
    """Scores the experts of each token and chooses the best."""

    def __init__(self, config: GPTNeoXMoeConfig):
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))

    def forward(self, hidden_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Logits (T, E); weights (T, K), which sum to 1, and indices (T, K) of the chosen."""
        logits_TE = F.linear(hidden_TD, self.weight)
        chosen_TK, indices_TK = logits_TE.float().topk(self.top_k)
        return logits_TE, chosen_TK.softmax(dim=-1).to(logits_TE.dtype), indices_TK


@use_experts_implementation(has_bias=True, has_gate=False)
class GPTNeoXMoeExperts(nn.Module):
    """All experts of a layer, fused; the names are those of transformers' grouped products."""

    def __init__(self, config: GPTNeoXMoeConfig):
        super().__init__()
        experts, neurons, hidden = (
            config.num_experts,
            config.moe_intermediate_size,
            config.hidden_size,
        )
        self.num_experts = experts
        self.up_proj = nn.Parameter(torch.empty(experts, neurons, hidden))
        self.up_proj_bias = nn.Parameter(torch.empty(experts, neurons))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, neurons))
        self.down_proj_bias = nn.Parameter(torch.empty(experts, hidden))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(
        self, hidden_TD: torch.Tensor, indices_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> torch.Tensor:
        """Weighted sum (T, D) of the chosen experts' outputs: the ``eager`` implementation."""
        output_TD = torch.zeros_like(hidden_TD)
        for expert in indices_TK.unique():
            tokens, places = torch.where(indices_TK == expert)
            inner = F.linear(hidden_TD[tokens], self.up_proj[expert], self.up_proj_bias[expert])
            outer = F.linear(
                self.act_fn(inner), self.down_proj[expert], self.down_proj_bias[expert]
            )
            weighed = outer * weights_TK[tokens, places, None]
            output_TD.index_add_(0, tokens, weighed.to(output_TD.dtype))
        return output_TD


class GPTNeoXMoeBlock(nn.Module):
    """The feed-forward block of a sparse layer."""

    def __init__(self, config: GPTNeoXMoeConfig):
        super().__init__()
        self.gate = GPTNeoXMoeRouter(config)
        self.experts = GPTNeoXMoeExperts(config)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states of shape (batch, sequence, D), and the same out."""
        hidden_TD = hidden.reshape(-1, hidden.shape[-1])
        _, weights_TK, indices_TK = self.gate(hidden_TD)
        return self.experts(hidden_TD, indices_TK, weights_TK).view_as(hidden)


class GPTNeoXMoeLayer(GPTNeoXLayer):
    """GPT-NeoX's layer, with experts unless the configuration keeps it dense."""

    def __init__(self, config: GPTNeoXMoeConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        if layer_idx not in (config.mlp_only_layers or ()):
            self.mlp = GPTNeoXMoeBlock(config)


class GPTNeoXMoePreTrainedModel(GPTNeoXPreTrainedModel):
    """What all models of the architecture share."""

    config: GPTNeoXMoeConfig
    _no_split_modules = ["GPTNeoXMoeLayer"]
    # Otherwise that of GPT-NeoX would be inherited, once a dense model was made in this process.
    _can_set_experts_implementation_cached_value = True
    _can_record_outputs = {
        "hidden_states": GPTNeoXMoeLayer,
        "attentions": GPTNeoXAttention,
        "router_logits": OutputRecorder(GPTNeoXMoeRouter, index=0),
    }

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # transformers remembers its answer for GPT-NeoX, which is no, on the class we inherit from.
        return True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, GPTNeoXMoeRouter | GPTNeoXMoeExperts):
            for name, parameter in module.named_parameters():
                if name.endswith("_bias"):
                    init.zeros_(parameter)
                else:
                    init.normal_(parameter, mean=0.0, std=self.config.initializer_range)


class GPTNeoXMoeModel(GPTNeoXMoePreTrainedModel, GPTNeoXModel):
    """The decoder without a head; its ``forward`` is GPT-NeoX's."""

    def __init__(self, config: GPTNeoXMoeConfig):
        super().__init__(config)
        self.layers = nn.ModuleList(
            GPTNeoXMoeLayer(config, i) for i in range(config.num_hidden_layers)
        )
        self.post_init()


class GPTNeoXMoeForCausalLM(GPTNeoXMoePreTrainedModel, GPTNeoXForCausalLM):
    """The language model; ``output_router_logits`` adds the load-balancing loss of Mixtral."""

    def __init__(self, config: GPTNeoXMoeConfig):
        # Past GPT-NeoX's own, which would build the dense model first.
        super(GPTNeoXForCausalLM, self).__init__(config)
        self.gpt_neox = GPTNeoXMoeModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        past_key_values: Cache | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs,
    ) -> MoeCausalLMOutputWithPast:
        """Arguments and outputs as those of transformers' Mixture-of-Experts language models."""
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        outputs = self.gpt_neox(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            past_key_values=past_key_values,
            use_cache=use_cache,
            output_router_logits=output_router_logits,
            **kwargs,
        )
        last = isinstance(logits_to_keep, int)
        kept = slice(-logits_to_keep, None) if last else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = auxiliary = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        if output_router_logits:
            auxiliary = load_balancing_loss_func(
                outputs.router_logits,
                self.config.num_experts,
                self.config.num_experts_per_tok,
                attention_mask,
            )
            if loss is not None:
                loss = loss + self.config.router_aux_loss_coef * auxiliary
        return MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=auxiliary,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits if output_router_logits else None,
        )


AutoConfig.register("gpt_neox_moe", GPTNeoXMoeConfig)
AutoModel.register(GPTNeoXMoeConfig, GPTNeoXMoeModel)
AutoModelForCausalLM.register(GPTNeoXMoeConfig, GPTNeoXMoeForCausalLM)
