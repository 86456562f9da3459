"""Minimum-norm fits under fixed routing: groups whose overlap is built in, and closed forms."""

import pytest
import torch

from stages.probe.smoothness import smoothness


def groups(d, count, n, shared, generator):
    """Inputs of groups whose spans have the overlap ``shared`` in n directions, and targets."""
    basis = torch.linalg.qr(
        torch.randn(d, d, generator=generator, dtype=torch.float64))[0]
    common = basis[:, :n]
    inputs, targets = [], []
    for i in range(count):
        own = basis[:, n * (i + 1) : n * (i + 2)]
        span = (1 - shared) ** 0.5 * own + shared**0.5 * common
        mixing = torch.randn(n, n, generator=generator, dtype=torch.float64)
        inputs.append(mixing @ span.T)
        targets.append(torch.randn(n, 1, generator=generator, dtype=torch.float64))
    return inputs, targets


@pytest.mark.parametrize(
    ("d", "count", "n", "shared"),
    [(200, 8, 10, 0.0), (200, 8, 10, 0.3), (200, 8, 10, 0.7), (400, 4, 20, 0.5)],
)
def test_groups_of_a_given_overlap(d, count, n, shared):
    inputs, targets = groups(d, count, n, shared, torch.Generator().manual_seed(1))
    found = smoothness(inputs, targets)
    assert found.residual < 1e-6
    assert found.overlap == pytest.approx(shared, abs=1e-9)
    assert found.eigenvalue == pytest.approx(1 + (count - 1) * shared)
    assert found.eigenvalue <= 1 + (count - 1) * found.overlap + 1e-9
    assert found.least_eigenvalue == pytest.approx(1 - shared)
    assert found.share == pytest.approx(found.ratio / count**0.5)
    assert 1 / found.eigenvalue <= found.cancellation * (1 + 1e-9)
    assert found.cancellation <= (1 + 1e-9) / (1 - shared)
    assert found.ratio <= (count / (1 - shared)) ** 0.5
    assert found.ratio >= 1 and found.frobenius >= found.bound * (1 - 1e-9)
    # What both rest on: a group's own fit is the dense one, projected on the span of its inputs.
    dense = torch.linalg.pinv(torch.cat(inputs)) @ torch.cat(targets)
    for x, y in zip(inputs, targets, strict=True):
        inverse = torch.linalg.pinv(x)
        torch.testing.assert_close(inverse @ x @ dense, inverse @ y, rtol=1e-6, atol=1e-8)
    if shared == 0:
        assert found.frobenius == pytest.approx(found.bound)
        assert found.cancellation == pytest.approx(1)
        assert 1 <= found.frobenius <= count**0.5
        norms = [(torch.linalg.pinv(x) @ y).norm() for x, y in zip(inputs, targets, strict=True)]
        equal = smoothness(inputs, [y / norm for y, norm in zip(targets, norms, strict=True)])
        assert equal.share == pytest.approx(1) == equal.frobenius / count**0.5


@pytest.mark.parametrize("cosine", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_two_points_in_closed_form(cosine, sign):
    inputs = [torch.tensor([[1.0, 0.0]], dtype=torch.float64),
              torch.tensor([[cosine, (1 - cosine**2) ** 0.5]], dtype=torch.float64)]
    targets = [torch.ones(1, 1), torch.full((1, 1), sign)]
    found = smoothness(inputs, targets)
    assert found.ratio == pytest.approx((2 / (1 + sign * cosine)) ** 0.5, rel=1e-10)
    assert found.eigenvalue == pytest.approx(1 + cosine)
    assert found.least_eigenvalue == pytest.approx(1 - cosine)
    assert found.cancellation == pytest.approx(1 / (1 + sign * cosine), rel=1e-10)
    if sign > 0:  # the bound is tight where the targets agree
        assert found.bound == pytest.approx(found.ratio, rel=1e-10)
    else:  # beyond √E, as far as the least eigenvalue lets it
        assert found.share == pytest.approx(found.least_eigenvalue**-0.5, rel=1e-10)


def test_one_map_for_all_leaves_nothing_to_gain():
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(5, 3, generator=generator)
    inputs = [torch.randn(6, 5, generator=generator) for _ in range(3)]
    found = smoothness(inputs, [x @ whole for x in inputs])
    assert found.ratio == pytest.approx(1.0, rel=1e-5) and found.overlap == pytest.approx(1.0)
    # Every group spans all: Σ P_i is 3 times the identity.
    assert found.eigenvalue == pytest.approx(3) == pytest.approx(found.least_eigenvalue)
    assert found.cancellation == pytest.approx(1 / 3, rel=1e-5)
