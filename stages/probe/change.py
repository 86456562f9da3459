"""How far the routes of two passes differ, and what chance alone would give.

Shape letters: T tokens, E experts, K chosen experts.
"""

from collections.abc import Sequence
from math import comb

import torch

from stages.models.routes import DROPPED, selected
from stages.models.routing import Routing


def overlap(before: torch.Tensor, after: torch.Tensor, *, published: bool = False) -> torch.Tensor:
    """Intersection over union (T,) of two selections of experts, booleans (T, E).

    A token that no expert took either time (a capacity left it out) has no overlap to speak of:
    NaN; with ``published`` 0, as in the published code of arXiv 2210.10253.
    """
    both = (before & after).sum(-1)
    either = (before | after).sum(-1)
    empty = 0.0 if published else torch.nan
    return torch.where(either > 0, both / either, torch.as_tensor(empty))


def routing_change(
    before: Sequence[Routing],
    after: Sequence[Routing],
    pairs: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> dict[str, float]:
    """By block, 1 - IoU averaged over tokens.

    ``pairs`` are the places of the tokens before and after that are compared, all by default.
    """
    found = {}
    for one, other in zip(before, after, strict=True):
        first, second = selected(one), selected(other)
        if pairs is not None:
            first, second = first[pairs[0]], second[pairs[1]]
        found[one.layer] = 1 - overlap(first, second).nanmean().item()
    return found


def routing_changes(
    before: Sequence[Routing], after: Sequence[Routing], inputs: int, *, published: bool = False
) -> list[dict[str, float]]:
    """The same for each of the inputs of a batch, whose tokens follow each other; ``published`` as
    for ``overlap``."""
    found: list[dict[str, float]] = [{} for _ in range(inputs)]
    for one, other in zip(before, after, strict=True):
        same = overlap(selected(one), selected(other), published=published)
        same = same.view(inputs, -1).nanmean(1)
        for changes, value in zip(found, (1 - same).tolist(), strict=True):
            changes[one.layer] = value
    return found


def choice_changes(
    before: Sequence[Routing],
    after: Sequence[Routing],
    inputs: int = 1,
    pairs: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> list[dict[str, float]]:
    """Beside the change of routes, of each input, means over tokens and blocks:

    ``experts_first_changed``, the share of tokens whose expert of the largest weight is another;
    ``experts_kept``, the share |A ∩ B| / K of the K experts that are chosen both times (1 - IoU
    counts one of two exchanged as 2/3); ``experts_none``, the share of tokens that no expert took
    either time, which these and 1 - IoU leave out; ``experts_dropped``, the share of the K choices
    that found no room afterwards; ``experts_kl``, the divergence of the softmax of the logits
    afterwards from that before, in nats; ``experts_usage_tv``, the total variation distance of how
    often each expert is used; ``experts_load_cv2``, by how much the squared coefficient of
    variation of that has risen. Empty without blocks.
    """
    found: dict[str, list[torch.Tensor]] = {}
    for one, other in zip(before, after, strict=True):
        if pairs is not None:
            one, other = one.only(pairs[0]), other.only(pairs[1])
        first, second = selected(one), selected(other)
        either = (first | second).any(-1)
        kept = (first & second).sum(-1) / one.experts.shape[1]
        moved = (_largest(one) != _largest(other)).to(kept)
        for name, values in (
            ("experts_first_changed", torch.where(either, moved, torch.nan)),
            ("experts_kept", torch.where(either, kept, torch.nan)),
            ("experts_none", 1 - either.to(kept)),
            ("experts_dropped", 1 - second.sum(-1) / one.experts.shape[1]),
            ("experts_kl", _divergence(one.logits.float(), other.logits.float())),
        ):
            found.setdefault(name, []).append(values.view(inputs, -1).nanmean(1))
        used = [each.view(inputs, -1, each.shape[-1]).sum(1).to(kept) for each in (first, second)]
        shares = [each / each.sum(-1, keepdim=True) for each in used]
        spread = [each.var(-1, correction=0) / each.mean(-1).square() for each in used]
        found.setdefault("experts_usage_tv", []).append((shares[1] - shares[0]).abs().sum(-1) / 2)
        found.setdefault("experts_load_cv2", []).append(spread[1] - spread[0])
    means = {name: torch.stack(values).nanmean(0).tolist() for name, values in found.items()}
    return [{name: values[i] for name, values in means.items()} for i in range(inputs)]


def _divergence(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """KL divergence (T,) of two softmaxes of logits (T, E), in nats."""
    first, second = before.log_softmax(-1), after.log_softmax(-1)
    return torch.where(first > -torch.inf, first.exp() * (first - second), 0.0).sum(-1)


def _largest(routing: Routing) -> torch.Tensor:
    """The expert of the largest weight of each token, (T,)."""
    largest = routing.weights.argmax(-1, keepdim=True)
    there = routing.weights.gather(-1, largest) > 0
    return torch.where(there, routing.experts.gather(-1, largest), DROPPED)[:, 0]


def chance(experts: int, chosen: int) -> float:
    """The routing change between two independent, even choices of K of E experts."""
    expected = sum(
        comb(chosen, m) * comb(experts - chosen, chosen - m) / comb(experts, chosen)
        * m / (2 * chosen - m)
        for m in range(max(0, 2 * chosen - experts), chosen + 1)
    )  # fmt: skip
    return 1 - expected
