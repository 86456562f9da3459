"""A dense twin with the activated FLOPs of an upcycled one, from the same dense model.

*Of whole copies*, the upcycled twin activates more neurons than the dense model. Here some neurons
of each feed-forward block are duplicated and their down-projection is divided by the number of
copies (Net2Net, arXiv 1511.05641), which preserves the function. Then the neurons that have a copy
get what tells the experts apart: elsewhere there is no symmetry to break. What the upcycled twin
then does better is due to routing, not to more computation.

*Of a split*, the upcycled twin activates fewer. Its partner of equal computation is the dense model
with that many neurons left in each block: the same ones for every token instead of those that a
router chooses. They are chosen as well as can be without training, by what they add to the block's
output on a few texts: SmolLM2-135M with half of its neurons has a loss of 4.7 on other texts (3.4
whole), and of 11 to 12 with random ones or those of the largest weights. Against a weaker partner,
routing would win without merit. (The dense model itself is the partner of equal total parameters,
and computes more.)
"""

import copy

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from stages.models import twin
from stages.models.dense import DENSE, Dense
from stages.models.images import ImageProcessor
from stages.models.load import filled
from stages.models.spec import WidenSpec

# Shape letters: F neurons of the dense block, D hidden size.

CALIBRATION_TEXTS = (
    "The old lighthouse stood at the end of the pier. Every evening at six the keeper climbed its "
    "ninety steps, lit the lamp and wrote the weather into a small blue book.",
    "Question: Which gas makes up most of the air around us?\nAnswer: nitrogen\n\n"
    "Question: How many days are there in a leap year?\nAnswer: 366",
    "def largest(numbers):\n    best = numbers[0]\n    for number in numbers[1:]:\n"
    "        if number > best:\n            best = number\n    return best\n",
    "We stayed three nights. The room was clean and the staff could not have been kinder, but the "
    "street below is loud until two in the morning and breakfast is not worth the price.",
    "To solve 3x + 7 = 22, subtract 7 from both sides, which gives 3x = 15, and divide by 3: "
    "x = 5. Check: 3 times 5 is 15, and 15 plus 7 is 22.",
    "User: How do I remove a coffee stain from a cotton shirt?\nAssistant: Rinse it with cold "
    "water as soon as you can, rub in a little dish soap, wait ten minutes, and wash it as usual.",
    "In 1928 Alexander Fleming noticed that a mould had killed the bacteria in one of his dishes. "
    "The substance it made, penicillin, became the first widely used antibiotic.",
    "The committee approved the budget by seven votes to two. Opponents said that the plan leaves "
    "too little for road repairs; the mayor replied that a second package would follow in spring.",
    '{"name": "Ada", "age": 36, "languages": ["French", "English"], "active": true}',
    "La bibliothèque ouvre à neuf heures et ferme à dix-huit heures, sauf le dimanche. "
    "Der Zug nach Hamburg fährt heute von Gleis vier. El mercado está cerca del puerto.",
)
"""What neurons are chosen by: about 400 tokens, none of them among the probe texts."""


@torch.no_grad()
def widen(
    dense: PreTrainedModel, tokenizer: Tokenizer | ImageProcessor, spec: WidenSpec
) -> tuple[PreTrainedModel, dict]:
    """The widened (or narrowed) twin of a float32 model, and the notes of its card.

    The dense model is one that ``twin.require_possible`` accepts. Raises StageFailed when its
    function was not kept although neurons were only added.
    """
    old, layout = dense.config, DENSE[dense.config.model_type]
    neurons = old.intermediate_size
    added = spec.added(neurons, old.num_hidden_layers)
    generator = torch.Generator().manual_seed(spec.seed)
    if added < 0:
        sources = [
            size_F.topk(neurons + added).indices.sort().values
            for size_F in contributions(dense, tokenizer, layout)
        ]
    else:
        sources = [
            _with_copies(neurons, added, generator) for _ in range(old.num_hidden_layers)
        ]
    model, copied = _build(dense, layout, sources)
    dense_probe = twin.probe(dense, tokenizer)
    notes: dict[str, float | int | str] = {"neurons_added_per_layer": added}
    if added >= 0:
        notes["logit_difference"] = twin.require_same_function(
            twin.probe(model, tokenizer)[0], dense_probe[0]
        )
    for layer, twice in enumerate(copied):
        block = model.get_submodule(layout.block.format(layer))
        weights = [(block.get_parameter(name), 0) for name in layout.inputs]
        weights.append((block.get_parameter(layout.output), 1))
        twin.break_symmetry(weights, spec, generator, twice)
    notes |= twin.notes(dense_probe, twin.probe(model, tokenizer), spec)
    # The routers of the upcycled twin are not known here.
    matrices = sum(block.get_parameter(name).ndim == 2 for name in (*layout.inputs, layout.output))
    excess = added * old.num_hidden_layers - spec.extra(neurons, old.num_hidden_layers)
    notes["flops_per_token_beyond_moe_without_routers"] = 2 * matrices * old.hidden_size * excess
    return model, notes


def _build(
    dense: PreTrainedModel, layout: Dense, sources: list[torch.Tensor]
) -> tuple[PreTrainedModel, list[torch.Tensor]]:
    """The model whose neurons are the old ones of these indices, layer by layer.

    Beside it, per layer the indices of the new neurons that have a copy.
    """
    copied = []
    config = copy.deepcopy(dense.config)
    config.intermediate_size = len(sources[0])
    state = dense.state_dict()
    for layer, source in enumerate(sources):
        path = layout.block.format(layer)
        copies_F = torch.bincount(source, minlength=dense.config.intermediate_size)
        copied.append((copies_F[source] > 1).nonzero().flatten())
        for name in layout.inputs:
            state[f"{path}.{name}"] = state[f"{path}.{name}"][source]
        down = f"{path}.{layout.output}"
        state[down] = state[down][:, source] / copies_F[source]
    model = filled(type(dense), config, state)
    if dense.can_generate():
        model.generation_config = dense.generation_config
    return model, copied


def _with_copies(neurons: int, added: int, generator: torch.Generator) -> torch.Tensor:
    """Of which old neuron each new one is a copy, shape (neurons + added,); the old ones first."""
    # Whole permutations one after the other, so that copies are spread as evenly as can be.
    rounds = [torch.randperm(neurons, generator=generator) for _ in range(-(-added // neurons))]
    return torch.cat([torch.arange(neurons), *rounds])[: neurons + added]


def contributions(
    dense: PreTrainedModel, tokenizer: Tokenizer, layout: Dense
) -> list[torch.Tensor]:
    """Per layer, how much each neuron (F,) adds to its block's output on the calibration texts.

    The root mean square of its activation times the length of its down-projection: the metric of
    Wanda (arXiv 2306.11695), for whole neurons.
    """
    downs = [
        dense.get_submodule(f"{layout.block}.{layout.output}".format(i).rpartition(".")[0])
        for i in range(dense.config.num_hidden_layers)
    ]
    squares = {down: torch.zeros(dense.config.intermediate_size) for down in downs}

    def add(down: nn.Module, inputs: tuple[torch.Tensor]) -> None:
        squares[down] += inputs[0].square().flatten(0, -2).sum(dim=0)

    hooks = [down.register_forward_pre_hook(add) for down in downs]
    tokens = 0
    for text in CALIBRATION_TEXTS:
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
        dense(ids)
        tokens += ids.shape[1]
    for hook in hooks:
        hook.remove()
    return [(squares[down] / tokens).sqrt() * down.weight.norm(dim=0) for down in downs]
