"""Losses on the routers, from what ``stages.models.routing`` saw in one forward pass.

They are computed here and not by the model, so that they are the same for every family and head,
and reach the router's gradient where a model's head returns no loss of its own.
"""

import torch

from stages.models.routing import Routing, probabilities


def load_balancing_loss(routings: list[Routing], scores: str) -> torch.Tensor:
    """E · Σ_e f_e · P_e over the tokens of all sparse layers together, a scalar; of an
    encoder-decoder, that of the encoder plus that of the decoder, as transformers adds them.

    f_e is the number of times expert e was chosen per token (so Σ f_e = K), P_e the mean of its
    probability (Switch Transformers, arXiv 2101.03961, equations 4 to 6; pooled over the layers as
    transformers' ``load_balancing_loss_func`` does). Gradients flow through P_e. ``scores`` are the
    family's: of sigmoids P_e takes each one's share (DeepSeek-V3, arXiv 2412.19437, equations 17 to
    20, whose loss is that of one sequence and layer over K), where transformers takes the softmax
    (MiniMax-M2, Laguna). Where a bias moves the choice (these two, ERNIE), the experts that were
    chosen count; transformers counts those of the largest logits there.
    """
    stacks: dict[bool, list[Routing]] = {}
    for routing in routings:
        stacks.setdefault("decoder" in routing.layer.split("."), []).append(routing)
    return sum(_balance(each, scores) for each in stacks.values())


def balance_by_sequence(sequences: list[list[Routing]], scores: str) -> torch.Tensor:
    """Mean over sequences of the load-balancing loss of each one's tokens alone, a scalar: what
    transformers has for Switch Transformers where a batch holds no padding."""
    return torch.stack([load_balancing_loss(routings, scores) for routings in sequences]).mean()


def _balance(routings: list[Routing], scores: str) -> torch.Tensor:
    experts = routings[0].logits.shape[-1]
    chosen = torch.cat([routing.experts.flatten() for routing in routings])
    tokens = sum(len(routing.logits) for routing in routings)
    share = torch.bincount(chosen, minlength=experts).float() / tokens
    probability = sum(probabilities(r.logits, scores).sum(0) for r in routings) / tokens
    return experts * (share * probability).sum()


def z_loss(routings: list[Routing]) -> torch.Tensor:
    """Mean over tokens and layers of (log Σ_e exp logit_e)², a scalar (arXiv 2202.08906, eq. 5)."""
    squares = [r.logits.float().logsumexp(-1).square().mean() for r in routings]
    return torch.stack(squares).mean()
