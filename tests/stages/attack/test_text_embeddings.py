"""Ascent in embedding space, where the best point of the ball is known."""

import pytest
import torch

from stages.attack.embeddings import ascend, nearest_distance, project, random_perturbation, scale

CLEAN = torch.arange(12.0).view(4, 3) / 10
SLOPE = torch.tensor([[1.0, 2.0, -2.0], [0.0, 3.0, 4.0], [5.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
EDITABLE = torch.tensor([True, True, False, True])


def linear(embedded):
    value = (embedded * SLOPE).sum((1, 2))
    return value, value.detach()


def climbed(objective=linear, **changes):
    settings = {"norm": "l2", "steps": 10, "restarts": 3} | changes
    generator = torch.Generator().manual_seed(0)
    return ascend(objective, CLEAN, EDITABLE, 0.5, generator=generator, **settings)


def test_the_best_point_of_each_tokens_ball_is_reached():
    found = climbed()
    expected = 0.5 * SLOPE / SLOPE.norm(dim=-1, keepdim=True) * EDITABLE[:, None]
    torch.testing.assert_close(found.delta, expected)
    # 3, 5 and √3 are the lengths of the slopes.
    gain = 0.5 * (3 + 5 + 3**0.5)
    assert found.margin == pytest.approx(linear(CLEAN[None])[0].item() + gain, rel=1e-5)
    assert found.gradients == 30


def test_the_best_corner_of_each_tokens_cube_is_reached():
    found = climbed(norm="linf")
    expected = 0.5 * SLOPE.sign() * EDITABLE[:, None]
    # Where the slope is 0, any value is as good.
    torch.testing.assert_close(found.delta * (SLOPE != 0), expected)
    # Token 1 has no slope in its first of three elements; a token's gradient was never all zero.
    assert found.zero_gradients == 0


def test_the_best_iterate_is_kept_and_never_worse_than_the_clean_input():
    def spike(embedded):
        """Follows the gradient away from a point that only the clean input is at."""
        away = embedded - CLEAN
        margins = -away.detach().square().sum((1, 2))
        return (away * SLOPE).sum((1, 2)), margins

    found = climbed(spike)
    assert found.margin == 0 and not found.delta.any()


def test_it_ends_where_the_goal_is_reached():
    """A step of 2.5 / 10 of the radius gains a quarter of what all of them do, 4.87."""
    start = linear(CLEAN[None])[0].item()
    whole = climbed(restarts=1)
    assert climbed(restarts=1, goal=start - 1).gradients == 0
    found = climbed(restarts=1, goal=start + 1)
    assert found.gradients == 1
    assert found.margin == pytest.approx(start + 0.25 * (whole.margin - start), rel=1e-4)
    assert climbed(restarts=1, goal=1e6).gradients == 10 == whole.gradients


def test_gradients_that_are_zero_are_counted():
    def masked(embedded):
        value = (embedded * SLOPE)[:, 0].sum(-1)
        return value, value.detach()

    # Of the three editable tokens one has a gradient.
    assert climbed(masked).zero_gradients == pytest.approx(2 / 3)


def test_random_perturbations_spend_the_budget_on_every_token_that_may_change():
    drawn, corner = (
        random_perturbation(CLEAN, EDITABLE, 0.5, norm, torch.Generator().manual_seed(1))
        for norm in ("l2", "linf"))
    torch.testing.assert_close(drawn.norm(dim=-1), torch.tensor([0.5, 0.5, 0.0, 0.5]))
    assert (drawn[0] - drawn[1]).norm() > 0.1
    assert corner.abs().tolist() == [[0.5] * 3, [0.5] * 3, [0.0] * 3, [0.5] * 3]
    assert corner[EDITABLE].unique().tolist() == [-0.5, 0.5]


def test_projection_and_scales_by_hand():
    outside = torch.tensor([[3.0, 4.0], [0.3, 0.4]])
    torch.testing.assert_close(project(outside, 1.0, "l2"), torch.tensor([[0.6, 0.8], [0.3, 0.4]]))
    torch.testing.assert_close(
        project(outside, 1.0, "linf"), torch.tensor([[1.0, 1.0], [0.3, 0.4]]))
    table = torch.tensor([[0.0, 3.0], [4.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    assert scale(table[:3], "l2") == 3.0
    assert scale(table[:2], "linf") == pytest.approx((25 / 4) ** 0.5)
    # Distances 3, 4 and 5; the last two rows are the same point and no neighbours.
    assert nearest_distance(table) == 3.0
