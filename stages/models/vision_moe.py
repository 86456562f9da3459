"""V-MoE: transformers' Vision Transformer with experts, the architecture that transformers lacks.

Everything but the feed-forward blocks of the sparse layers is transformers' ViT, so a dense ViT is
transformers' own class and a folder of its weights is read by it. The router is linear without a
bias; a chosen expert's weight is its softmax value over all experts, not renormalised (V-MoE, arXiv
2106.05974), unless ``norm_topk_prob`` says so, as upcycled models of K > 1 do. The noise of
training and the auxiliary losses are the recipe's (``stages/finetune``) and not the model's, so
that they are the same for every family.

With ``ensemble_size`` M it is an efficient ensemble of experts (E³, arXiv 2110.03360): from the
first sparse layer on, each image's representation stands there M times, once for each member; the
experts and rows of each router are dealt out in equal, contiguous parts, and a member's tokens are
routed among its own. All else is shared, also the classifier. The members' probabilities are
averaged. Importing this module registers the architecture with transformers.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
    ViTPreTrainedModel,
)
from transformers import initialization as init
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.models.vit.modeling_vit import ViTAttention, ViTLayer
from transformers.utils.output_capturing import OutputRecorder

from stages.models.averaging import EnsembleOutput, averaged
from stages.models.capacity import within_capacity

# Biased, ungated experts: the same computation in both architectures.
from stages.models.gpt_neox_moe import GPTNeoXMoeExperts as Experts

# Shape letters: B images, S tokens of an image, T tokens, E experts, K chosen experts, D hidden,
# M members of an ensemble. The tokens of an image follow each other, member by member.


class ViTMoeConfig(ViTConfig):
    """ViT's configuration, and that of its experts.

    ``moe_layers`` are the indices of the sparse layers (every second one by default),
    ``moe_intermediate_size`` the neurons of one expert. ``capacity_factor`` C (training) and
    ``eval_capacity_factor`` (otherwise) limit an expert to round(K T C / E) of the T tokens of a
    group of ``group_size`` images; None is no limit, and no group size is the whole batch.
    ``batch_prioritized`` serves the tokens with the largest weights first instead of in their
    order. ``ensemble_size`` is the number of members that share the experts among them.
    """

    model_type = "vit_moe"

    num_experts: int = 8
    num_experts_per_tok: int = 2
    moe_intermediate_size: int = 3072
    moe_layers: list[int] | None = None
    norm_topk_prob: bool = False
    capacity_factor: float | None = None
    eval_capacity_factor: float | None = None
    group_size: int | None = None
    batch_prioritized: bool = False
    ensemble_size: int = 1

    def __post_init__(self, **kwargs):
        if self.moe_layers is None:
            self.moe_layers = list(range(1, self.num_hidden_layers, 2))
        super().__post_init__(**kwargs)


class ViTMoeRouter(nn.Module):
    """Scores the experts of each token and chooses the best."""

    def __init__(self, config: ViTMoeConfig):
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.norm_topk_prob = config.norm_topk_prob
        self.members = getattr(config, "ensemble_size", 1)
        self.tokens = (config.image_size // config.patch_size) ** 2 + 1
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))

    def forward(self, hidden_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Logits (T, E); weights (T, K) and indices (T, K) of the chosen, the best first."""
        logits_TE = self.restricted(F.linear(hidden_TD, self.weight))
        weights_TK, indices_TK = logits_TE.float().softmax(dim=-1).topk(self.top_k)
        if self.norm_topk_prob:
            weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
        return logits_TE, weights_TK.to(logits_TE.dtype), indices_TK

    def restricted(self, logits_TE: torch.Tensor) -> torch.Tensor:
        """The logits with -inf for experts that are another member's; unchanged the second time."""
        if self.members == 1:
            return logits_TE
        tokens, experts = (torch.arange(n, device=logits_TE.device) for n in logits_TE.shape)
        member_T = tokens // self.tokens % self.members
        member_E = experts * self.members // len(experts)
        return logits_TE.masked_fill(member_T[:, None] != member_E, -torch.inf)


class ViTMoeBlock(nn.Module):
    """The feed-forward block of a sparse layer."""

    def __init__(self, config: ViTMoeConfig):
        super().__init__()
        self.config = config
        self.gate = ViTMoeRouter(config)
        self.experts = Experts(config)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states of shape (B, S, D), and the same out."""
        hidden_TD = hidden.reshape(-1, hidden.shape[-1])
        _, weights_TK, indices_TK = self.gate(hidden_TD)
        factor = self.config.capacity_factor if self.training else self.config.eval_capacity_factor
        if factor is not None:
            tokens = hidden.shape[1] * self.config.ensemble_size
            kept_TK = self._kept(indices_TK, weights_TK, tokens, factor)
            weights_TK = weights_TK * kept_TK
        return self.experts(hidden_TD, indices_TK, weights_TK).view_as(hidden)

    def _kept(
        self, indices_TK: torch.Tensor, weights_TK: torch.Tensor, tokens: int, factor: float
    ) -> torch.Tensor:
        """The assignments within capacity, group by group; ``tokens`` are those of an image."""
        experts, size = self.config.num_experts, self.config.group_size
        size = len(indices_TK) if size is None else size * tokens
        groups = zip(indices_TK.split(size), weights_TK.detach().split(size), strict=True)
        return torch.cat(
            [
                within_capacity(
                    indices,
                    weights,
                    round(indices.numel() * factor / experts),
                    experts,
                    self.config.batch_prioritized,
                )
                for indices, weights in groups
            ]
        )


class ViTMoeLayer(ViTLayer):
    """ViT's layer, with experts where the configuration has them."""

    def __init__(self, config: ViTMoeConfig, layer: int):
        super().__init__(config)
        if layer in config.moe_layers:
            self.mlp = ViTMoeBlock(config)
        self.tiles = config.ensemble_size if layer == min(config.moe_layers) else 1

    def forward(self, hidden_states: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """As ViT's; where the members of an ensemble part, hidden states (B, S, D) come out as
        (B M, S, D), those of one image next to each other."""
        if self.tiles > 1:
            hidden_states = hidden_states.repeat_interleave(self.tiles, dim=0)
        return super().forward(hidden_states, *args, **kwargs)


class ViTMoePreTrainedModel(ViTPreTrainedModel):
    """What all models of the architecture share."""

    config: ViTMoeConfig
    _no_split_modules = ["ViTEmbeddings", "ViTMoeLayer"]
    # Otherwise that of ViT would be inherited, once a dense model was made in this process.
    _can_set_experts_implementation_cached_value = True
    _can_record_outputs = {
        "hidden_states": ViTMoeLayer,
        "attentions": ViTAttention,
        "router_logits": OutputRecorder(ViTMoeRouter, index=0),
    }

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # transformers remembers its answer for ViT, which is no, on the class we inherit from.
        return True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ViTMoeRouter | Experts):
            for name, parameter in module.named_parameters():
                if name.endswith("_bias"):
                    init.zeros_(parameter)
                else:
                    init.normal_(parameter, mean=0.0, std=self.config.initializer_range)


class ViTMoeModel(ViTMoePreTrainedModel, ViTModel):
    """The encoder without a head; its ``forward`` is ViT's."""

    def __init__(self, config: ViTMoeConfig):
        super().__init__(config, add_pooling_layer=False)
        self.layers = nn.ModuleList(
            ViTMoeLayer(config, i) for i in range(config.num_hidden_layers)
        )
        self.post_init()


class ViTMoeForImageClassification(ViTMoePreTrainedModel, ViTForImageClassification):
    """The classifier, on the class token; its ``forward`` is ViT's, averaged over the members of
    an ensemble."""

    def __init__(self, config: ViTMoeConfig):
        # Past ViT's own, which would build the dense model first.
        super(ViTForImageClassification, self).__init__(config)
        self.num_labels = config.num_labels
        self.vit = ViTMoeModel(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(
        self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None, **kwargs
    ) -> ImageClassifierOutput | EnsembleOutput:
        """Logits (B, labels) of images (B, C, H, W)."""
        if self.config.ensemble_size == 1:
            return super().forward(pixel_values, labels=labels, **kwargs)
        logits = super().forward(pixel_values, **kwargs).logits
        return averaged(logits.unflatten(0, (-1, self.config.ensemble_size)), labels)

    def passes(self, parameter: str) -> int:
        """How often a parameter is used on each patch: once, or by each member of an ensemble."""
        part, _, rest = parameter.removeprefix("vit.").partition(".")
        first = min(self.config.moe_layers)
        shared = part != "classifier" and not (
            part == "layers" and int(rest.partition(".")[0]) >= first
        )
        return 1 if shared else self.config.ensemble_size


AutoConfig.register("vit_moe", ViTMoeConfig)
AutoModelForImageClassification.register(ViTMoeConfig, ViTMoeForImageClassification)
