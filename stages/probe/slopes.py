"""How steep a classifier is around each of several images: lower bounds of its local Lipschitz
constant, of l2 norms, as ``lipschitz.py`` has them for the tokens of one text.

Shape letters: B images, C channels, H and W their size.
"""

from collections.abc import Callable

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from stages.attack.image_geometry import Draws, per_image, same, sizes
from stages.attack.image_objective import Value
from stages.attack.image_spec import PGD
from stages.attack.pgd import pgd

Function = Callable[[torch.Tensor], torch.Tensor]
"""Images (B, C, H, W) to outputs (B, labels), each image's from that image alone."""
TOLERANCE = 1e-4
"""Power iteration ends for an image whose norm has risen by a smaller share."""
MOST_ITERATIONS = 100


class Slope:
    """‖f(x + d) - f(x)‖ / ‖d‖ around images, as what an attack climbs."""

    def __init__(self, function: Function, clean: torch.Tensor):
        self.function, self.clean = function, clean
        with torch.no_grad():
            self.here = function(clean)
        # No image counts as misclassified, so that the best iterate is the steepest.
        self.labels = torch.zeros(len(clean), dtype=torch.long, device=clean.device)
        self.nothing = clean.new_zeros(len(clean), 2)

    def __call__(self, images: torch.Tensor) -> Value:
        """The slopes from the clean images to others."""
        rise = (self.function(images) - self.here).norm(dim=1)
        return Value(rise / sizes(images - self.clean, "l2"), self.nothing)

    def climb(self, images: torch.Tensor) -> tuple[Value, torch.Tensor]:
        """The slopes, and their gradients (B, C, H, W)."""
        images = images.detach().requires_grad_()
        value = self(images)
        (gradient,) = torch.autograd.grad(value.loss.sum(), images)
        return Value(value.loss.detach(), value.logits), gradient


def steepest_slopes(
    function: Function,
    clean: torch.Tensor,
    radius: float,
    *,
    steps: int,
    restarts: int,
    draws: Draws,
) -> torch.Tensor:
    """The largest slopes (B,) that projected gradient ascent finds within the l2 ball."""
    attack = PGD(norm="l2", steps=steps, restarts=restarts)
    return pgd(Slope(function, clean), attack, clean, same(radius, clean), draws).loss


@torch.no_grad()
def random_slopes(
    function: Function, clean: torch.Tensor, radius: float, samples: int, draws: Draws
) -> torch.Tensor:
    """The largest slopes (B,) to random points of the ball's surface, clipped to [0, 1]."""
    slope = Slope(function, clean)
    found = clean.new_zeros(len(clean))
    for _ in range(samples):
        delta = draws.normal(tuple(clean.shape[1:]))
        delta = delta * per_image(radius / sizes(delta, "l2"))
        found = torch.maximum(found, slope((clean + delta.to(clean)).clamp(0, 1)).loss)
    return found


def jacobian_norms(function: Function, clean: torch.Tensor, draws: Draws) -> torch.Tensor:
    """The spectral norms (B,) of the Jacobians at the images, by power iteration from below."""
    images = clean.clone().requires_grad_()
    # The fused attention of PyTorch has no second derivative.
    with sdpa_kernel(SDPBackend.MATH):
        outputs = function(images)
        rows = draws.normal(tuple(outputs.shape[1:])).to(outputs).requires_grad_()
        (back,) = torch.autograd.grad(outputs, images, rows, create_graph=True)
        norms = clean.new_zeros(len(clean))
        left = torch.ones_like(norms, dtype=torch.bool)
        unit = rows.detach() / rows.detach().norm(dim=1, keepdim=True)
        for _ in range(MOST_ITERATIONS):
            # u J, then its image under J: ``back`` is linear in ``rows``.
            (pulled,) = torch.autograd.grad(outputs, images, unit, retain_graph=True)
            (pushed,) = torch.autograd.grad(back, rows, pulled, retain_graph=True)
            found = sizes(pulled, "l2")
            grown = found > norms * (1 + TOLERANCE)
            norms = torch.where(left, torch.maximum(norms, found), norms)
            left &= grown
            if not left.any():
                break
            unit = pushed / pushed.norm(dim=1, keepdim=True)
    return norms
