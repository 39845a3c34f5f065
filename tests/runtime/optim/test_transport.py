"""Moments carried from one basis to the next, against the equations written out entry by entry."""

from __future__ import annotations

import torch

from oasis_fx.runtime.optim.transport import transport_mean, transport_second_moment

BIAS1, BIAS2 = torch.tensor([[[0.19]]], dtype=torch.float64), torch.tensor([[[0.002]]], dtype=torch.float64)


def moments(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Means and second moments of a stream of random gradients, as Adam would hold them after two steps."""
    g1, g2 = torch.randn(2, 1, 6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    mean = 0.9 * 0.1 * g1 + 0.1 * g2
    second = 0.999 * 0.001 * g1**2 + 0.001 * g2**2
    return mean, second


def rotation(seed: int = 1) -> torch.Tensor:
    q = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))).Q
    return q[None]


def test_entry_by_entry() -> None:
    mean, second = moments()
    overlap = rotation() * 0.7  # bases that overlap in part
    got = transport_second_moment(second, mean, overlap, BIAS1, BIAS2)
    for i in range(6):
        for j in range(4):
            variance = sum(
                (second[0, i, k] / BIAS2 - (mean[0, i, k] / BIAS1) ** 2).squeeze() * overlap[0, k, j] ** 2
                for k in range(4)
            )
            centre = sum((mean[0, i, k] / BIAS1).squeeze() * overlap[0, k, j] for k in range(4))
            torch.testing.assert_close(got[0, i, j], BIAS2.squeeze() * abs(variance + centre**2))
    torch.testing.assert_close(transport_mean(mean, overlap)[0], mean[0] @ overlap[0])


def test_an_unmoved_basis_changes_nothing() -> None:
    mean, second = moments()
    eye = torch.eye(4, dtype=torch.float64)[None]
    torch.testing.assert_close(transport_mean(mean, eye), mean)
    torch.testing.assert_close(transport_second_moment(second, mean, eye, BIAS1, BIAS2), second)


def test_permuted_and_flipped_columns_permute_the_second_moment() -> None:
    mean, second = moments()
    order = [2, 0, 3, 1]
    signs = torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=torch.float64)
    overlap = (torch.eye(4, dtype=torch.float64)[:, order] * signs)[None]
    torch.testing.assert_close(transport_mean(mean, overlap), mean[..., order] * signs)
    torch.testing.assert_close(transport_second_moment(second, mean, overlap, BIAS1, BIAS2), second[..., order])


def test_a_rotation_within_the_span_keeps_the_mean_gradient() -> None:
    mean, _ = moments()
    q = torch.linalg.qr(torch.randn(1, 9, 4, dtype=torch.float64)).Q
    turned = q @ rotation()
    torch.testing.assert_close(transport_mean(mean, q.mT @ turned) @ turned.mT, mean @ q.mT)


def test_never_negative_and_nothing_before_the_first_step() -> None:
    for seed in range(20):
        mean, second = moments(seed)
        assert (transport_second_moment(second, 3 * mean, rotation(seed), BIAS1, BIAS2) >= 0).all()
    zero = torch.zeros(1, 6, 4, dtype=torch.float64)
    nothing = torch.zeros(1, 1, 1, dtype=torch.float64)
    assert torch.equal(transport_second_moment(zero, zero, rotation(), nothing, nothing), zero)
