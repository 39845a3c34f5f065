"""On a GPU an optimizer step waits for no number: what it reads is counted here, on the path that a GPU takes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from oasis_fx import OasisAdamW, OasisLion, OasisMuon, OasisSGD, oasis_backend
from oasis_fx.runtime.subspaces import host_reads
from oasis_fx.runtime.subspaces.rules import RULES, Oja, rule_of
from oasis_fx.runtime.subspaces.store import STORE

READS = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.equal.default,
    torch.ops.aten.is_nonzero.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten.unique_dim.default,
}


class Reads(TorchDispatchMode):
    """Lists the operators whose result the host has to know."""

    def __init__(self, on_cpu: list[torch.Tensor]) -> None:
        """Args: on_cpu: tensors that are on the CPU wherever the weights are."""
        super().__init__()
        self.on_cpu = {tensor.data_ptr() for tensor in on_cpu}
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in READS and args[0].data_ptr() not in self.on_cpu:
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(5, 64)
        self.up = torch.nn.Linear(64, 128)
        self.down = torch.nn.Linear(128, 64)

    def forward(self, x):
        return self.down(torch.relu(self.up(self.table(x)))).square().mean()


def reads_of_a_step(monkeypatch, make, dtype, rule, tail=None) -> list[str]:
    """Of the third step: the first ones make states, and first moves."""
    monkeypatch.setattr(host_reads, "reads_are_free", lambda device: False)
    torch.manual_seed(0)
    net = Net().to(dtype)
    compiled = torch.compile(net, backend=oasis_backend(32, subspace=rule, tail=tail, inner="aot_eager"))
    optimizer = make(net.parameters())
    x = torch.arange(5).repeat(16)
    for number in range(3):
        compiled(x).backward()
        counts = [
            count for p in net.parameters() for s in STORE.all_of(p) for count in (s.steps_since_due, s.num_tails)
        ]
        with Reads(counts) as reads:
            optimizer.step()
        moved = [p.detach().clone() for p in net.parameters()]
        optimizer.zero_grad()
        if number == 1:
            before = moved
    assert all(not torch.equal(one, other) for one, other in zip(before, moved, strict=True))
    return reads.found


OPTIMIZERS = {
    "adamw": OasisAdamW,
    "sgd": OasisSGD,
    "lion": OasisLion,
    "muon": OasisMuon,
    "tensor lr": lambda params: OasisAdamW(params, lr=torch.tensor(1e-3)),
    "tensor lr, sgd": lambda params: OasisSGD(params, lr=torch.tensor(1e-2)),
    "tensor lr, lion": lambda params: OasisLion(params, lr=torch.tensor(1e-4)),
    "tensor lr, muon": lambda params: OasisMuon(params, lr=torch.tensor([1e-3])),
    "tensor lr, outside": lambda params: OasisAdamW(params, lr=torch.tensor(1e-3), step_outside_subspace=True),
    "outside": lambda params: OasisAdamW(params, step_outside_subspace=True),
    "nearest": lambda params: OasisAdamW(params, stochastic_rounding=False),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_no_optimizer_reads(monkeypatch, name, dtype) -> None:
    assert reads_of_a_step(monkeypatch, OPTIMIZERS[name], dtype, Oja()) == []


@pytest.mark.parametrize("rule", [*RULES, "oja, lr auto"])
def test_no_rule_makes_a_step_read(monkeypatch, rule) -> None:
    """A rule of the batch chooses its basis within the passes, where it may look."""
    given = Oja(lr="auto") if rule == "oja, lr auto" else rule_of(rule)
    assert reads_of_a_step(monkeypatch, OasisAdamW, torch.float32, given) == []


@pytest.mark.parametrize("make", [OasisAdamW, OasisSGD, OasisLion, OasisMuon], ids=lambda make: make.__name__)
def test_no_tail_makes_a_step_read(monkeypatch, make) -> None:
    assert reads_of_a_step(monkeypatch, make, torch.bfloat16, Oja(), tail=16) == []


def test_eight_bit_states_are_not_read(monkeypatch) -> None:
    pytest.importorskip("torchao")
    assert reads_of_a_step(monkeypatch, lambda p: OasisAdamW(p, state_bits=8), torch.bfloat16, Oja()) == []


@pytest.mark.parametrize("make", [OasisAdamW, OasisSGD, OasisLion, OasisMuon], ids=lambda make: make.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_learning_rate_that_is_not_read_steps_as_a_number_does(monkeypatch, make, dtype) -> None:
    """And a schedule that changes the tensor in place is followed."""

    def trained(as_tensor: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        net = Net().to(dtype)
        compiled = torch.compile(net, backend=oasis_backend(rank=8, inner="aot_eager"))
        lr = torch.tensor(1e-2, dtype=torch.float64) if as_tensor else 1e-2
        optimizer = make(net.parameters(), lr=lr, weight_decay=0.5, stochastic_rounding=False)
        for _ in range(4):
            compiled(torch.arange(5).repeat(4)).backward()
            optimizer.step(), optimizer.zero_grad()
            if as_tensor:
                lr.mul_(0.5)
            else:
                optimizer.param_groups[0]["lr"] *= 0.5
        return [p.detach().clone() for p in net.parameters()]

    monkeypatch.setattr(host_reads, "reads_are_free", lambda device: False)
    for one, other in zip(trained(False), trained(True), strict=True):
        assert (one - other).norm() <= (1e-4 if dtype == torch.float32 else 4e-3) * one.norm()


@pytest.mark.parametrize("make", [OasisAdamW, OasisSGD, OasisLion, OasisMuon], ids=lambda make: make.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_step_that_is_left_out_on_the_device_changes_nothing(monkeypatch, make, dtype) -> None:
    """Bitwise: weights, states, bases and their counts. Moments have a bias to be divided by, so the third step is."""
    monkeypatch.setattr(host_reads, "reads_are_free", lambda device: False)
    torch.manual_seed(0)
    net = Net().to(dtype)
    compiled = torch.compile(net, backend=oasis_backend(rank=8, inner="aot_eager"))
    optimizer = make(net.parameters(), lr=1e-2)
    for spoilt in (1.0, 1.0, torch.inf):
        before = copy.deepcopy(optimizer.state_dict()["state"]), [p.detach().clone() for p in net.parameters()]
        (compiled(torch.arange(5).repeat(4)) * spoilt).backward()
        optimizer.step(), optimizer.zero_grad()
    assert optimizer.num_skipped_steps == 1
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before[1], strict=True))
    for number, state in optimizer.state_dict()["state"].items():
        for key, value in state.items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, before[0][number][key]), (number, key)
