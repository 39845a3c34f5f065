"""Run a program eagerly, under stock torch or under the backend, and keep what came of it."""

from __future__ import annotations

import operator
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch._inductor.compile_fx import compile_fx
from torch.utils.checkpoint import checkpoint

from fuzz.calling import CALLS
from fuzz.program import Program, module_text
from oasis_fx import OasisAdamW
from oasis_fx.backend import OasisBackend
from oasis_fx.compile.lowering import run_node_by_node
from oasis_fx.runtime.subspaces import rules
from oasis_fx.runtime.subspaces.rules import RULES, Rule, Sampled
from oasis_fx.runtime.subspaces.subspace import Subspace
from oasis_fx.settings import Settings

SECONDS = 120  # of the processor; a program that takes longer counts as a crash


@dataclass
class Use:
    """One read of a weight in the reference.

    Attributes:
        rows: X [N, n], or None where it is not known.
        summed: the dimensions of the weight that the matmul sums over, where they are known.
        parts: zeros that were added to the weight; their gradients are this use's part of dW.
        seen: X itself, and how often it had been changed in place by then.
    """

    weight: str
    rows: torch.Tensor | None
    summed: tuple[int, ...] = ()
    parts: list[torch.Tensor] = field(default_factory=list)
    seen: tuple[torch.Tensor, int] | None = None

    @property
    def has_changed(self) -> bool:
        """Whether X was changed in place afterwards: eager mode then has no dW of this use, and refuses to make one."""
        return self.seen is not None and self.seen[0]._version != self.seen[1]

    def gradient(self) -> torch.Tensor | None:
        """This use's part of dW, or None where it gets none or it is not known."""
        parts = [part.grad for part in self.parts if part.grad is not None]
        return sum(parts[1:], parts[0]) if parts else None


class Tapped(torch.nn.Module):
    """What the reference's module derives from."""

    def __init__(self) -> None:
        super().__init__()
        self.uses: list[Use] = []

    def get_parameter(self, target: str) -> torch.nn.Parameter:
        """As torch's, past what `tap_submodules` puts in the place of a matrix."""
        return dict(self.named_parameters(remove_duplicate=False))[target]

    def first_name(self, weight: str) -> str:
        """The name under which a weight with several is among the named parameters."""
        parameter = self.get_parameter(weight)
        return next(name for name, other in self.named_parameters() if other is parameter)

    def saw(self, weight: str, rows: torch.Tensor | None, summed: tuple[int, ...]) -> None:
        if torch.is_grad_enabled():
            use = Use(self.first_name(weight), None if rows is None else rows.detach().clone(), summed)
            use.seen = None if rows is None else (rows, rows._version)
            self.uses.append(use)

    def tap(self, weight: str, parameter: torch.Tensor | None = None) -> torch.Tensor:
        """A weight, plus zeros whose gradient will be that of this read."""
        parameter = getattr(self, weight) if parameter is None else parameter
        name = self.first_name(weight)
        uses = [use for use in self.uses if use.weight == name]
        if not uses or not parameter.requires_grad or not torch.is_grad_enabled():
            return parameter
        zeros = torch.zeros_like(parameter, requires_grad=True)
        use = next((use for use in uses if not use.parts), uses[-1])
        if use.parts and use.rows is None:  # in a loop
            use = Use(name, None, use.summed)
            self.uses.append(use)
        use.parts.append(zeros)
        return parameter + zeros

    def tap_submodules(self) -> None:
        """Let each read of a matrix by `nn.Linear` or `nn.MultiheadAttention` go through `tap`."""
        for path, module in list(self.named_modules()):
            if path and isinstance(module, torch.nn.Linear | torch.nn.MultiheadAttention):
                matrices = [name for name, weight in module.named_parameters(recurse=False) if weight.dim() >= 2]
                reads = {name: property(partial(self._read, f"{path}.{name}", name)) for name in matrices}
                module.__class__ = type(type(module).__name__, (type(module),), reads)

    def _read(self, weight: str, name: str, module: torch.nn.Module) -> torch.Tensor:
        return self.tap(weight, module._parameters[name])


@dataclass
class Run:
    """A program that has run."""

    net: Any
    outputs: list[tuple[torch.Tensor, ...]]
    batches: list[list[torch.Tensor]]
    leaves: list[torch.Tensor]
    num_backwards: int = 0
    num_calls: int = 0
    num_graphs: int = 0  # that Dynamo has made of the program: 0 in eager mode
    sampled: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)  # X and Q of dense rules


def rule(program: Program) -> Rule:
    """That of its options."""
    text = program.options.rule
    return RULES[text] if text in RULES else eval(text, vars(rules))


def our_backend(program: Program) -> Any:
    o = program.options
    settings = Settings(
        rank=o.rank,
        subspace=rule(program),
        memory_budget=o.budget,
        exclude=o.exclude,
        inner="inductor" if o.inner == "no code" else o.inner,
    )
    return OasisBackend(settings, run_node_by_node if o.inner == "no code" else None)


def stock_backend(program: Program) -> Any:
    if program.options.inner == "no code":
        return lambda gm, inputs: compile_fx(gm, inputs, inner_compile=run_node_by_node)
    return program.options.inner


def randoms(seed: int, dtype: torch.dtype) -> Callable[..., torch.Tensor]:
    """What a program's text calls ``randn``."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *size: torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype)


def run_program(program: Program, backend: Any, *, tapped: bool = False) -> Run:
    """Run a program's text as its options say; ``backend`` None is eager mode."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.manual_seed(0)
    dtype = getattr(torch, program.options.dtype)
    names: dict[str, Any] = {
        "torch": torch, "F": F, "operator": operator, "checkpoint": checkpoint, "Tapped": Tapped,
    }  # fmt: skip
    exec(compile(module_text(program, tapped=tapped), f"<program {program.seed}>", "exec"), names)
    net = names["Net"](randoms(0, dtype))
    if tapped:
        net.tap_submodules()
    run = Run(net, [], [], [])

    def nonleaf(x: torch.Tensor) -> torch.Tensor:
        run.leaves.append(x.requires_grad_())
        return x * 1

    for number in range(3):
        made = {"torch": torch, "nonleaf": nonleaf, "number": number, "randn": randoms(100 + number, dtype)}
        run.batches.append([eval(given.make, made) for given in program.inputs])
        run.leaves += [x for x in run.batches[-1] if x.is_leaf and x.requires_grad]
    trained = [parameter for parameter in net.parameters() if parameter.requires_grad]

    def keep(out: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        run.outputs.append(tuple(o.detach().clone() for o in out))
        run.num_calls += torch.is_grad_enabled()
        return out

    def loss(out: tuple[torch.Tensor, ...]) -> torch.Tensor:
        read = [out[i] for i in program.in_loss if out[i].requires_grad]
        return sum((o * torch.linspace(-1, 1.5, o.numel()).to(o).view(o.shape)).sum() for o in read)  # type: ignore[return-value]

    def done() -> None:
        run.num_backwards += 1

    def step() -> None:
        if backend is not None and trained:
            OasisAdamW(trained, lr=0.0, weight_decay=0.0).step()
        net.zero_grad()
        run.num_backwards = run.num_calls = 0
        if tapped:
            net.uses.clear()

    called = net if backend is None else torch.compile(net, backend=backend, dynamic=program.options.dynamic)
    calls = {
        "f": called, "batches": run.batches, "loss": loss,
        "keep": keep, "done": done, "step": step, "torch": torch, "trained": trained,
    }  # fmt: skip
    with _note_sampled(run.sampled), _limited(SECONDS):
        exec(CALLS[program.options.calls], calls)
    run.num_graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    return run


def tensors(run: Run) -> Iterator[torch.Tensor]:
    yield from (t for out in run.outputs for t in out)
    yield from (p.grad for p in [*run.net.parameters(), *run.leaves] if p.grad is not None)


@contextmanager
def _limited(seconds: int) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TimeoutError(f"over {seconds} s")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


@contextmanager
def _note_sampled(noted: list[tuple[torch.Tensor, torch.Tensor]]) -> Iterator[None]:
    """Within: each X that the rule `sampled` gets is noted with the basis that it chooses."""
    choose = Sampled.choose

    def noting(self: Sampled, batch: torch.Tensor, subspace: Subspace, generator: torch.Generator) -> torch.Tensor:
        basis = choose(self, batch, subspace, generator)
        noted.append((batch.detach().clone(), basis.detach().clone()))
        return basis

    Sampled.choose = noting  # type: ignore[method-assign]
    try:
        yield
    finally:
        Sampled.choose = choose  # type: ignore[method-assign]
