"""A dense twin with the activated FLOPs of an upcycled one, from the same dense model.

Some neurons of each feed-forward block are duplicated and their down-projection is divided by the
number of copies (arXiv 1511.05641), which preserves the function. The noise of upcycling is added
afterwards to the neurons that have a copy: elsewhere there is no symmetry to break. What the
upcycled twin then does better is due to routing, not to more computation.
"""

import copy

import torch
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from stages.models import twin
from stages.models.load import filled
from stages.models.spec import WidenSpec


@torch.no_grad()
def widen(
    dense: PreTrainedModel, tokenizer: Tokenizer, spec: WidenSpec
) -> tuple[PreTrainedModel, dict]:
    """The widened twin of a float32 model, and the notes of its card.

    Raises StageFailed for a dense model that is not Llama-like or whose function was not kept.
    """
    twin.require_llama_like(dense)
    old = dense.config
    layers = old.num_hidden_layers if spec.layers == "all" else len(spec.layers)
    extra = (spec.top_k - 1) * layers * old.intermediate_size  # neurons that the MoE twin adds
    added = round(extra / old.num_hidden_layers)  # in each layer
    generator = torch.Generator().manual_seed(spec.seed)
    model, copied = _build(dense, added, generator)
    dense_probe = twin.probe(dense, tokenizer)
    before = twin.require_same_function(twin.probe(model, tokenizer)[0], dense_probe[0])
    for layer, neurons in zip(model.model.layers, copied, strict=True):
        block = layer.mlp
        for projection in (block.gate_proj, block.up_proj):
            twin.add_noise(projection.weight, spec.noise, generator, neurons[:, None])
        twin.add_noise(block.down_proj.weight, spec.noise, generator, neurons)
    after = twin.probe(model, tokenizer)
    notes = twin.noise_notes(before, dense_probe, after, spec.noise, spec.seed)
    notes["neurons_added_per_layer"] = added
    # 3 matrices, a multiplication and an addition; the routers of the MoE twin are not known here.
    excess = added * old.num_hidden_layers - extra
    notes["flops_per_token_beyond_moe_without_routers"] = 6 * old.hidden_size * excess
    return model, notes


def _build(
    dense: PreTrainedModel, added: int, generator: torch.Generator
) -> tuple[PreTrainedModel, list[torch.Tensor]]:
    """The widened model, and per layer 1 for the neurons that have a copy and 0 for the others."""
    copied = []
    neurons = dense.config.intermediate_size
    config = copy.deepcopy(dense.config)
    config.intermediate_size = neurons + added
    state = dense.state_dict()
    for layer in range(config.num_hidden_layers):
        block = f"model.layers.{layer}.mlp"
        # Whole permutations one after the other, so that copies are spread as evenly as can be.
        rounds = [torch.randperm(neurons, generator=generator) for _ in range(-(-added // neurons))]
        source = torch.cat([torch.arange(neurons), *rounds])[: neurons + added]
        copies = torch.bincount(source, minlength=neurons)
        copied.append((copies[source] > 1).float())
        for name in ("gate_proj", "up_proj"):
            state[f"{block}.{name}.weight"] = state[f"{block}.{name}.weight"][source]
        down = state[f"{block}.down_proj.weight"]
        state[f"{block}.down_proj.weight"] = (down / copies)[:, source]
    model = filled(type(dense), config, state)
    model.generation_config = dense.generation_config
    return model, copied
