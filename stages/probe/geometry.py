"""What a router's decision hangs on: margins, certified radii, and how much the experts differ.

Shape letters: T tokens, D hidden size, E experts, K chosen experts.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import PreTrainedModel

from stages.errors import StageFailed
from stages.models.families import family
from stages.models.routes import chosen, routed
from stages.models.routing import Routing, blocks
from stages.probe.smoothness import Smoothness, smoothness

Expert = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""The output (T, D) of one expert (T,) for each hidden state (T, D), unweighted."""


@dataclass
class Watched:
    """One sparse block in one pass."""

    routing: Routing
    hidden: torch.Tensor
    """Inputs of the experts, (T, D)."""
    scorers: torch.Tensor | None
    """Rows of the router's matrix (E, D), where its logits are their products with the inputs but
    for a constant each; else None."""
    expert: Expert

    def split(self, inputs: int) -> "list[Watched]":
        """The same for each of the inputs of a batch, whose tokens follow each other."""
        parts = zip(self.routing.split(inputs), self.hidden.chunk(inputs), strict=True)
        return [replace(self, routing=routing, hidden=hidden) for routing, hidden in parts]


@contextmanager
def watched(model: PreTrainedModel) -> Iterator[list[Watched]]:
    """The list is filled with every sparse block of the passes made inside.

    Raises StageFailed for a family whose experts are not called with the choice.
    """
    entry = family(model)
    if not entry.is_moe or entry.index is None:
        raise StageFailed(
            f"{model.config.model_type}: has no experts that can be asked one by one; probe a "
            "Mixture-of-Experts model of another family"
        )
    found, inputs, hooks = [], {}, []
    of = blocks(model)
    for path, (_, experts) in of.items():
        hooks.append(
            experts.register_forward_pre_hook(
                lambda module, args, path=path: inputs.__setitem__(path, args[0])
            )
        )
    try:
        with routed(model) as routes:
            yield found
    finally:
        for hook in hooks:
            hook.remove()
    for routing in routes:
        router, experts = of[routing.layer]
        hidden = inputs[routing.layer]
        found.append(Watched(routing, hidden, _scorers(router, hidden, routing), _one(experts)))


def _one(experts: nn.Module) -> Expert:
    def output(hidden: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        return experts.forward(hidden, numbers[:, None], hidden.new_ones(len(hidden), 1))

    return output


def _scorers(router: nn.Module, hidden: torch.Tensor, routing: Routing) -> torch.Tensor | None:
    """The router's matrix, checked: logits minus products must be the same for every token that may
    be given to an expert."""
    logits = routing.logits.float()
    allowed = logits.isfinite()
    for parameter in router.parameters():
        if parameter.shape == (logits.shape[-1], hidden.shape[-1]):
            rest = logits - hidden.float() @ parameter.float().T
            most = torch.where(allowed, rest, -torch.inf).amax(0)
            least = torch.where(allowed, rest, torch.inf).amin(0)
            if (most - least).max() <= 1e-3 * logits[allowed].abs().max():
                return parameter.detach().float()
    return None


def measured(block: Watched, generator: torch.Generator) -> dict[str, float]:
    """Means over the tokens of one input of all that this module tells about them, and the fits of
    ``groups``.

    What hangs on a token's choice is told of those alone whose experts all had room for it;
    ``dropped`` is the share of the others.
    """
    values = margins(block.routing) | differences(block, generator)
    if block.scorers is not None:
        values |= radii(block.routing, block.scorers)
    means = {name: value.nanmean().item() for name, value in values.items()}
    dropped = (~_served(block.routing)).float().mean().item()
    return means | {"dropped": dropped} | groups(block, generator)


def _served(routing: Routing) -> torch.Tensor:
    """Which tokens all their experts had room for, booleans (T,)."""
    return (routing.weights > 0).all(-1)


def groups(block: Watched, generator: torch.Generator) -> dict[str, float]:
    """How much smoother minimum-norm fits of each expert's tokens are than one of all tokens, and
    the same for groups of the same sizes that are dealt out at random (``smoothness.py``).

    ``smoothness`` is the ratio of the Lipschitz constants, at least 1 (F1); ``smoothness_gain``
    what it has over ``smoothness_random``; ``smoothness_frobenius`` the ratio of Frobenius norms,
    which is at least ``smoothness_bound`` (F2); ``overlap`` of the experts' inputs, ``eigenvalue``
    and ``least_eigenvalue`` of their summed projectors. ``smoothness_share`` is ``smoothness`` over
    √E, E the experts that tokens went to, and ``cancellation`` the dense map's squared norm over
    the sum of the experts' (F3): at most 1, and equal to 1, where their inputs are orthogonal. NaN
    where no linear map fits all tokens; nothing where there are more tokens than dimensions.
    """
    hidden, experts = block.hidden, block.routing.logits.argmax(-1)
    if len(hidden) > hidden.shape[1]:
        return {}
    target = block.expert(hidden, experts)
    shuffled = experts[torch.randperm(len(experts), generator=generator).to(experts.device)]

    def fits(of: torch.Tensor) -> Smoothness:
        parts = [of == number for number in of.unique()]
        return smoothness([hidden[part] for part in parts], [target[part] for part in parts])

    learned, random = fits(experts), fits(shuffled)
    found = {
        "smoothness": learned.ratio,
        "smoothness_random": random.ratio,
        "smoothness_gain": learned.ratio - random.ratio,
        "smoothness_frobenius": learned.frobenius,
        "smoothness_bound": learned.bound,
        "smoothness_share": learned.share,
        "cancellation": learned.cancellation,
        "overlap": learned.overlap,
        "eigenvalue": learned.eigenvalue,
        "least_eigenvalue": learned.least_eigenvalue,
    }
    # Equal tokens with different targets, or nearly dependent ones, have no common map.
    return found if learned.residual < 1e-3 else dict.fromkeys(found, float("nan"))


def margins(routing: Routing) -> dict[str, torch.Tensor]:
    """Per token (T,): ``router_margin``, the first minus the second probability; ``logit_margin``,
    the smallest logit chosen minus the largest not chosen, NaN where none was left or one of the
    chosen had no room; ``entropy`` of the probabilities, nats.
    """
    probabilities = routing.logits.float().softmax(-1)
    first, second = probabilities.topk(2, -1).values.unbind(-1)
    among = chosen(routing)
    inside = routing.logits.masked_fill(~among, torch.inf).amin(-1)
    outside = routing.logits.masked_fill(among, -torch.inf).amax(-1)
    there = outside.isfinite() & _served(routing)
    return {
        "router_margin": first - second,
        "logit_margin": torch.where(there, inside - outside, torch.nan),
        "entropy": torch.special.entr(probabilities).sum(-1),
    }


def radii(routing: Routing, scorers: torch.Tensor) -> dict[str, torch.Tensor]:
    """How far a block's input may move before its set of experts can change, (T,).

    ``radius_l2`` and ``radius_linf``: the least over pairs of a chosen and another expert of the
    difference of their logits over the dual norm of that of their rows (E, D). Exact for a linear
    router that takes the largest logits; NaN for tokens whose choice is not that, or is of all, or
    of an expert that had no room.
    """
    logits, among = routing.logits.double(), chosen(routing)
    best = logits.topk(routing.experts.shape[1], -1).indices
    largest = torch.zeros_like(among).scatter(-1, best, True)
    plain = (largest == among).all(-1) & _served(routing)
    gaps = logits[:, :, None] - logits[:, None, :]  # (T, E, E)
    pairs = among[:, :, None] & ~among[:, None, :]
    found = {}
    for name, dual in (("radius_l2", 2), ("radius_linf", 1)):
        lengths = (scorers[:, None] - scorers[None]).double().norm(p=dual, dim=-1)
        least = (gaps / lengths).masked_fill(~pairs, torch.inf).amin((1, 2))
        found[name] = torch.where(plain & least.isfinite(), least, torch.nan)
    return found


def differences(watched: Watched, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """How different the experts are that a token could have gone to, (T,).

    ``disagreement``: distance of the two best experts' outputs over the mean of their lengths, with
    their ``cosine``; ``disagreement_next``: of ranks K and K + 1; ``disagreement_random``: of two
    drawn ones. ``jump``: what the output changes by when rank K gives way to K + 1, the weight of
    rank K times the distance of their outputs. ``routing_term``: product of the weights of the two
    best, the distance of their outputs and the distance of their rows in the router;
    ``routing_jacobian``: see there. All are NaN for a token that one of its experts had no room
    for, and what has rank K + 1 in it for one that all experts are given.
    """
    routing, hidden = watched.routing, watched.hidden
    logits = routing.logits.float()
    order = routing.weights.argsort(-1, descending=True)
    ranked, weights = routing.experts.gather(-1, order), routing.weights.gather(-1, order).float()
    others = logits.masked_fill(chosen(routing), -torch.inf).argmax(-1)
    last = ranked[:, -1]
    single = ranked.shape[1] == 1
    first, second = ranked[:, 0], others if single else ranked[:, 1]
    drawn = torch.rand(logits.shape, generator=generator).to(logits.device).topk(2, -1).indices
    outputs: dict[str, tuple[torch.Tensor, torch.Tensor]] = {
        name: tuple(watched.expert(hidden, numbers).float() for numbers in pair)
        for name, pair in {
            "": (first, second), "_next": (last, others), "_random": tuple(drawn.unbind(-1)),
        }.items()
    }  # fmt: skip
    found = {}
    for name, (one, other) in outputs.items():
        mean = (one.norm(dim=-1) + other.norm(dim=-1)) / 2
        found[f"disagreement{name}"] = (one - other).norm(dim=-1) / mean
    found["cosine"] = torch.cosine_similarity(*outputs[""], dim=-1)
    one, other = outputs["_next"]
    found["jump"] = weights[:, -1] * (one - other).norm(dim=-1)
    everything = chosen(routing).all(-1)
    for name in ("disagreement_next", "jump"):
        found[name] = found[name].masked_fill(everything, torch.nan)
    if watched.scorers is not None:
        rows = (watched.scorers[first] - watched.scorers[second]).norm(dim=-1)
        probabilities = logits.softmax(-1)
        beside = probabilities.gather(-1, second[:, None])[:, 0] if single else weights[:, 1]
        distance = (outputs[""][0] - outputs[""][1]).norm(dim=-1)
        found["routing_term"] = weights[:, 0] * beside * distance * rows
        found["routing_jacobian"] = routing_jacobian(watched)
    dropped = ~_served(routing)
    return {name: value.masked_fill(dropped, torch.nan) for name, value in found.items()}


def routing_jacobian(watched: Watched) -> torch.Tensor:
    """The part that the router has in a block's steepness, (T,).

    The spectral norm of Σ_a f_a ∇w_a over the chosen experts: what the Jacobian of Σ_a w_a f_a has
    beside Σ_a w_a J_a, with the choice as it is. For two experts whose weights sum to 1 it is the
    routing term. NaN for weights that are neither a softmax over all experts nor over the chosen,
    of the tokens that their experts had room for.
    """
    routing, hidden = watched.routing, watched.hidden
    logits, weights_TK = routing.logits.float(), routing.weights.float()
    probabilities_TE = logits.softmax(-1)
    own = probabilities_TE.gather(-1, routing.experts)
    renormalised = own / own.sum(-1, keepdim=True)
    served = _served(routing)[:, None]
    errors = [((weights_TK - rule) * served).abs().max() for rule in (renormalised, own)]
    if min(errors) > 1e-2:
        return logits.new_full((len(logits),), torch.nan)
    # Which experts' logits each weight depends on, as weights (T, E) of the softmax that it is of.
    over_TE = probabilities_TE
    if errors[0] <= errors[1]:
        over_TE = torch.zeros_like(logits).scatter(-1, routing.experts, weights_TK)
    mean_TD = over_TE @ watched.scorers
    gradients_TKD = weights_TK[..., None] * (watched.scorers[routing.experts] - mean_TD[:, None])
    outputs_TKM = torch.stack(
        [watched.expert(hidden, numbers).float() for numbers in routing.experts.unbind(-1)], dim=1
    )
    # ‖Fᵀ G‖² is the largest eigenvalue of (F Fᵀ)(G Gᵀ), which is K × K.
    product = (outputs_TKM @ outputs_TKM.mT) @ (gradients_TKD @ gradients_TKD.mT)
    return torch.linalg.eigvals(product.double()).real.amax(-1).clamp(min=0).sqrt().to(logits)
