"""Adversarial training on images: PGD (arXiv 1706.06083) and TRADES (arXiv 1901.08573)."""

import torch
import torch.nn.functional as F

from stages.attack.image_geometry import project, steepest
from stages.finetune.recipe import ImageAdversary, Trades
from stages.models.images import Classifier
from stages.models.modes import evaluating

START = 1e-3
"""Standard deviation of TRADES' random start, as its authors have it; PGD starts in the ball."""


def perturbed(
    classifier: Classifier, clean: torch.Tensor, labels: torch.Tensor, recipe: ImageAdversary
) -> torch.Tensor:
    """Images (B, C, H, W) in [0, 1] within the budget, for labels (B,): the last iterate.

    Drawn from the global random numbers. No parameter gets a gradient.
    """
    with evaluating(classifier.model):
        loss = _divergence(classifier, clean) if isinstance(recipe, Trades) else _cross(labels)
        if isinstance(recipe, Trades):
            start = clean + START * torch.randn_like(clean)
        elif recipe.norm == "linf":
            start = clean + recipe.budget * (2 * torch.rand_like(clean) - 1)
        else:
            length = torch.rand(len(clean), 1, 1, 1, device=clean.device)
            length = length ** (1 / clean[0].numel())
            start = clean + recipe.budget * length * steepest(torch.randn_like(clean), "l2")
        images = project(start, clean, recipe.budget, recipe.norm)
        step = recipe.relative_step * recipe.budget / recipe.steps
        for _ in range(recipe.steps):
            images = images.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(loss(classifier(images)), images)
            ahead = images + step * steepest(gradient, recipe.norm)
            images = project(ahead, clean, recipe.budget, recipe.norm)
    return images.detach()


def _cross(labels: torch.Tensor):
    return lambda logits: F.cross_entropy(logits.float(), labels, reduction="sum")


def _divergence(classifier: Classifier, clean: torch.Tensor):
    with torch.no_grad():
        before = classifier(clean)
    return lambda logits: divergence(before, logits)


def divergence(clean: torch.Tensor, attacked: torch.Tensor) -> torch.Tensor:
    """KL divergence of the attacked predictions from the clean ones, from logits (B, labels),
    summed over the images."""
    p, q = (logits.float().log_softmax(-1) for logits in (clean, attacked))
    return F.kl_div(q, p, reduction="sum", log_target=True)
