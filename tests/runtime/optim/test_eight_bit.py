"""States in eight bits: their size, their error, checkpoints."""

from __future__ import annotations

import sys

import pytest
import torch

from oasis_fx import OasisAdamW, oasis_backend
from oasis_fx.inspect.measure import optimizer_bytes
from oasis_fx.runtime.optim import chunks
from oasis_fx.runtime.optim.eight_bit import encode, in_float32, new_codes


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
    with in_float32([state], ("exp_avg",)) as (plain,):
        assert not plain["exp_avg"].any()
        plain["exp_avg"].copy_(values)
    before = codes.clone(), scale.clone()
    with in_float32([state], ("exp_avg",)) as (plain,):
        error = (plain["exp_avg"] - values).view(-1, 256).abs().amax(1)
        assert bool((error <= 0.01 * values.view(-1, 256).abs().amax(1)).all())
    assert torch.equal(codes, before[0]) and torch.equal(scale, before[1])  # unchanged values keep their codes


def test_blocks_that_have_not_changed_keep_their_codes_beside_others_that_have() -> None:
    codes, scale = new_codes(torch.empty(64, 64))
    state = {"exp_avg": codes, "exp_avg_scale": scale}
    with in_float32([state], ("exp_avg",)) as (plain,):
        plain["exp_avg"].normal_(generator=torch.Generator().manual_seed(0))
    before = codes.clone()
    codes[:4] = 3  # codes that no coding gives: the largest number of a block is 1 times its scale
    scale[0] = 1e-3
    with in_float32([state], ("exp_avg",)) as (plain,):
        plain["exp_avg"][4:8] *= 2
    assert bool((codes[:4] == 3).all()) and torch.equal(codes[4:], before[4:])


@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_those_of_torchao(signed: bool) -> None:
    from torchao.optim.quant_utils import create_dynamic_map, quantize_8bit_with_qmap, scale_tensor

    values = torch.randn(1 << 16, generator=torch.Generator().manual_seed(0))
    values = values * torch.logspace(-4, 4, 1 << 16)
    values = values if signed else values.square()
    table = torch.tensor(create_dynamic_map(signed))
    scaled, scales = scale_tensor(values, 256)
    codes, found = encode(values, signed)
    expected = quantize_8bit_with_qmap(scaled, table)
    assert torch.equal(found, scales)
    differ = codes != expected
    assert int(differ.sum()) <= 3  # on the midpoint of two codes, to rounding
    errors, least = ((table[chosen.int()] - scaled).abs() for chosen in (codes, expected))
    torch.testing.assert_close(errors, least, rtol=1e-5, atol=0)


def test_weights_step_alike_in_pieces_and_whole(monkeypatch) -> None:
    whole, _, _ = train(8, range(4))
    monkeypatch.setattr(chunks, "CHUNK", 512)
    cut, optimizer, _ = train(8, range(4))
    for one, other in zip(cut.parameters(), whole.parameters(), strict=True):
        assert torch.equal(one, other)
    assert all(float(state["step"]) == 4 for state in optimizer.state.values())


def test_moments_that_began_in_32_bits_go_on_beside_those_in_eight() -> None:
    """Of two weights of one shape, whose states are transported together."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.Linear(256, 64), torch.nn.Linear(64, 256))
    compiled = torch.compile(net, backend=oasis_backend(16, inner="aot_eager"))
    optimizer = OasisAdamW(net.parameters(), lr=1e-3, state_bits=32)
    for frozen in (True, False):
        net[2].weight.requires_grad_(not frozen)
        optimizer.param_groups[0]["state_bits"] = 32 if frozen else 8
        for _ in range(2):
            compiled(torch.randn(32, 64)).square().mean().backward()
            optimizer.step(), optimizer.zero_grad()
    dtypes = [optimizer.state[net[place].weight]["exp_avg"].dtype for place in (0, 2)]
    assert dtypes == [torch.float32, torch.uint8]
    assert all(bool(weight.isfinite().all()) for weight in net.parameters())


def test_without_torchao(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.optim.quant_utils", None)
    with pytest.raises(ValueError, match="state_bits is 8: it needs torchao"):
        OasisAdamW([torch.nn.Parameter(torch.zeros(2, 2))], state_bits=8)
    with pytest.raises(ValueError, match="state_bits is 4: it must be 8 or 32"):
        OasisAdamW([torch.nn.Parameter(torch.zeros(2, 2))], state_bits=4)
