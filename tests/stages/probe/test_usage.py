import torch

from stages.models.routing import Routing
from stages.probe.usage import highest, pruned, risk_difference, usage

LAYERS = ["a", "b"]


def routing(layer, experts, weights=None):
    experts = torch.tensor(experts)
    weights = torch.ones(experts.shape) if weights is None else torch.tensor(weights)
    return Routing(layer, torch.zeros(len(experts), 3), experts, weights)


def test_usage_is_the_share_of_the_tokens():
    found = usage([routing("a", [[0, 1], [0, 2]]),
                   routing("b", [[1, 2], [1, 2]], [[1.0, 0.0], [1.0, 1.0]])])
    assert found.tolist() == [[1.0, 0.5, 0.5], [0.0, 1.0, 0.5]]


def test_risk_difference_weighs_every_input_alike():
    refused = torch.tensor([[[1.0, 0.0]], [[0.5, 0.0]]])
    complied = torch.tensor([[[0.25, 1.0]]])
    assert risk_difference(refused, complied).tolist() == [[0.5, -1.0]]


def test_which_experts_are_taken_out():
    used = torch.tensor([[0.9, 0.1, 0.5], [0.2, 0.3, 0.8]])
    assert pruned(used, LAYERS, 1, "most_used", 0) == {"a": [0], "b": [2]}
    assert {k: set(v) for k, v in pruned(used, LAYERS, 2, "least_used", 0).items()} == {
        "a": {1, 2}, "b": {0, 1}}
    drawn = pruned(used, LAYERS, 2, "random", 0)
    assert drawn == pruned(used, LAYERS, 2, "random", 0)
    assert all(len(set(gone)) == 2 for gone in drawn.values())


def test_the_highest_of_all_layers_leave_each_layer_enough():
    score = torch.tensor([[0.9, 0.8, 0.7], [0.1, 0.6, 0.0]])
    assert highest(score, LAYERS, 2, spare=1) == {"a": [0, 1], "b": []}
    assert highest(score, LAYERS, 3, spare=1) == {"a": [0, 1], "b": [1]}
    assert highest(score, LAYERS, 99, spare=2) == {"a": [0], "b": [1]}
