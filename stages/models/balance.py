"""V-MoE's auxiliary losses, which ask a router to use its experts evenly (arXiv 2106.05974).

All tokens of a forward pass are one group. Each loss is summed over the sparse layers, as in the
authors' code (google-research/vmoe), so that a weight means the same there and here. A layer whose
experts are in perfect balance adds 0, but to the GShard loss 1.
"""

from collections.abc import Callable

import torch

from stages.models.routing import Routing

# Shape letters: T tokens, E experts.


def importance_loss(routings: list[Routing]) -> torch.Tensor:
    """Squared coefficient of variation of the experts' summed probabilities, a scalar.

    In V-MoE those of the router as it is: where noise was added, ``routings`` with the logits
    without it.
    """
    return _sum(routings, lambda p_TE: _squared_variation(p_TE.sum(0)))


def gshard_loss(routings: list[Routing]) -> torch.Tensor:
    """E Σ_e f_e P_e, a scalar: the share of tokens whose best expert is e (no gradient) times its
    mean probability (GShard, arXiv 2006.16668)."""

    def loss(p_TE: torch.Tensor) -> torch.Tensor:
        experts = p_TE.shape[1]
        best_E = torch.bincount(p_TE.argmax(1), minlength=experts) / len(p_TE)
        return experts * (best_E * p_TE.mean(0)).sum()

    return _sum(routings, loss)


def load_loss(
    routings: list[Routing], clean: dict[str, torch.Tensor], noise: float
) -> torch.Tensor:
    """Squared coefficient of variation of the experts' smooth loads, a scalar.

    An expert's load is the mean probability, over tokens, that it would be chosen if its noise were
    drawn again: that its logit without noise plus normal noise exceeds the last chosen noisy one.
    ``routings`` hold the noisy logits, ``clean`` those without noise (T, E) by layer; ``noise`` is
    the standard deviation, above 0.
    """
    losses = []
    for routing in routings:
        least_T1 = routing.logits.float().topk(routing.experts.shape[1], dim=1).values[:, -1:]
        needed_TE = (least_T1 - clean[routing.layer].float()) / noise
        chance_TE = torch.special.ndtr(-needed_TE)
        losses.append(_squared_variation(chance_TE.mean(0)))
    return torch.stack(losses).sum()


def _sum(
    routings: list[Routing], loss: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    return torch.stack([loss(r.logits.float().softmax(-1)) for r in routings]).sum()


def _squared_variation(values_E: torch.Tensor) -> torch.Tensor:
    return (values_E.std(correction=0) / values_E.mean()).square()
