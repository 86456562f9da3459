"""Which experts are used, by how much, and on which of two kinds of inputs more.

Shape letters: L sparse blocks, E experts.
"""

from collections.abc import Sequence

import torch

from stages.models.routes import selected
from stages.models.routing import Routing

Experts = dict[str, list[int]]
"""Some experts of each block, by the block's path."""


def usage(routes: Sequence[Routing]) -> torch.Tensor:
    """The share of the tokens that chose each expert, (L, E)."""
    return torch.stack([selected(routing).float().mean(0).cpu() for routing in routes])


def risk_difference(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Mean usage over some inputs (N, L, E) minus that over others (M, L, E), (L, E): the risk
    difference of arXiv 2509.09660, each input counting once."""
    return first.mean(0) - second.mean(0)


def pruned(
    usage: torch.Tensor, layers: Sequence[str], count: int, which: str, seed: int
) -> Experts:
    """So many experts of every block: ``least_used``, ``most_used`` or ``random`` ones."""
    if which == "random":
        score = torch.rand(usage.shape, generator=torch.Generator().manual_seed(seed))
    else:
        score = usage if which == "most_used" else -usage
    chosen = score.topk(count, dim=-1).indices
    return {layer: row.tolist() for layer, row in zip(layers, chosen, strict=True)}


def highest(score: torch.Tensor, layers: Sequence[str], count: int, spare: int) -> Experts:
    """The ``count`` experts of all blocks with the highest scores (L, E), each block keeping at
    least ``spare`` of its experts."""
    blocks, experts = score.shape
    found: Experts = {layer: [] for layer in layers}
    for place in score.flatten().argsort(descending=True).tolist():
        mine = found[layers[place // experts]]
        if sum(map(len, found.values())) == count:
            break
        if len(mine) < experts - spare:
            mine.append(place % experts)
    return found
