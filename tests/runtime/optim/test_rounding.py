"""Rounding is unbiased, and exact where nothing is to be rounded."""

from __future__ import annotations

import math

import torch

from oasis_fx.runtime.optim.rounding import _sixteen_bits, round_stochastically_


def test_unbiased_and_to_a_neighbour() -> None:
    for value in (1.001, -3.1415927, 1e-3, 7e20, -2e-30):
        source = torch.full((200_000,), value)
        target = torch.empty(200_000, dtype=torch.bfloat16)
        round_stochastically_(target, source, torch.Generator().manual_seed(0))
        step = float(torch.tensor(value).abs() * 2**-7)
        assert target.unique().numel() == 2
        assert (target.double() - value).abs().max() <= step
        # Three standard deviations of a mean of 200000 draws between two neighbours.
        assert abs(target.double().mean() - float(source[0])) < 3 * step / 2 / math.sqrt(200_000)


def test_exact_values_stay() -> None:
    exact = torch.randn(1000).bfloat16()
    special = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan]).bfloat16()
    for values in (exact, special):
        target = torch.empty_like(values)
        round_stochastically_(target, values.float())
        assert torch.equal(target.view(torch.int16), values.view(torch.int16))


def test_non_contiguous() -> None:
    source = torch.randn(6, 8).bfloat16().float().T
    target = torch.empty(6, 8, dtype=torch.bfloat16).T
    round_stochastically_(target, source)
    assert torch.equal(target.float(), source)


def test_not_a_number_stays_whatever_its_bits() -> None:
    bits = torch.tensor([0x7FFFFFFF, 0x7FFF8001, 0x7F800001, 0x7FC00000, -1], dtype=torch.int32)
    target = torch.zeros(5, dtype=torch.bfloat16)
    for seed in range(20):
        round_stochastically_(target, bits.view(torch.float32), torch.Generator().manual_seed(seed))
        assert bool(target.isnan().all())


def test_the_noise_is_uniform_and_each_number_of_its_own() -> None:
    """Sixteen bits, each set half of the time (within 5 standard errors), and no two neighbours alike."""
    noise = _sixteen_bits(100_003, torch.device("cpu"), torch.Generator().manual_seed(0))
    assert noise.shape == (100_003,) and int(noise.min()) >= 0 and int(noise.max()) <= 0xFFFF
    shares = torch.stack([(noise >> bit & 1).double().mean() for bit in range(16)])
    assert bool(((shares - 0.5).abs() < 5 * 0.5 / 100_003**0.5).all())
    for lag in range(1, 5):
        pairs = torch.stack([noise[:-lag], noise[lag:]]).double()
        assert abs(float(torch.corrcoef(pairs)[0, 1])) < 5 / 100_003**0.5
