"""How steep a function is around a point: found slopes, each a lower bound of the Lipschitz
constant of the neighbourhood."""

from collections.abc import Callable

import torch

from stages.attack.embeddings import ascend, project

Function = Callable[[torch.Tensor], torch.Tensor]
"""Inputs (B, n, D) to outputs (B, C)."""


def steepest(
    function: Function,
    clean: torch.Tensor,
    editable: torch.Tensor,
    radius: float,
    *,
    steps: int,
    restarts: int,
    generator: torch.Generator,
) -> float:
    """The largest ‖f(x + d) - f(x)‖ / ‖d‖ that ascent finds, every editable token's part of d at
    most ``radius`` long; norms are l2 over all elements."""
    with torch.no_grad():
        here = function(clean[None])

    def slope(embedded: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        ratio = _slope(function(embedded) - here, embedded - clean)
        return ratio, ratio.detach()

    found = ascend(
        slope, clean, editable, radius, norm="l2", steps=steps, restarts=restarts,
        generator=generator,
    )  # fmt: skip
    return found.margin


@torch.no_grad()
def random_slope(
    function: Function,
    clean: torch.Tensor,
    editable: torch.Tensor,
    radius: float,
    samples: int,
    generator: torch.Generator,
) -> float:
    """The same over random directions."""
    drawn = torch.randn((samples, *clean.shape), generator=generator).to(clean)
    delta = project(1e6 * radius * drawn, radius, "l2") * editable[:, None]
    return _slope(function(clean + delta) - function(clean[None]), delta).max().item()


def _slope(change: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    return change.norm(dim=-1) / delta.flatten(1).norm(dim=-1)


def jacobian_norm(function: Function, clean: torch.Tensor, editable: torch.Tensor) -> float:
    """The spectral norm of the Jacobian at the point with respect to the editable tokens, exact:
    its C rows by one backward pass each."""
    point = clean[None].clone().requires_grad_()
    outputs = function(point)[0]
    rows = [
        torch.autograd.grad(output, point, retain_graph=True)[0][0][editable].flatten()
        for output in outputs
    ]
    return torch.linalg.matrix_norm(torch.stack(rows).float(), 2).item()
