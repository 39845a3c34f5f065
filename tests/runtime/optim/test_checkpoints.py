"""What a checkpoint survives: killing, safetensors, torch.distributed.checkpoint."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time

import pytest
import torch

from oasis_fx import OasisAdamW, OasisMuon, oasis_backend
from oasis_fx.integrations.checkpoint import from_tensors, to_tensors

PROGRAM = """
import os, sys, time, torch
from oasis_fx import AutoRank, OasisAdamW, oasis_backend
from oasis_fx.rules import Oja
from oasis_fx.runtime.optim import step as optimizer_step

optimizer_step.RANK_STEPS = (20,)
file, steps = sys.argv[1], int(sys.argv[2])
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(24, 32), torch.nn.Tanh(), torch.nn.Linear(32, 24)).bfloat16()
compiled = torch.compile(model, backend=oasis_backend(AutoRank(0.25), subspace=Oja(lr="auto"), inner="aot_eager"))
optimizer = OasisAdamW(model.parameters(), lr=1e-2)
begin = 0
if os.path.exists(file):
    saved = torch.load(file, weights_only=True)
    model.load_state_dict(saved["model"]), optimizer.load_state_dict(saved["optimizer"])
    begin = saved["step"]
print("begins at", begin, flush=True)
for step in range(begin, steps):
    print("step", step, flush=True)
    time.sleep(0.01)  # so that there are moments to kill it at
    x = torch.randn(16, 24, generator=torch.Generator().manual_seed(step)).bfloat16()
    (compiled(x) - x.flip(1)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 3 == 2 or step == steps - 1:
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
        torch.save(state, file + ".new")
        os.replace(file + ".new", file)
"""


@pytest.mark.slow
def test_killed_at_any_moment_it_ends_where_it_would_have(tmp_path) -> None:
    """Ranks are shared out at the 20th step here: kills fall before, about and after it."""
    program, steps = tmp_path / "program.py", 60
    program.write_text(PROGRAM)

    def start(file: str) -> subprocess.Popen:
        command = [sys.executable, program, tmp_path / file, str(steps)]
        return subprocess.Popen([str(c) for c in command], stdout=subprocess.PIPE, text=True)

    whole_run = start("whole")
    whole_run.communicate(timeout=240)
    assert whole_run.returncode == 0
    moments, begun = random.Random(0), []
    for _ in range(3):
        process = start("killed")
        begun.append(int(process.stdout.readline().split()[-1]))
        for _ in range(moments.randint(6, 18)):  # by steps and not by seconds: machines differ
            process.stdout.readline()
        time.sleep(moments.uniform(0.0, 0.05))
        process.send_signal(signal.SIGKILL)
        process.communicate()
    last = start("killed")
    last.communicate(timeout=240)
    assert last.returncode == 0
    assert 0 == begun[0] < begun[1] < begun[2] < steps
    whole, killed = (torch.load(tmp_path / name, weights_only=True) for name in ("whole", "killed"))
    assert killed["step"] == steps
    assert sum("basis" in state for state in whole["optimizer"]["state"].values()) == 2
    for name, weight in whole["model"].items():
        assert torch.equal(weight, killed["model"][name]), name
    expected, found = to_tensors(whole["optimizer"]), to_tensors(killed["optimizer"])
    assert expected[1] == found[1]
    assert all(torch.equal(tensor, found[0][name]) for name, tensor in expected[0].items())


class Net(torch.nn.Module):
    """``a`` and ``b`` share a basis."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = (torch.nn.Linear(16, 16) for _ in range(3))

    def forward(self, x):
        return self.c(torch.tanh(self.a(x)) * self.b(x))


def trained(make=OasisAdamW, steps: int = 3, **settings):
    torch._dynamo.reset()
    model = Net()
    compiled = torch.compile(model, backend=oasis_backend(4, inner="aot_eager", **settings))
    optimizer = make(model.parameters(), lr=1e-2)
    train(compiled, optimizer, range(steps))
    return model, compiled, optimizer


def train(compiled, optimizer, steps) -> list[float]:
    losses = []
    for step in steps:
        x = torch.randn(20, 16, generator=torch.Generator().manual_seed(step))
        loss = (compiled(x) - x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("rule", ["oja", "dct", "gradient_power"])
@pytest.mark.parametrize("make", [OasisAdamW, OasisMuon], ids=lambda make: make.__name__)
def test_safetensors(tmp_path, make, rule) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    from safetensors import safe_open

    model, compiled, optimizer = trained(make, subspace=rule)
    tensors, text = to_tensors(optimizer.state_dict())
    safetensors.save_file(tensors, tmp_path / "optimizer.safetensors", {"oasis_fx": text})
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = train(compiled, optimizer, range(3, 7))

    model, compiled, optimizer = trained(make, 0, subspace=rule)
    with safe_open(tmp_path / "optimizer.safetensors", "pt") as file:
        read = {name: file.get_tensor(name) for name in file.keys()}  # it is no dict
        saved = from_tensors(read, file.metadata()["oasis_fx"])
    model.load_state_dict(weights)
    optimizer.load_state_dict(saved)
    assert train(compiled, optimizer, range(3, 7)) == expected
    if rule == "oja":  # two bases for three weights
        assert sum(name.endswith("/basis") for name in tensors) == 2


def test_flat_and_back_is_the_same() -> None:
    shared = torch.arange(6.0).view(2, 3)
    given = {
        "state": {0: {"a": shared, "t": (1, 2)}, 1: {"a": shared, "part": shared[0], "turned": shared.T}},
        "param_groups": [{"lr": 0.1, "params": [0, 1], "flag": None, "text": "x", "on": True}],
    }
    tensors, text = to_tensors(given)
    found = from_tensors(tensors, text)
    assert found["param_groups"] == given["param_groups"] and found["state"][0]["t"] == (1, 2)
    assert found["state"][0]["a"] is found["state"][1]["a"]
    for name in ("part", "turned"):
        assert torch.equal(found["state"][1][name], given["state"][1][name])
    with pytest.raises(ValueError, match="state/x is"):
        to_tensors({"state": {"x": object()}})


def test_equal_addresses_of_two_devices_are_two_tensors(monkeypatch) -> None:
    monkeypatch.setattr(torch.Tensor, "data_ptr", lambda tensor: 1)
    tensors, _ = to_tensors({"state": {"a": torch.zeros(2), "b": torch.zeros(2, device="meta")}})
    assert {name: tensor.device.type for name, tensor in tensors.items()} == {"state/a": "cpu", "state/b": "meta"}


def test_distributed_checkpoint(tmp_path) -> None:
    from torch.distributed import checkpoint as dcp

    model, compiled, optimizer = trained()
    dcp.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, checkpoint_id=tmp_path / "saved")
    expected = train(compiled, optimizer, range(3, 7))

    model, compiled, optimizer = trained(steps=1)  # its states have their shapes
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    dcp.load(state, checkpoint_id=tmp_path / "saved")
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    assert train(compiled, optimizer, range(3, 7)) == expected


def test_a_model_has_no_names_of_ours() -> None:
    model, _, _ = trained()
    assert list(model.state_dict()) == list(Net().state_dict())
    Net().load_state_dict(model.state_dict())
