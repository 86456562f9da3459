"""Vision models with random weights, dense and with experts."""

import torch
from transformers import PreTrainedModel, ViTConfig, ViTForImageClassification

from stages.models.families import family
from stages.models.images import ImageProcessor
from stages.models.vision_ensembles import (
    ViTEnsembleConfig,
    ViTEnsembleForImageClassification,
    ViTMoeEnsembleConfig,
    ViTMoeEnsembleForImageClassification,
)
from stages.models.vision_heads import (
    ViTHeadConfig,
    ViTHeadForImageClassification,
    ViTMoeHeadConfig,
    ViTMoeHeadForImageClassification,
)
from stages.models.vision_moe import ViTMoeConfig, ViTMoeForImageClassification
from stages.models.vision_spec import VisionSpec


def from_scratch(spec: VisionSpec) -> tuple[PreTrainedModel, ImageProcessor]:
    """The model in evaluation mode, its weights drawn from the seed, and its input's form.

    Matrices are normal with standard deviation 1/sqrt(width); biases are zero. Pixels are read in
    [-1, 1].
    """
    shape, names = spec.shape, spec.names
    fields = {
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.depth,
        "num_attention_heads": shape.heads,
        "intermediate_size": shape.neurons,
        "image_size": spec.image_size,
        "patch_size": spec.patch,
        "num_channels": spec.channels,
        "initializer_range": shape.hidden**-0.5,
        "id2label": dict(enumerate(names)),
        "label2id": {name: i for i, name in enumerate(names)},
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)
        model = _model(spec, fields)
    if spec.shared_start and spec.experts:
        _equal_experts(model)
    half = (0.5,) * spec.channels
    processor = ImageProcessor(spec.image_size, spec.channels, half, half, names, spec.tokens)
    return model.eval(), processor


def _model(spec: VisionSpec, fields: dict) -> PreTrainedModel:
    if spec.has_head_experts:
        experts, top_k = spec.experts_of_head
        config = ViTMoeHeadConfig(
            **fields,
            num_experts=experts,
            num_experts_per_tok=top_k,
            moe_intermediate_size=spec.width_of_head // experts,
            norm_topk_prob=top_k > 1,
        )
        return ViTMoeHeadForImageClassification(config)
    if spec.head == "dense":
        return ViTHeadForImageClassification(
            ViTHeadConfig(**fields, head_intermediate_size=spec.width_of_head)
        )
    if spec.experts:
        fields |= {
            "num_experts": spec.experts,
            "num_experts_per_tok": spec.top_k,
            "moe_intermediate_size": spec.shape.neurons,
            "moe_layers": list(spec.moe_layers),
            "capacity_factor": spec.capacity_factor,
            "eval_capacity_factor": spec.eval_capacity_factor,
            "group_size": spec.group_size,
            "batch_prioritized": spec.batch_prioritized,
        }
    if spec.is_deep_ensemble:
        fields |= {"num_members": spec.ensemble}
        if spec.experts:
            return ViTMoeEnsembleForImageClassification(ViTMoeEnsembleConfig(**fields))
        return ViTEnsembleForImageClassification(ViTEnsembleConfig(**fields))
    if spec.experts:
        return ViTMoeForImageClassification(
            ViTMoeConfig(**fields, ensemble_size=spec.ensemble)
        )
    return ViTForImageClassification(ViTConfig(**fields))


@torch.no_grad()
def _equal_experts(model: PreTrainedModel) -> None:
    for experts in family(model).modules(model, "expert").values():
        for parameter in experts.parameters():
            parameter.copy_(parameter[:1].expand_as(parameter))
