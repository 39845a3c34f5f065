"""What an optimizer step takes of its host's time: ours and stock fused AdamW, in alternation, on tensors so small that
arithmetic costs next to nothing. On a GPU this is the time before the last launch of a step.

    python -m benchmarks.step_host
    python -m benchmarks.step_host --as-on-cuda      # nothing is read, and launches of our kernels are left out
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from tabulate import tabulate

from oasis_fx import OasisAdamW, OasisLion, OasisMuon, OasisSGD, oasis_backend
from oasis_fx.runtime.optim.kernels import dispatch
from oasis_fx.runtime.subspaces import host_reads

OURS = {"adamw": OasisAdamW, "sgd": OasisSGD, "lion": OasisLion, "muon": OasisMuon}


class Training:
    """A model of tiny tensors and its optimizer, a step of which is timed."""

    def __init__(self, blocks: int, ours: str | None) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 44, "vocab_size": 64, "num_hidden_layers": blocks}
        config = LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2, use_cache=False)
        self.model: Any = LlamaForCausalLM(config).train()
        tokens = torch.randint(0, 64, (1, 16))
        self.batch = {"input_ids": tokens, "labels": tokens}
        torch.compiler.reset()
        if ours is None:
            self.optimizer: Any = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)
        else:
            self.model.compile(backend=oasis_backend(rank=4, inner="aot_eager"))
            self.optimizer = OURS[ours](self.model.parameters(), lr=1e-5)

    def step(self) -> float:
        """Take a step and return the milliseconds that the optimizer has kept its thread busy for."""
        self.model(**self.batch).loss.backward()
        start = time.thread_time()
        self.optimizer.step()
        taken = time.thread_time() - start
        self.optimizer.zero_grad()
        return 1000 * taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, nargs="+", default=[8, 32], help="depths of the Llama")
    parser.add_argument("--optimizers", nargs="+", default=["adamw"], choices=OURS)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--as-on-cuda", action="store_true", help="take the path of a GPU, without the launches")
    args = parser.parse_args()
    torch.set_num_threads(1)  # the time of other threads would not be counted
    if args.as_on_cuda:
        host_reads.reads_are_free = lambda device: False
        dispatch.DEVICES = ("cpu",)
        launches = dispatch.Kernels(lambda *_, **__: None, lambda *_, **__: None)
        dispatch._kernels = lambda: launches  # type: ignore[assignment]
    rows = [row for blocks in args.blocks for row in compare(blocks, args.optimizers, args.steps)]
    print(tabulate(rows, ["blocks", "optimizer", "host ms", "ratio to stock"], tablefmt="github", floatfmt=".2f"))


def compare(blocks: int, optimizers: list[str], steps: int) -> list[list[Any]]:
    """Return a row for each optimizer: medians over steps that alternate, after some that make states."""
    runs = {name: Training(blocks, None if name == "stock" else name) for name in ("stock", *optimizers)}
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(5 + steps):
        for name, run in runs.items():
            milliseconds = run.step()
            if number >= 5:
                taken[name].append(milliseconds)
    medians = {name: statistics.median(times) for name, times in taken.items()}
    return [[blocks, name, ms, ms / medians["stock"]] for name, ms in medians.items()]


if __name__ == "__main__":
    main()
