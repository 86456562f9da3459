"""Routes recorded and forced: what every sparse block chose, and other choices in its place.

    with routed(model) as clean:                     # records
        model(input_ids=tokens)
    with routed(model, imposed(clean)):              # the same routes on another input
        model(input_ids=others)

What is forced goes to the experts' own module, so forcing the recorded routes reproduces the
logits bit for bit. Nothing is installed outside the context and nothing is computed for a recording
but what the model computes anyway. Where experts are spread over ranks, each rank records and
forces the routes of its own tokens; numbers of experts are those of all ranks.

Policies (``imposed`` to ``per_input``) are functions of a ``Routing`` that return the one to use in
its place, or None to leave it. They are for one forward pass over whole sequences, without a cache.
"""

import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from stages.errors import StageFailed
from stages.models.families import family
from stages.models.routing import Routing, blocks, choosing, intercept, normalises, replaced

Policy = Callable[[Routing], Routing | None]
Weigh = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
DROPPED = -1
"""Number that stands for the expert of a token that came too late for its capacity."""


@contextmanager
def routed(model: PreTrainedModel, force: Policy | None = None) -> Iterator[list[Routing]]:
    """The list is filled with what the sparse blocks did in the forward passes made inside, block
    by block in the order of execution; ``force`` may put another choice in place of each.

    A dense model's list stays empty. Raises StageFailed for a family whose experts cannot be told
    what to do.
    """
    entry, routes = family(model), []

    def choice(routing: Routing) -> Routing | None:
        changed = force(routing) if force is not None else None
        routes.append(changed or routing)
        return changed

    with ExitStack() as undo:
        if entry.is_moe and entry.no_evaluation:
            raise StageFailed(f"{entry.model_type}: routes cannot be seen: {entry.no_evaluation}")
        if entry.index is not None and entry.is_moe:
            undo.enter_context(intercept(blocks(model), choice=choice))
        elif entry.is_moe:
            seam = _sorted if entry.chooses_largest else _one_hot
            for path, router in entry.modules(model, "router").items():
                undo.enter_context(seam(model, path, router, choice))
        yield routes


def _sorted(model: PreTrainedModel, path: str, router: nn.Module, choice: Policy):
    """JetMoE and MoLM: their routers return the token-expert pairs sorted by expert."""

    def hook(module: nn.Module, args: tuple, output: tuple) -> tuple | None:
        order, _, gates, sizes, logits = output
        place = torch.argsort(order)
        numbers = torch.arange(len(sizes), device=order.device)
        numbers = numbers.repeat_interleave(torch.tensor(sizes, device=order.device))
        shape = (len(logits), -1)
        routing = Routing(path, logits, numbers[place].view(shape), gates[place].view(shape))
        changed = choice(routing)
        if changed is None:
            return None
        if changed.experts.shape != routing.experts.shape:
            raise StageFailed(
                f"{model.config.model_type}: its attention is laid out for the configured number "
                "of experts per token, and another cannot be forced"
            )
        flat = changed.experts.flatten()
        order = flat.sort(0).indices  # as the router itself sorts
        sizes = torch.bincount(flat, minlength=len(sizes)).tolist()
        pairs = order.div(changed.experts.shape[1], rounding_mode="trunc")
        return order, pairs, changed.weights.flatten()[order].to(gates), sizes, logits

    return router.register_forward_hook(hook)


def _one_hot(model: PreTrainedModel, path: str, router: nn.Module, choice: Policy):
    """Switch: one expert, named by a mask that is zero for a token beyond the capacity."""
    logits: list[torch.Tensor] = []
    block = path.rpartition(".")[0]

    def hook(module: nn.Module, args: tuple) -> tuple | None:
        hidden, mask, weights = args
        there = mask[:, 0].sum(-1, keepdim=True) > 0
        chosen = torch.where(there, mask[:, 0].argmax(-1, keepdim=True), DROPPED)
        kept = torch.where(there, weights, 0)
        changed = choice(Routing(block, logits.pop().flatten(0, -2), chosen, kept))
        if changed is None:
            return None
        mask = F.one_hot(changed.experts.clamp(min=0), mask.shape[-1])
        return hidden, mask * (changed.experts >= 0)[..., None], changed.weights.to(weights)

    undo = ExitStack()
    undo.enter_context(router.register_forward_hook(lambda m, a, output: logits.append(output[2])))
    experts = model.get_submodule(f"{block}.experts")
    undo.enter_context(experts.register_forward_pre_hook(hook))
    return undo


def imposed(
    routes: Sequence[Routing],
    *,
    weigh: Weigh | None = None,
    layers: Collection[str] | None = None,
) -> Policy:
    """The experts of a recording of as many tokens, with its weights; with ``weigh``
    (``routing.weighing``) only the experts, weighed by the present logits. What an expert had no
    room for it does not get.

    ``layers`` limits it to some blocks.
    """
    by_layer = {routing.layer: routing for routing in routes}

    def policy(routing: Routing) -> Routing | None:
        if layers is not None and routing.layer not in layers:
            return None
        before = by_layer[routing.layer]
        weights = before.weights
        if weigh is not None:
            weights = weigh(routing.logits, before.experts) * (weights != 0)
        return routing.change(experts=before.experts, weights=weights)

    return policy


def fixed(experts: Sequence[int]) -> Policy:
    """The same experts, in order of their weights, for every token."""

    def policy(routing: Routing) -> Routing:
        numbers = torch.tensor(experts, device=routing.experts.device)
        return _by_rank(routing, numbers.expand(len(routing.experts), -1))

    return policy


def next_ranked(weigh: Weigh | None = None) -> Policy:
    """Ranks K + 1 to 2K: the best K of the experts that were not chosen, with room or without.

    A bias that a family adds for the choice alone is not counted. Raises StageFailed with fewer
    than 2K experts that a token may be given to.
    """

    def policy(routing: Routing) -> Routing:
        count, others = routing.experts.shape[1], routing.logits.detach().clone()
        # A member of an ensemble can choose among its own alone.
        allowed = int(others.isfinite().sum(-1).min())
        if 2 * count > allowed:
            raise StageFailed(
                f"{routing.layer}: chooses {count} of {allowed} experts, so there are no "
                f"ranks {count + 1} to {2 * count}"
            )
        others.masked_fill_(chosen(routing), -torch.inf)
        return _weighed(routing, others.topk(count, -1).indices, weigh)

    return policy


def at_random(seed: int, weigh: Weigh | None = None) -> Policy:
    """K different experts drawn for each token and block."""

    def policy(routing: Routing) -> Routing:
        draw = _drawn(routing, f"{seed}", routing.logits.shape)
        draw = draw.masked_fill(routing.logits == -torch.inf, -1)  # not that token's to choose
        return _weighed(routing, draw.topk(routing.experts.shape[1], -1).indices, weigh)

    return policy


def without_first() -> Policy:
    """The expert with the largest weight adds nothing; the others keep their weights."""

    def policy(routing: Routing) -> Routing:
        first = routing.weights.argmax(-1, keepdim=True)
        return routing.change(weights=routing.weights.scatter(-1, first, 0))

    return policy


def without_output() -> Policy:
    """The routed experts add nothing; a shared expert does what it did."""
    return lambda routing: routing.change(weights=torch.zeros_like(routing.weights))


def permuted(seed: int) -> Policy:
    """Each block's experts change places, in one permutation for all its tokens."""

    def policy(routing: Routing) -> Routing:
        order = _drawn(routing, f"{seed}", (routing.logits.shape[-1],)).argsort()
        moved = order[routing.experts.clamp(min=0)]
        return routing.change(experts=torch.where(routing.experts < 0, routing.experts, moved))

    return policy


def masked(experts: Mapping[str, Collection[int]], weigh: Weigh) -> Policy:
    """Some experts of some blocks, by the block's path, cannot be chosen: each is replaced by the
    best of the others by their logits, and all are weighed anew by the family's rule. In the place
    of an expert that had no room for a token none takes it.

    Raises StageFailed where fewer than K experts that a token may be given to remain.
    """

    def policy(routing: Routing) -> Routing | None:
        gone = list(experts.get(routing.layer, ()))
        if not gone:
            return None
        count, left = routing.experts.shape[1], routing.logits.detach().clone()
        left[:, gone] = -torch.inf
        # A member of an ensemble can choose among its own alone.
        total, remain = (int(each.isfinite().sum(-1).min()) for each in (routing.logits, left))
        if remain < count:
            raise StageFailed(
                f"{routing.layer}: {remain} of {total} experts remain and a token needs {count}; "
                "mask fewer"
            )
        # Those that were chosen and may stay do, whatever rule chose them.
        best = left.masked_fill(chosen(routing), -torch.inf).topk(count, -1).indices
        lost = torch.isin(routing.experts, torch.tensor(gone, device=best.device))
        # The first that is replaced gets the best of the others, the second the next.
        place = (lost.cumsum(-1) - 1).clamp(min=0)
        numbers = torch.where(lost, best.gather(-1, place), routing.experts)
        weights = weigh(routing.logits, numbers) * (routing.weights != 0)
        return routing.change(experts=numbers, weights=weights)

    return policy


@contextmanager
def another_k(
    model: PreTrainedModel, count: int, weigh: Weigh | None = None
) -> Iterator[Policy | None]:
    """Inside, each router chooses ``count`` experts as it does when it is configured so.

    They have the weights that the router gives them; with the family's rule (``routing.weighing``)
    the policy that is given weighs them by the other one. Where the rule divides by the sum over
    the chosen: without that, so that each expert has the weight that it has, or would have, beside
    as many as the router is configured to choose. Where it does not, the weights are made to sum to
    what those of the configured number do.
    """
    entry, divides = family(model), normalises(model)
    with ExitStack() as undo:
        if weigh is None:
            undo.enter_context(choosing(model, count))
            yield None
            return
        configured: dict[str, torch.Tensor] = {}
        for path, (router, _) in blocks(model).items():

            def ask(module: nn.Module, args: tuple, kwargs: dict, output: tuple, path=path,
                    own=router.top_k) -> None:  # fmt: skip
                with replaced(module, "top_k", own):
                    configured[path] = module.forward(*args, **kwargs)[entry.index]

            undo.enter_context(router.register_forward_hook(ask, with_kwargs=True))
        undo.enter_context(choosing(model, count))

        def policy(routing: Routing) -> Routing:
            scores = weigh(routing.logits, _every(routing.logits))
            before, now = (
                scores.gather(-1, experts).sum(-1, keepdim=True)
                for experts in (configured.pop(routing.layer), routing.experts)
            )
            return routing.change(
                weights=routing.weights * (now / before if divides else before / now)
            )

        yield policy


def soft(weigh: Weigh) -> Policy:
    """Every expert, each by its weight: the choice disappears and the model becomes smooth."""

    def policy(routing: Routing) -> Routing:
        every = _every(routing.logits)
        return routing.change(experts=every, weights=weigh(routing.logits, every))

    return policy


def at_share(policy: Policy, share: float, seed: int) -> Policy:
    """Another policy for so large a share of the tokens, drawn for each block."""

    def partly(routing: Routing) -> Routing:
        other = policy(routing)
        here = _drawn(routing, f"{seed}/share", (len(routing.logits), 1)) < share
        return routing.change(
            experts=torch.where(here, other.experts, routing.experts),
            weights=torch.where(here, other.weights, routing.weights),
        )

    return partly


def per_input(policies: Sequence[Policy]) -> Policy:
    """A policy for each of the inputs of a batch, whose tokens follow each other in equal number:
    what is done to one does not depend on the others."""

    def policy(routing: Routing) -> Routing:
        changed = [
            each(part) or part
            for each, part in zip(policies, routing.split(len(policies)), strict=True)
        ]
        return routing.change(
            experts=torch.cat([part.experts for part in changed]),
            weights=torch.cat([part.weights for part in changed]),
        )

    return policy


@contextmanager
def soft_backward(model: PreTrainedModel, weigh: Weigh) -> Iterator[None]:
    """Forward passes inside compute what they always do, backward passes see soft routing over all
    experts, weighed by the family's rule (``weighing``): a straight-through estimator for the
    choice, which has no gradient of its own (BPDA, arXiv 1802.00420, applied to the router).

    Forcing routes inside as well is not supported.
    """
    of = blocks(model)
    last: dict[str, Routing] = {}
    with ExitStack() as undo:

        def note(routing: Routing) -> None:
            last[routing.layer] = routing

        undo.enter_context(intercept(of, choice=note))
        for path, (_, experts) in of.items():

            def hook(module: nn.Module, args: tuple, hard: torch.Tensor, path=path):
                routing = last.pop(path)
                every = _every(routing.logits)
                weights = weigh(routing.logits, every).to(args[2].dtype)
                return _Straight.apply(hard, module.forward(args[0], every, weights))

            undo.enter_context(experts.register_forward_hook(hook))
        yield


class _Straight(torch.autograd.Function):
    """The first argument forward, the second backward."""

    @staticmethod
    def forward(ctx, hard: torch.Tensor, soft: torch.Tensor) -> torch.Tensor:
        return hard.clone()

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[None, torch.Tensor]:
        return None, gradient


def selected(routing: Routing) -> torch.Tensor:
    """Which experts add to each token's output, booleans (T, E): those chosen with a weight above
    zero, as in the published code of arXiv 2210.10253."""
    none = torch.zeros_like(routing.logits, dtype=torch.bool)
    return none.scatter(-1, routing.experts.clamp(min=0), routing.weights > 0)


def chosen(routing: Routing) -> torch.Tensor:
    """The same with those that had no room for the token."""
    return selected(routing.change(weights=routing.experts >= 0))


def _weighed(routing: Routing, experts: torch.Tensor, weigh: Weigh | None) -> Routing:
    """Other experts (T, K), best first; a token gets as many of them as had room for it."""
    if weigh is None:
        return _by_rank(routing, experts)
    served = routing.weights.sort(-1, descending=True).values != 0
    return routing.change(experts=experts, weights=weigh(routing.logits, experts) * served)


def _by_rank(routing: Routing, experts: torch.Tensor) -> Routing:
    """Other experts (T, K), best first, under the weights of those in whose place they stand."""
    weights = routing.weights.sort(-1, descending=True).values
    return routing.change(experts=experts, weights=weights)


def _every(logits: torch.Tensor) -> torch.Tensor:
    return torch.arange(logits.shape[-1], device=logits.device).expand(len(logits), -1)


def _drawn(routing: Routing, seed: str, shape: Sequence[int]) -> torch.Tensor:
    """Uniform numbers that depend on the seed and the block alone."""
    generator = torch.Generator().manual_seed(hash_of(f"{seed}/{routing.layer}"))
    return torch.rand(shape, generator=generator).to(routing.logits.device)


def hash_of(text: str) -> int:
    """A seed of 63 bits from a text, the same on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1
