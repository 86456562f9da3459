"""The ways in which a dense block becomes experts, each against numbers worked out by hand."""

import itertools

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from stages.models import experts, twin
from stages.models.card import ModelCard
from stages.models.dense import DENSE
from stages.models.spec import UpcycleSpec
from stages.models.stage import run
from tests.stages.models.tiny_folders import dense_folder, llama_folder, plain

LLAMA, NEOX = DENSE["llama"], DENSE["gpt_neox"]


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return llama_folder(tmp_path_factory.mktemp("dense"))


def upcycled(dense, folder, **fields):
    folder.mkdir()
    run(UpcycleSpec(**fields), {"dense": dense}, folder)
    return folder


def made(dense, folder, **fields):
    return plain(upcycled(dense, folder, **fields)).state_dict()


def neurons_of(dense_state, state, layer):
    """Which dense neuron each neuron of each expert (E, N) is, found by its gate's row."""
    gate_FD = dense_state[f"model.layers.{layer}.mlp.gate_proj.weight"]
    gate_END = state[f"model.layers.{layer}.mlp.experts.gate_up_proj"].chunk(2, dim=1)[0]
    return (gate_END[:, :, None] == gate_FD).all(dim=-1).float().argmax(dim=-1)


def generator():
    return torch.Generator().manual_seed(0)


# A gated block of 4 neurons on a hidden size of 2, and its halves {0, 3} and {1, 2}.
BLOCK = {
    "gate_proj.weight": torch.tensor([[1.0, 0], [0, 1], [0, 2], [3, 0]]),
    "up_proj.weight": torch.tensor([[1.0, 1], [2, 2], [3, 3], [4, 4]]),
    "down_proj.weight": torch.tensor([[1.0, 2, 3, 4], [5, 6, 7, 8]]),
}


def test_a_part_takes_rows_and_columns_and_scales_the_down_projection():
    part = experts.part(BLOCK, LLAMA, torch.tensor([1, 2]), experts=2)
    assert part["gate_proj.weight"].tolist() == [[0, 1], [0, 2]]
    assert part["up_proj.weight"].tolist() == [[2, 2], [3, 3]]
    assert part["down_proj.weight"].tolist() == [[4, 6], [12, 14]]
    neox = {
        "dense_h_to_4h.weight": BLOCK["gate_proj.weight"],
        "dense_h_to_4h.bias": torch.tensor([1.0, 2, 3, 4]),
        "dense_4h_to_h.weight": BLOCK["down_proj.weight"],
        "dense_4h_to_h.bias": torch.tensor([10.0, 20]),
    }
    part = experts.part(neox, NEOX, torch.tensor([0, 3]), experts=2)
    assert part["dense_h_to_4h.bias"].tolist() == [1, 4]
    assert part["dense_4h_to_h.weight"].tolist() == [[2, 8], [10, 16]]
    assert part["dense_4h_to_h.bias"].tolist() == [10, 20]  # the weights sum to 1


def test_clusters_join_neurons_of_one_direction_and_ignore_their_length():
    rows = torch.cat([BLOCK["gate_proj.weight"]] * 2, dim=1)
    clusters = experts.balanced_clusters(rows, 2, seed=0)
    assert sorted(clusters.tolist()) == [[0, 3], [1, 2]]


def test_clusters_are_of_equal_size_where_plain_k_means_would_not_be():
    # Five rows near one direction and one far off: 3 and 3, with the far one among the nearest.
    angles = torch.tensor([0.0, 0.1, 0.2, 0.3, 0.4, 1.5])
    rows = torch.stack([angles.cos(), angles.sin()], dim=1)
    clusters = experts.balanced_clusters(rows, 2, seed=0)
    assert sorted(clusters.tolist()) == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize(("rows", "clusters"), [(6, 2), (96, 4), (120, 24), (12, 12)])
def test_the_assignment_is_the_cheapest_balanced_one(rows, clusters):
    for seed in range(5):
        cost = np.random.default_rng(seed).normal(size=(rows, clusters))
        cost += np.linspace(0, 3, clusters)  # the first clusters are nearer to all rows
        labels = experts.balanced_assignment(cost)
        assert (np.bincount(labels, minlength=clusters) == rows // clusters).all()
        size = rows // clusters
        row, column = linear_sum_assignment(np.repeat(cost, size, axis=1))
        best = cost[row, column // size].sum()
        assert cost[np.arange(rows), labels].sum() == pytest.approx(best, abs=1e-9)


def test_equal_rows_are_dealt_out_too():
    # In floating point, moving round in a circle would seem to save a little, without end.
    costs = np.random.default_rng(0).normal(size=8)
    labels = experts.balanced_assignment(np.tile(costs, (32, 1)))
    assert np.bincount(labels).tolist() == [4] * 8


def test_clusters_are_a_local_optimum_of_balanced_k_means():
    """No swap of two rows between clusters lowers the sum of squared distances to the centroids,
    and the sum is below that of a random split."""
    rows = torch.randn(24, 6, generator=generator()).double()
    rows /= rows.norm(dim=1, keepdim=True)

    def spread(clusters, centroids=None):
        groups = [rows[list(c)] for c in clusters]
        if centroids is None:
            centroids = [g.mean(dim=0) for g in groups]
        return sum(((g - c) ** 2).sum().item() for g, c in zip(groups, centroids, strict=True))

    clusters = experts.balanced_clusters(rows, 3, seed=1).tolist()
    assert sorted(itertools.chain(*clusters)) == list(range(24))
    centroids = [rows[c].mean(dim=0) for c in clusters]
    best = spread(clusters, centroids)
    for a, b in itertools.combinations(range(3), 2):
        for i, j in itertools.product(range(8), range(8)):
            swapped = [list(c) for c in clusters]
            swapped[a][i], swapped[b][j] = swapped[b][j], swapped[a][i]
            assert spread(swapped, centroids) >= best - 1e-12
    order = torch.randperm(24, generator=generator()).view(3, 8).tolist()
    assert best < 0.9 * spread(order)


@pytest.mark.parametrize("kind", ["random_split", "clustered_split"])
def test_a_split_deals_out_every_neuron_once(dense, tmp_path, kind):
    before = plain(dense).state_dict()
    fields = {"experts": 8, "top_k": 3, "experts_from": kind}
    state = made(dense, tmp_path / "moe", **fields)
    partitions = []
    for layer in range(4):
        neurons = neurons_of(before, state, layer)
        assert neurons.shape == (8, 16)
        assert sorted(neurons.flatten().tolist()) == list(range(128))
        down = state[f"model.layers.{layer}.mlp.experts.down_proj"]
        whole = before[f"model.layers.{layer}.mlp.down_proj.weight"]
        torch.testing.assert_close(down, 3 * whole[:, neurons].transpose(0, 1))
        partitions.append(tuple(neurons.flatten().tolist()))
    assert len(set(partitions)) == 4
    rescaled = made(dense, tmp_path / "rescaled", **fields, rescale=True)
    for name in state:
        factor = 8 / 3 if name.endswith("experts.down_proj") else 1
        torch.testing.assert_close(rescaled[name], factor * state[name])


def test_clustering_beats_dealing_at_random(dense, tmp_path):
    before = plain(dense).state_dict()
    spread = {}
    for kind in ("random_split", "clustered_split"):
        state = made(dense, tmp_path / kind, experts=8, experts_from=kind)
        neurons_EN = neurons_of(before, state, 0)
        rows = torch.cat(
            [before[f"model.layers.0.mlp.{n}_proj.weight"] for n in ("gate", "up")], dim=1
        )
        rows_ENX = torch.nn.functional.normalize(rows)[neurons_EN]
        spread[kind] = rows_ENX.var(dim=1, correction=0).sum().item()
    assert spread["clustered_split"] < 0.97 * spread["random_split"]


def test_a_centroid_router_scores_the_mean_gate_of_an_expert():
    spec = UpcycleSpec(experts=2, top_k=1, experts_from="clustered_split")
    halves = torch.tensor([[0, 3], [1, 2]])
    rows = experts.router_rows(spec, BLOCK, LLAMA, halves, 0.5, generator())
    # Mean gates (2, 0) and (0, 1.5), brought to a tenth of the length 0.5 × sqrt(2) of random rows.
    torch.testing.assert_close(rows, torch.tensor([[0.05 * 2**0.5, 0], [0, 0.05 * 2**0.5]]))
    zero = spec.model_copy(update={"router": "zero"})
    assert not experts.router_rows(zero, BLOCK, LLAMA, halves, 0.5, generator()).any()
    random = UpcycleSpec(experts=64, top_k=1)
    wide = {"down_proj.weight": torch.zeros(256, 4)}
    rows = experts.router_rows(random, wide, LLAMA, None, 0.5, generator())
    assert rows.shape == (64, 256)
    assert rows.std().item() == pytest.approx(0.5, rel=0.02)


def test_a_centroid_router_sends_a_token_to_the_neurons_that_fire(tmp_path):
    """Two groups of neurons, each reading one half of the hidden state: the right one is chosen,
    and one of two experts is the dense function, although half of the neurons are left out."""
    dense = dense_folder(tmp_path / "dense", num_hidden_layers=1)
    model = plain(dense)
    with torch.no_grad():
        mlp = model.model.layers[0].mlp
        first = torch.zeros(128, dtype=torch.bool)
        first[torch.randperm(128, generator=generator())[:64]] = True
        gate = torch.rand(128, 64, generator=generator())
        gate[first, 32:], gate[~first, :32] = 0, 0
        mlp.gate_proj.weight.copy_(gate)
        mlp.up_proj.weight.copy_(gate)
    model.save_pretrained(dense)
    state = made(
        dense, tmp_path / "moe", experts=2, top_k=1, experts_from="clustered_split"
    )
    neurons = neurons_of(plain(dense).state_dict(), state, 0)
    assert first[neurons].float().mean(dim=1).sort().values.tolist() == [0, 1]
    block = plain(tmp_path / "moe").model.layers[0].mlp
    for half in (slice(0, 32), slice(32, 64)):
        x = torch.zeros(1, 1, 64)
        x[..., half] = torch.rand(32, generator=generator())
        torch.testing.assert_close(block(x), mlp(x))


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_neurons_drawn_anew_are_others_in_each_expert_and_keep_mean_and_spread(tmp_path, family):
    dense = dense_folder(tmp_path / "dense", family, num_hidden_layers=2, intermediate_size=512)
    kept = plain(upcycled(dense, tmp_path / "kept", noise=0))
    drawn = plain(upcycled(dense, tmp_path / "drawn", drop=0.25))
    chosen = []
    for old, new in zip(
        experts.expert_weights(kept), experts.expert_weights(drawn), strict=True
    ):
        assert [axis for _, axis in old] == [0, 0, 1]
        changed = set()
        for (before, axis), (after, _) in zip(old, new, strict=True):
            rows_before, rows_after = before, after
            if before.ndim == 2 and axis == 1:
                rows_before, rows_after = before.T, after.T
            if before.ndim == 1:
                rows_before, rows_after = before[:, None], after[:, None]
            differs = (rows_before != rows_after).any(dim=1)
            changed.add(tuple(differs.nonzero().flatten().tolist()))
            gone, come = rows_before[differs], rows_after[differs]
            assert come.std().item() == pytest.approx(gone.std().item(), rel=0.2)
            error = gone.std().item() / come.numel() ** 0.5
            assert come.mean().item() == pytest.approx(gone.mean().item(), abs=4 * error)
        (neurons,) = changed  # the same in all matrices
        assert len(neurons) == 128
        chosen.append(neurons)
    assert len(set(chosen)) == 8  # 2 layers × 4 experts
    bias = [n for n in kept.state_dict() if n.endswith("down_proj_bias")]
    for name in bias:
        assert torch.equal(kept.state_dict()[name], drawn.state_dict()[name])


def test_the_card_states_what_was_drawn_anew(dense, tmp_path):
    notes = ModelCard.read(upcycled(dense, tmp_path / "moe", drop=0.5, seed=3)).notes
    assert notes["drawn_anew"] == "0.5 of the neurons of each copy, seed 3"
    assert "noise" not in notes
    assert notes["logit_difference"] < 1e-5 < 0.1 < notes["logit_difference_of_twin"]


def test_clusters_have_a_router_of_centroids_by_default():
    assert UpcycleSpec().router == UpcycleSpec(experts_from="random_split").router == "random"
    assert UpcycleSpec(experts_from="clustered_split").router == "centroid"
    assert UpcycleSpec(experts_from="clustered_split", router="random").router == "random"


def test_noise_is_added_by_default_to_equal_experts_only():
    assert UpcycleSpec().noise == 0.01
    assert UpcycleSpec(drop=0.5).noise == 0
    assert UpcycleSpec(experts_from="random_split").noise == 0
    assert UpcycleSpec(experts_from="random_split", noise=0.1).noise == 0.1


def test_drawing_anew_by_hand():
    tensor = torch.tensor([[1.0, 9, 9], [3.0, 9, 9]])
    twin.draw_anew([(tensor, 1)], torch.tensor([0]), generator())
    values = torch.randn(2, 1, generator=generator()) * 1.0 + 2.0  # mean 2, deviation 1
    torch.testing.assert_close(tensor, torch.cat([values, torch.full((2, 2), 9.0)], dim=1))


@pytest.mark.parametrize(
    "fields",
    [
        {"drop": 0.5},
        {"experts_from": "random_split"},
        {"experts_from": "clustered_split"},
    ],
)
def test_the_same_seed_gives_the_same_file_and_another_seed_another(dense, tmp_path, fields):
    one, two, other = (
        (upcycled(dense, tmp_path / name, seed=seed, **fields) / "model.safetensors").read_bytes()
        for name, seed in (("one", 5), ("two", 5), ("other", 6))
    )
    assert one == two != other


def test_the_experts_of_a_split_give_their_router_a_gradient(dense, tmp_path):
    model = plain(upcycled(dense, tmp_path / "moe", experts_from="random_split"))
    tokens = torch.arange(3, 103)[None]
    model(tokens, labels=tokens).loss.backward()
    for name, parameter in model.named_parameters():
        if name.endswith("mlp.gate.weight"):
            assert parameter.grad.norm() > 1e-3, name
