"""Sharpness of a loss around a model's weights: largest eigenvalue and trace of its Hessian.

The Hessian is never formed. Its products with vectors come from differentiating twice backwards,
the eigenvalue from Lanczos iterations on them (ARPACK, through scipy), the trace from Hutchinson's
estimator with Rademacher vectors (Bekas, Kokiopoulou and Saad, 2007). Of top-k routing the
derivatives see the chosen experts and their weights, not that another expert could be chosen.

Shape letters: B examples, P parameters, R random vectors.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

from stages.errors import StageFailed
from stages.models.families import family
from stages.models.roles import roles

Losses = Callable[[], torch.Tensor]
"""The losses (B,) of some examples, computed anew from the model's weights at each call."""
ALL = "all"


@dataclass(frozen=True)
class Sharpness:
    """What was found of the Hessian of the mean loss of B examples, and each example's part."""

    eigenvalue: float
    """The largest one."""
    trace: float
    trace_error: float
    """Standard error of the trace over the random vectors; NaN with fewer than two of them."""
    parameters: int
    eigenvalue_parts: np.ndarray
    """v'H_i v of the eigenvector v and each example's own Hessian H_i, (B,); their mean is the
    eigenvalue, up to what the iterations leave."""
    trace_parts: np.ndarray
    """z'H_i z of each random vector z, (R, B); the trace is the mean of all."""


class Hessian:
    """The Hessian of the mean of some losses with respect to some parameters.

    ``parts`` are functions of equal meaning for disjoint sets of the examples, so that no more than
    one of them is in memory at once.
    """

    def __init__(self, parts: Sequence[Losses], parameters: Sequence[nn.Parameter]):
        self.parts, self.parameters = parts, list(parameters)
        self.size = sum(p.numel() for p in self.parameters)
        with torch.no_grad():
            self.examples = sum(len(losses()) for losses in parts)

    def _vectors(self, flat: np.ndarray) -> list[torch.Tensor]:
        places = np.cumsum([p.numel() for p in self.parameters])[:-1]
        return [
            torch.from_numpy(piece).to(p).view_as(p)
            for piece, p in zip(np.split(flat, places), self.parameters, strict=True)
        ]

    def _gradient(self, loss: torch.Tensor, **options: bool) -> list[torch.Tensor]:
        """Of a scalar; zeros for a parameter that it does not hang on."""
        found = torch.autograd.grad(loss, self.parameters, allow_unused=True, **options)
        return [
            torch.zeros_like(p) if g is None else g
            for g, p in zip(found, self.parameters, strict=True)
        ]

    def _slope(self, loss: torch.Tensor, vectors: list[torch.Tensor]) -> torch.Tensor:
        """The derivative of a scalar along the vectors, itself differentiable."""
        gradient = self._gradient(loss, create_graph=True)
        return sum((g * v).sum() for g, v in zip(gradient, vectors, strict=True))

    def product(self, flat: np.ndarray) -> np.ndarray:
        """H times a vector, both of shape (P,)."""
        vectors, found = self._vectors(flat.ravel()), np.zeros(self.size)
        for losses in self.parts:
            slope = self._slope(losses().sum(), vectors)
            if slope.requires_grad:  # else the losses are linear in these parameters
                pieces = self._gradient(slope)
                found += torch.cat([p.flatten() for p in pieces]).double().cpu().numpy()
        return found / self.examples

    def forms(self, flat: np.ndarray) -> np.ndarray:
        """v'H_i v of each example i, shape (B,), for one vector v (P,).

        The second derivative along v of Σ w_i loss_i is linear in w: its gradient with respect to
        w, at any w, has all of them at once.
        """
        vectors, found = self._vectors(flat), []
        for losses in self.parts:
            each = losses()
            weights = torch.ones_like(each, requires_grad=True)
            slope = self._slope((weights * each).sum(), vectors)
            forms = torch.zeros_like(each)
            if slope.requires_grad:
                bend = self._slope(slope, vectors)
                if bend.requires_grad:
                    (forms,) = torch.autograd.grad(bend, weights)
            found.append(forms.detach().double().cpu().numpy())
        return np.concatenate(found)


def sharpness(hessian: Hessian, *, vectors: int, tolerance: float, seed: int) -> Sharpness:
    """The sharpness of a loss, with ``vectors`` random vectors for the trace.

    ``tolerance`` is ARPACK's, relative to the eigenvalue. Raises StageFailed where its iterations
    do not come that near.
    """
    random = np.random.default_rng(seed)
    start = random.standard_normal(hessian.size)
    eigenvalue, vector = 0.0, start / np.linalg.norm(start)
    # ARPACK cannot start on a matrix of zeros, such as that of a router whose weights are 1.
    if hessian.product(vector).any():
        operator = LinearOperator((hessian.size,) * 2, matvec=hessian.product, dtype=np.float64)
        try:
            values, columns = eigsh(operator, k=1, which="LA", v0=start, tol=tolerance)
        except ArpackNoConvergence as error:
            raise StageFailed(
                f"the Hessian's largest eigenvalue was not found to {tolerance:g}: {error}; raise "
                "tolerance"
            ) from error
        eigenvalue, vector = float(values[0]), columns[:, 0]
    signs = random.choice((-1.0, 1.0), (vectors, hessian.size))
    parts_RB = np.stack([hessian.forms(z) for z in signs])
    by_vector = parts_RB.mean(axis=1)
    error = by_vector.std(ddof=1) / vectors**0.5 if vectors > 1 else np.nan
    return Sharpness(
        eigenvalue,
        float(by_vector.mean()),
        float(error),
        hessian.size,
        hessian.forms(vector),
        parts_RB,
    )


def parameters_of(model: PreTrainedModel, part: str) -> list[nn.Parameter]:
    """The parameters of a role, of ``all``, or of the ``head`` with whatever router and experts it
    holds; empty where the model has none."""
    role_of, entry = roles(model), family(model)
    heads = tuple(f"{path}." for path in entry.modules(model, "head")) if entry.head else ()

    def belongs(name: str) -> bool:
        return part in (ALL, role_of[name]) or (part == "head" and name.startswith(heads))

    return [p for name, p in model.named_parameters() if belongs(name)]


@contextmanager
def twice_differentiable(model: PreTrainedModel) -> Iterator[None]:
    """Kernels inside are those that can be differentiated more than once, and all parameters want
    a gradient; afterwards everything is as it was."""
    wanted = [(p, p.requires_grad) for p in model.parameters()]
    swappable = model._can_set_experts_implementation()
    before = model.get_experts_implementation() if swappable else None
    try:
        if swappable:
            model.set_experts_implementation("eager")
        model.requires_grad_(True)
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        for parameter, requires_grad in wanted:
            parameter.requires_grad_(requires_grad)
        if swappable:
            model.set_experts_implementation(before)
