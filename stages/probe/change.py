"""How far the routes of two passes differ, and what chance alone would give.

Shape letters: T tokens, E experts, K chosen experts.
"""

from collections.abc import Sequence
from math import comb

import torch

from stages.models.routes import selected
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
    before: Sequence[Routing], after: Sequence[Routing], inputs: int
) -> list[dict[str, float]]:
    """The same for each of the inputs of a batch, whose tokens follow each other."""
    found: list[dict[str, float]] = [{} for _ in range(inputs)]
    for one, other in zip(before, after, strict=True):
        same = overlap(selected(one), selected(other)).view(inputs, -1).nanmean(1)
        for changes, value in zip(found, (1 - same).tolist(), strict=True):
            changes[one.layer] = value
    return found


def chance(experts: int, chosen: int) -> float:
    """The routing change between two independent, even choices of K of E experts."""
    expected = sum(
        comb(chosen, m) * comb(experts - chosen, chosen - m) / comb(experts, chosen)
        * m / (2 * chosen - m)
        for m in range(max(0, 2 * chosen - experts), chosen + 1)
    )  # fmt: skip
    return 1 - expected
