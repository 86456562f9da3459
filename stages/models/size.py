"""Parameters and floating-point operations of a model, counted from its weights."""

from torch import nn
from transformers import PreTrainedModel

from stages.models.card import ModelCard
from stages.models.families import family
from stages.models.roles import head_of, roles

ADDED = ("cls_token", "position_embeddings")
"""Ends of the names of a vision model's parameters that are added or put before, not multiplied."""


def measure(
    model: PreTrainedModel, origin: str, notes: dict | None = None, *, top_k: int | None = None
) -> ModelCard:
    """The card of a model. Weights on the meta device are enough: only shapes are read.

    Of the routed experts, ``top_k`` of ``experts`` are active (the model's own number where it is
    not given); routers, shared experts and all dense parts always are. Operations per token are
    twice the active entries of all matrices that a token is multiplied with: an embedding look-up
    costs nothing, the head counts once, tied or not. Attention scores (they grow with the
    sequence), norms and activations are left out. Those of an encoder-decoder are of a token that
    is read and one that is written, together and for the first of them alone.

    What the members of a partitioned ensemble do with shared parts counts once for each of them. A
    vision model's tokens are the patches of an image and the class token; the head, which reads
    the class token alone, is left out of a token's operations, and ``flops_per_image`` in the notes
    has it.
    """
    entry, config = family(model), model.config
    experts, own = entry.experts_of(config.to_dict())
    top_k = own if top_k is None else top_k
    looked_up = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    role_of = roles(model)
    # Their parts may have other roles: a head can hold a router and experts.
    heads = tuple(f"{path}." for path in entry.modules(model, "head")) if entry.head else ()
    # Their parts may be shared with the decoder's, or lie inside it.
    read = tuple(f"{path}." for path in entry.modules(model, "read")) if entry.read else ()
    passes = getattr(model, "passes", lambda name: 1)
    total = active = multiplied = 0
    head_size = read_size = expert_size = 0
    for name, parameter in model.named_parameters():
        size, times, chosen = parameter.numel(), passes(name), role_of[name] == "expert"
        # No two members have an expert in common.
        used = size * times * top_k // experts if chosen else size
        total, active = total + size, active + used
        # The fused biases of experts have two axes too.
        matrix = parameter.ndim >= 2 and not name.endswith(("bias", *ADDED))
        if matrix and id(parameter) not in looked_up:
            operations = used if chosen else size * times
            multiplied += operations
            head_size += operations if name.startswith(heads) else 0
            read_size += operations if name.startswith(read) else 0
            expert_size += size * times // experts if chosen and not name.startswith(heads) else 0
    notes = dict(notes or {})
    if entry.modality == "image":
        multiplied -= head_size
        tokens = (config.image_size // config.patch_size) ** 2 + 1
        flops = 2 * (tokens * multiplied + head_size)
        notes |= {"tokens_per_image": tokens, "flops_per_image": flops}
    elif id(head := head_of(model).weight) in looked_up:
        multiplied += head.numel()
    return ModelCard(
        architecture="moe" if entry.is_moe else "dense",
        family=entry.model_type,
        total_parameters=total,
        active_parameters=active,
        flops_per_token=2 * multiplied,
        flops_per_read_token=2 * read_size if entry.encoder_decoder else None,
        flops_per_expert=2 * expert_size,
        experts=experts,
        top_k=top_k,
        moe_layers=entry.sparse_layers(config.to_dict()),
        layers=sum(getattr(config, name) for name in entry.layer_counts),
        origin=origin,
        notes=notes,
    )
