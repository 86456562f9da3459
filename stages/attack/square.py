"""Square attack (arXiv 1912.00049) and random noise: attacks that need no gradient."""

from collections.abc import Callable

import numpy as np
import torch

from stages.attack.image_geometry import Draws, at_distance, per_image, project, sizes
from stages.attack.image_losses import margin
from stages.attack.image_objective import Best, Value
from stages.attack.image_spec import Noise, Square

HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
"""After these queries of 10,000 the squares' share of the image is halved."""

Logits = Callable[[torch.Tensor], torch.Tensor]


def share(query: int, queries: int, initial: float) -> float:
    """The share of the pixels that a square covers at a query, counted from 0."""
    place = int(query / queries * 10_000)
    return initial / 2 ** sum(place > threshold for threshold in HALVINGS)


def side(part: float, height: int) -> int:
    """The side of a square that covers a share of an image of that height."""
    return min(max(round((part * height * height) ** 0.5), 1), max(height - 1, 1))


@torch.no_grad()
def square(
    classifier: Logits,
    attack: Square,
    clean: torch.Tensor,
    labels: torch.Tensor,
    budget: float,
    draws: Draws,
) -> tuple[Best, torch.Tensor]:
    """The best images found, and the queries (B,) that each example took.

    Images (B, C, H, W) in [0, 1], H = W. An example that is misclassified is left alone.
    """
    best = Best(clean)
    queries = torch.zeros(len(clean), dtype=torch.long, device=clean.device)
    start = _stripes if attack.norm == "linf" else _tiles
    images = project(start(clean, budget, draws), clean, budget, attack.norm)
    logits = classifier(images)
    queries += 1
    best.update(images, Value(margin(logits, labels), logits), labels)
    change = _linf if attack.norm == "linf" else _l2
    for query in range(1, attack.queries):
        open_ = ~best.wrong
        if not open_.any():
            break
        length = side(share(query, attack.queries, attack.initial_share), clean.shape[-1])
        original = clean[open_]
        images = change(best.images[open_], original, budget, length, draws.only(open_))
        images = project(images, original, budget, attack.norm)
        logits = classifier(images)
        queries += open_
        best.update(images, Value(margin(logits, labels[open_]), logits), labels, open_)
    return best, queries


@torch.no_grad()
def noise(
    classifier: Logits,
    attack: Noise,
    clean: torch.Tensor,
    labels: torch.Tensor,
    budget: float,
    draws: Draws,
) -> Best:
    """The best of random points: corners of the l-infinity ball, clipped to [0, 1]; the surface of
    the l2 ball within [0, 1]."""
    best, shape = Best(clean), tuple(clean.shape[1:])
    for _ in range(attack.queries):
        if attack.norm == "linf":
            images = (clean + budget * draws.signs(shape).to(clean)).clamp(0, 1)
        else:
            images = at_distance(clean, draws.normal(shape).to(clean), budget)
        logits = classifier(images)
        best.update(images, Value(margin(logits, labels), logits), labels)
    return best


def _stripes(clean: torch.Tensor, budget: float, draws: Draws) -> torch.Tensor:
    """Vertical stripes of one pixel, each of a random sign per channel."""
    signs = draws.signs((clean.shape[1], 1, clean.shape[3]))
    return clean + budget * signs.to(clean)


def _linf(
    images: torch.Tensor, clean: torch.Tensor, budget: float, length: int, draws: Draws
) -> torch.Tensor:
    """A square of the perturbation set to plus or minus the budget, per channel."""
    signs = draws.signs((clean.shape[1], 1, 1)).to(clean)
    inside = _window(clean, draws.integers(clean.shape[-1] - length + 1, 2), length)
    return torch.where(inside, clean + budget * signs, images)


def _window(images: torch.Tensor, corners: np.ndarray, length: int) -> torch.Tensor:
    """Which pixels lie in each image's square, (B, 1, H, W)."""
    place = torch.arange(images.shape[-1], device=images.device)
    row, column = torch.from_numpy(corners).to(images.device).T[..., None]
    rows, columns = ((place >= c) & (place < c + length) for c in (row, column))
    return (rows[:, :, None] & columns[:, None, :])[:, None]


def _tiles(clean: torch.Tensor, budget: float, draws: Draws) -> torch.Tensor:
    """A grid of bumps of random signs, of which the l2 norm is the budget."""
    length = max(clean.shape[-1] // 5, 2)
    count = clean.shape[-1] // length
    signs = draws.signs((clean.shape[1], count, count)).to(clean)
    delta = torch.zeros_like(clean)
    tile = _bump(length).to(clean)
    for row in range(count):
        for column in range(count):
            top, left = row * length, column * length
            delta[:, :, top : top + length, left : left + length] = (
                tile * signs[:, :, row, column, None, None]
            )
    return clean + delta * per_image(budget / sizes(delta, "l2"))


def _l2(
    images: torch.Tensor, clean: torch.Tensor, budget: float, length: int, draws: Draws
) -> torch.Tensor:
    """One square's mass, and what is left of the budget, moved into a bump in another square."""
    length = max(length, 3)
    length = min(length + 1 - length % 2, clean.shape[-1] - 1 + clean.shape[-1] % 2)
    places = draws.integers(clean.shape[-1] - length + 1, 4)
    into = _window(clean, places[:, :2], length).expand_as(clean)
    out_of = _window(clean, places[:, 2:], length).expand_as(clean)
    delta = images - clean
    either = torch.where(into | out_of, delta, 0)
    left = (budget**2 - sizes(delta, "l2").square()).clamp_min(0) / clean.shape[1]
    available = (either.square().sum((2, 3)) + left[:, None]).sqrt()
    old = torch.where(into, delta, 0)
    bump = torch.zeros_like(clean)
    bump[into] = _bump(length).to(clean).expand(*clean.shape[:2], -1, -1).flatten()
    sign = draws.signs((clean.shape[1], 1, 1)).to(clean)
    new = sign * bump + old / old.flatten(2).norm(dim=2)[..., None, None].clamp_min(1e-12)
    new = new * (available / new.flatten(2).norm(dim=2).clamp_min(1e-12))[..., None, None]
    return clean + torch.where(into, new, torch.where(out_of, 0, delta))


def _bump(length: int) -> torch.Tensor:
    """Two halves of opposite sign, each highest in its middle, (length, length), of l2 norm 1."""
    half = length // 2
    bump = torch.cat([_hill(half, length), -_hill(length - half, length)])
    return bump / bump.norm()


def _hill(height: int, width: int) -> torch.Tensor:
    """Concentric rectangles, the inner ones higher: the sum of 1 / k² from the rim inwards."""
    rows = torch.minimum(torch.arange(height), torch.arange(height).flip(0))
    columns = torch.minimum(torch.arange(width), torch.arange(width).flip(0))
    inner = int(torch.minimum(rows.max(), columns.max())) + 1
    ring = torch.minimum(rows[:, None], columns[None, :])
    steps = torch.tensor([1 / (inner - k) ** 2 for k in range(inner)]).cumsum(0)
    return steps[ring]
