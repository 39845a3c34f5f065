"""Saved bytes, matmul work and live bytes of the backward graph under a budget: torch's partitioner beside ours.

    python -m benchmarks.live_bytes --model 1024x4 --batch 4 --seq 512

Counted on graphs, with fake tensors; both partition the same rewritten graph. Live bytes are those of
`oasis_fx.plan.liveness`.
"""

from __future__ import annotations

import argparse

import torch
from tabulate import tabulate
from transformers import LlamaConfig

from benchmarks import models
from oasis_fx._torch.compiler import functorch_config
from oasis_fx.memory.node_costs import matmul_flops, saved_storages
from oasis_fx.plan.liveness import moments
from oasis_fx.plan.trace import halves_under, trace_fake
from oasis_fx.settings import Settings

SHARES = (1.0, 0.8, 0.5, 0.3, 0.2, 0.1, 0.05)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="1024x4", help="smollm2, llama-1b, llama-8b or WIDTHxLAYERS")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--vocabulary", type=int)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq", type=int, default=512)
    parser.add_argument("--rank", type=int, default=32)
    args = parser.parse_args()
    config = LlamaConfig(**models.llama(args), use_cache=False)
    traced = trace_fake(config, args.batch, args.seq, torch.float32, Settings(rank=args.rank))
    number = traced.trace.num_forward_outputs
    rows = []
    for share in SHARES:
        row = [f"{share}"]
        for ours in (False, True):
            with functorch_config.patch(activation_memory_budget=1.0 if ours else share):
                budget = share if ours and share < 1 else None
                forward, backward = halves_under(traced, budget, rewritten=True)
            static = {node.name for node in forward.find_nodes(op="placeholder")}
            live = max(moment.total for moment in moments(backward, static))
            saved = sum(saved_storages(forward, number).values())
            work = matmul_flops(forward) + matmul_flops(backward)
            row += [f"{saved / 2**20:.0f}", f"{live / 2**20:.0f}", f"{work / 1e9:.0f}"]
        rows.append(row)
    headers = ["share", "torch: saved MiB", "live MiB", "GFLOP", "ours: saved MiB", "live MiB", "GFLOP"]
    print(tabulate(rows, headers, tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    main()
