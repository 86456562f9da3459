"""Routing change by hand: the cases of the published code, and chance."""

import itertools
import math
from dataclasses import replace

import pytest
import torch

from stages.models.routing import Routing
from stages.probe.change import (
    chance,
    choice_changes,
    overlap,
    routing_change,
    routing_changes,
)


def sets(*members, experts=4):
    rows = torch.zeros(len(members), experts, dtype=torch.bool)
    for row, chosen in zip(rows, members, strict=True):
        row[list(chosen)] = True
    return rows


def test_overlap_of_sets():
    before = sets({2, 3}, {0, 1, 2}, {1, 2}, {0, 1, 2, 3}, {}, {})
    after = sets({2, 3}, {0, 1, 2, 3}, {1}, {0}, {}, {})
    assert overlap(before, after, published=True).tolist() == [1, 0.75, 0.5, 0.25, 0, 0]
    found = overlap(before, after)
    assert found[:4].tolist() == [1, 0.75, 0.5, 0.25] and found[4:].isnan().all()


def test_sums_over_images_are_those_of_the_published_code():
    """Three images of two tokens with two experts, the last one masked or not."""
    before = sets({0}, {0, 1}, {}, {0, 1}, {1}, {1}, experts=2)
    after = sets({0}, {1}, {}, {0}, {1}, {1}, experts=2)
    each = overlap(before, after, published=True).view(3, 2).mean(1)
    assert each.tolist() == [0.75, 0.25, 1] and (each[:2].sum(), each.sum()) == (1, 2)
    # Left out of the mean, the token without experts is no change.
    assert overlap(before, after).view(3, 2).nanmean(1).tolist() == [0.75, 0.5, 1]


def routing(experts, weights=None, layer="x"):
    experts = torch.tensor(experts)
    weights = torch.ones(experts.shape) if weights is None else torch.tensor(weights)
    return Routing(layer, torch.zeros(len(experts), 4), experts, weights)


def test_one_of_two_experts_swapped_is_two_thirds():
    before = routing([[0, 1], [0, 1], [0, 1]])
    after = routing([[1, 0], [1, 2], [2, 3]])
    assert routing_change([before], [after])["x"] == pytest.approx((0 + 2 / 3 + 1) / 3)
    places = torch.tensor([0, 2]), torch.tensor([0, 1])
    assert routing_change([before], [after], places)["x"] == pytest.approx((0 + 2 / 3) / 2)
    # An expert without weight adds nothing and is not selected.
    dropped = routing([[0, 1]] * 3, [[1.0, 0.0]] * 3)
    assert routing_change([before], [dropped])["x"] == pytest.approx(0.5)


def test_each_input_of_a_batch_has_its_own_change():
    before = [routing([[0, 1]] * 4, layer="a"), routing([[0, 1]] * 4, layer="b")]
    after = [routing([[0, 1], [1, 2], [2, 3], [2, 3]], layer="a"),
             routing([[0, 1]] * 4, [[1.0, 1.0], [0.0, 0.0], [1.0, 0.0], [1.0, 1.0]], layer="b")]
    first, second = routing_changes(before, after, 2)
    assert first == pytest.approx({"a": (0 + 2 / 3) / 2, "b": (0 + 1) / 2})
    assert second == pytest.approx({"a": 1, "b": (1 / 2 + 0) / 2})
    assert routing_changes([], [], 2) == [{}, {}]


def test_what_else_is_told_of_a_choice():
    before = [routing([[0, 1]] * 4, [[0.6, 0.4]] * 4)]
    after = [routing([[1, 0], [0, 2], [2, 3], [2, 3]],
                     [[0.6, 0.4], [0.6, 0.4], [0.6, 0.4], [0.0, 0.0]])]  # fmt: skip
    (found,) = choice_changes(before, after)
    # The same two in the other order; one of two; none; none at all. Used 4, 4, 0 and 0 times, and
    # afterwards 2, 1, 2 and 1 times.
    assert found == pytest.approx({
        "experts_first_changed": 3 / 4, "experts_kept": (1 + 1 / 2) / 4, "experts_none": 0,
        "experts_dropped": 2 / 8, "experts_kl": 0,
        "experts_usage_tv": (1 / 6 + 1 / 3 + 1 / 3 + 1 / 6) / 2,
        "experts_load_cv2": 0.25 / 1.5**2 - 1,
    })  # fmt: skip
    half = (1 / 2, 3 / 4, 0)
    # A token that no expert takes either time is left out and counted.
    none = [routing([[0, 1]] * 4, [[0.6, 0.4]] * 3 + [[0.0, 0.0]])]
    first, second = (tuple(each.values())[:3] for each in choice_changes(none, after, 2))
    assert first == pytest.approx(half) and second == pytest.approx((1, 0, 1 / 2))
    places = torch.tensor([0, 2]), torch.tensor([0, 1])
    (moved,) = choice_changes(before, after, pairs=places)
    assert tuple(moved.values())[:3] == pytest.approx(half)
    assert choice_changes([], [], 2) == [{}, {}]


def test_divergence_of_the_routers_probabilities():
    """(1/2, 1/2) and (1/4, 3/4) over the experts that a token may be given to."""
    one, other = routing([[0, 1]]), routing([[0, 1]])
    inf = -torch.inf
    one = replace(one, logits=torch.tensor([[0.0, 0.0, inf, inf]]))
    other = replace(other, logits=torch.tensor([[0.0, math.log(3), inf, inf]]))
    (found,) = choice_changes([one], [other])
    assert found["experts_kl"] == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))


@pytest.mark.parametrize(
    ("experts", "chosen", "expected"),
    [(8, 1, 0.875), (8, 2, 0.821), (16, 2, 0.914), (32, 1, 0.969), (32, 2, 0.958),
     (60, 4, 0.961), (64, 8, 0.930), (128, 8, 0.966)],
)
def test_chance(experts, chosen, expected):
    assert chance(experts, chosen) == pytest.approx(expected, abs=6e-4)


def test_chance_is_met_by_drawing():
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.rand(20_000, 8, generator=generator).topk(2).indices for _ in range(2))
    before, after = (torch.zeros(20_000, 8, dtype=torch.bool).scatter(1, chosen, True)
                     for chosen in (first, second))
    met = overlap(before, after).mean().item()
    assert 1 - chance(8, 2) == pytest.approx(0.1786, abs=5e-5)
    assert met == pytest.approx(0.1786, abs=0.006)  # three standard errors


def test_chance_is_the_mean_over_all_pairs_of_sets():
    every = [set(c) for c in itertools.combinations(range(6), 4)]
    mean = sum(1 - len(a & b) / len(a | b) for a in every for b in every) / len(every) ** 2
    assert chance(6, 4) == pytest.approx(mean)
