"""Which experts a token goes to in training, where a recipe says other than the router's top k."""

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment


def random_experts(logits: torch.Tensor, k: int) -> torch.Tensor:
    """``k`` different experts for each token, evenly drawn, shape (T, k); none with a logit of
    -inf, which the token cannot choose."""
    drawn = torch.rand_like(logits, dtype=torch.float32).masked_fill(logits == -torch.inf, -1)
    return drawn.topk(k, dim=-1).indices


@torch.no_grad()
def balanced_experts(logits: torch.Tensor, k: int) -> torch.Tensor:
    """``k`` different experts for each token, every expert equally often, shape (T, k).

    ``k`` rounds; in each, every token gets one expert that it has not had, every expert at most
    ⌈T / E⌉ tokens, and the sum of the logits is the largest possible (BASE layers, arXiv
    2103.16716, equation 2, solved exactly). Time grows with T³ in the worst case.
    """
    scores = logits.double().cpu().numpy()
    tokens, experts = scores.shape
    places = -(-tokens // experts)
    # Tokens that stand for free places keep the sides equal, so that no expert can be left short
    # in one round and none is without a choice in the next.
    free = np.zeros((places * experts - tokens, experts))
    scores = np.concatenate([scores, free])
    # Worse than any difference of logits can make good.
    barred = -(np.abs(scores).sum() + 1)
    rounds = []
    for _ in range(k):
        _, column = linear_sum_assignment(np.repeat(scores, places, axis=1), maximize=True)
        rounds.append(column // places)
        scores[np.arange(len(scores)), rounds[-1]] = barred
    return torch.from_numpy(np.stack(rounds, axis=1)[:tokens]).to(logits.device)


def softmax_weights(
    logits: torch.Tensor, experts: torch.Tensor, *, of_chosen: bool
) -> torch.Tensor:
    """Weights (T, K) of chosen experts: the softmax of the logits (T, E), or of theirs alone."""
    if of_chosen:
        return logits.gather(-1, experts).float().softmax(-1)
    return logits.float().softmax(-1).gather(-1, experts)


def reassigned(output: tuple, experts: torch.Tensor, weights: torch.Tensor) -> tuple:
    """What a router that chooses inside its block returns, with other experts and weights (T, K).

    One of Switch Transformers: a mask of the only expert (B, S, E), its weight and the logits; no
    expert is then too full for a token. Others: the pairs of a token and an expert by their place,
    their tokens and weights in the order of the experts, how many each of them has, and the logits.
    """
    if len(output) == 3:
        mask, weight, logits = output
        only = F.one_hot(experts.view(mask.shape[:-1]), mask.shape[-1]).to(mask.dtype)
        return only, weights.view_as(weight).to(weight.dtype), logits
    _, _, weight, sizes, logits = output
    chosen, order = experts.flatten().sort()
    given = torch.bincount(chosen, minlength=len(sizes)).tolist()
    weights = weights.flatten()[order].to(weight.dtype)
    return order, order // experts.shape[1], weights, given, logits
