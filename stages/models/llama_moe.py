"""LLaMA-MoE: Llama whose feed-forward blocks were split into experts (arXiv 2406.16554).

transformers lacks it, and the code that the checkpoints bring along is never run; this class reads
their configuration and weights. A router is two matrices with a hyperbolic tangent between them;
the chosen experts' weights are the softmax over their logits times ``score_scale_factor``. In
training the released code adds noise to the logits, scaled by a matrix of its own; here noise is
left to the recipe's ``router.noise``, and that matrix is carried along unchanged.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlamaConfig
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
)
from transformers.integrations import use_experts_implementation
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaModel,
    LlamaPreTrainedModel,
)
from transformers.utils.output_capturing import OutputRecorder

from stages.errors import BadInput

# Shape letters: T tokens, E experts, K chosen experts, F neurons of an expert, D hidden size.


class LlamaMoeConfig(LlamaConfig):
    """Llama's configuration, and that of its experts under the names of the released checkpoints.

    ``intermediate_size`` are the neurons of all experts of a layer together. Raises BadInput for
    one that this class cannot compute: experts of several sizes, weights that are no softmax.
    """

    model_type = "llama_moe"

    num_experts: int = 16
    num_selects: int = 4
    size_experts: list | None = None
    gate_network: str = "mlp"
    gate_use_softmax: bool = True
    gate_add_noise: bool = True
    multiply_gate_scores: bool = True
    score_scale_factor: float | list = 1.0
    add_weight_norm: bool = False

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        fixed = {
            "gate_network": "mlp",
            "gate_use_softmax": True,
            "multiply_gate_scores": True,
            "add_weight_norm": False,
        }
        for field, value in fixed.items():
            if getattr(self, field) != value:
                raise BadInput(
                    f"config.json: {field}: {getattr(self, field)!r} of a LLaMA-MoE is not known "
                    f"here, only {value!r}; use a released checkpoint"
                )
        sizes = {size for layer in self.size_experts or () for size in layer}
        if sizes - {self.intermediate_size // self.num_experts}:
            raise BadInput(
                "config.json: size_experts: experts of several sizes are not known here; use a "
                "released checkpoint"
            )
        if isinstance(self.score_scale_factor, list):
            raise BadInput(
                "config.json: score_scale_factor: one factor per layer is not known here, only a "
                "number; use a released checkpoint"
            )


class LlamaMoeRouter(nn.Module):
    """Scores the experts of each token and chooses the best."""

    def __init__(self, config: LlamaMoeConfig):
        super().__init__()
        experts = config.num_experts
        self.top_k, self.scale = config.num_selects, config.score_scale_factor
        self.gate_network = nn.Sequential(
            nn.Linear(config.hidden_size, experts, bias=False),
            nn.Tanh(),
            nn.Linear(experts, experts, bias=False),
        )
        if config.gate_add_noise:
            self.weight_noise = nn.Linear(config.hidden_size, experts, bias=False)
            self.weight_noise.requires_grad_(False)

    def forward(self, hidden_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Logits (T, E); weights (T, K), which sum to the scale, and indices (T, K)."""
        first, _, second = self.gate_network
        # The logits are the first product by ``linear``, as in every router (``routing.py``).
        logits_TE = F.linear((hidden_TD @ first.weight.T).tanh(), second.weight)
        chosen_TK, indices_TK = logits_TE.topk(self.top_k)
        weights_TK = chosen_TK.softmax(dim=-1, dtype=torch.float32).to(logits_TE.dtype)
        return logits_TE, weights_TK * self.scale, indices_TK


@use_experts_implementation
class LlamaMoeExperts(nn.Module):
    """All experts of a layer, fused; the names are those of transformers' grouped products."""

    def __init__(self, config: LlamaMoeConfig):
        super().__init__()
        self.num_experts = config.num_experts
        neurons, hidden = config.intermediate_size // config.num_experts, config.hidden_size
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * neurons, hidden))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, hidden, neurons))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(
        self, hidden_TD: torch.Tensor, indices_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> torch.Tensor:
        """Weighted sum (T, D) of the chosen experts' outputs: the ``eager`` implementation."""
        output_TD = torch.zeros_like(hidden_TD)
        for expert in indices_TK.unique():
            tokens, places = torch.where(indices_TK == expert)
            gate_TF, up_TF = F.linear(hidden_TD[tokens], self.gate_up_proj[expert]).chunk(2, dim=-1)
            outer = F.linear(self.act_fn(gate_TF) * up_TF, self.down_proj[expert])
            weighed = outer * weights_TK[tokens, places, None]
            output_TD.index_add_(0, tokens, weighed.to(output_TD.dtype))
        return output_TD


class LlamaMoeBlock(nn.Module):
    """The feed-forward block of a layer."""

    def __init__(self, config: LlamaMoeConfig):
        super().__init__()
        self.gate = LlamaMoeRouter(config)
        self.experts = LlamaMoeExperts(config)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states of shape (batch, sequence, D), and the same out."""
        hidden_TD = hidden.reshape(-1, hidden.shape[-1])
        _, weights_TK, indices_TK = self.gate(hidden_TD)
        return self.experts(hidden_TD, indices_TK, weights_TK).view_as(hidden)


class LlamaMoeDecoderLayer(LlamaDecoderLayer):
    """Llama's layer with experts."""

    def __init__(self, config: LlamaMoeConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.mlp = LlamaMoeBlock(config)


class LlamaMoePreTrainedModel(LlamaPreTrainedModel):
    """What all models of the architecture share."""

    config: LlamaMoeConfig
    _no_split_modules = ["LlamaMoeDecoderLayer"]
    _can_set_experts_implementation_cached_value = True
    _can_record_outputs = {
        "hidden_states": LlamaMoeDecoderLayer,
        "attentions": LlamaAttention,
        "router_logits": OutputRecorder(LlamaMoeRouter, index=0),
    }

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # transformers remembers its answer for Llama, which is no, on the class we inherit from.
        return True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, LlamaMoeExperts):
            for parameter in module.parameters():
                init.normal_(parameter, mean=0.0, std=self.config.initializer_range)
        elif isinstance(module, LlamaMoeRouter) and self.config.gate_add_noise:
            init.zeros_(module.weight_noise.weight)


class LlamaMoeModel(LlamaMoePreTrainedModel, LlamaModel):
    """The decoder without a head; its ``forward`` is Llama's."""

    def __init__(self, config: LlamaMoeConfig):
        super().__init__(config)
        self.layers = nn.ModuleList(
            LlamaMoeDecoderLayer(config, i) for i in range(config.num_hidden_layers)
        )
        self.post_init()


class LlamaMoeForCausalLM(LlamaMoePreTrainedModel, LlamaForCausalLM):
    """The language model; its ``forward`` is Llama's."""

    def __init__(self, config: LlamaMoeConfig):
        # Past Llama's own, which would build the dense model first.
        super(LlamaForCausalLM, self).__init__(config)
        self.model = LlamaMoeModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


_RELEASED = {"gate": "w1", "up": "w3", "down": "w2"}
register_checkpoint_conversion_mapping(
    "llama_moe",
    [
        # On saving, transformers writes whole names only where a number is followed by a dot.
        *(
            WeightRenaming(
                rf"mlp.calculator.experts.weight_{part}.(\d+)", rf"mlp.experts.\1.{name}.weight"
            )
            for part, name in _RELEASED.items()
        ),
        WeightConverter(
            source_patterns=["mlp.experts.*.w1.weight", "mlp.experts.*.w3.weight"],
            target_patterns="mlp.experts.gate_up_proj",
            operations=[MergeModulelist(dim=0), Concatenate(dim=1)],
        ),
        WeightConverter(
            source_patterns="mlp.experts.*.w2.weight",
            target_patterns="mlp.experts.down_proj",
            operations=[MergeModulelist(dim=0)],
        ),
    ],
)
AutoConfig.register("llama_moe", LlamaMoeConfig)
AutoModel.register(LlamaMoeConfig, LlamaMoeModel)
AutoModelForCausalLM.register(LlamaMoeConfig, LlamaMoeForCausalLM)
