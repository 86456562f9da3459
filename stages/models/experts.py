"""How the feed-forward block of a dense layer becomes experts: copied or split, and told apart.

A split keeps the sum: with all experts chosen and even weights 1/E, experts whose down-projection
is multiplied by E add up to the dense block. Choosing K of them leaves out the others' neurons.
"""

import numpy as np
import torch
from scipy.sparse.csgraph import bellman_ford, csgraph_from_dense
from sklearn.cluster import kmeans_plusplus
from transformers import PreTrainedModel

from stages.models.dense import Dense
from stages.models.families import family
from stages.models.spec import UpcycleSpec

# Shape letters: E experts, F neurons of the dense block, N of an expert, D hidden size.

ROUNDS = 20
"""Most rounds of balanced k-means; it mostly converges before."""
CENTROID_LENGTH = 0.1
"""Length of a router's centroid, in units of a random row's. MoEfication adds the chosen experts
without weights; longer rows would weigh them unevenly from the start, since hidden states lie along
the centroids (SmolLM2-135M, 4 of 8 clusters in every fifth layer: loss 6.1 at 1, 3.8 at 0.1)."""


def neurons_of_experts(
    spec: UpcycleSpec, block: dict[str, torch.Tensor], dense: Dense, generator: torch.Generator
) -> torch.Tensor | None:
    """Indices (E, N) of each expert's neurons in a dense block, ascending; None for whole copies.

    ``block`` holds the parameters of the block by their names in ``dense``.
    """
    if spec.experts_from == "copies":
        return None
    if spec.experts_from == "random_split":
        order = torch.randperm(block[dense.output].shape[1], generator=generator)
        return order.view(spec.experts, -1).sort(dim=1).values
    rows_FX = torch.cat([block[name] for name in dense.inputs if block[name].ndim == 2], dim=1)
    seed = torch.randint(2**31, (), generator=generator).item()
    return balanced_clusters(rows_FX, spec.experts, seed)


def balanced_clusters(rows_FX: torch.Tensor, experts: int, seed: int) -> torch.Tensor:
    """Indices (E, F / E) of equally many rows per cluster, ascending: balanced k-means.

    Rows are scaled to length 1, so that direction counts and not size (MoEfication, arXiv
    2110.01786). Each round assigns the rows at the least sum of squared distances
    that equal clusters allow, exactly, and moves the centroids to the means.
    """
    rows = torch.nn.functional.normalize(rows_FX.double()).numpy()
    centroids, _ = kmeans_plusplus(rows, experts, random_state=seed)
    labels = None
    for _ in range(ROUNDS):
        # Lengths are 1, so the squared distance differs from this by a constant per row.
        cost_FE = (centroids**2).sum(axis=1) - 2 * rows @ centroids.T
        before, labels = labels, balanced_assignment(cost_FE)
        if before is not None and (labels == before).all():
            break
        centroids = np.stack([rows[labels == e].mean(axis=0) for e in range(experts)])
    return torch.from_numpy(np.argsort(labels, kind="stable").reshape(experts, -1))


def balanced_assignment(cost_FE: np.ndarray) -> np.ndarray:
    """The cluster (F,) of each row at the least total cost, with F / E rows in each cluster.

    Each row starts in its nearest cluster; then, as long as one is too full, rows move along the
    cheapest path from it to one with room (successive shortest paths, which keep the total
    optimal). scipy's linear_sum_assignment gives the same from F × F costs, a hundred times slower
    for 8,192 rows.
    """
    count = cost_FE.shape[1]
    room = len(cost_FE) // count
    # Whole numbers, whose differences are exact: rounding must not make a circle that saves costs.
    cost_FE = np.round((cost_FE - cost_FE.min()) * 2.0**40)
    labels = cost_FE.argmin(axis=1)
    # The cheapest move of one row from one cluster to another, and the row.
    move_EE, row_EE = np.full((count, count), np.inf), np.zeros((count, count), int)

    def update(cluster: int) -> None:
        members = np.flatnonzero(labels == cluster)
        move_EE[cluster] = np.inf
        if len(members):
            extra = cost_FE[members] - cost_FE[members, cluster, None]
            best = extra.argmin(axis=0)
            move_EE[cluster], row_EE[cluster] = extra[best, range(count)], members[best]
            move_EE[cluster, cluster] = np.inf

    for cluster in range(count):
        update(cluster)
    while (sizes := np.bincount(labels, minlength=count)).max() > room:
        start = sizes.argmax()
        graph = csgraph_from_dense(move_EE, null_value=np.inf)
        total, previous = bellman_ford(graph, indices=start, return_predecessors=True)
        end = np.where(sizes < room, total, np.inf).argmin()
        path = [end]
        while path[-1] != start:
            path.append(previous[path[-1]])
        for target, origin in zip(path, path[1:], strict=False):
            labels[row_EE[origin, target]] = target
        for cluster in path:
            update(cluster)
    return labels


def part(
    block: dict[str, torch.Tensor], dense: Dense, neurons_N: torch.Tensor, experts: int
) -> dict[str, torch.Tensor]:
    """The dense block of one expert of a split, with its down-projection multiplied by E."""
    parameters = {name: block[name][neurons_N] for name in dense.inputs}
    parameters[dense.output] = block[dense.output][:, neurons_N] * experts
    if dense.output_bias:
        # The weights of the chosen experts sum to 1, and so does what they take of the bias.
        parameters[dense.output_bias] = block[dense.output_bias]
    return parameters


def router_rows(
    spec: UpcycleSpec,
    block: dict[str, torch.Tensor],
    dense: Dense,
    neurons_EN: torch.Tensor | None,
    std: float,
    generator: torch.Generator,
) -> torch.Tensor:
    """The initial router (E, D) of a layer; ``std`` is the model's ``initializer_range``."""
    hidden = block[dense.output].shape[0]
    if spec.router == "zero":
        return torch.zeros(spec.experts, hidden)
    if spec.router == "random":
        return torch.randn(spec.experts, hidden, generator=generator) * std
    centroids_ED = block[dense.inputs[0]][neurons_EN].mean(dim=1)
    return torch.nn.functional.normalize(centroids_ED) * CENTROID_LENGTH * std * hidden**0.5


def expert_weights(model: PreTrainedModel) -> list[list[tuple[torch.Tensor, int]]]:
    """Per layer and expert, views of the expert's weights and the axis on which its neurons lie.

    The output bias, which belongs to no neuron, is not among them.
    """
    found = []
    for experts in family(model).modules(model, "expert").values():
        for expert in range(experts.num_experts):
            if hasattr(experts, "gate_up_proj"):
                inputs = [*experts.gate_up_proj[expert].chunk(2)]
            else:
                inputs = [experts.up_proj[expert], experts.up_proj_bias[expert]]
            found.append([*((tensor, 0) for tensor in inputs), (experts.down_proj[expert], 1)])
    return found
