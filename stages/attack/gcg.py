"""Greedy coordinate gradient: discrete tokens replaced one at a time, guided by a gradient.

After arXiv 2307.15043. The objective is anything that can be computed from embeddings: a task's
margin, the likelihood of a target text, the routers' choice.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Found:
    """The best tokens of a search."""

    tokens: torch.Tensor
    """(n,)."""
    score: float
    """What they are kept for."""
    steps: int
    """Steps that were made; fewer than asked for when the goal was reached."""
    zero_gradients: float
    """Share of positions whose gradient was exactly zero on the way."""
    last: torch.Tensor
    """Where a further step would start, (n,)."""


def promises(gradient: torch.Tensor, table: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """First-order gain (n, V) of each replacement at each position.

    ``gradient`` (n, D) is that of the objective with respect to the embeddings of ``tokens`` (n,),
    rows of ``table`` (V, D).
    """
    return gradient @ table.T - (gradient * table[tokens]).sum(-1, keepdim=True)


def draw_candidates(
    gains: torch.Tensor,
    tokens: torch.Tensor,
    positions: torch.Tensor,
    *,
    top: int,
    number: int,
    generator: torch.Generator,
) -> torch.Tensor:
    """Different token sequences (at most ``number``, n), each with one replacement.

    Position and replacement are drawn evenly: a position among ``positions`` (k,), a token among
    the ``top`` of its gains (k, V) (``-inf`` for those that may not be used).
    """
    best = gains.topk(min(top, gains.shape[1]), dim=-1)
    allowed = best.values > -torch.inf
    pairs = allowed.nonzero().cpu()
    chosen = pairs[torch.randperm(len(pairs), generator=generator)[:number]].to(tokens.device)
    rows = tokens.repeat(len(chosen), 1)
    places = positions[chosen[:, 0]]
    rows[torch.arange(len(chosen)), places] = best.indices[chosen[:, 0], chosen[:, 1]]
    return rows


def search(
    value: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
    gradient: Callable[[torch.Tensor], torch.Tensor],
    table: torch.Tensor,
    start: torch.Tensor,
    positions: torch.Tensor,
    *,
    allowed: torch.Tensor,
    budget: int,
    steps: int,
    candidates: int,
    top: int,
    generator: torch.Generator,
    keep: Callable[[torch.Tensor], torch.Tensor],
    goal: float = float("inf"),
) -> Found:
    """Replace tokens so as to raise a loss, and keep those that succeed best.

    Args:
        value: the loss of token sequences (B, n), and the score by which success is judged, each
            (B,); they differ where the loss is a surrogate.
        gradient: of the loss with respect to the embeddings of one sequence (n,), (n, D).
        table: embeddings of the vocabulary (V, D).
        start: the first tokens (n,).
        positions: those that may change (k,).
        allowed: tokens that may be put in, booleans (V,).
        budget: most positions that differ from ``start`` at any time.
        steps: replacements at most.
        candidates: sequences evaluated in each step.
        top: replacements of a position from which candidates are drawn.
        generator: draws the candidates.
        keep: which candidates (B, n) count as inputs, booleans (B,); where none does, the step
            changes nothing.
        goal: the search ends where the score is above it.

    The candidate of the largest loss is where the next step starts, better or not; what scored best
    of all candidates and the start is returned.
    """
    tokens, best = start, (start, value(start[None])[1].item())
    zero, made = 0, 0
    for _ in range(steps):
        if best[1] > goal:
            break
        made += 1
        slope = gradient(tokens)
        zero += int((slope[positions] == 0).all(-1).sum())
        changed = tokens != start
        # With the budget spent, only what differs already may change again.
        free = positions if int(changed.sum()) < budget else positions[changed[positions]]
        gains = promises(slope[free], table, tokens[free]).masked_fill(~allowed, -torch.inf)
        gains[torch.arange(len(free)), tokens[free]] = -torch.inf
        rows = draw_candidates(
            gains, tokens, free, top=top, number=candidates, generator=generator
        )
        rows = rows[keep(rows)]
        if not len(rows):
            continue
        losses, scores = value(rows)
        tokens, first = rows[int(losses.argmax())], int(scores.argmax())
        if scores[first].item() > best[1]:
            best = rows[first], scores[first].item()
    return Found(*best, made, zero / max(1, made * len(positions)), tokens)


def random_replacements(
    start: torch.Tensor,
    positions: torch.Tensor,
    number: int,
    allowed: torch.Tensor,
    keep: Callable[[torch.Tensor], torch.Tensor],
    generator: torch.Generator,
    tries: int = 32,
) -> torch.Tensor:
    """The control (n,): as many positions, one after the other, with tokens drawn evenly from the
    allowed ones, each the first of some tries that leaves an input."""
    vocabulary = allowed.nonzero()[:, 0].cpu()
    tokens = start
    for place in positions[torch.randperm(len(positions), generator=generator)[:number]].tolist():
        rows = tokens.repeat(tries, 1)
        drawn = torch.randint(len(vocabulary), (tries,), generator=generator)
        rows[:, place] = vocabulary[drawn].to(rows)
        kept = rows[keep(rows) & (rows != start)[:, place]]
        tokens = kept[0] if len(kept) else tokens
    return tokens
