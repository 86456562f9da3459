"""The knobs of a recipe that act inside a forward pass of training.

They are installed around each forward pass and taken off again, so that evaluation, the export and
everything else sees the plain model, whatever mode it is in.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import nn
from transformers import PreTrainedModel

from stages.finetune.assignment import (
    balanced_experts,
    random_experts,
    reassigned,
    softmax_weights,
)
from stages.finetune.batches import MicroBatch
from stages.finetune.dropout import (
    attention_dropout,
    attention_modules,
    output_dropout,
    residual_modules,
    sum_dropout,
    watched_attention,
)
from stages.finetune.evidence import Evidence
from stages.finetune.recipe import Recipe
from stages.finetune.refusals import CAPACITY
from stages.finetune.telemetry import load, load_variation
from stages.models.families import family
from stages.models.routing import Blocks, Routing, blocks, intercept, replaced, weighing


class Knobs:
    """What a recipe does to forward passes of a model. Made before the model is spread out.

    Raises StageFailed for a knob that cannot act on this architecture.
    """

    def __init__(self, model: PreTrainedModel, recipe: Recipe, evidence: Evidence):
        self.model, self.recipe, self.evidence = model, recipe, evidence
        self.residual = residual_modules(model) if recipe.dropout.residual else []
        self.attention = attention_modules(model) if recipe.dropout.attention is not None else []
        self.reassigns, self.weigh = recipe.router.assignment != "top_k", None
        if self.reassigns and family(model).index is not None:
            self.weigh = weighing(model)
        elif self.reassigns:
            of_chosen = family(model).scores == "softmax of the chosen"
            self.weigh = partial(softmax_weights, of_chosen=of_chosen)
        self.part: MicroBatch | None = None
        """What the forward pass reads, where some of it may be padding."""
        self.noise = recipe.router.noise
        """Standard deviation of the noise on router logits."""
        self.clean: dict[str, torch.Tensor] = {}
        """Router logits before noise (T, E) of the last forward pass, by layer."""
        self.blocks: Blocks = {}
        self.experts: list[nn.Module] = []
        self.sums: list[tuple[nn.Module, str]] = []
        """Methods that add up the experts' outputs, where the experts do not."""
        self.sees_choice = self.knows_choice = False
        self.own_jitter: list[tuple[nn.Module, str]] = []
        """Attributes with the width of the model's own jitter."""
        self.own_width = 0.0
        self.dropping: set[str] = set()
        """Attention modules in which dropout was seen."""

    def attach(self) -> None:
        """Find the routers and experts of the model as it will be trained, adapters included."""
        entry = family(self.model)
        if entry.is_moe:
            self.blocks = blocks(self.model)
            self.experts = list(entry.modules(self.model, "expert").values())
            self.sums = entry.routed_sums(self.model)
            self.own_jitter = entry.own_jitter(self.model)
            self.own_width = max((getattr(m, name) for m, name in self.own_jitter), default=0.0)
            if self.own_width and self.recipe.router.jitter is None:
                self.evidence.note("router.jitter", of_the_model_itself=self.own_width)
            self.sees_choice = entry.index is not None
            self.knows_choice = self.sees_choice or entry.chooses_largest
            if self.noise == "1/E":
                self.noise = 1 / getattr(self.model.config, entry.num_experts)

    @contextmanager
    def forward(self, part: MicroBatch | None = None) -> Iterator[list[Routing]]:
        """A forward pass inside is one of training, of a micro-batch where that may hold padding;
        what its sparse blocks decided is in the list, in the order of the layers."""
        routings: list[Routing] = []
        self.part = part
        recipe = self.recipe
        with ExitStack() as undo:
            if self.blocks:
                self._intercept_routing(undo, routings)
            if recipe.dropout.residual:
                modules = [self.model.get_submodule(path) for path in self.residual]
                p, name = recipe.dropout.residual, "dropout.residual"
                undo.enter_context(output_dropout(name, modules, p, self._zeros))
            if recipe.dropout.attention is not None:
                modules = {path: self.model.get_submodule(path) for path in self.attention}
                p = recipe.dropout.attention
                undo.enter_context(attention_dropout(list(modules.values()), p))
                if self.evidence.open:
                    undo.enter_context(watched_attention(modules, self._drops))
            yield routings

    def _intercept_routing(self, undo: ExitStack, routings: list[Routing]) -> None:
        router, parts = self.recipe.router, self.blocks.values()
        if router.jitter is not None:
            for module, name in self.own_jitter:
                undo.enter_context(replaced(module, name, 0.0))
        if router.jitter == 0:
            self.evidence.note("router.jitter", in_place_of_the_models_own=self.own_width)
        elif router.jitter is not None:
            for module, _ in parts:
                undo.enter_context(module.register_forward_pre_hook(self._jitter))
        if router.top_k is not None:
            for module, _ in parts:
                # An adapter stands around the module that chooses.
                inner = getattr(module, "base_layer", module)
                undo.enter_context(replaced(inner, "top_k", router.top_k))
        if router.capacity is not None:
            name = CAPACITY[family(self.model).model_type]
            for module, _ in parts:
                inner = getattr(module, "base_layer", module)
                undo.enter_context(replaced(inner, name, router.capacity))
        seen = {"choice": self._choose(routings)}
        if router.noise or self.knows_choice and not self.sees_choice:
            seen["logits"] = self._logits(routings)
        if not self.knows_choice:
            for path, (module, _) in self.blocks.items():
                undo.enter_context(module.register_forward_hook(self._best(path, routings)))
        if self.reassigns and not self.sees_choice:
            for path, (module, _) in self.blocks.items():
                undo.enter_context(module.register_forward_hook(self._reassign(path, routings)))
        undo.enter_context(intercept(self.blocks, **seen))
        if self.recipe.experts.dropout:
            p, name = self.recipe.experts.dropout, "experts.dropout"
            undo.enter_context(
                sum_dropout(name, self.sums, p, self._zeros)
                if self.sums
                else output_dropout(name, self.experts, p, self._zeros)
            )

    def _logits(self, routings: list[Routing]) -> Callable[[str, torch.Tensor], torch.Tensor]:
        def noisy(layer: str, logits: torch.Tensor) -> torch.Tensor:
            self.clean[layer] = logits
            if self.noise:
                noise = self.noise * torch.randn_like(logits)
                self.evidence.mean("router.noise", "mean_square_of_the_noise", noise.square())
                logits = logits + noise
            if self.knows_choice and not self.sees_choice:
                rows = logits.flatten(0, -2)
                router = self.blocks[layer][0]
                k = getattr(router, "base_layer", router).top_k
                if self.recipe.router.top_k is not None:
                    self.evidence.mean("router.top_k", "experts_per_token", k)
                none = rows.new_zeros(len(rows), 0)
                routings.append(Routing(layer, rows, rows.topk(k).indices, none))
            return logits

        return noisy

    def _best(self, layer: str, routings: list[Routing]) -> Callable:
        """Notes the one expert of each token that a router of Switch names, of weight 0 where it
        came too late for its capacity."""

        def note(module: nn.Module, args: tuple, output: tuple) -> None:
            mask, probability, logits = (part.flatten(0, -2) for part in output)
            kept = probability * mask.sum(-1, keepdim=True)
            routings.append(Routing(layer, logits, logits.argmax(-1, keepdim=True), kept))

        return note

    def _reassign(self, layer: str, routings: list[Routing]) -> Callable:
        """Changes what a router that chooses inside its block has just returned and noted."""

        def change(module: nn.Module, args: tuple, output: tuple) -> tuple:
            found = routings.pop()
            routings.append(changed := self._assigned(found))
            return reassigned(output, changed.experts, changed.weights)

        return change

    def _jitter(self, module: nn.Module, args: tuple) -> tuple:
        width = self.recipe.router.jitter
        factor = torch.empty_like(args[0]).uniform_(1 - width, 1 + width)
        if self.evidence.open:
            self.evidence.mean("router.jitter", "mean_deviation_of_the_factor", (factor - 1).abs())
            self.evidence.note("router.jitter", in_place_of_the_models_own=self.own_width)
        return (args[0] * factor, *args[1:])

    def _choose(self, routings: list[Routing]) -> Callable[[Routing], Routing | None]:
        def choice(found: Routing) -> Routing | None:
            changed = self._dropped(self._assigned(found))
            routings.append(changed)
            if self.recipe.router.top_k is not None:
                given = (found.weights > 0).sum(-1)
                self.evidence.mean("router.top_k", "experts_per_token", given)
            return None if changed is found else changed

        return choice

    def _assigned(self, found: Routing) -> Routing:
        """The experts that the recipe's assignment gives to each token; padding takes none of the
        places that are shared out evenly."""
        assignment, k = self.recipe.router.assignment, found.experts.shape[1]
        if assignment == "top_k":
            return found
        real = self.part.real_tokens(found.layer) if self.part is not None else None
        real = slice(None) if real is None else real
        experts = found.experts.clone()
        if assignment == "random":
            experts = random_experts(found.logits, k)
        else:
            experts[real] = balanced_experts(found.logits[real], k)
        if self.evidence.open:
            before, after = found.experts[real], experts[real]
            kept = (after[:, :, None] == before[:, None]).any(-1).float()
            self.evidence.mean("router.assignment", "share_of_choices_changed", 1 - kept)
            own, given = (load_variation(load(e, found)) for e in (before, after))
            self.evidence.mean("router.assignment", "load_variation_of_the_router", own)
            self.evidence.mean("router.assignment", "load_variation", given)
        return found.change(experts=experts, weights=self.weigh(found.logits, experts))

    def _dropped(self, found: Routing) -> Routing:
        """Whole experts dropped: their weight is 0."""
        p = self.recipe.experts.drop
        if not p:
            return found
        kept = torch.rand(found.logits.shape[-1], device=found.logits.device) >= p
        self.evidence.mean("experts.drop", "share_of_experts_dropped", ~kept)
        self.evidence.mean("experts.drop", "share_of_choices_dropped", ~kept[found.experts])
        return found.change(weights=found.weights * kept[found.experts] / (1 - p))

    def _drops(self, path: str, probability: float) -> None:
        self.dropping.add(path)
        self.evidence.note("dropout.attention", modules=len(self.dropping))
        self.evidence.mean("dropout.attention", "probability", probability)

    def _zeros(self, knob: str, output: torch.Tensor) -> None:
        if self.evidence.open:
            self.evidence.mean(knob, "share_of_outputs_dropped", output == 0)
