"""Dense AdamW on bfloat16 weights: torch's AdamW in float32, but for rounding, which is unbiased."""

from __future__ import annotations

import pytest
import torch

from oasis_fx import OasisAdamW

SETTINGS = {"lr": 0.05, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.5}


def test_a_dense_bfloat16_step_is_adamw_rounded() -> None:
    """The mean over 4096 equal entries is the float32 value to a tenth of a bfloat16 digit: noise is 1/64 of one."""
    weight = torch.nn.Parameter(torch.full((64, 64), 1.5, dtype=torch.bfloat16))
    exact = torch.nn.Parameter(torch.full((1,), 1.5))
    ours, theirs = OasisAdamW([weight], **SETTINGS), torch.optim.AdamW([exact], **SETTINGS)
    for gradient in (0.3, -0.2, 0.7, 0.1):
        weight.grad, exact.grad = torch.full_like(weight, gradient), torch.full_like(exact, gradient)
        exact.grad.copy_(weight.grad[0, :1])  # as bfloat16 has it
        ours.step(), theirs.step()
    digit = 2.0**-7  # of numbers from 1 to 2
    assert float(weight.detach().double().mean()) == pytest.approx(float(exact.detach()), abs=0.2 * digit)
    for name in ("exp_avg", "exp_avg_sq"):
        expected = float(theirs.state[exact][name])
        assert float(ours.state[weight][name].double().mean()) == pytest.approx(expected, rel=2e-3), name
        assert ours.state[weight][name].dtype == torch.bfloat16
    assert float(ours.state[weight]["step"]) == 4


def test_a_second_moment_in_bfloat16_follows_a_gradient_that_falls() -> None:
    """By beta2 = 0.999 it falls by a thousandth a step, a quarter of its last digit: to nearest it would stay."""
    weight = torch.nn.Parameter(torch.zeros(64, 64, dtype=torch.bfloat16))
    optimizer = OasisAdamW([weight], lr=1e-3)
    for step in range(201):
        weight.grad = torch.full_like(weight, 1.0 if step == 0 else 0.0)
        optimizer.step()
    second = float(optimizer.state[weight]["exp_avg_sq"].double().mean())
    assert second == pytest.approx(0.001 * 0.999**200, rel=0.02)


def test_each_step_has_noise_of_its_own() -> None:
    """A step of a 64th of a digit, 64 times: with the same noise each time, no entry that stayed once would ever go."""
    weight = torch.nn.Parameter(torch.full((64, 64), 1.5, dtype=torch.bfloat16))
    optimizer = OasisAdamW([weight], lr=2.0**-7 / 64, weight_decay=0.0)
    for _ in range(64):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    # Of 4096 entries some stay: exp(-1) of them, and not 63 of 64.
    stayed = float((weight == 1.5).double().mean())
    assert 0.30 < stayed < 0.44
    assert float(weight.detach().double().mean()) == pytest.approx(1.5 - 2.0**-7, abs=0.1 * 2.0**-7)
