"""A large vocabulary under each way to keep its logits small: saved bytes, peak memory, and equal gradients.

    python -m benchmarks.cross_entropy --out benchmarks/results/cross_entropy.json
    python -m benchmarks.cross_entropy --ways plain,torch --tokens 4096

Every way is a process of its own. Gradients are compared with the way `plain` of the same backend. A way whose
package is not installed says so in its row:
`pip install --no-deps cut-cross-entropy liger-kernel` (the latter needs Triton).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from benchmarks.process_peak import peak_bytes, reset_peak

NUM_CHUNKS = 8
HeadLoss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def plain(x: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of ``x @ weight.T``: x [tokens, d], weight [vocabulary, d], target [tokens] int64."""
    return F.cross_entropy((x @ weight.T).float(), target)


def checkpointed(x: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """`plain` in chunks of tokens, whose logits are recomputed in the backward pass."""

    def part(x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy((x @ weight.T).float(), target, reduction="sum")

    chunks = zip(x.chunk(NUM_CHUNKS), target.chunk(NUM_CHUNKS), strict=True)
    sums = [checkpoint(part, a, b, use_reentrant=False) for a, b in chunks]
    return torch.stack(sums).sum() / target.numel()


def of_torch(x: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    options = torch.nn.LinearCrossEntropyOptions(
        allow_retain_graph=True
    )  # what torch.compile would force, with a warning
    return F.linear_cross_entropy(x, weight, target, options=options)


def chunked(x: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    from oasis_fx.chunked_loss import chunked_cross_entropy

    return chunked_cross_entropy(x, weight, target, num_chunks=NUM_CHUNKS)


def cut(x: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(x, weight, target, impl="torch_compile")


def liger(x: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss()(weight, x, target)


# Without the last one it leaves a head alone whose logits have less than 8 times the bytes of its inputs.
AUTO_CHUNKER = {
    "auto_chunker.enable": True,
    "auto_chunker.num_chunk": NUM_CHUNKS,
    "auto_chunker.amplify_ratio_threshold": 1,
}

# (loss, options of Inductor, whether the loss is in the compiled graph)
WAYS: dict[str, tuple[HeadLoss, dict[str, Any], bool]] = {
    "plain": (plain, {}, True),
    "auto_chunker": (plain, AUTO_CHUNKER, True),
    "torch": (of_torch, {}, True),
    "torch-outside": (of_torch, {}, False),
    "chunked": (chunked, {}, True),
    "chunked-outside": (chunked, {}, False),
    "checkpointed": (checkpointed, {}, True),
    "checkpointed-outside": (checkpointed, {}, False),
    "cut": (cut, {}, True),
    "cut-outside": (cut, {}, False),
    "liger": (liger, {}, True),
}


def measure(way: str, method: str, args: argparse.Namespace, folder: str) -> dict[str, Any]:
    """One way in this process; gradients of the first step go to ``folder``."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from oasis_fx import LowRankGrad, OasisAdamW, oasis_backend
    from oasis_fx.inspect.measure import saved_for_backward_bytes

    torch.manual_seed(0)
    torch._dynamo.config.recompile_limit = 64
    config = LlamaConfig(
        hidden_size=args.width, intermediate_size=args.width * 8 // 3, num_hidden_layers=args.layers,
        num_attention_heads=args.width // 64, num_key_value_heads=args.width // 64, vocab_size=args.vocabulary,
        tie_word_embeddings=args.tied, use_cache=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    loss_of, options, inside = WAYS[way]
    body, weight = model.model, model.lm_head.weight
    ids = torch.randint(0, args.vocabulary, (4, args.tokens // 4 + 1))
    target = ids[:, 1:].flatten()

    class WithLoss(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            x = self.model.model(ids[:, :-1]).last_hidden_state.flatten(0, 1)
            return loss_of(x, self.model.lm_head.weight, ids[:, 1:].flatten())

    backend = oasis_backend(rank=32, options=options) if method == "oasis" else None
    keywords: dict[str, Any] = {"backend": backend} if backend is not None else {"options": options}
    compiled = torch.compile(WithLoss() if inside else body, **keywords)

    def loss() -> torch.Tensor:
        if inside:
            return compiled(ids)
        return loss_of(compiled(ids[:, :-1]).last_hidden_state.flatten(0, 1), weight, target)

    if method == "oasis":
        optimizer: Any = OasisAdamW(model.parameters(), lr=1e-5)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    torch._dynamo.utils.counters.clear()
    reset_peak()
    value = loss()
    bases = [p.grad.basis for p in model.parameters() if isinstance(p.grad, LowRankGrad)]
    known = [*model.parameters(), *model.buffers(), *bases, ids, target]
    # Outside of a graph it cannot be counted: reading what a checkpoint saved computes it again, and the operator of
    # torch keeps its gradients where autograd does not show them. Peak memory has both.
    saved = saved_for_backward_bytes(value, known) if inside else None
    value.backward()
    gradients = {n: p.grad.factor if isinstance(p.grad, LowRankGrad) else p.grad for n, p in model.named_parameters()}
    row: dict[str, Any] = {
        "loss": value.item(),
        "rewritten": sum(isinstance(p.grad, LowRankGrad) for p in model.parameters()),
        "saved": saved,
        "breaks": sum(torch._dynamo.utils.counters["graph_break"].values()),
    }
    file = Path(folder) / f"{method}.pt"
    if way == "plain":
        torch.save((row["loss"], gradients), file)
    else:
        expected_loss, expected = torch.load(file)
        row["loss_error"] = abs(row["loss"] - expected_loss) / expected_loss
        row["gradient_error"] = max(float((g - expected[n]).norm() / expected[n].norm()) for n, g in gradients.items())
        del expected
    del gradients, bases, value
    optimizer.step(), optimizer.zero_grad()
    reset_peak()  # compiling, and the comparison, are not training
    for _ in range(args.steps):
        loss().backward()
        optimizer.step(), optimizer.zero_grad()
    return {**row, "peak": peak_bytes()}


def _worker(pipe: Any, *args: Any) -> None:
    try:
        pipe.send(measure(*args))
    except BaseException as error:  # the row says what became of it
        lines = traceback.format_exc().splitlines()
        pipe.send(
            {"failed": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}", "trace": lines}
        )


def table(results: dict[str, dict[str, Any]]) -> str:
    """Markdown; ratios are to `plain` of stock."""
    lines = [
        "| | graph breaks | low-rank | gradients differ by | saved, MiB | saved | peak |",
        "|---|" + "---|" * 6,
    ]
    base = results.get("stock plain", next(iter(results.values())))
    for name, row in results.items():
        if "failed" in row:
            lines.append(f"| {name} | {row['failed'][:90]} | | | | | |")
            continue
        error = f"{row['gradient_error']:.1e}" if "gradient_error" in row else "-"
        saved = f"{row['saved'] / 2**20:.0f} | {row['saved'] / base['saved']:.2f}" if row["saved"] else "- | -"
        ratio = f"{row['peak'] / base['peak']:.2f}"
        lines.append(f"| {name} | {row['breaks']} | {row['rewritten']} | {error} | {saved} | {ratio} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", default=",".join(WAYS), help="of %(default)s; `plain` is always run")
    parser.add_argument("--methods", default="stock,oasis")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tied", action="store_true", help="the head is the embedding")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    ways, methods = args.ways.split(","), args.methods.split(",")
    for given, allowed in ((ways, tuple(WAYS)), (methods, ("stock", "oasis"))):
        for name in given:
            if name not in allowed:
                parser.error(f"{name!r} is not one of {', '.join(allowed)}")
    results: dict[str, dict[str, Any]] = {}
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        for method in methods:
            for way in ["plain", *[way for way in ways if way != "plain"]]:
                mine, theirs = context.Pipe()
                process = context.Process(target=_worker, args=(theirs, way, method, args, folder))
                process.start()
                theirs.close()
                try:
                    results[f"{method} {way}"] = mine.recv()
                except EOFError:
                    results[f"{method} {way}"] = {"failed": "the process ended"}
                process.join()
                print(
                    f"{method} {way}: { ({k: v for k, v in results[f'{method} {way}'].items() if k != 'trace'}) }",
                    flush=True,
                )
    print("\n" + table(results))
    if args.out:
        settings = {**vars(args), "out": str(args.out)}
        args.out.write_text(
            json.dumps({"settings": settings, "torch": torch.__version__, "results": results}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
