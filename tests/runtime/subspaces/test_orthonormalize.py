"""Orthonormal for whatever input, and close to what was nearly orthonormal."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oasis_fx.runtime.subspaces import host_reads
from oasis_fx.runtime.subspaces import orthonormalize as module
from oasis_fx.runtime.subspaces.orthonormalize import cholesky_orthonormalize, orthonormalize


def defect(q: torch.Tensor) -> float:
    eye = torch.eye(q.shape[-1], dtype=torch.float64)
    return float((q.double().mT @ q.double() - eye).abs().max())


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    n=st.integers(1, 40),
    r=st.integers(1, 40),
    length=st.integers(1, 4),
    exponent=st.integers(-30, 30),
    defective=st.sampled_from(["full", "zero", "rank one", "equal columns", "ill-conditioned"]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_columns_are_orthonormal(n, r, length, exponent, defective, dtype) -> None:
    r = min(n, r)
    a = torch.randn(length, n, r, dtype=torch.float64, generator=torch.Generator().manual_seed(n * 100 + r))
    if defective == "zero":
        a[0] = 0
    elif defective == "rank one":
        a[0] = a[0, :, :1] @ a[0, :1, :]
    elif defective == "equal columns":
        a[..., -1] = a[..., 0]
    elif defective == "ill-conditioned":
        a = a * torch.logspace(0, -8, r, dtype=torch.float64)
    q = orthonormalize((a * 10.0**exponent).to(dtype))
    assert q.dtype == dtype and q.shape == a.shape
    assert defect(q) <= (1e-5 if dtype == torch.float32 else 1e-11)


def test_equals_householder_with_positive_diagonal_and_spans_the_same() -> None:
    a = torch.randn(3, 20, 6, dtype=torch.float64)
    q, r = torch.linalg.qr(a)
    expected = q * r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)
    torch.testing.assert_close(orthonormalize(a), expected, rtol=1e-10, atol=1e-10)


def test_stays_near_what_was_nearly_orthonormal() -> None:
    q = torch.linalg.qr(torch.randn(2, 30, 5, dtype=torch.float64)).Q * torch.tensor([1, -1, 1, -1, 1.0])
    moved = orthonormalize(q + 1e-3 * torch.randn(2, 30, 5, dtype=torch.float64))
    assert (moved - q).abs().max() < 1e-2  # a flipped sign would be off by about 0.3


def test_only_the_failing_members_are_done_again(monkeypatch) -> None:
    seen = []
    real = module._householder
    monkeypatch.setattr(module, "_householder", lambda a: seen.append(len(a)) or real(a))
    a = torch.randn(4, 10, 3)
    orthonormalize(a)
    assert seen == []
    a[2] = 0
    orthonormalize(a)
    assert seen == [1]


def test_low_precision_matmuls_do_not_matter() -> None:
    torch.set_float32_matmul_precision("medium")
    try:
        assert defect(orthonormalize(torch.randn(2, 200, 32))) <= 1e-5
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert defect(orthonormalize(torch.randn(2, 200, 32))) <= 1e-5
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_square(dtype) -> None:
    assert defect(orthonormalize(torch.randn(2, 16, 16, dtype=dtype))) <= 1e-5


@pytest.mark.parametrize("free", [True, False])
def test_a_large_singular_value_beside_small_ones_needs_no_householder(monkeypatch, free) -> None:
    """As of a power step of rank 4096 on activations that are nearly one vector: float32 leaves its Gram matrix
    indefinite, and a basis that such a step does not move stays random for good."""
    monkeypatch.setattr(host_reads, "reads_are_free", lambda device: free)
    for seed in range(4):
        g = torch.Generator().manual_seed(seed)
        q = torch.linalg.qr(torch.randn(200, 64, dtype=torch.float64, generator=g)).Q
        u = torch.nn.functional.normalize(torch.randn(64, 1, dtype=torch.float64, generator=g), dim=0)
        hard = (q + 7000 * (q @ u) @ u.T).float()
        easy = torch.randn(200, 64, generator=g)
        (found,) = cholesky_orthonormalize([torch.stack([hard, easy])])
        assert found.done.tolist() == [True, True]
        assert defect(found.q) <= 1e-5
        (alone,) = cholesky_orthonormalize([easy[None]])
        assert torch.equal(found.q[1], alone.q[0])  # what did not fail is computed as ever
        assert module._cholesky_qr([hard[None] / hard.abs().max()])[1].item()  # without the shift it fails
