"""Fixed routing and minimum-norm fits: how much smoother experts can be than one dense map.

For groups of inputs X_i that one linear map can fit together, the map of least norm W and those of
the groups W_i obey W_i = W P_i with P_i the projector onto the span of the group's inputs, so that
max ‖W_i‖ <= ‖W‖. Two further bounds follow from the largest eigenvalue of Σ P_i. These are this
project's own statements, in the spirit of arXiv 2210.10253 and no quotation of its theorems.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Smoothness:
    """The fits of some groups of inputs."""

    ratio: float
    """Lipschitz constant (spectral norm) of the dense fit over the largest of the groups'."""
    overlap: float
    """Largest ‖P_i P_j‖ over pairs of groups: 0 orthogonal, 1 a common direction."""
    eigenvalue: float
    """Largest eigenvalue of Σ P_i; 1 for orthogonal groups, at most 1 + (groups - 1) overlap."""
    bound: float
    """Lower bound of the dense map's norm over the largest of the groups', Frobenius:
    √(Σ ‖W_i‖² / (eigenvalue max ‖W_i‖²))."""
    frobenius: float
    """The same ratio measured."""
    residual: float
    """Largest error of the dense fit, relative to the largest target: whether one map fits all."""


def smoothness(inputs: Sequence[torch.Tensor], targets: Sequence[torch.Tensor]) -> Smoothness:
    """Fit the groups, inputs (n_i, D) and targets (n_i, M), together and one by one, in float64."""
    xs, ys = ([t.double() for t in each] for each in (inputs, targets))
    whole, target = torch.cat(xs), torch.cat(ys)
    dense = torch.linalg.pinv(whole) @ target
    fits = [torch.linalg.pinv(x) @ y for x, y in zip(xs, ys, strict=True)]
    bases = [_basis(x) for x in xs]
    together = torch.linalg.matrix_norm(torch.cat(bases, dim=1), 2) ** 2
    overlaps = [
        torch.linalg.matrix_norm(a.T @ b, 2) for i, a in enumerate(bases) for b in bases[:i]
    ]
    squares = torch.stack([fit.square().sum() for fit in fits])
    spectral = max(torch.linalg.matrix_norm(fit, 2) for fit in fits)
    return Smoothness(
        ratio=(torch.linalg.matrix_norm(dense, 2) / spectral).item(),
        overlap=max(overlaps).item() if overlaps else 0.0,
        eigenvalue=together.item(),
        bound=(squares.sum() / (together * squares.max())).sqrt().item(),
        frobenius=(dense.norm() / squares.max().sqrt()).item(),
        residual=((whole @ dense - target).abs().max() / target.abs().max()).item(),
    )


def _basis(inputs: torch.Tensor) -> torch.Tensor:
    """An orthonormal basis (D, rank) of the span of some inputs (n, D)."""
    _, values, rows = torch.linalg.svd(inputs, full_matrices=False)
    return rows[values > 1e-10 * values[0]].T
