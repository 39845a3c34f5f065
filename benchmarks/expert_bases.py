"""One basis for all experts of a layer, or one for each: which trains better at the same memory?

    python -m benchmarks.expert_bases --out benchmarks/results        # about 20 minutes on one core

At rank 22 a shared basis takes the optimizer memory that a basis for each expert takes at rank 16.

A byte-level decoder with top-2 mixtures of experts learns Python source (the standard library's). The experts'
products run in eager mode through the runtime that compiled graphs use: subspaces, coordinate slots, OasisAdamW.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tabulate import tabulate

from oasis_fx import OasisAdamW
from oasis_fx.graph.matricization import LINEAR
from oasis_fx.inspect.measure import optimizer_bytes
from oasis_fx.runtime.gradients.slots import Group, lend
from oasis_fx.runtime.subspaces.spec import SubspaceSpec
from oasis_fx.runtime.subspaces.store import STORE


class _Product(torch.autograd.Function):
    """``x @ w.T`` that gives C to the basis and G to the slot: what a rewritten graph computes."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, w: torch.Tensor, basis: torch.Tensor, slot: torch.Tensor) -> torch.Tensor:
        p = x @ basis
        ctx.save_for_backward(w, p, x.T @ p)
        return x @ w.T

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        w, p, statistic = ctx.saved_tensors
        return dy @ w, None, statistic, dy.T @ p


class Experts(torch.nn.Module):
    """Top-2 mixture of two-layer experts. ``shared``: one basis for all experts; ``rank`` None: dense gradients."""

    def __init__(self, width: int, hidden: int, num_experts: int, rank: int | None, shared: bool) -> None:
        super().__init__()
        self.router = torch.nn.Linear(width, num_experts, bias=False)
        self.up = torch.nn.ParameterList(torch.randn(hidden, width) / width**0.5 for _ in range(num_experts))
        self.down = torch.nn.ParameterList(torch.randn(width, hidden) / hidden**0.5 for _ in range(num_experts))
        self.rank, self.shared = rank, shared

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.flatten(0, -2)
        gates, chosen = self.router(tokens).softmax(-1).topk(2)
        gates = gates / gates.sum(-1, keepdim=True)
        places = [(chosen == expert).nonzero(as_tuple=True) for expert in range(len(self.up))]
        hidden = self._products([tokens[rows] for rows, _ in places], list(self.up))
        outputs = self._products([F.gelu(h) for h in hidden], list(self.down))
        total = torch.zeros_like(tokens)
        for (rows, columns), output in zip(places, outputs, strict=True):
            total = total.index_add(0, rows, output * gates[rows, columns, None])
        return total.view_as(x)

    def _products(self, xs: Sequence[torch.Tensor], weights: list[torch.Tensor]) -> list[torch.Tensor]:
        if self.rank is None or not torch.is_grad_enabled():
            return [F.linear(x, w) for x, w in zip(xs, weights, strict=True)]
        spec = SubspaceSpec(self.rank)
        groups = [weights] if self.shared else [[w] for w in weights]
        features = [(LINEAR,) * len(group) for group in groups]
        subspaces = [STORE.resolve(group, spec, dims) for group, dims in zip(groups, features, strict=True)]
        lent = lend([Group(s, tuple(g), f) for s, g, f in zip(subspaces, groups, features, strict=True)])
        bases = [basis for basis, group in zip(lent.bases, groups, strict=True) for _ in group]
        return [_Product.apply(x, w, q, slot) for x, w, q, slot in zip(xs, weights, bases, lent.slots, strict=True)]


class Decoder(torch.nn.Module):
    def __init__(self, args: argparse.Namespace, rank: int | None, shared: bool) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(256, args.width)
        self.places = torch.nn.Embedding(args.length, args.width)
        for table in (self.table, self.places):
            torch.nn.init.normal_(table.weight, std=0.02)
        self.attention = torch.nn.ModuleList(
            torch.nn.MultiheadAttention(args.width, 4, batch_first=True) for _ in range(args.layers)
        )
        self.experts = torch.nn.ModuleList(
            Experts(args.width, 2 * args.width, args.experts, rank, shared) for _ in range(args.layers)
        )
        self.norms = torch.nn.ModuleList(torch.nn.LayerNorm(args.width) for _ in range(2 * args.layers + 1))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        length = tokens.shape[1]
        h = self.table(tokens) + self.places(torch.arange(length))
        mask = torch.nn.Transformer.generate_square_subsequent_mask(length)
        for index, (attention, experts) in enumerate(zip(self.attention, self.experts, strict=True)):
            x = self.norms[2 * index](h)
            h = h + attention(x, x, x, attn_mask=mask, is_causal=True, need_weights=False)[0]
            h = h + experts(self.norms[2 * index + 1](h))
        return F.linear(self.norms[-1](h), self.table.weight)


def corpus() -> torch.Tensor:
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return torch.frombuffer(bytearray(b"".join(f.read_bytes() for f in files)), dtype=torch.uint8)


def train(args: argparse.Namespace, rank: int | None, shared: bool, seed: int) -> dict[str, float]:
    torch.manual_seed(seed)
    text = corpus()
    split = len(text) * 9 // 10
    model = Decoder(args, rank, shared)
    lr = args.dense_lr if rank is None else args.lr
    optimizer = OasisAdamW(model.parameters(), lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=args.steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(seed)

    def loss_on(first: int, last: int) -> torch.Tensor:
        starts = torch.randint(first, last - args.length - 1, (args.batch,), generator=generator).tolist()
        rows = torch.stack([text[s : s + args.length + 1] for s in starts]).long()
        return F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())

    for _ in range(args.steps):
        loss_on(0, split).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step(), schedule.step(), optimizer.zero_grad()
    generator.manual_seed(10_000)
    with torch.no_grad():
        held_out = statistics.fmean(loss_on(split, len(text)).item() for _ in range(40))
    return {"held_out": held_out, "optimizer_mib": optimizer_bytes(optimizer) / 2**20}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"width": 128, "layers": 2, "experts": 8, "length": 128, "batch": 8, "steps": 1000}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--dense-lr", type=float, default=1e-3)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--plans", default="dense:0,shared:16,own:16,shared:22", help="dense, shared or own, and the rank"
    )
    parser.add_argument("--out", type=Path, help="folder for the raw results")
    args = parser.parse_args()
    results: dict[str, list[dict[str, float]]] = {}
    rows = []
    for name in args.plans.split(","):
        kind, rank = name.split(":")
        results[name] = [train(args, int(rank) or None, kind == "shared", seed) for seed in range(args.seeds)]
        losses = [result["held_out"] for result in results[name]]
        rows.append((name, f"{results[name][0]['optimizer_mib']:.2f}", *(f"{loss:.4f}" for loss in losses)))
        print(*rows[-1], flush=True)
    print(tabulate(rows, ["bases", "optimizer MiB", *(f"loss, seed {seed}" for seed in range(args.seeds))], "github"))
    if args.out:
        record = {"settings": {**vars(args), "out": str(args.out)}, "torch": torch.__version__, "results": results}
        (args.out / "expert_bases.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
