"""Projected gradient descent on images, and the weaker attack of the paper."""

import torch

from stages.attack.image_geometry import Draws, per_image, project, steepest
from stages.attack.image_objective import Best, Objective, Value
from stages.attack.image_spec import PGD, PaperPGD


def pgd(
    objective: Objective, attack: PGD, clean: torch.Tensor, budget: torch.Tensor, draws: Draws
) -> Best:
    """The best iterates of all restarts, for images (B, C, H, W) in [0, 1] (arXiv 1706.06083)."""
    best = Best(clean)
    step = per_image(attack.relative_step * budget / attack.steps).to(clean)
    for _ in range(attack.restarts):
        images = draws.in_ball(clean, budget, attack.norm) if attack.random_start else clean
        for _ in range(attack.steps):
            value, gradient = objective.climb(images)
            best.update(images, value, objective.labels)
            ahead = images + step * steepest(gradient, attack.norm)
            images = project(ahead, clean, budget, attack.norm)
        with torch.no_grad():
            best.update(images, objective(images), objective.labels)
    return best


def paper_pgd(
    objective: Objective, attack: PaperPGD, clean: torch.Tensor, budget: torch.Tensor
) -> Best:
    """The last iterate of the paper's attack, which may lie outside [0, 1] (arXiv 2210.10253)."""
    images, step = clean, per_image(budget / attack.steps).to(clean)
    for _ in range(attack.steps):
        _, gradient = objective.climb(images)
        images = images + step * steepest(gradient, attack.norm)
    with torch.no_grad():
        logits = objective(images).logits
    last = Best(images)
    # It counts as it is, whatever came before.
    last.update(images, Value(torch.zeros_like(last.loss), logits), objective.labels)
    return last
