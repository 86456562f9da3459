"""FreeLB: adversarial training in embedding space (arXiv 1909.11764, algorithm 1)."""

import torch

from stages.finetune.recipe import FreeLB


def start(embeddings: torch.Tensor, sequences: torch.Tensor, recipe: FreeLB) -> torch.Tensor:
    """The first perturbation of packed embeddings (1, N, D), a leaf that wants a gradient.

    ``sequences`` says to which sequence each token belongs, shape (N,). Every element is uniform
    within ± initial / √(tokens of its sequence × D).
    """
    lengths = torch.bincount(sequences)[sequences]
    bound = recipe.initial / (lengths * embeddings.shape[-1]).sqrt()
    uniform = torch.empty_like(embeddings, dtype=torch.float32).uniform_(-1, 1)
    return (uniform * bound[None, :, None]).requires_grad_()


@torch.no_grad()
def climb(delta: torch.Tensor, sequences: torch.Tensor, recipe: FreeLB) -> torch.Tensor:
    """The next perturbation: one step of length ``learning_rate`` along each sequence's gradient,
    then back into the ball of radius ``max_norm``; norms are L2 over all elements of a sequence.
    """
    length = norms(delta.grad, sequences)[sequences][None, :, None]
    # A sequence without a gradient stays where it is.
    moved = delta + recipe.learning_rate * (delta.grad / length).nan_to_num()
    if recipe.max_norm is not None:
        outside = (norms(moved, sequences) / recipe.max_norm).clamp(min=1)
        moved /= outside[sequences][None, :, None]
    return moved.requires_grad_()


def norms(delta: torch.Tensor, sequences: torch.Tensor) -> torch.Tensor:
    """L2 norm of each sequence's part, shape (sequences,)."""
    squares = delta.detach()[0].square().sum(-1)
    return squares.new_zeros(int(sequences.max()) + 1).index_add_(0, sequences, squares).sqrt()
