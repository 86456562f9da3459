"""Auto-PGD (arXiv 2003.01690): momentum and a step that halves by itself, without parameters."""

import torch

from stages.attack.image_geometry import Draws, per_image, project, sizes, steepest
from stages.attack.image_objective import Best, Objective
from stages.attack.image_spec import Norm

MOMENTUM = 0.75
"""Weight of the gradient step; the rest is the direction of the last move."""
PROGRESS = 0.75
"""A step is halved where fewer of the moves since the last checkpoint raised the loss."""


def checkpoints(steps: int) -> list[int]:
    """The iterations at which the step may be halved: intervals of 22 % of the steps at first, each
    3 % shorter than the one before, and at least 6 %."""
    interval, shorter = max(int(0.22 * steps), 1), max(int(0.03 * steps), 1)
    least, found, place = max(int(0.06 * steps), 1), [], 0
    while place + interval <= steps:
        place += interval
        found.append(place)
        interval = max(interval - shorter, least)
    return found


def apgd(
    objective: Objective,
    clean: torch.Tensor,
    *,
    norm: Norm,
    budget: torch.Tensor,
    steps: int,
    restarts: int,
    draws: Draws,
) -> Best:
    """The best iterates of all restarts, for images (B, C, H, W) in [0, 1] and budgets (B,).

    ``steps`` gradients a restart. Each example has a step of its own, which starts at twice the
    budget.
    """
    best = Best(clean)
    for _ in range(restarts):
        _run(objective, clean, norm, budget, steps, draws, best)
    return best


def _run(
    objective: Objective,
    clean: torch.Tensor,
    norm: Norm,
    budget: torch.Tensor,
    steps: int,
    draws: Draws,
    best: Best,
) -> None:
    def moved(images: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        ahead = images + per_image(step) * steepest(gradient, norm)
        return project(ahead, clean, budget, norm)

    images = _start(clean, budget, norm, draws)
    value, gradient = objective.climb(images)
    best.update(images, value, objective.labels)
    step = (2 * budget).to(value.loss)
    top, top_images, top_gradient = value.loss.clone(), images.clone(), gradient.clone()
    raised = torch.zeros_like(step)
    # At the first checkpoint only the share of moves that raised the loss counts.
    top_before, halved_before = top.clone(), torch.ones_like(step, dtype=torch.bool)
    due, last, before, loss = checkpoints(steps), 0, images, value.loss
    for iteration in range(1, steps):
        ahead = moved(images, gradient)
        if iteration > 1:
            ahead = images + MOMENTUM * (ahead - images) + (1 - MOMENTUM) * (images - before)
            ahead = project(ahead, clean, budget, norm)
        before, images = images, ahead
        value, gradient = objective.climb(images)
        best.update(images, value, objective.labels)
        raised += value.loss > loss
        loss = value.loss
        higher = loss > top
        top = torch.where(higher, loss, top)
        top_images[higher], top_gradient[higher] = images[higher], gradient[higher]
        if iteration in due:
            stalled = raised < PROGRESS * (iteration - last)
            halve = stalled | (~halved_before & (top <= top_before))
            step = torch.where(halve, step / 2, step)
            images = torch.where(per_image(halve), top_images, images)
            gradient = torch.where(per_image(halve), top_gradient, gradient)
            loss = torch.where(halve, top, loss)
            halved_before, top_before, last = halve, top.clone(), iteration
            raised.zero_()


def _start(clean: torch.Tensor, budget: torch.Tensor, norm: Norm, draws: Draws) -> torch.Tensor:
    """A random point at the full budget from each image, clipped to [0, 1]."""
    shape = tuple(clean.shape[1:])
    delta = draws.uniform(-1, 1, shape) if norm == "linf" else draws.normal(shape)
    delta = delta * per_image(budget.to(delta) / sizes(delta, norm))
    return (clean + delta.to(clean)).clamp(0, 1)
