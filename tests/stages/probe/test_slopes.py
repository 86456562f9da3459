"""Slopes of maps of images whose steepest direction is known."""

import pytest
import torch

from stages.attack.image_geometry import Draws
from stages.probe.slopes import jacobian_norms, random_slopes, steepest_slopes

GENERATOR = torch.Generator().manual_seed(0)
MAP = torch.randn(3, 16, generator=GENERATOR)
CLEAN = 0.3 + 0.4 * torch.rand(5, 1, 4, 4, generator=GENERATOR)


def draws(count=5):
    return Draws([(7, i) for i in range(count)])


def linear(images):
    return images.flatten(1) @ MAP.T


def test_the_norm_of_a_linear_map():
    norm = torch.linalg.matrix_norm(MAP, 2).item()
    assert jacobian_norms(linear, CLEAN, draws()).tolist() == pytest.approx([norm] * 5, rel=1e-3)
    found = steepest_slopes(linear, CLEAN, 0.2, steps=40, restarts=2, draws=draws())
    assert (found > 0.97 * norm).all() and (found <= norm * (1 + 1e-4)).all()
    random = random_slopes(linear, CLEAN, 0.2, 32, draws())
    assert (random > 0).all() and (random < found).all()


def test_each_image_has_its_own_jacobian():
    """Squares: the Jacobian at x is MAP times twice the diagonal of x."""

    def squares(images):
        return images.flatten(1).square() @ MAP.T

    exact = [torch.linalg.matrix_norm(MAP * 2 * x.flatten(), 2).item() for x in CLEAN]
    found = jacobian_norms(squares, CLEAN, draws())
    assert found.tolist() == pytest.approx(exact, rel=2e-3)
    assert (found <= torch.tensor(exact) * (1 + 1e-5)).all()  # from below
    part = jacobian_norms(squares, CLEAN[:2], draws(2))
    torch.testing.assert_close(part, found[:2])


def test_steps_stay_in_the_ball_and_among_images():
    seen = []

    def noted(images):
        seen.append(images.detach().clone())
        return linear(images)

    dark = torch.zeros_like(CLEAN)
    steepest_slopes(noted, dark, 0.2, steps=5, restarts=1, draws=draws())
    random_slopes(noted, dark, 0.2, 3, draws())
    images = torch.cat(seen)
    assert images.min() >= 0 and images.flatten(1).norm(dim=1).max() <= 0.2 + 1e-6


def test_a_jump_makes_the_slope_as_steep_as_the_radius_is_small():
    def step(images):
        flat = images.flatten(1)
        return 1e-3 * flat @ MAP.T + (flat[:, :1] > 0.5).float() * torch.eye(3)[0]

    grey = torch.full_like(CLEAN, 0.5)
    slopes = [random_slopes(step, grey, r, 32, draws()).mean().item() for r in (0.1, 0.01)]
    assert slopes == pytest.approx([10.0, 100.0], rel=0.05)
