"""Vision Transformers whose classifier is a two-layer block, or a mixture of such blocks.

The dense, Soft-MoE and sparse heads of *Mixture-of-Experts Models in Vision* (arXiv 2601.15021): an
expert maps the body's features to the logits of the labels through one hidden layer, and the head
adds up the experts' logits, all of them weighed by the softmax of a linear router (soft), or the K
best with the softmax over those alone (sparse). Ours are the body (ViT in place of a ResNet), its
activation, a router without a bias, and noise and balancing losses that are the recipe's; with K of
1 a weight is not renormalised, as in V-MoE, or it would be 1 and the router would learn nothing.

A soft head is a sparse one with K = E, so its router is seen and forced like any other. Its tokens
are the images: the head reads the class token alone. Importing this module registers both
architectures with transformers.
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
)
from transformers import initialization as init
from transformers.activations import ACT2FN

from stages.models.vision_moe import ViTMoeRouter

# Shape letters: T images, E experts, K chosen experts, D hidden size, N neurons, L labels.


class ViTHeadConfig(ViTConfig):
    """ViT's configuration, and the neurons of its dense two-layer head."""

    model_type = "vit_head"

    head_intermediate_size: int = 256


class ViTMoeHeadConfig(ViTConfig):
    """ViT's configuration, and that of its head of experts: ``moe_intermediate_size`` are the
    neurons of one."""

    model_type = "vit_moe_head"

    num_experts: int = 8
    num_experts_per_tok: int = 2
    moe_intermediate_size: int = 32
    norm_topk_prob: bool = True


class DenseHead(nn.Module):
    """Features (T, D) to logits (T, L) through one hidden layer."""

    def __init__(self, config: ViTHeadConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.head_intermediate_size)
        self.act_fn = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(config.head_intermediate_size, config.num_labels)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Logits of the labels."""
        return self.fc2(self.act_fn(self.fc1(features)))


class HeadExperts(nn.Module):
    """All experts of a head, fused; each a ``DenseHead`` of its own."""

    def __init__(self, config: ViTMoeHeadConfig):
        super().__init__()
        experts, neurons = config.num_experts, config.moe_intermediate_size
        self.num_experts = experts
        self.up_proj = nn.Parameter(torch.empty(experts, neurons, config.hidden_size))
        self.up_proj_bias = nn.Parameter(torch.empty(experts, neurons))
        self.down_proj = nn.Parameter(torch.empty(experts, config.num_labels, neurons))
        self.down_proj_bias = nn.Parameter(torch.empty(experts, config.num_labels))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(
        self, hidden_TD: torch.Tensor, indices_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> torch.Tensor:
        """Weighted sum (T, L) of the chosen experts' logits."""
        logits_TL = hidden_TD.new_zeros(len(hidden_TD), self.down_proj.shape[1])
        for expert in indices_TK.unique():
            tokens, places = torch.where(indices_TK == expert)
            inner = F.linear(hidden_TD[tokens], self.up_proj[expert], self.up_proj_bias[expert])
            outer = F.linear(
                self.act_fn(inner), self.down_proj[expert], self.down_proj_bias[expert]
            )
            weighed = outer * weights_TK[tokens, places, None]
            logits_TL = logits_TL.index_add(0, tokens, weighed.to(logits_TL.dtype))
        return logits_TL


class MoeHead(nn.Module):
    """A mixture of experts in a classifier's place."""

    def __init__(self, config: ViTMoeHeadConfig):
        super().__init__()
        self.gate = ViTMoeRouter(config)
        self.experts = HeadExperts(config)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Logits (…, L) of features (…, D)."""
        hidden_TD = features.reshape(-1, features.shape[-1])
        _, weights_TK, indices_TK = self.gate(hidden_TD)
        logits_TL = self.experts(hidden_TD, indices_TK, weights_TK)
        return logits_TL.view(*features.shape[:-1], -1)


class ViTHeadForImageClassification(ViTForImageClassification):
    """ViT with a dense two-layer head; its ``forward`` is ViT's."""

    config: ViTHeadConfig
    head_class = DenseHead

    def __init__(self, config: ViTHeadConfig | ViTMoeHeadConfig):
        # Past ViT's own, which would build the linear head first.
        super(ViTForImageClassification, self).__init__(config)
        self.num_labels = config.num_labels
        self.vit = ViTModel(config, add_pooling_layer=False)
        self.classifier = self.head_class(config)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ViTMoeRouter | HeadExperts):
            for name, parameter in module.named_parameters():
                if name.endswith("_bias"):
                    init.zeros_(parameter)
                else:
                    init.normal_(parameter, mean=0.0, std=self.config.initializer_range)


class ViTMoeHeadForImageClassification(ViTHeadForImageClassification):
    """ViT with a head of experts."""

    config: ViTMoeHeadConfig
    head_class = MoeHead


AutoConfig.register("vit_head", ViTHeadConfig)
AutoConfig.register("vit_moe_head", ViTMoeHeadConfig)
AutoModelForImageClassification.register(ViTHeadConfig, ViTHeadForImageClassification)
AutoModelForImageClassification.register(ViTMoeHeadConfig, ViTMoeHeadForImageClassification)
