"""Host time around the compiled graphs of a training step: what lends a graph its bases and takes its gradients back.

    python -m benchmarks.wrappers --blocks 32

A net of linear layers is compiled by stock Inductor and by oasis_fx, with an inner compiler that generates no code: its
graphs return empty tensors of the right shapes, and the time for that is left out. What remains is CPU time of the
thread in Dynamo's guards, AOTAutograd's wrappers, our wrappers and autograd's engine. A GPU's host takes it too, and it
depends on the number of weights alone. A block has seven weights that read four activations, as one of a Llama has.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from functorch.compile import make_boxed_func
from tabulate import tabulate
from torch import fx, nn
from torch._inductor.compile_fx import compile_fx

from oasis_fx.backend import OasisBackend
from oasis_fx.runtime.subspaces.rules import Rule, rule_of
from oasis_fx.runtime.subspaces.store import STORE
from oasis_fx.settings import Settings

WIDTH, RANK, TOKENS = 16, 4, 8
_in_graphs = 0  # nanoseconds of the thread within compiled graphs


class Block(nn.Module):
    """The linear layers of a Llama's block, without what is between them."""

    def __init__(self) -> None:
        super().__init__()
        names = ("q", "k", "v", "o", "gate", "up", "down")
        self.layers = nn.ModuleDict({name: nn.Linear(WIDTH, WIDTH, bias=False) for name in names})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = self.layers
        x = x + a["o"](torch.tanh(a["q"](x) + a["k"](x) + a["v"](x)))
        y = torch.sin(x)
        return x + a["down"](torch.cos(a["gate"](y)) * a["up"](y))


class Net(nn.Module):
    """Blocks, one after the other."""

    def __init__(self, num_blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(num_blocks))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def empty_graph(gm: fx.GraphModule, example_inputs: Sequence[Any], **_: Any) -> Callable[..., Any]:
    """Return a graph's callable that computes nothing: it returns inputs as they are, and empty tensors."""
    inputs = {node: at for at, node in enumerate(gm.graph.find_nodes(op="placeholder"))}
    (output,) = gm.graph.find_nodes(op="output")
    plan = [(inputs.get(node), _layout(node)) for node in output.args[0]]

    def run(*args: Any) -> list[Any]:
        global _in_graphs
        start = time.thread_time_ns()
        made = [args[at] if at is not None else like and torch.empty_strided(*like) for at, like in plan]
        _in_graphs += time.thread_time_ns() - start
        return made

    return make_boxed_func(run)


def _layout(node: Any) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    value = node.meta["val"] if isinstance(node, fx.Node) else None
    return (tuple(value.shape), value.stride()) if isinstance(value, torch.Tensor) else None


def stock(gm: fx.GraphModule, example_inputs: Sequence[torch.Tensor]) -> Any:
    """Compile a graph as Inductor does, without generated code."""
    return compile_fx(gm, example_inputs, inner_compile=empty_graph)


class Contender:
    """A compiled net, whose forward and backward passes are timed by the thread's CPU time."""

    def __init__(self, num_blocks: int, rule: Rule | None, regional: bool) -> None:
        torch.manual_seed(0)
        self.net = Net(num_blocks)
        self.x = torch.randn(TOKENS, WIDTH)
        self.forward: list[int] = []
        self.backward: list[int] = []
        backend: Any = stock if rule is None else OasisBackend(Settings(rank=RANK, subspace=rule), empty_graph)
        for module in self.net.blocks if regional else [self.net]:
            module.compile(backend=backend)
        self.step()
        self.forward, self.backward = [], []

    def step(self) -> None:
        """Run a forward and a backward pass, and note what they took outside of the compiled graphs."""
        started = time.thread_time_ns() - _in_graphs
        loss = self.net(self.x).sum()
        between = time.thread_time_ns() - _in_graphs
        loss.backward()
        ended = time.thread_time_ns() - _in_graphs
        self.forward.append(between - started)
        self.backward.append(ended - between)
        self._clear()

    def _clear(self) -> None:
        """Do what an optimizer's step and `zero_grad` would: the next pass accumulates nothing."""
        for weight in self.net.parameters():
            weight.grad = None
            for subspace in STORE.all_of(weight):
                subspace.drop_statistic()

    def times(self) -> list[float]:
        """Return the least and the median time of forward and backward, and both together, in milliseconds."""
        both = [f + b for f, b in zip(self.forward, self.backward, strict=True)]
        return [pick(times) / 1e6 for times in (self.forward, self.backward, both) for pick in (min, statistics.median)]


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--calls", type=int, default=200, help="forward and backward passes of each, in turns")
    parser.add_argument("--rule", default="oja", help="name of a rule of oasis_fx.rules")
    parser.add_argument("--regional", action="store_true", help="compile each block by itself: they share one graph")
    parser.add_argument("--profile", action="store_true", help="print where the time of ours goes, by cProfile")
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    args = parser.parse_args(given)
    torch.set_num_threads(1)
    rules = {"stock": None, "ours": rule_of(args.rule)}
    contenders = {name: Contender(args.blocks, rule, args.regional) for name, rule in rules.items()}
    for _ in range(args.calls):
        for contender in contenders.values():
            contender.step()
    found = {name: contender.times() for name, contender in contenders.items()}
    headers = [f"{name} ({kind})" for name in ("forward", "backward", "both") for kind in ("min", "median")]
    rows = [[name, *times] for name, times in found.items()]
    print(f"{args.blocks} blocks of 7 weights, ms of the CPU's thread in a step, outside of the graphs")
    print(tabulate(rows, ["", *headers], floatfmt=".2f", tablefmt="github"))
    if args.out is not None:
        args.out.write_text(json.dumps({"blocks": args.blocks, "headers": headers, **found}, indent=1) + "\n")
    if args.profile:
        with cProfile.Profile() as profile:
            for _ in range(args.calls):
                contenders["ours"].step()
        pstats.Stats(profile).sort_stats("tottime").print_stats(40)


if __name__ == "__main__":
    main()
