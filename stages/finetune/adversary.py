"""Adversarial training on images: PGD (arXiv 1706.06083) and TRADES (arXiv 1901.08573)."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from stages.attack.image_geometry import project, same, steepest
from stages.finetune.recipe import ImageAdversary, Trades
from stages.models.images import Classifier
from stages.models.modes import evaluating
from stages.models.routes import routed

START = 1e-3
"""Standard deviation of TRADES' random start, as its authors have it; PGD starts in the ball."""


def perturbed(
    classifier: Classifier, clean: torch.Tensor, labels: torch.Tensor, recipe: ImageAdversary
) -> torch.Tensor:
    """Images (B, C, H, W) in [0, 1] within the budget, for labels (B,): the last iterate.

    Drawn from the global random numbers. No parameter gets a gradient.
    """
    with evaluating(classifier.model):
        if isinstance(recipe, Trades):
            loss = _divergence(classifier, clean, recipe)
        else:
            loss = _cross(classifier, labels)
        if isinstance(recipe, Trades):
            start = clean + START * torch.randn_like(clean)
        elif recipe.norm == "linf":
            start = clean + recipe.budget * (2 * torch.rand_like(clean) - 1)
        else:
            length = torch.rand(len(clean), 1, 1, 1, device=clean.device)
            length = length ** (1 / clean[0].numel())
            start = clean + recipe.budget * length * steepest(torch.randn_like(clean), "l2")
        budget = same(recipe.budget, clean)
        images = project(start, clean, budget, recipe.norm)
        step = recipe.relative_step * recipe.budget / recipe.steps
        for _ in range(recipe.steps):
            images = images.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(loss(images), images)
            ahead = images + step * steepest(gradient, recipe.norm)
            images = project(ahead, clean, budget, recipe.norm)
    return images.detach()


def _cross(classifier: Classifier, labels: torch.Tensor) -> Callable:
    return lambda images: F.cross_entropy(classifier(images).float(), labels, reduction="sum")


def _divergence(classifier: Classifier, clean: torch.Tensor, recipe: Trades) -> Callable:
    """What the loss has beside that of the clean image."""
    with torch.no_grad(), routed(classifier.model) as before:
        logits = classifier(clean)

    def moved(images: torch.Tensor) -> torch.Tensor:
        with routed(classifier.model) as now:
            found = divergence(logits, classifier(images))
        if recipe.router_beta:
            routers = [(a.logits, b.logits) for a, b in zip(before, now, strict=True)]
            turned = router_divergence(routers, len(images))
            found = recipe.beta * found + recipe.router_beta * turned
        return found

    return moved


def divergence(clean: torch.Tensor, attacked: torch.Tensor) -> torch.Tensor:
    """KL divergence of the attacked predictions from the clean ones, from logits (B, labels),
    summed over the images."""
    p, q = (logits.float().log_softmax(-1) for logits in (clean, attacked))
    return F.kl_div(q, p, reduction="sum", log_target=True)


def router_divergence(
    routers: Sequence[tuple[torch.Tensor, torch.Tensor]], images: int
) -> torch.Tensor:
    """The same of the routers' probabilities, from clean and attacked logits (T, E) of each layer:
    the mean over an image's tokens and the layers, summed over the images."""
    total = sum(divergence(clean, attacked) / len(clean) for clean, attacked in routers)
    return images * total / len(routers)
