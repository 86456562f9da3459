"""V-MoE's auxiliary losses, by hand."""

import math

import pytest
import torch

from stages.models.balance import gshard_loss, importance_loss, load_loss
from stages.models.routing import Routing


def routing(probabilities, k=1, layer="layer"):
    logits = torch.log(torch.tensor(probabilities)).requires_grad_()
    experts = logits.topk(k).indices
    return Routing(layer, logits, experts, torch.ones_like(experts))


UNEVEN = [[0.7, 0.3], [0.9, 0.1]]


def test_importance_is_the_squared_variation_of_summed_probabilities():
    """Sums 1.6 and 0.4: mean 1, standard deviation 0.6."""
    assert importance_loss([routing(UNEVEN)]).item() == pytest.approx(0.36)
    even = routing([[0.7, 0.3], [0.3, 0.7]])
    assert importance_loss([even]).item() == pytest.approx(0, abs=1e-6)


def test_losses_are_summed_over_the_layers():
    """Six equal layers count six times, as in V-MoE's code; what is even adds 0, to GShard's 1."""
    six, even = [routing(UNEVEN)] * 6, routing([[0.7, 0.3], [0.3, 0.7]])
    assert importance_loss(six).item() == pytest.approx(6 * 0.36)
    assert importance_loss([routing(UNEVEN), even]).item() == pytest.approx(0.36)
    assert gshard_loss([routing(UNEVEN), even]).item() == pytest.approx(1.6 + 1)
    noisy = Routing("layer", torch.tensor([[2.0, 1.0]]), torch.tensor([[0]]), torch.ones(1, 1))
    one = load_loss([noisy], {"layer": torch.tensor([[1.5, 1.2]])}, 0.5).item()
    six = load_loss([noisy] * 6, {"layer": torch.tensor([[1.5, 1.2]])}, 0.5).item()
    assert six == pytest.approx(6 * one) and one > 0.1


def test_gshard_is_one_in_balance():
    """Both tokens prefer expert 0, whose mean probability is 0.8: 2 * (1 * 0.8 + 0 * 0.2)."""
    assert gshard_loss([routing(UNEVEN)]).item() == pytest.approx(1.6)
    assert gshard_loss([routing([[0.7, 0.3], [0.3, 0.7]])]).item() == pytest.approx(1)


def test_load_is_the_chance_to_be_chosen_if_the_noise_were_drawn_again():
    """One token: noisy logits 2 and 1, without noise 1.5 and 1.2, deviation 0.5, one expert."""
    noisy = Routing("layer", torch.tensor([[2.0, 1.0]]), torch.tensor([[0]]), torch.ones(1, 1))
    clean = torch.tensor([[1.5, 1.2]], requires_grad=True)

    def above(x):
        return 0.5 * math.erfc(x / math.sqrt(2))

    first, second = above((2.0 - 1.5) / 0.5), above((2.0 - 1.2) / 0.5)
    mean = (first + second) / 2
    expected = ((first - second) / 2 / mean) ** 2
    loss = load_loss([noisy], {"layer": clean}, 0.5)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    loss.backward()
    assert clean.grad.abs().min() > 1e-3


def test_gradients_even_the_experts_out():
    for loss in (importance_loss, gshard_loss):
        found = routing(UNEVEN)
        loss([found]).backward()
        assert (found.logits.grad[:, 0] > 0).all() and (found.logits.grad[:, 1] < 0).all()
