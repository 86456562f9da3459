"""Projected gradient ascent on the embeddings of tokens."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

STEP = 2.5
"""Length of all steps together, in radii: enough to cross the ball and come back (arXiv 1706.06083
uses it on images)."""
Objective = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Perturbation:
    """The best iterate of an ascent."""

    delta: torch.Tensor
    """(n, D)."""
    margin: float
    zero_gradients: float
    """Share of token gradients that were exactly zero on the way."""
    gradients: int
    """Inputs whose gradient was computed."""


def scale(table: torch.Tensor, norm: Literal["l2", "linf"]) -> float:
    """What a radius of 1 means: the median norm of an embedding, or the root mean square of its
    elements, over the vocabulary (V, D)."""
    return (table.norm(dim=-1).median() if norm == "l2" else table.square().mean().sqrt()).item()


def nearest_distance(table: torch.Tensor, sample: int = 512) -> float:
    """The median l2 distance of an embedding to the nearest other one, over evenly spaced ones."""
    chosen = table[:: max(1, len(table) // sample)].float()
    distances = torch.cdist(chosen, table.float())
    # Tokens that were never trained may share one embedding; they are no neighbours. Nor is a token
    # its own, whose distance is rounded to a thousandth of the others.
    distances[distances < 1e-2 * distances.median()] = torch.inf
    return distances.amin(1).median().item()


def ascend(
    objective: Objective,
    clean: torch.Tensor,
    editable: torch.Tensor,
    radius: float,
    *,
    norm: Literal["l2", "linf"],
    steps: int,
    restarts: int,
    generator: torch.Generator,
    goal: float = float("inf"),
) -> Perturbation:
    """Raise an objective within a ball of ``radius`` around each editable token's embedding.

    ``clean`` (n, D), ``editable`` booleans (n,). The objective maps inputs (B, n, D) to losses and
    margins (B,); the gradient of the losses is followed, normalised for each token, and the iterate
    with the largest margin is kept. Every restart starts at a point drawn evenly from the
    balls: at the clean input the gradient may say nothing. It ends where the margin is above
    ``goal``.
    """
    mask = editable[:, None].to(clean)
    shape = (restarts, *clean.shape)
    start = torch.randn(shape, generator=generator) if norm == "l2" else (
        2 * torch.rand(shape, generator=generator) - 1)
    if norm == "l2":
        length = torch.rand((*shape[:2], 1), generator=generator) ** (1 / clean.shape[-1])
        start = start / start.norm(dim=-1, keepdim=True) * length
    delta = radius * start.to(clean) * mask
    best = torch.zeros_like(clean), -torch.inf
    zero, seen = 0, 0
    for step in range(steps + 1):
        delta.requires_grad_(step < steps)
        losses, margins = objective(clean + delta)
        margins = margins.nan_to_num(nan=-torch.inf)  # one start without an answer is not the best
        top = int(margins.argmax())
        if margins[top].item() > best[1]:
            best = delta[top].detach().clone(), margins[top].item()
        if step == steps or best[1] > goal:
            break
        gradient = torch.autograd.grad(losses.sum(), delta)[0] * mask
        if not gradient.isfinite().all():
            gradient = gradient.nan_to_num()
        zero += int(((gradient == 0).all(-1) & editable).sum())
        seen += restarts * int(editable.sum())
        delta = project(delta.detach() + STEP * radius / steps * _steepest(gradient, norm),
                        radius, norm)
    return Perturbation(*best, zero / max(1, seen), restarts * step)


def project(delta: torch.Tensor, radius: float, norm: Literal["l2", "linf"]) -> torch.Tensor:
    """The nearest point of each token's ball."""
    if norm == "linf":
        return delta.clamp(-radius, radius)
    return delta / (delta.norm(dim=-1, keepdim=True) / radius).clamp(min=1)


def _steepest(gradient: torch.Tensor, norm: Literal["l2", "linf"]) -> torch.Tensor:
    """The direction in which a step of length 1 gains most; none where there is no gradient."""
    if norm == "linf":
        return gradient.sign()
    # In float64: a confident model's gradient is small enough to square to 0.
    length = gradient.double().norm(dim=-1, keepdim=True)
    return (gradient / length.clamp_min(1e-300)).to(gradient)


def random_perturbation(
    clean: torch.Tensor,
    editable: torch.Tensor,
    radius: float,
    norm: Literal["l2", "linf"],
    generator: torch.Generator,
) -> torch.Tensor:
    """The control (n, D): for every editable token of ``clean`` (n, D) a random direction of length
    ``radius``, for ``linf`` a random corner."""
    drawn = torch.randn(clean.shape, generator=generator).to(clean)
    drawn = drawn.sign() if norm == "linf" else drawn / drawn.norm(dim=-1, keepdim=True)
    return radius * drawn * editable[:, None]
