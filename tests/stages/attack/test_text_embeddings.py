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
    """Nearly: steps along the rim shorten as they come near it."""
    found = climbed()
    expected = 0.5 * SLOPE / SLOPE.norm(dim=-1, keepdim=True) * EDITABLE[:, None]
    assert (found.delta - expected).norm(dim=-1).max() < 0.2 * 0.5
    assert found.delta.norm(dim=-1).tolist() == pytest.approx([0.5, 0.5, 0.0, 0.5])
    # 3, 5 and √3 are the lengths of the slopes.
    gain = 0.5 * (3 + 5 + 3**0.5)
    assert found.margin == pytest.approx(linear(CLEAN[None])[0].item() + gain, abs=0.01 * gain)
    assert found.gradients == 30


def test_the_best_corner_of_each_tokens_cube_is_reached():
    found = climbed(norm="linf")
    expected = 0.5 * SLOPE.sign() * EDITABLE[:, None]
    # Where the slope is 0, any value is as good.
    torch.testing.assert_close(found.delta * (SLOPE != 0), expected)
    # Token 1 has no slope in its first of three elements; a token's gradient was never all zero.
    assert found.zero_gradients == 0


def seen_by(objective, **changes):
    """What is found, and the inputs (B, n, D) that were looked at on the way."""
    seen = []

    def watched(embedded):
        seen.append(embedded.detach().clone())
        return objective(embedded)

    return climbed(watched, **changes), seen


def test_a_start_without_an_answer_is_not_the_best():
    """The second of three says nothing anywhere; the others are climbed as without it."""
    def silent(embedded):
        value, margins = linear(embedded)
        return value, torch.where(torch.arange(3) == 1, torch.nan, margins)

    found, whole = climbed(silent), climbed()
    assert found.margin == pytest.approx(whole.margin, rel=1e-2) and found.delta.norm() > 0.8


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_every_restart_starts_at_a_random_point_of_the_balls(norm):
    for restarts in (1, 400):
        _, seen = seen_by(linear, norm=norm, restarts=restarts)
        delta = seen[0] - CLEAN
        assert delta.shape[0] == restarts and not delta[:, ~EDITABLE].any()
        assert (delta[:, EDITABLE].abs().sum(-1) > 1e-3).all()
        sizes = delta[:, EDITABLE].norm(dim=-1) if norm == "l2" else delta[:, EDITABLE].abs()
        assert sizes.max() <= 0.5 + 1e-6
    # Evenly: half of a ball's points lie beyond 0.5^(1/3) of its radius, half of a cube's elements
    # beyond half of it.
    middle = 0.5 * (0.5 ** (1 / 3) if norm == "l2" else 0.5)
    assert (sizes > middle).float().mean().item() == pytest.approx(0.5, abs=0.05)


def test_the_best_iterate_is_kept():
    def spike(embedded):
        """Follows the gradient, and counts what is near the clean input."""
        away = embedded - CLEAN
        return (away * SLOPE).sum((1, 2)), -away.detach().square().sum((1, 2))

    found, seen = seen_by(spike)
    every = torch.cat(seen)
    best = spike(every)[1].argmax()
    assert found.margin == spike(every)[1][best].item()
    assert torch.equal(CLEAN + found.delta, every[best])


def test_it_ends_where_the_goal_is_reached():
    whole, seen = seen_by(linear, restarts=1)
    margins = [linear(each)[1].item() for each in seen]
    assert whole.gradients == 10 and len(margins) == 11
    assert climbed(restarts=1, goal=margins[0] - 0.1).gradients == 0
    found = climbed(restarts=1, goal=margins[2])
    # Each step gains on this objective, so that the third is the first beyond.
    assert margins[:4] == sorted(margins[:4]) and found.gradients == 3
    assert found.margin == margins[3]
    assert climbed(restarts=1, goal=1e6).gradients == 10


def test_a_gradient_that_squares_to_zero_is_followed():
    def tiny(embedded):
        value = 1e-30 * (embedded * SLOPE).sum((1, 2))
        return value, linear(embedded)[1]

    found = climbed(tiny)
    torch.testing.assert_close(found.delta, climbed().delta, rtol=0, atol=1e-4)
    assert found.zero_gradients == 0


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
