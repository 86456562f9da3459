"""The router's part in the Jacobian of a mixture of affine experts, against differences."""

import pytest
import torch

from stages.models.routing import Routing
from stages.probe.geometry import Watched, differences, routing_jacobian

E, D, M = 5, 12, 7
GENERATOR = torch.Generator().manual_seed(2)


def drawn(*shape):
    return torch.randn(shape, generator=GENERATOR, dtype=torch.float64)


MAPS, SHIFTS, SCORERS, POINT = drawn(E, M, D), drawn(E, M), drawn(E, D), drawn(D)
CHOSEN = (SCORERS @ POINT).argsort(descending=True)


def expert(hidden, numbers):
    return (MAPS[numbers] @ hidden[..., None])[..., 0] + SHIFTS[numbers]


def mixture(x, chosen, normalised):
    """The output (M,) and the weights at a point, the choice kept."""
    logits = SCORERS @ x
    weights = logits[chosen].softmax(-1) if normalised else logits.softmax(-1)[chosen]
    outputs = MAPS[chosen] @ x + SHIFTS[chosen]
    return weights @ outputs, weights, outputs


def central_differences(chosen, normalised, step=1e-6):
    columns = []
    for direction in torch.eye(D, dtype=torch.float64):
        ahead, behind = (mixture(POINT + s * direction, chosen, normalised)[0]
                         for s in (step, -step))
        columns.append((ahead - behind) / (2 * step))
    return torch.stack(columns, dim=1)


def pairs(weights, outputs, chosen, probabilities, normalised):
    """The routing part by pairs of experts: of those chosen, and of a chosen and another one."""
    found = torch.zeros(M, D, dtype=torch.float64)
    for i, a in enumerate(chosen.tolist()):
        for j, b in enumerate(chosen.tolist()[:i]):
            difference = outputs[i] - outputs[j]
            found += weights[i] * weights[j] * torch.outer(difference, SCORERS[a] - SCORERS[b])
        if not normalised:
            for b in set(range(E)) - set(chosen.tolist()):
                found += weights[i] * probabilities[b] * torch.outer(
                    outputs[i], SCORERS[a] - SCORERS[b])
    return found


@pytest.mark.parametrize(
    ("count", "normalised"), [(E, True), (2, True), (2, False), (3, False), (1, False)])
def test_the_jacobian_is_the_experts_part_and_the_routers(count, normalised):
    chosen = CHOSEN[:count]
    _, weights, outputs = mixture(POINT, chosen, normalised)
    whole = central_differences(chosen, normalised)
    experts = (weights[:, None, None] * MAPS[chosen]).sum(0)
    probabilities = (SCORERS @ POINT).softmax(-1)
    routing = pairs(weights, outputs, chosen, probabilities, normalised)
    torch.testing.assert_close(whole, experts + routing, rtol=0, atol=2e-8)
    watched = Watched(
        Routing("x", (SCORERS @ POINT)[None], chosen[None], weights[None]),
        POINT[None], SCORERS.float(), expert)
    found = routing_jacobian(watched).item()
    assert found == pytest.approx(torch.linalg.matrix_norm(routing, 2).item(), rel=1e-4)
    if normalised:  # the bound by pairs holds, and is met where there is one pair
        bound = sum(
            weights[i] * weights[j] * (outputs[i] - outputs[j]).norm()
            * (SCORERS[chosen[i]] - SCORERS[chosen[j]]).norm()
            for i in range(count) for j in range(i))
        slopes = sum(w * torch.linalg.matrix_norm(MAPS[c], 2)
                     for w, c in zip(weights, chosen, strict=True))
        assert torch.linalg.matrix_norm(whole, 2) <= slopes + bound
        assert found <= bound * (1 + 1e-4)
    if (count, normalised) == (2, True):
        term = differences(watched, torch.Generator())["routing_term"].item()
        assert term == pytest.approx(found, rel=1e-4)


@pytest.mark.parametrize(
    ("margin", "slope"), [(0, 0.25), (1, 0.1966), (2, 0.1050), (4, 0.0177), (8, 0.0003)])
def test_the_routers_part_falls_with_the_margin(margin, slope):
    """Two experts a unit apart, rows of the router a unit apart: the slope of the sigmoid."""
    scorers = torch.tensor([[1.0, 0.0], [0.0, 0.0]])

    def apart(hidden, numbers):
        return numbers[:, None].float() + hidden.new_zeros(len(hidden), 1)

    logits = torch.tensor([[float(margin), 0.0]])
    watched = Watched(Routing("x", logits, torch.tensor([[0, 1]]), logits.softmax(-1)),
                      torch.tensor([[float(margin), 0.0]]), scorers, apart)
    assert routing_jacobian(watched).item() == pytest.approx(slope, abs=5e-5)
    found = differences(watched, torch.Generator())
    assert found["routing_term"].item() == pytest.approx(slope, abs=5e-5)


def test_weights_of_another_rule_have_no_such_number():
    watched = Watched(
        Routing("x", (SCORERS @ POINT)[None].float(), CHOSEN[None, :2], torch.tensor([[0.9, 0.9]])),
        POINT[None], SCORERS.float(), expert)
    assert routing_jacobian(watched).isnan().all()
