"""Deep ensembles: Vision Transformers that share nothing but the image, and whose probabilities are
averaged (Lakshminarayanan, Pritzel and Blundell, arXiv 1612.01474).

The members are drawn one by one and lie in one folder, so that they are trained, evaluated and
attacked as one model. They are trained on the same batches by the mean of their losses: no gradient
passes between them, and Adam takes no notice of the division by their number, but a gradient is
clipped by the norm over all of them. Importing this module registers both architectures with
transformers.
"""

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTPreTrainedModel,
)

from stages.models.averaging import EnsembleOutput, averaged
from stages.models.vision_moe import (
    ViTMoeConfig,
    ViTMoeForImageClassification,
    ViTMoePreTrainedModel,
)


class ViTEnsembleConfig(ViTConfig):
    """ViT's configuration, and how many of them."""

    model_type = "vit_ensemble"

    num_members: int = 2


class ViTMoeEnsembleConfig(ViTMoeConfig):
    """V-MoE's configuration, and how many of them."""

    model_type = "vit_moe_ensemble"

    num_members: int = 2


class _Members:
    """Members of one configuration, of the class ``member_class``."""

    member_class: type[ViTForImageClassification]

    def __init__(self, config: ViTEnsembleConfig | ViTMoeEnsembleConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.members = nn.ModuleList(self.member_class(config) for _ in range(config.num_members))
        self.post_init()

    def forward(
        self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None, **kwargs
    ) -> EnsembleOutput:
        """The averaged output of all members for images (B, C, H, W)."""
        logits = [member(pixel_values, **kwargs).logits for member in self.members]
        return averaged(torch.stack(logits, dim=1), labels)


class ViTEnsembleForImageClassification(_Members, ViTPreTrainedModel):
    """A deep ensemble of dense Vision Transformers."""

    config: ViTEnsembleConfig
    member_class = ViTForImageClassification


class ViTMoeEnsembleForImageClassification(_Members, ViTMoePreTrainedModel):
    """A deep ensemble of V-MoEs."""

    config: ViTMoeEnsembleConfig
    member_class = ViTMoeForImageClassification


AutoConfig.register("vit_ensemble", ViTEnsembleConfig)
AutoConfig.register("vit_moe_ensemble", ViTMoeEnsembleConfig)
AutoModelForImageClassification.register(ViTEnsembleConfig, ViTEnsembleForImageClassification)
AutoModelForImageClassification.register(
    ViTMoeEnsembleConfig, ViTMoeEnsembleForImageClassification
)
