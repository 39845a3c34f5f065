"""Captured energy, drift and condition: against their definitions, computed from whole activations and bases."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from oasis_fx import OasisAdamW, oasis_backend

EAGER = {"inner": "aot_eager"}


def net() -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(12, 20), torch.nn.Tanh(), torch.nn.Linear(20, 7)).double()


def batch(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(9, 12, dtype=torch.float64, generator=generator) * torch.logspace(0, -1, 12, dtype=torch.float64)


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_follow_their_definitions(inner) -> None:
    model = net()
    backend = oasis_backend(rank=3, inner=inner)
    compiled = torch.compile(model, backend=backend)
    optimizer = OasisAdamW(model.parameters(), lr=1e-2)
    for step in range(3):
        xs = [batch(2 * step), batch(2 * step + 1)]  # two micro-batches
        for x in xs:
            compiled(x).square().sum().backward()
        q = model[0].weight.grad.basis.detach().clone()
        optimizer.step()
        after = model[0].weight.grad.subspace.basis.detach()
        optimizer.zero_grad()
        first, second = backend.stats()
        whole = torch.cat(xs)
        assert math.isclose(
            first.captured_energy, float((whole @ q).square().sum() / whole.square().sum()), rel_tol=1e-9
        )
        # The sines of the angles between the two spaces.
        cosines = torch.linalg.svdvals(q.T @ after).clamp(max=1)
        assert math.isclose(first.drift, float((1 - cosines.square()).mean().sqrt()), abs_tol=1e-7)
        assert (first.name, first.shape, first.num_updates) == ("0.weight", (12, 3), step + 1)
        assert 0 < second.captured_energy < 1 and second.shape == (20, 3)
        assert 1 <= first.condition < 1e6


@pytest.mark.parametrize(
    "layer, rows",
    [
        (torch.nn.Conv2d(3, 8, 3, padding=1), lambda x: F.unfold(x, 3, padding=1)),
        (torch.nn.Conv2d(3, 8, 2, stride=2), lambda x: F.unfold(x, 2, stride=2)),
    ],
    ids=["overlapping patches", "patches"],
)
def test_energy_of_a_convolution_is_that_of_its_patches(layer, rows) -> None:
    layer = copy.deepcopy(layer).double()
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    backend = oasis_backend(rank=2, **EAGER)
    torch.compile(layer, backend=backend)(x).square().sum().backward()
    patches = rows(x).transpose(1, 2).flatten(0, 1)
    q = layer.weight.grad.basis.detach().clone()
    OasisAdamW(layer.parameters()).step()
    (found,) = backend.stats()
    assert math.isclose(
        found.captured_energy, float((patches @ q).square().sum() / patches.square().sum()), rel_tol=1e-9
    )


def test_float16_statistics_are_in_one_unit() -> None:
    model = torch.nn.Linear(12, 5, bias=False).half()
    x = torch.randn(9, 12).half()
    backend = oasis_backend(rank=3, **EAGER)
    torch.compile(model, backend=backend)(x).sum().backward()
    q = model.weight.grad.basis.detach().clone()
    OasisAdamW(model.parameters()).step()
    (found,) = backend.stats()
    expected = float((x.float() @ q).square().sum() / x.float().square().sum())
    assert math.isclose(found.captured_energy, expected, rel_tol=1e-2)


def test_names_of_blocks_compiled_one_by_one() -> None:
    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = net()[0], net()[2]

        def forward(self, x):
            return self.down(torch.tanh(self.up(x)))

    blocks = torch.nn.ModuleList(Block() for _ in range(2))
    backend = oasis_backend(rank=3, **EAGER)
    for block in blocks:
        block.compile(backend=backend)
        block(batch(0)).sum().backward()
    assert [s.name for s in backend.stats()] == ["up.weight", "down.weight", "up.weight (2)", "down.weight (2)"]
    assert [s.name for s in backend.stats(blocks)] == ["0.up.weight", "0.down.weight", "1.up.weight", "1.down.weight"]
    assert [s.name for s in backend.stats(blocks[1])] == ["up.weight", "down.weight"]


def test_before_the_first_step_and_without_energies() -> None:
    model = net()
    backend = oasis_backend(rank=3, stats=False, **EAGER)
    compiled = torch.compile(model, backend=backend)
    assert backend.stats() == () and backend.stats().flat() == {}
    compiled(batch(0)).sum().backward()
    assert all(math.isnan(s.drift) for s in backend.stats()) and backend.stats().flat() == {}
    assert model[0].weight.grad.subspace.energy_sum is None
    OasisAdamW(model.parameters()).step()
    flat = backend.stats().flat("train")
    assert set(flat) == {f"train/{n}/{q}" for n in ("0.weight", "2.weight", "mean") for q in ("drift", "condition")}
    mean = sum(flat[f"train/{n}/drift"] for n in ("0.weight", "2.weight")) / 2
    assert math.isclose(flat["train/mean/drift"], mean)


def test_a_step_that_moves_no_basis_keeps_the_last_numbers() -> None:
    model = net()
    backend = oasis_backend(rank=3, **EAGER)
    compiled = torch.compile(model, backend=backend)
    optimizer = OasisAdamW(model.parameters(), lr=1e-2)
    compiled(batch(0)).sum().backward()
    optimizer.step(), optimizer.zero_grad()
    before = backend.stats()
    (compiled(batch(1)) * torch.inf).sum().backward()
    with pytest.warns(RuntimeWarning, match="not finite"):
        optimizer.step()
    optimizer.zero_grad()
    assert backend.stats() == before
    compiled(torch.zeros(9, 12, dtype=torch.float64)).sum().backward()  # a statistic of zero
    optimizer.step()
    assert backend.stats()[0] == dataclasses.replace(before[0], missed=1)


def test_as_a_table() -> None:
    model = net()
    backend = oasis_backend(rank=3, **EAGER)
    torch.compile(model, backend=backend)(batch(0)).sum().backward()
    OasisAdamW(model.parameters()).step()
    lines = str(backend.stats()).splitlines()
    assert "captured" in lines[0] and len([line for line in lines if line.startswith(("0.weight", "2.weight"))]) == 2


def test_a_deleted_model_is_forgotten() -> None:
    model = net()
    backend = oasis_backend(rank=3, **EAGER)
    compiled = torch.compile(model, backend=backend)
    compiled(batch(0)).sum().backward()
    assert len(backend.stats()) == 2
    del model, compiled
    torch._dynamo.reset()
    import gc

    gc.collect()
    assert backend.stats() == ()
