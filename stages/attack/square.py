"""Square attack (arXiv 1912.00049) and random noise: attacks that need no gradient.

Squares may lie anywhere in the image. The authors' code never puts one at the bottom or right edge,
which makes it weaker on small images.
"""

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
    budget: torch.Tensor,
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
        original, limit = clean[open_], budget[open_]
        images = change(best.images[open_], original, limit, length, draws.only(open_))
        images = project(images, original, limit, attack.norm)
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
    budget: torch.Tensor,
    draws: Draws,
) -> Best:
    """The best of random points: corners of the l-infinity ball, clipped to [0, 1]; the surface of
    the l2 ball within [0, 1]."""
    best, shape = Best(clean), tuple(clean.shape[1:])
    for _ in range(attack.queries):
        if attack.norm == "linf":
            signs = draws.signs(shape).to(clean)
            images = (clean + per_image(budget).to(clean) * signs).clamp(0, 1)
        else:
            images = at_distance(clean, draws.normal(shape).to(clean), budget)
        logits = classifier(images)
        best.update(images, Value(margin(logits, labels), logits), labels)
    return best


def _stripes(clean: torch.Tensor, budget: torch.Tensor, draws: Draws) -> torch.Tensor:
    """Vertical stripes of one pixel, each of a random sign per channel."""
    signs = draws.signs((clean.shape[1], 1, clean.shape[3]))
    return clean + per_image(budget).to(clean) * signs.to(clean)


def _linf(
    images: torch.Tensor, clean: torch.Tensor, budget: torch.Tensor, length: int, draws: Draws
) -> torch.Tensor:
    """A square of the perturbation set to plus or minus the budget, per channel."""
    signs = draws.signs((clean.shape[1], 1, 1)).to(clean)
    inside = _window(clean, draws.integers(clean.shape[-1] - length + 1, 2), length)
    return torch.where(inside, clean + per_image(budget).to(clean) * signs, images)


def _window(images: torch.Tensor, corners: np.ndarray, length: int) -> torch.Tensor:
    """Which pixels lie in each image's square, (B, 1, H, W)."""
    place = torch.arange(images.shape[-1], device=images.device)
    row, column = torch.from_numpy(corners).to(images.device).T[..., None]
    rows, columns = ((place >= c) & (place < c + length) for c in (row, column))
    return (rows[:, :, None] & columns[:, None, :])[:, None]


def _tiles(clean: torch.Tensor, budget: torch.Tensor, draws: Draws) -> torch.Tensor:
    """Five by five bumps in the middle, of random signs and directions, of which the l2 norm is the
    budget."""
    length = clean.shape[-1] // 5
    edge = (clean.shape[-1] - 5 * length) // 2
    signs = draws.signs((clean.shape[1], 5, 5)).to(clean)
    turned = draws.integers(2, 25).reshape(-1, 5, 5)
    delta = torch.zeros_like(clean)
    for row in range(5):
        for column in range(5):
            top, left = edge + row * length, edge + column * length
            tiles = _bumps(length, turned[:, row, column]).to(clean)
            delta[:, :, top : top + length, left : left + length] = (
                tiles * signs[:, :, row, column, None, None]
            )
    return clean + delta * per_image(budget.to(delta) / sizes(delta, "l2"))


def _l2(
    images: torch.Tensor, clean: torch.Tensor, budget: torch.Tensor, length: int, draws: Draws
) -> torch.Tensor:
    """One square's mass, and what is left of the budget, moved into a bump in another square."""
    length = max(length, 3)
    length = min(length + 1 - length % 2, clean.shape[-1] - 1 + clean.shape[-1] % 2)
    places = draws.integers(clean.shape[-1] - length + 1, 4)
    into = _window(clean, places[:, :2], length).expand_as(clean)
    out_of = _window(clean, places[:, 2:], length).expand_as(clean)
    delta = images - clean
    either = torch.where(into | out_of, delta, 0)
    left = ((budget**2).to(delta) - sizes(delta, "l2").square()).clamp_min(0) / clean.shape[1]
    available = (either.square().sum((2, 3)) + left[:, None]).sqrt()
    old = torch.where(into, delta, 0)
    placed = torch.zeros_like(clean)
    bumps = _bumps(length, draws.integers(2, 1)[:, 0]).to(clean)
    placed[into] = bumps.expand(-1, clean.shape[1], -1, -1).flatten()
    sign = draws.signs((clean.shape[1], 1, 1)).to(clean)
    new = sign * placed + old / old.flatten(2).norm(dim=2)[..., None, None].clamp_min(1e-12)
    new = new * (available / new.flatten(2).norm(dim=2).clamp_min(1e-12))[..., None, None]
    return clean + torch.where(into, new, torch.where(out_of, 0, delta))


def _bumps(length: int, turned: np.ndarray) -> torch.Tensor:
    """The bump of each image, (B, 1, length, length): transposed where it is ``turned`` (B,)."""
    one = _bump(length)
    turns = torch.from_numpy(turned)[:, None, None, None].bool()
    return torch.where(turns, one.T, one)


def _bump(length: int) -> torch.Tensor:
    """What a square gets in the l2 norm: two halves, one above the other, of opposite sign, each of
    which falls off from one pixel in its middle; (length, length), of l2 norm 1."""
    half = length // 2
    halves = torch.cat([_hill(half, length), -_hill(length - half, length)])
    return halves / halves.norm()


def _hill(height: int, width: int) -> torch.Tensor:
    """At d steps (the larger of rows and columns) from the middle, the sum of 1 / k² for k from
    d + 1 to half the longer side and one; (height, width), of l2 norm 1."""
    rows = (torch.arange(height) - height // 2).abs()
    columns = (torch.arange(width) - width // 2).abs()
    longest = max(height, width) // 2 + 1
    sums = (1 / torch.arange(longest, 0, -1) ** 2).cumsum(0).flip(0)
    hill = sums[torch.maximum(rows[:, None], columns[None, :])]
    return hill / hill.norm()
