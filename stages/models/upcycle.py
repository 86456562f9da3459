"""Upcycling: a Mixture-of-Experts model made of a dense one.

Whole copies as experts compute what the dense model computes, whatever the router says, because
the weights of the chosen ones sum to 1 (sparse upcycling, arXiv 2212.05055). A split computes it
with all experts and even weights. This is measured on real text before anything else happens, and
a larger difference than rounding refuses the model; then the twin gets what makes it differ (fewer
experts per token, its router, neurons drawn anew, noise), and the card says by how much it does.
V-MoE with one expert per token gets its own weights, softmax values over all experts, after that: a
weight that always is 1 has no gradient, and the task could not train the router.
"""

import torch
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from stages.models import experts, targets, twin
from stages.models.dense import DENSE, becomes
from stages.models.families import family
from stages.models.images import ImageProcessor
from stages.models.load import filled
from stages.models.spec import UpcycleSpec, indices

# Shape letters: E experts, N neurons of an expert, D hidden size.


@torch.no_grad()
def upcycle(
    dense: PreTrainedModel, tokenizer: Tokenizer | ImageProcessor, spec: UpcycleSpec
) -> tuple[PreTrainedModel, dict]:
    """The upcycled twin of a float32 model, and the notes of its card.

    The dense model is one that ``twin.require_possible`` accepts. Raises StageFailed when its
    function was not kept where it must be.
    """
    generator = torch.Generator().manual_seed(spec.seed)
    model, routers = _build(dense, spec, generator)
    dense_probe = twin.probe(dense, tokenizer)
    copies = spec.experts_from == "copies"
    if copies:
        _route(model, routers, spec.top_k)
    kept = twin.require_same_function(twin.probe(model, tokenizer)[0], dense_probe[0])
    if not copies:
        _route(model, routers, spec.top_k)
        if not spec.rescale:
            for block in family(model).modules(model, "expert").values():
                block.down_proj *= spec.top_k / spec.experts
    for weights in experts.expert_weights(model):
        twin.break_symmetry(weights, spec, generator)
    how = "as routed" if copies else "with all experts at even weights"
    if spec.top_k == 1 and model.config.model_type == "vit_moe":
        for each in (model.config, *family(model).modules(model, "router").values()):
            each.norm_topk_prob = False
        how += ", before its weight was V-MoE's own" if copies else ""
    notes = {"logit_difference": kept, "logit_difference_measured": how}
    notes |= twin.notes(dense_probe, twin.probe(model, tokenizer), spec)
    own = {"gpt_neox_moe": "gpt_neox_moe", "vit_moe": "vision_moe"}.get(model.config.model_type)
    if own:
        notes["loading"] = f"import stages.models.{own} before transformers' from_pretrained"
    return model, notes


def _build(
    dense: PreTrainedModel, spec: UpcycleSpec, generator: torch.Generator
) -> tuple[PreTrainedModel, list[torch.Tensor]]:
    """The model with all experts chosen at even weights, and the routers (E, D) that it gets."""
    layout, old = DENSE[dense.config.model_type], dense.config
    layers = indices(spec.layers, old.num_hidden_layers)
    name = becomes(spec, old.model_type, old.num_hidden_layers)
    state, routers = dense.state_dict(), []
    names = [*layout.inputs, layout.output, *filter(None, [layout.output_bias])]
    for layer in layers:
        path = layout.block.format(layer)
        block = {parameter: state.pop(f"{path}.{parameter}") for parameter in names}
        neurons_EN = experts.neurons_of_experts(spec, block, layout, generator)
        routers.append(
            experts.router_rows(spec, block, layout, neurons_EN, old.initializer_range, generator)
        )
        if neurons_EN is None:
            whole = targets.expert(name, block)
            sparse = {key: t.expand(spec.experts, *t.shape) for key, t in whole.items()}
        else:
            parts = [
                targets.expert(name, experts.part(block, layout, neurons_N, spec.experts))
                for neurons_N in neurons_EN
            ]
            sparse = {key: torch.stack([part[key] for part in parts]) for key in parts[0]}
        sparse["gate.weight"] = torch.zeros(spec.experts, old.hidden_size)
        sparse |= targets.shared_expert(name, old.hidden_size)
        state |= {f"{path}.{parameter}": tensor for parameter, tensor in sparse.items()}
    share = 1 if spec.experts_from == "copies" else spec.experts
    config = targets.configuration(
        name,
        old,
        layers,
        experts=spec.experts,
        top_k=spec.experts,
        neurons=old.intermediate_size // share,
    )
    model = filled(targets.CLASSES[name], config, state)
    if dense.can_generate():
        model.generation_config = dense.generation_config
    return model, routers


def _route(model: PreTrainedModel, routers: list[torch.Tensor], top_k: int) -> None:
    """Give the model its routers, which choose ``top_k`` experts."""
    entry = family(model)
    setattr(model.config, entry.top_k, top_k)
    for router, rows_ED in zip(entry.modules(model, "router").values(), routers, strict=True):
        router.top_k = top_k
        router.weight.copy_(rows_ED)
