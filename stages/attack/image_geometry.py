"""Balls around images: norms, directions of steepest ascent, projection, and random points."""

from collections.abc import Sequence

import numpy as np
import torch

from stages.attack.image_spec import Norm

# Shape letters: B images, C channels, H and W their size. Budgets are (B,) in float64: how far each
# image may go.


def sizes(delta: torch.Tensor, norm: Norm) -> torch.Tensor:
    """The norm of each perturbation (B, C, H, W), shape (B,)."""
    flat = delta.flatten(1)
    return flat.abs().amax(1) if norm == "linf" else flat.norm(dim=1)


def per_image(values: torch.Tensor) -> torch.Tensor:
    """Numbers (B,) in a shape that multiplies images."""
    return values[:, None, None, None]


def same(budget: float, images: torch.Tensor) -> torch.Tensor:
    """The budgets of images that all have the same one."""
    return images.new_full((len(images),), budget, dtype=torch.float64)


def steepest(gradient: torch.Tensor, norm: Norm) -> torch.Tensor:
    """The direction of length 1 that ascends fastest, (B, C, H, W); 0 where the gradient is."""
    if norm == "linf":
        return gradient.sign()
    # In float64: a confident model's gradient is small enough to square to 0.
    return (gradient / per_image(sizes(gradient.double(), norm)).clamp_min(1e-300)).to(gradient)


def project(
    images: torch.Tensor, clean: torch.Tensor, budget: torch.Tensor, norm: Norm
) -> torch.Tensor:
    """The nearest images within the budget, clipped to [0, 1].

    ``clean`` lies in [0, 1], so that clipping leads nobody out of the ball.
    """
    delta, limit = images - clean, per_image(budget).to(images)
    if norm == "linf":
        delta = delta.clamp(-limit, limit)
    else:
        delta = delta * (limit / per_image(sizes(delta, norm)).clamp_min(1e-12)).clamp_max(1)
    return (clean + delta).clamp(0, 1)


def at_distance(clean: torch.Tensor, direction: torch.Tensor, budget: torch.Tensor) -> torch.Tensor:
    """Images in [0, 1] whose l2 distance from ``clean`` is the budget, each along its direction.

    A pixel that meets the end of the range stays there and the others go on, so that clipping makes
    no perturbation smaller. Where all pixels end within the budget, that corner of the range is the
    image. Both (B, C, H, W), no element of a direction 0.
    """
    dtype, clean, direction = clean.dtype, clean.double(), direction.double()
    low = budget / sizes(direction, "l2")  # reaches the budget where nothing is clipped
    high = (torch.where(direction > 0, 1 - clean, clean) / direction.abs()).flatten(1).amax(1)
    high = high.maximum(low)
    for _ in range(60):
        middle = (low + high) / 2
        images = (clean + per_image(middle) * direction).clamp(0, 1)
        short = sizes(images - clean, "l2") < budget
        low, high = torch.where(short, middle, low), torch.where(short, high, middle)
    return images.to(dtype)


class Draws:
    """Random numbers of each image, from its own seed.

    So neither the batch nor the shard in which an image stands changes what is drawn for it.
    """

    def __init__(self, seeds: Sequence[int | Sequence[int]]):
        self.generators = [np.random.default_rng(seed) for seed in seeds]

    def only(self, chosen: torch.Tensor) -> "Draws":
        """Those of the images that the mask (B,) names; they go on where these are."""
        part = Draws(())
        part.generators = [self.generators[i] for i in chosen.nonzero().flatten().tolist()]
        return part

    def uniform(
        self, low: float | np.ndarray, high: float | np.ndarray, shape: tuple[int, ...]
    ) -> torch.Tensor:
        """Uniform numbers, (B, *shape), float32 on the CPU; between limits for all, or (B,)."""
        limits = (np.broadcast_to(limit, len(self.generators)) for limit in (low, high))
        drawn = [g.uniform(*ends, shape) for g, *ends in zip(self.generators, *limits, strict=True)]
        return torch.from_numpy(np.array(drawn, dtype=np.float32))

    def normal(self, shape: tuple[int, ...]) -> torch.Tensor:
        """Standard normal numbers, (B, *shape), float32 on the CPU."""
        drawn = [g.standard_normal(shape) for g in self.generators]
        return torch.from_numpy(np.array(drawn, dtype=np.float32))

    def signs(self, shape: tuple[int, ...]) -> torch.Tensor:
        """-1 or 1, (B, *shape), float32 on the CPU."""
        drawn = [g.integers(0, 2, shape) for g in self.generators]
        return torch.from_numpy(2 * np.array(drawn, dtype=np.float32) - 1)

    def integers(self, high: int, count: int) -> np.ndarray:
        """Whole numbers from 0 to ``high`` - 1, (B, count)."""
        return np.array([g.integers(0, high, count) for g in self.generators])

    def in_ball(self, clean: torch.Tensor, budget: torch.Tensor, norm: Norm) -> torch.Tensor:
        """A point of each image's ball, clipped to [0, 1]: uniform, in both norms."""
        shape, limits = tuple(clean.shape[1:]), budget.cpu()
        if norm == "linf":
            delta = self.uniform(-limits.numpy(), limits.numpy(), shape)
        else:
            delta = self.normal(shape)
            share = self.uniform(0, 1, ()) ** (1 / delta[0].numel())
            delta = delta * per_image(limits.to(share) * share / sizes(delta, norm))
        return (clean + delta.to(clean)).clamp(0, 1)
