"""Seeing and changing which experts a token goes to: the one place that intercepts routing.

It works on the two modules that every sparse block has, whatever its family and however its
experts are spread over workers: the router, which turns hidden states into logits by one matrix
product and then follows the family's own rule, and ``experts(hidden_states, top_k_index,
top_k_weights)``. Nothing is installed outside ``intercept``, so it costs nothing when unused.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from stages.errors import StageFailed
from stages.models.families import family


@dataclass(frozen=True)
class Routing:
    """What one sparse block decided for the T tokens of one forward pass."""

    layer: str
    """Path of the block, such as ``model.layers.3.mlp``."""
    logits: torch.Tensor
    """Router logits that the choice was made from, shape (T, E)."""
    experts: torch.Tensor
    """Chosen experts, shape (T, K), integers."""
    weights: torch.Tensor
    """Factors of their outputs, shape (T, K)."""

    def only(self, tokens: torch.Tensor) -> "Routing":
        """The same for those of the T tokens that the mask (T,) names."""
        return replace(self, logits=self.logits[tokens], experts=self.experts[tokens],
                       weights=self.weights[tokens])

    def split(self, inputs: int) -> "list[Routing]":
        """The same for each of the inputs of a batch, whose tokens follow each other."""
        parts = (t.chunk(inputs) for t in (self.logits, self.experts, self.weights))
        return [Routing(self.layer, *part) for part in zip(*parts, strict=True)]

    def change(self, **fields: torch.Tensor) -> "Routing":
        """A copy with other ``experts`` or ``weights``."""
        return replace(self, **fields)


Blocks = dict[str, tuple[nn.Module, nn.Module | None]]
"""Router and experts of sparse blocks, by the block's path, in the order of the layers."""


def blocks(model: PreTrainedModel) -> Blocks:
    """All sparse blocks of a model. They stay the same while it is trained, so ask once.

    In a family whose experts are not called with the choice (Switch, NLLB, JetMoE), only the logits
    can be seen and changed: there are no experts then, and the path is the router's.
    """
    entry = family(model)
    routers, experts = entry.modules(model, "router"), entry.modules(model, "expert")
    if entry.index is None:
        return {path: (router, None) for path, router in routers.items()}
    return {
        path.rpartition(".")[0]: (router, module)
        for router, (path, module) in zip(routers.values(), experts.items(), strict=True)
    }


@contextmanager
def intercept(
    of: Blocks,
    *,
    logits: Callable[[str, torch.Tensor], torch.Tensor] | None = None,
    choice: Callable[[Routing], Routing | None] | None = None,
) -> Iterator[None]:
    """Every forward pass inside goes through the given functions, for each of the blocks.

    ``logits`` maps a block's path and its router logits, shape (T, E), to those from which the
    family's own rule then chooses. ``choice`` sees the outcome just before the experts run, and
    may return another one for them. Both are part of the graph, so gradients flow through them.
    Where a block has no experts to be seen, ``choice`` is not called.
    """
    with ExitStack() as undo:
        for path, (router, experts) in of.items():
            # Where a router lets a token choose among some experts only, the others' are -inf.
            own = getattr(getattr(router, "base_layer", router), "restricted", None)
            seen = _Logits(path, own, logits)
            adapted = _adapted(router)
            if adapted is None:
                scored = _first_product(router.forward, seen)
                undo.enter_context(replaced(router, "forward", scored))
            else:
                undo.enter_context(replaced(adapted, "forward", _output(adapted.forward, seen)))
            if choice is not None and experts is not None:
                hook = _chosen(path, seen, choice)
                undo.enter_context(experts.register_forward_pre_hook(hook))
        yield


class _Logits:
    """A router's logits in the pass that runs: changed as asked, and kept."""

    def __init__(
        self,
        path: str,
        own: Callable[[torch.Tensor], torch.Tensor] | None,
        change: Callable[[str, torch.Tensor], torch.Tensor] | None,
    ):
        self.path, self.own, self.change = path, own, change
        self.logits: torch.Tensor | None = None

    def take(self, logits: torch.Tensor) -> torch.Tensor:
        if self.own is not None:
            logits = self.own(logits)
        if self.change is not None:
            logits = self.change(self.path, logits)
        self.logits = logits
        return logits


class _FirstProduct(TorchFunctionMode):
    """Catches the result of the first matrix product inside it: a router's logits.

    The families differ in what they do with the logits and whether they return them, not in how
    they come about.
    """

    def __init__(self, seen: _Logits):
        self.seen = seen

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is F.linear and self.seen.logits is None:
            return self.seen.take(result)
        return result


def _adapted(router: nn.Module) -> nn.Module | None:
    """The low-rank adapter that stands around a router's linear layer: its output are the logits,
    and the first product inside it is what the layer had without it."""
    layers = (m for m in router.modules() if isinstance(getattr(m, "base_layer", None), nn.Linear))
    return next(layers, None)


def _first_product(forward: Callable, seen: _Logits) -> Callable:
    def scored(*args: Any, **kwargs: Any) -> Any:
        seen.logits = None
        with _FirstProduct(seen):
            return forward(*args, **kwargs)

    return scored


def _output(forward: Callable, seen: _Logits) -> Callable:
    def scored(*args: Any, **kwargs: Any) -> torch.Tensor:
        return seen.take(forward(*args, **kwargs))

    return scored


def _chosen(path: str, seen: _Logits, choice: Callable) -> Callable:
    def hook(module: nn.Module, args: tuple) -> tuple | None:
        hidden_states, experts, weights = args
        changed = choice(Routing(path, seen.logits, experts, weights))
        if changed is None:
            return None
        return hidden_states, changed.experts, changed.weights.to(weights.dtype)

    return hook


@contextmanager
def replaced(module: nn.Module, name: str, value: Any) -> Iterator[None]:
    """A module's attribute with another value; what stood on the instance before comes back."""
    before = dict(vars(module))
    setattr(module, name, value)
    try:
        yield
    finally:
        if name in before:
            setattr(module, name, before[name])
        else:
            delattr(module, name)


@contextmanager
def choosing(model: PreTrainedModel, count: int) -> Iterator[None]:
    """Each router chooses ``count`` experts for a token, inside the context: by its own rule, with
    whatever the choice depends on beside the logits (biases, groups of experts, a capacity).

    Raises StageFailed for a family that has no number to set, and where a router goes on choosing
    another number.
    """
    entry = family(model)
    if not entry.counts_experts:
        raise StageFailed(
            f"{entry.model_type} {entry.no_weighing}, so their number per token cannot be set; "
            "evaluate it with the number that it is configured for"
        )
    before = {router: router.top_k for router in entry.modules(model, "router").values()}

    def observe(router: nn.Module, args: tuple, output: tuple) -> None:
        if output[entry.index].shape[-1] != count:
            raise StageFailed(
                f"a router of {entry.model_type} does not choose {count} experts though told so; "
                "evaluate it with the number that it is configured for"
            )

    seen = entry.index is not None
    hooks = [router.register_forward_hook(observe) for router in before if seen]
    try:
        for router in before:
            router.top_k = count
        yield
    finally:
        for router, top_k in before.items():
            router.top_k = top_k
        for hook in hooks:
            hook.remove()


def normalises(model: PreTrainedModel) -> bool:
    """Whether the weights of the experts that a token is given to are made to sum to a constant."""
    told = family(model).normalised
    return getattr(model.config, told) if isinstance(told, str) else told


def probabilities(logits: torch.Tensor, scores: str) -> torch.Tensor:
    """What router logits (..., E) give to each expert, in a sum of 1: their softmax or, where a
    family's ``scores`` are sigmoids, those over their sum (DeepSeek-V3, arXiv 2412.19437,
    equation 19)."""
    logits = logits.float()
    return (F.logsigmoid(logits) if scores == "sigmoid" else logits).softmax(-1)


@torch.no_grad()
def weighing(model: PreTrainedModel) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """The family's rule from logits (T, E) and chosen experts (T, K) to their weights (T, K).

    A score is a softmax or a sigmoid of the logits, divided by its sum over the chosen experts or
    not, as the family's entry says, times a constant that is read off what the first router does
    on random hidden states. Raises StageFailed for a router with another rule, and for a family
    whose experts are not called with the choice.
    """
    entry = family(model)
    if entry.index is None:
        raise StageFailed(
            f"{entry.model_type}: {entry.no_weighing}, so others cannot be weighed in their place; "
            "take a model of another architecture, or leave out what weighs experts anew"
        )
    seen: list[Routing] = []
    path, (router, experts) = next(iter(blocks(model).items()))
    weight = next(router.parameters())
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn((1, 16, model.config.hidden_size), generator=generator).to(weight)
    with intercept({path: (router, experts)}, choice=seen.append):
        model.get_submodule(path)(probe)
    routing = seen[0]
    # Where all experts are chosen the outcome does not tell whether a sum was divided by.
    divides = normalises(model)

    def shares(logits: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
        logits = logits.float()
        scores = logits.sigmoid() if entry.scores == "sigmoid" else logits.softmax(-1)
        chosen = scores.gather(-1, experts)
        return chosen / chosen.sum(-1, keepdim=True) if divides else chosen

    # A weight of 0 is a token that its expert had no room for.
    kept = routing.weights != 0
    expected, found = routing.weights[kept].float(), shares(routing.logits, routing.experts)[kept]
    scale = (expected.sum() / found.sum()).item()
    if torch.allclose(expected, scale * found, rtol=1e-4, atol=1e-6):
        return lambda logits, experts: scale * shares(logits, experts)
    raise StageFailed(
        f"{model.config.model_type}: its router weighs the chosen experts by a rule of its own, so "
        "others cannot be put in their place; set router.assignment to top_k"
    )
