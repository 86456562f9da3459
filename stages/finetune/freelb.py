"""FreeLB: adversarial training in embedding space (arXiv 1909.11764, algorithm 1).

``sequences`` says to which sequence of a micro-batch each token (R, N) of its rows belongs, -1
where it is padding, which is never perturbed.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from stages.finetune.recipe import FreeLB

LEFT = "share_of_the_norm_that_rounding_leaves"
"""What the evidence calls it."""
LEAST = 0.5
"""Of that share; below, the adversary does not act."""


def start(embeddings: torch.Tensor, sequences: torch.Tensor, recipe: FreeLB) -> torch.Tensor:
    """The first perturbation of embeddings (R, N, D), a leaf that wants a gradient.

    Every element is uniform within ± initial / √(tokens of its sequence × D).
    """
    real = sequences >= 0
    lengths = torch.bincount(sequences[real])[sequences]
    bound = recipe.initial / (lengths * embeddings.shape[-1]).sqrt() * real
    uniform = torch.empty_like(embeddings, dtype=torch.float32).uniform_(-1, 1)
    return (uniform * bound[..., None]).requires_grad_()


@torch.no_grad()
def climb(delta: torch.Tensor, sequences: torch.Tensor, recipe: FreeLB) -> torch.Tensor:
    """The next perturbation: one step of length ``learning_rate`` along each sequence's gradient,
    then back into the ball of radius ``max_norm``; norms are L2 over all elements of a sequence.
    """
    real = (sequences >= 0)[..., None]
    length = norms(delta.grad, sequences)[sequences][..., None]
    # A sequence without a gradient stays where it is.
    moved = delta + real * recipe.learning_rate * (delta.grad / length).nan_to_num()
    if recipe.max_norm is not None:
        outside = (norms(moved, sequences) / recipe.max_norm).clamp(min=1)
        moved /= outside[sequences][..., None]
    return moved.requires_grad_()


def norms(delta: torch.Tensor, sequences: torch.Tensor) -> torch.Tensor:
    """L2 norm of each sequence's part, shape (sequences,)."""
    squares, real = delta.detach().square().sum(-1), sequences >= 0
    sums = squares.new_zeros(int(sequences.max()) + 1)
    return sums.index_add_(0, sequences[real], squares[real]).sqrt()


@contextmanager
def added(embedding: nn.Module, delta: torch.Tensor) -> Iterator[list[torch.Tensor]]:
    """Inside, the model reads its tokens' embeddings with the perturbation on top of them; what
    rounding leaves of it (R, N, D) is in the list afterwards.

    The tokens themselves go in as ever, since a classification head finds the end of a padded row
    by them.
    """
    left: list[torch.Tensor] = []

    def hook(_: nn.Module, args: tuple, out: torch.Tensor) -> torch.Tensor:
        moved = out + delta.to(out.dtype)
        left.append((moved.detach() - out.detach()).float())
        return moved

    handle = embedding.register_forward_hook(hook)
    try:
        yield left
    finally:
        handle.remove()
