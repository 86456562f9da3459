"""The perturbation starts, climbs and is held as FreeLB's algorithm says, sequence by sequence."""

import pytest
import torch

from stages.finetune.freelb import climb, norms, start
from stages.finetune.recipe import FreeLB

SEQUENCES = torch.tensor([0, 0, 1])


def test_it_starts_within_the_bound_of_each_sequence():
    torch.manual_seed(0)
    delta = start(torch.zeros(1, 3, 50), SEQUENCES, FreeLB(initial=0.5))
    first, second = delta[0, :2], delta[0, 2]
    assert first.abs().max() <= 0.5 / 100**0.5 and second.abs().max() <= 0.5 / 50**0.5
    assert second.abs().max() > 0.5 / 100**0.5  # a shorter sequence has a wider bound
    assert delta.requires_grad and delta.is_leaf


def test_one_step_worked_by_hand():
    delta = torch.zeros(1, 3, 1, requires_grad=True)
    delta.grad = torch.tensor([[[3.0], [4.0], [-2.0]]])  # norms 5 and 2
    moved = climb(delta, SEQUENCES, FreeLB(learning_rate=1.0))
    assert moved.flatten().tolist() == pytest.approx([0.6, 0.8, -1.0])
    held = climb(delta, SEQUENCES, FreeLB(learning_rate=1.0, max_norm=0.5))
    assert held.flatten().tolist() == pytest.approx([0.3, 0.4, -0.5])
    assert norms(held, SEQUENCES).tolist() == pytest.approx([0.5, 0.5])


def test_a_sequence_without_a_gradient_stays():
    delta = torch.full((1, 3, 1), 0.25, requires_grad=True)
    delta.grad = torch.tensor([[[0.0], [0.0], [1.0]]])
    moved = climb(delta, SEQUENCES, FreeLB(learning_rate=0.5))
    assert moved.flatten().tolist() == pytest.approx([0.25, 0.25, 0.75])
