"""States in eight bits: their size, their error, checkpoints."""

from __future__ import annotations

import sys

import pytest
import torch

from oasis_fx import OasisAdamW, oasis_backend
from oasis_fx.inspect.measure import optimizer_bytes
from oasis_fx.runtime.optim.eight_bit import in_float32, new_codes


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Embedding(64, 128)
        self.up, self.down = torch.nn.Linear(128, 512), torch.nn.Linear(512, 128)

    def forward(self, tokens):
        return self.down(torch.relu(self.up(self.embed(tokens))))


def train(bits: int, steps, model=None, state=None, dtype=torch.float32):
    torch._dynamo.reset()
    model = model or Net().to(dtype)
    compiled = torch.compile(model, backend=oasis_backend(16, inner="aot_eager"))
    optimizer = OasisAdamW(model.parameters(), lr=3e-3, state_bits=bits)
    if state is not None:
        optimizer.load_state_dict(state)
    losses = []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(64, (8, 16), generator=generator)
        loss = (compiled(tokens).float() - tokens[..., None] / 64).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    return model, optimizer, losses


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_falls_as_with_float32_and_the_states_are_a_quarter(dtype) -> None:
    _, full, losses = train(32, range(30), dtype=dtype)
    _, eight, other = train(8, range(30), dtype=dtype)
    assert other[-1] < 0.3 * other[0] and other[-1] == pytest.approx(losses[-1], rel=0.25)
    assert optimizer_bytes(eight) < optimizer_bytes(full)
    in_codes = 0
    for one, other in zip(eight.state.values(), full.state.values(), strict=True):
        if one["exp_avg"].numel() >= 4096:
            in_codes += 1
            size = sum(value.nbytes for key, value in one.items() if key.startswith("exp_avg"))
            numbers = one["exp_avg"].numel()
            assert one["exp_avg"].dtype == torch.uint8 and size == 2 * (numbers + 4 * numbers // 256)
        else:
            assert one["exp_avg"].dtype == other["exp_avg"].dtype
    assert in_codes == 2  # the embedding's, and those of one rewritten weight


def test_a_resumed_run_is_bitwise_the_uninterrupted_one(tmp_path) -> None:
    model, optimizer, _ = train(8, range(4))
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    whole, _, _ = train(8, range(9))
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    again = Net()
    again.load_state_dict(saved["model"])
    train(8, range(4, 9), again, saved["optimizer"])
    for found, expected in zip(again.parameters(), whole.parameters(), strict=True):
        assert torch.equal(found, expected)


def test_codes_come_and_go_within_a_hundredth_of_each_block_s_largest() -> None:
    codes, scale = new_codes(torch.empty(64, 64))
    state = {"exp_avg": codes, "exp_avg_scale": scale}
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(64, 64, generator=generator) * torch.logspace(-6, 0, 64)[:, None]
    with in_float32(state, ("exp_avg",)) as plain:
        assert not plain["exp_avg"].any()
        plain["exp_avg"].copy_(values)
    before = codes.clone(), scale.clone()
    with in_float32(state, ("exp_avg",)) as plain:
        error = (plain["exp_avg"] - values).view(-1, 256).abs().amax(1)
        assert bool((error <= 0.01 * values.view(-1, 256).abs().amax(1)).all())
    assert torch.equal(codes, before[0]) and torch.equal(scale, before[1])  # unchanged values keep their codes


def test_without_torchao(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.optim.quant_utils", None)
    with pytest.raises(ValueError, match="state_bits is 8: it needs torchao"):
        OasisAdamW([torch.nn.Parameter(torch.zeros(2, 2))], state_bits=8)
    with pytest.raises(ValueError, match="state_bits is 4: it must be 8 or 32"):
        OasisAdamW([torch.nn.Parameter(torch.zeros(2, 2))], state_bits=4)
