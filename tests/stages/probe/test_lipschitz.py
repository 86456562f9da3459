"""Slopes of a map whose steepest direction is known."""

import pytest
import torch

from stages.probe.lipschitz import jacobian_norm, random_slope, steepest

MAP = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
CLEAN = torch.randn(4, 2, generator=torch.Generator().manual_seed(1))
EVERY = torch.ones(4, dtype=torch.bool)


def linear(embedded):
    return embedded.flatten(1) @ MAP.T


def test_the_norm_of_a_linear_map():
    norm = torch.linalg.matrix_norm(MAP, 2).item()
    assert jacobian_norm(linear, CLEAN, EVERY) == pytest.approx(norm, rel=1e-5)
    part = torch.tensor([True, False, True, False])
    expected = torch.linalg.matrix_norm(MAP.view(3, 4, 2)[:, part].flatten(1), 2).item()
    assert jacobian_norm(linear, CLEAN, part) == pytest.approx(expected, rel=1e-5)
    found = steepest(linear, CLEAN, EVERY, 0.5, steps=100, restarts=8,
                     generator=torch.Generator().manual_seed(0))
    # Each token's part of the direction has the same length at most, so it comes close.
    assert 0.85 * norm < found <= norm * (1 + 1e-4)
    random = random_slope(linear, CLEAN, EVERY, 0.5, 64, torch.Generator().manual_seed(0))
    assert 0 < random < found


def test_a_jump_makes_the_slope_as_steep_as_the_radius_is_small():
    def step(embedded):
        flat = embedded.flatten(1)
        return 1e-3 * flat @ MAP.T + (flat[:, :1] > CLEAN[0, 0]).float() * torch.eye(3)[0]

    slopes = [random_slope(step, CLEAN, EVERY, r, 64, torch.Generator().manual_seed(0))
              for r in (0.1, 0.01)]
    # Four tokens, each displaced by the radius: the jump of 1 over 2 r.
    assert slopes == pytest.approx([5.0, 50.0], rel=0.05)
