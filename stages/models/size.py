"""Parameters and floating-point operations of a model, counted from its weights."""

from torch import nn
from transformers import PreTrainedModel

from stages.models.card import ModelCard
from stages.models.families import family, roles


def measure(model: PreTrainedModel, origin: str, notes: dict | None = None) -> ModelCard:
    """The card of a model. Weights on the meta device are enough: only shapes are read.

    Of the routed experts, ``top_k`` of ``experts`` are active; routers, shared experts and all
    dense parts always are. Operations per token are twice the active entries of all matrices that
    a token is multiplied with: an embedding look-up costs nothing, the head counts once, tied or
    not. Attention scores (they grow with the sequence), norms and activations are left out.
    """
    entry, config = family(model), model.config
    experts, top_k = entry.experts_of(config.to_dict())
    looked_up = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    role_of = roles(model)
    total = active = multiplied = 0
    for name, parameter in model.named_parameters():
        size = parameter.numel()
        used = size * top_k // experts if role_of[name] == "expert" else size
        total, active = total + size, active + used
        # The fused biases of experts have two axes too.
        matrix = parameter.ndim >= 2 and not name.endswith("bias")
        if matrix and id(parameter) not in looked_up:
            multiplied += used
    head = model.get_output_embeddings().weight
    if id(head) in looked_up:
        multiplied += head.numel()
    return ModelCard(
        architecture="moe" if entry.is_moe else "dense",
        family=entry.model_type,
        total_parameters=total,
        active_parameters=active,
        flops_per_token=2 * multiplied,
        experts=experts,
        top_k=top_k,
        moe_layers=entry.sparse_layers(config.to_dict()),
        layers=sum(getattr(config, name) for name in entry.layer_counts),
        origin=origin,
        notes=notes or {},
    )
