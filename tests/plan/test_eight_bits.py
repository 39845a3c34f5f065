"""What a step in eight bits needs, as the plan counts it, beside what torch counts as such a step runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

pytest.importorskip("torchao")

from oasis_fx import OasisAdamW, oasis_backend
from oasis_fx.inspect.state_bytes import moment_bytes
from oasis_fx.plan import memory, optimizer_work

N, RANK = 512, 64


class Traffic(TorchDispatchMode):
    """Counts what operators read and write, and their number; views are none."""

    moved = operators = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if all(kind in (torch.Tensor, torch.nn.Parameter) for kind in types) and not any(
            one.alias_info is not None and not one.alias_info.is_write for one in func._schema.returns
        ):
            tensors = [t for t in tree_leaves((args, kwargs or {}, out)) if isinstance(t, torch.Tensor)]
            self.operators += 1
            self.moved += sum(t.nbytes for t in tensors if t.numel() >= N)
        return out


def step_of(bits: int, *, low_rank: bool) -> tuple[torch.nn.Module, OasisAdamW]:
    """A weight whose optimizer has made a step, and whose gradient is there for another."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = torch.nn.Linear(N, N, bias=False)
    exclude = [] if low_rank else ["*"]
    backend = oasis_backend(rank=RANK, inner="aot_eager", exclude=exclude)
    compiled = torch.compile(model, backend=backend)
    optimizer = OasisAdamW(model.parameters(), lr=1e-3, state_bits=bits)
    for _ in range(2):
        optimizer.step()
        optimizer.zero_grad()
        compiled(torch.randn(64, N)).square().sum().backward()
    return model, optimizer


@pytest.mark.filterwarnings("ignore:OasisAdamW. none of")
@pytest.mark.parametrize("low_rank", [False, True], ids=["dense", "low-rank"])
def test_bytes_and_operators_that_eight_bits_add(low_rank) -> None:
    counted = []
    for bits in (32, 8):
        _, optimizer = step_of(bits, low_rank=low_rank)
        with Traffic() as traffic:
            optimizer.step()
        counted.append(traffic)
    (moved, operators) = optimizer_work._EIGHT_BITS_LOW_RANK if low_rank else optimizer_work._EIGHT_BITS
    numbers = N * RANK if low_rank else N * N
    assert (counted[1].moved - counted[0].moved) / numbers == pytest.approx(moved, rel=0.1)
    assert counted[1].operators - counted[0].operators == pytest.approx(operators, rel=0.1)


@pytest.mark.filterwarnings("ignore:OasisAdamW. none of")
def test_bytes_that_are_decoded_at_once() -> None:
    _, optimizer = step_of(8, low_rank=False)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        optimizer.step()
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    assert peak / N**2 == pytest.approx(memory._DECODED, rel=0.1)


def test_states_are_those_of_real_tensors() -> None:
    model, optimizer = step_of(8, low_rank=True)
    state = optimizer.state[model.weight]
    kept = sum(t.nbytes for name, t in state.items() if name.startswith("exp_avg"))
    assert kept == 2 * moment_bytes(N * RANK, torch.float32, 8) < 2 * moment_bytes(N * RANK, torch.float32, 32)
