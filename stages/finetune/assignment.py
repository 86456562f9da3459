"""Which experts a token goes to in training, where a recipe says other than the router's top k."""

import numpy as np
import torch
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
