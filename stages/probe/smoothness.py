"""Fixed routing and minimum-norm fits: how much smoother experts can be than one dense map.

For E groups of inputs X_i that one linear map can fit together, the map of least norm W and those
of the groups W_i obey W_i = P_i W with P_i the projector onto the span of the group's inputs. With
λ the largest and κ the least positive eigenvalue of Σ P_i, and Frobenius norms where squares stand:

    (F1)  max ‖W_i‖ <= ‖W‖, spectral and Frobenius norms
    (F2)  Σ ‖W_i‖² / λ <= ‖W‖²,  λ <= 1 + (E - 1) max ‖P_i P_j‖
    (F3)  Orthogonal groups have λ = κ = 1: ‖W‖² = Σ ‖W_i‖², and ‖W‖ / max ‖W_i‖ lies in [1, √E].
          Others: ‖W‖² <= Σ ‖W_i‖² / κ, and ‖W‖ / max ‖W_i‖ <= √(E / κ) for both norms. Groups that
          share directions and disagree on them can exceed √E, because W must cancel.

These are this project's own statements, in the spirit of arXiv 2210.10253 and no quotation of its
theorems.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

RANK = 1e-10
"""Singular values below this share of the largest count as zero."""


@dataclass(frozen=True)
class Smoothness:
    """The fits of some groups of inputs."""

    ratio: float
    """Lipschitz constant (spectral norm) of the dense fit over the largest of the groups'."""
    overlap: float
    """Largest ‖P_i P_j‖ over pairs of groups: 0 orthogonal, 1 a common direction."""
    eigenvalue: float
    """λ, the largest eigenvalue of Σ P_i; 1 for orthogonal groups, at most
    1 + (groups - 1) overlap (F2)."""
    least_eigenvalue: float
    """κ, the least positive one; 1 for orthogonal groups (F3)."""
    bound: float
    """Lower bound of the dense map's norm over the largest of the groups', Frobenius:
    √(Σ ‖W_i‖² / (λ max ‖W_i‖²)) (F2)."""
    frobenius: float
    """The same ratio measured."""
    share: float
    """``ratio`` over √(number of groups): at most 1 for orthogonal groups, 1/√κ for others (F3)."""
    cancellation: float
    """‖W‖² / Σ ‖W_i‖², Frobenius: 1 for orthogonal groups, between 1/λ and 1/κ for others, and
    above 1 where the dense map cancels what the groups disagree on (F3)."""
    residual: float
    """Largest error of the dense fit, relative to the largest target: whether one map fits all."""


def smoothness(inputs: Sequence[torch.Tensor], targets: Sequence[torch.Tensor]) -> Smoothness:
    """Fit the groups, inputs (n_i, D) and targets (n_i, M), together and one by one, in float64."""
    xs, ys = ([t.double() for t in each] for each in (inputs, targets))
    whole, target = torch.cat(xs), torch.cat(ys)
    dense = torch.linalg.pinv(whole) @ target
    fits = [torch.linalg.pinv(x) @ y for x, y in zip(xs, ys, strict=True)]
    bases = [_basis(x) for x in xs]
    # Σ P_i and the Gram matrix of all bases have the same positive eigenvalues.
    values = torch.linalg.svdvals(torch.cat(bases, dim=1))
    together, least = values[0] ** 2, values[values > RANK * values[0]][-1] ** 2
    overlaps = [
        torch.linalg.matrix_norm(a.T @ b, 2) for i, a in enumerate(bases) for b in bases[:i]
    ]
    squares = torch.stack([fit.square().sum() for fit in fits])
    spectral = max(torch.linalg.matrix_norm(fit, 2) for fit in fits)
    ratio = torch.linalg.matrix_norm(dense, 2) / spectral
    return Smoothness(
        ratio=ratio.item(),
        overlap=max(overlaps).item() if overlaps else 0.0,
        eigenvalue=together.item(),
        least_eigenvalue=least.item(),
        bound=(squares.sum() / (together * squares.max())).sqrt().item(),
        frobenius=(dense.norm() / squares.max().sqrt()).item(),
        share=(ratio / len(fits) ** 0.5).item(),
        cancellation=(dense.square().sum() / squares.sum()).item(),
        residual=((whole @ dense - target).abs().max() / target.abs().max()).item(),
    )


def _basis(inputs: torch.Tensor) -> torch.Tensor:
    """An orthonormal basis (D, rank) of the span of some inputs (n, D)."""
    _, values, rows = torch.linalg.svd(inputs, full_matrices=False)
    return rows[values > RANK * values[0]].T
