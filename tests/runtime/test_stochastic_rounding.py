"""Rounding is unbiased, and exact where nothing is to be rounded."""

from __future__ import annotations

import math

import torch

from oasis_fx.runtime.stochastic_rounding import round_stochastically_


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
