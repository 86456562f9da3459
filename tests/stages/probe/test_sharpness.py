"""Eigenvalue and trace of the Hessian against the whole Hessian of tiny models."""

import numpy as np
import pytest
import torch
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from stages.models.vision import from_scratch
from stages.models.vision_spec import VisionSpec
from stages.probe.sharpness import Hessian, parameters_of, sharpness, twice_differentiable

TINY = VisionSpec(
    size="tiny", hidden=4, heads=2, neurons=4, depth=1, patch=4, image_size=8, channels=1,
    labels=3, shared_start=False,
)  # fmt: skip
SPECS = {
    "dense": TINY,
    "experts": TINY.model_copy(update={"experts": 3, "top_k": 2, "layers": (0,)}),
    "head": TINY.model_copy(
        update={"head": "sparse_moe", "head_experts": 2, "head_top_k": 1, "head_neurons": 4}
    ),
}
IMAGES = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
LABELS = torch.tensor([0, 1, 2, 0, 1])


def whole(model, names, weights):
    """The Hessian (P, P) of the mean loss with respect to some parameters, by torch itself."""
    fixed = {n: p.detach() for n, p in model.named_parameters()}
    sizes = [fixed[n].numel() for n in names]

    def loss(flat):
        pieces = dict(zip(names, flat.split(sizes), strict=True))
        given = fixed | {n: piece.view_as(fixed[n]) for n, piece in pieces.items()}
        logits = functional_call(model, given, (IMAGES,)).logits
        return (weights * cross_entropy(logits, LABELS, reduction="none")).sum()

    point = torch.cat([fixed[n].flatten() for n in names])
    return torch.autograd.functional.hessian(loss, point).numpy()


def parts(model, *sizes):
    def losses(rows):
        return lambda: cross_entropy(model(IMAGES[rows]).logits, LABELS[rows], reduction="none")

    ends = np.cumsum(sizes)
    return [losses(slice(end - size, end)) for end, size in zip(ends, sizes, strict=True)]


@pytest.fixture(scope="module", params=SPECS)
def model(request):
    return from_scratch(SPECS[request.param])[0].double()


@pytest.mark.parametrize("part", ["all", "head", "router", "expert"])
def test_it_is_that_of_the_whole_hessian(model, part):
    chosen = parameters_of(model, part)
    if not chosen:
        assert part in ("router", "expert") and "experts" not in str(model)
        return
    names = [n for n, p in model.named_parameters() if any(p is c for c in chosen)]
    ones = np.ones(sum(p.numel() for p in chosen))
    with twice_differentiable(model):
        hessian = Hessian(parts(model, 3, 2), chosen)
        product = hessian.product(ones)
        found = sharpness(hessian, vectors=6, tolerance=1e-7, seed=0)
        exact = whole(model, names, torch.full((5,), 1 / 5, dtype=torch.float64))
        own = whole(model, names, torch.eye(5, dtype=torch.float64)[4])
    assert found.parameters == len(exact) == sum(p.numel() for p in chosen)
    values, columns = np.linalg.eigh(exact)
    assert found.eigenvalue == pytest.approx(values[-1], rel=1e-4)
    assert found.eigenvalue_parts.mean() == pytest.approx(values[-1], rel=1e-4)
    top = columns[:, -1]
    assert found.eigenvalue_parts[4] == pytest.approx(top @ own @ top, rel=1e-3, abs=1e-6)
    # The same random vectors, by the whole matrix.
    random = np.random.default_rng(0)
    random.standard_normal(len(exact))
    signs = random.choice((-1.0, 1.0), (6, len(exact)))
    forms = np.einsum("rp,pq,rq->r", signs, exact, signs)
    # A router computes its softmax in float32.
    np.testing.assert_allclose(found.trace_parts.mean(1), forms, rtol=1e-5, atol=1e-6)
    assert found.trace == pytest.approx(forms.mean(), rel=1e-5, abs=1e-6)
    assert found.trace_error == pytest.approx(forms.std(ddof=1) / 6**0.5, rel=1e-4)
    np.testing.assert_allclose(product, exact @ ones, rtol=1e-5, atol=1e-6)


def test_the_trace_lies_within_its_error():
    model = from_scratch(SPECS["experts"])[0].double()
    names = [n for n, _ in model.named_parameters()]
    with twice_differentiable(model):
        found = sharpness(
            Hessian(parts(model, 5), model.parameters()), vectors=60, tolerance=1e-2, seed=3
        )
        exact = np.trace(whole(model, names, torch.full((5,), 0.2, dtype=torch.float64)))
    assert abs(found.trace - exact) < 3 * found.trace_error
    assert 0 < found.trace_error < abs(exact)


def test_a_loss_without_curvature_has_none():
    """A linear loss, whose slope does not hang on the parameters any more."""
    weight = torch.nn.Parameter(torch.ones(3))
    hessian = Hessian([lambda: torch.tensor([[1.0, 2, 3], [4, 5, 6]]) @ weight], [weight])
    found = sharpness(hessian, vectors=2, tolerance=1e-3, seed=0)
    assert (found.eigenvalue, found.trace, found.eigenvalue_parts.tolist()) == (0, 0, [0, 0])


def test_a_model_is_left_as_it_was():
    model = from_scratch(SPECS["experts"])[0].requires_grad_(False)
    before = model.config._experts_implementation
    with twice_differentiable(model):
        assert model.config._experts_implementation == "eager"
        assert all(p.requires_grad for p in model.parameters())
    assert model.config._experts_implementation == before
    assert not any(p.requires_grad for p in model.parameters())
