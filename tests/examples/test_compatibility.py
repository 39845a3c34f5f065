"""Other ways to save memory, beside this one: right together, dense with a reason, or refused by name.

docs/compatibility.md names a test for each of its rows; the last test here sees that they exist.
"""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest
import torch

from oasis_fx import LowRankGrad, OasisAdamW, OasisSGD, oasis_backend

ROOT = Path(__file__).parents[2]


class Chain(torch.nn.Module):
    """Every weight has a basis of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = torch.nn.Linear(32, 48), torch.nn.Linear(48, 32)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


class Gated(Chain):
    """``a`` and ``c`` share a basis."""

    def __init__(self) -> None:
        super().__init__()
        self.c = torch.nn.Linear(32, 48)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)) * self.c(x))


def inputs(step: int = 0) -> torch.Tensor:
    return torch.randn(40, 32, generator=torch.Generator().manual_seed(step), dtype=torch.float64)


def released(model, compiled, steps: int, make=lambda parameters: OasisAdamW(parameters, lr=1e-2)) -> list[float]:
    """An optimizer for each parameter, which steps as soon as its gradient is there."""
    optimizers = {p: make([p]) for p in model.parameters()}

    def step(parameter) -> None:
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(step)
    losses = []
    for number in range(steps):
        loss = (compiled(inputs(number)) - inputs(number).flip(1)).square().mean()
        loss.backward()
        losses.append(loss.item())
    return losses


def test_gradient_release_is_a_step_of_all() -> None:
    model = Chain().double()
    backend = oasis_backend(8, inner="aot_eager")
    found = released(model, torch.compile(model, backend=backend), 8)
    assert [s.num_updates for s in backend.stats()] == [8, 8]
    torch._dynamo.reset()
    model = Chain().double()
    compiled = torch.compile(model, backend=oasis_backend(8, inner="aot_eager"))
    optimizer, expected = OasisAdamW(model.parameters(), lr=1e-2), []
    for step in range(8):
        loss = (compiled(inputs(step)) - inputs(step).flip(1)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        expected.append(loss.item())
    assert found == expected


def test_gradient_release_of_weights_that_share_a_basis_is_a_step_of_all() -> None:
    """The first of them moves the basis; the gradients and states of the others follow by its overlap."""
    model, reference = Gated().double(), Gated().double()
    reference.load_state_dict(model.state_dict())
    n = max(p.shape[1] for p in model.parameters() if p.dim() == 2)
    compiled = torch.compile(model, backend=oasis_backend(n, inner="aot_eager"))
    released(model, compiled, 4, lambda parameters: OasisSGD(parameters, lr=0.05, momentum=0.9))
    released(reference, reference, 4, lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9))
    for one, other in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_activations_saved_on_the_cpu() -> None:
    model = Gated().double()
    compiled = torch.compile(model, backend=oasis_backend(8, inner="aot_eager"))
    gradients = []
    for _ in range(2):
        with torch.autograd.graph.save_on_cpu() if gradients else torch.enable_grad():
            loss = compiled(inputs()).square().sum()
        loss.backward()
        assert all(isinstance(p.grad, LowRankGrad) for p in model.parameters() if p.dim() == 2)
        gradients.append([getattr(p.grad, "factor", p.grad).clone() for p in model.parameters()])
        model.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_float8_training_stays_dense_and_says_so() -> None:
    float8 = pytest.importorskip("torchao.float8")
    config = float8.Float8LinearConfig(emulate=True)
    model, plain = (float8.convert_to_float8_training(Chain(), config=config) for _ in range(2))
    backend = oasis_backend(8, inner="aot_eager")
    torch.compile(model, backend=backend)(inputs().float()).square().sum().backward()
    plain(inputs().float()).square().sum().backward()
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    (graph,) = backend.compiled_graphs()
    assert len(graph.reasons) == 2 and all("no matmul" in reason for reason in graph.reasons.values())


def test_peft_adapters_train_in_subspaces_and_frozen_weights_stay() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(Gated(), peft.LoraConfig(r=12, target_modules=["a", "b", "c"]))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    compiled = torch.compile(model, backend=oasis_backend(4, inner="aot_eager"))
    optimizer = OasisAdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(6):
        loss = (compiled(inputs().float()) - inputs().float().flip(1)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    adapters = {name for name, p in model.named_parameters() if "lora_" in name}
    assert changed == adapters and len(adapters) == 6
    assert all(state["exp_avg"].shape[1] == 4 and "basis" in state for state in optimizer.state.values())


@cache
def functions_of(file: Path) -> frozenset[str]:
    return frozenset(n.name for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.FunctionDef))


@pytest.mark.parametrize("page", sorted(file.stem for file in (ROOT / "docs").glob("*.md")))
def test_whatever_a_page_calls_a_test_is_one(page) -> None:
    """Bare names of functions or files, as in the tables of docs/situations.md and docs/design.md."""
    files = list((ROOT / "tests").rglob("*.py"))
    known = {file.stem for file in files} | {
        node.name
        for file in files
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.FunctionDef)
    }
    named = set(re.findall(r"\btest_\w+", (ROOT / "docs" / f"{page}.md").read_text()))
    assert named <= known, named - known
    assert len(named) >= (15 if page in ("compatibility", "design", "situations") else 0)


def test_the_page_names_tests_that_exist() -> None:
    page = (ROOT / "docs" / "compatibility.md").read_text()
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", page)
    rows = [line for line in page.splitlines() if line.startswith("| ") and "`tests/" in line]
    assert len(rows) >= 15 and len(named) >= len(rows)
    for file, test in named:
        assert test in functions_of(ROOT / file), f"{file}::{test}"
