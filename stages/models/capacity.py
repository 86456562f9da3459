"""Which choices of experts fit into the experts' capacity."""

import torch
import torch.nn.functional as F

# Shape letters: T tokens, E experts, K chosen experts, N token-expert pairs.


def within_capacity(
    indices_TK: torch.Tensor, weights_TK: torch.Tensor, capacity: int, experts: int, first: bool
) -> torch.Tensor:
    """Which assignments of one group an expert still takes, shape (T, K), boolean.

    All first choices are served before all second ones, the tokens in their order, or with
    ``first`` those with the largest weight first (batch-prioritised routing, arXiv 2106.05974,
    algorithms 1 and 2).
    """
    order_T = torch.arange(len(indices_TK), device=indices_TK.device)
    if first:
        order_T = weights_TK.amax(dim=-1).argsort(descending=True, stable=True)
    queue_N = indices_TK[order_T].T.flatten()  # choice by choice
    one_hot_NE = F.one_hot(queue_N, experts)
    place_N = (one_hot_NE.cumsum(dim=0) * one_hot_NE).sum(dim=-1)
    kept_KT = (place_N <= capacity).view(indices_TK.shape[1], -1)
    kept_TK = torch.empty_like(indices_TK, dtype=torch.bool)
    kept_TK[order_T] = kept_KT.T
    return kept_TK
