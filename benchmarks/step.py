"""A whole training step, contender against contender: seconds, memory, compile time.

    python benchmarks/step.py --model smollm2 --batch 4 --seq 256 --out benchmarks/results
    python benchmarks/step.py --model 1024x4 --dtype bfloat16 --device cuda --batch 8 --seq 2048

Each contender is a process of its own with an empty compile cache; they step in turns, so that a time is
comparable to the one beside it. Sizes are counted on real tensors.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

CONTENDERS = ("stock", "stock-recompute", "oasis", "oasis-recompute")
# By default. Also oasis-no-stats, and any share of saved bytes: stock-budget0.5, oasis-budget0.1.


class Contender:
    """A model in training by one method, in this process."""

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        import torch

        from oasis_fx import OasisAdamW, oasis_backend

        torch.manual_seed(0)
        torch.set_float32_matmul_precision(args.matmul_precision)
        self.torch, self.args = torch, args
        self.model = build_model(args)
        vocabulary = self.model.config.vocab_size
        self.inputs = torch.randint(0, vocabulary, (args.batch, args.seq), device=args.device)
        # Exact and free in stock torch: recompute what is cheap although the backward must materialize it.
        recompute = name.endswith("-recompute")
        torch._functorch.config.ban_recompute_materialized_backward = not recompute
        share = float(name.partition("-budget")[2] or 1)
        if name.startswith("oasis"):
            stats = not name.endswith("-no-stats")
            self.model.compile(backend=oasis_backend(rank=args.rank, memory_budget=share, stats=stats))
            self.optimizer: Any = OasisAdamW(self.model.parameters(), lr=1e-5)
        else:
            torch._functorch.config.activation_memory_budget = share
            self.model.compile()
            self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)
        reset_peak(args.device)

    def step(self) -> dict[str, float]:
        marks = [self.now()]
        loss = self.model(input_ids=self.inputs, labels=self.inputs).loss
        marks.append(self.now())
        loss.backward()
        marks.append(self.now())
        self.optimizer.step()
        self.optimizer.zero_grad()
        marks.append(self.now())
        names = ("forward", "backward", "optimizer")
        parts = {name: b - a for name, a, b in zip(names, marks[:-1], marks[1:], strict=True)}
        return {**parts, "step": marks[-1] - marks[0], "loss": loss.item()}

    def sizes(self) -> dict[str, int]:
        from oasis_fx import LowRankGrad
        from oasis_fx.measure import gradient_bytes, optimizer_bytes, saved_for_backward_bytes

        peak = peak_bytes(self.args.device)
        loss = self.model(input_ids=self.inputs, labels=self.inputs).loss
        states = self.optimizer.state
        bases = [s["basis"] for s in states.values() if "basis" in s]
        known = [*self.model.parameters(), *self.model.buffers(), *bases, self.inputs]
        saved = saved_for_backward_bytes(loss, known)
        loss.backward()
        block = [p for name, p in self.model.named_parameters() if "layers." in name and p.dim() == 2]
        of_block = {id(t): t for p in block for t in states[p].values() if isinstance(t, self.torch.Tensor)}
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in of_block.values()}
        return {
            "peak": peak,
            "saved": saved,
            "gradients": gradient_bytes(self.model.parameters()),
            "optimizer": optimizer_bytes(self.optimizer),
            "block_gradients_and_optimizer": gradient_bytes(block) + sum(storages.values()),
            "rewritten": sum(isinstance(p.grad, LowRankGrad) for p in self.model.parameters()),
        }

    def now(self) -> float:
        if self.args.device == "cuda":
            self.torch.cuda.synchronize()
        return time.perf_counter()


def build_model(args: argparse.Namespace) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    if args.model == "smollm2":  # the shape of the demo's model; its weights do not matter for time
        config = LlamaConfig(
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=args.layers or 30,
            num_attention_heads=9,
            num_key_value_heads=3,
            vocab_size=49152,
            tie_word_embeddings=True,
            use_cache=False,
        )
    else:
        width, layers = map(int, args.model.split("x"))
        config = LlamaConfig(
            hidden_size=width,
            intermediate_size=width * 11 // 4,
            num_hidden_layers=layers,
            num_attention_heads=width // 64,
            num_key_value_heads=width // 64,
            vocab_size=args.vocabulary,
            use_cache=False,
        )
    return LlamaForCausalLM(config).to(args.device, getattr(torch, args.dtype))


def reset_peak(device: str) -> None:
    if device == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(device: str) -> int:
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def work(name: str, args: argparse.Namespace, cache: str, pipe: Any) -> None:
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
    try:
        contender = Contender(name, args)
        pipe.send("ready")
        while (request := pipe.recv()) is not None:
            pipe.send(getattr(contender, request)())
    except BaseException:
        pipe.send({"error": traceback.format_exc()})


def measure(args: argparse.Namespace) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    pipes, results = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for name in args.contenders:
            pipes[name], theirs = context.Pipe()
            context.Process(target=work, args=(name, args, f"{folder}/{name}", theirs), daemon=True).start()
            ask(pipes[name])
            results[name] = {"compile_and_first_step": ask(pipes[name], "step")["step"], "steps": []}
            print(f"{name}: first step {results[name]['compile_and_first_step']:.1f} s", flush=True)
        for number in range(args.steps + 2):
            for name, pipe in pipes.items():
                done = ask(pipe, "step")
                if number >= 2:  # warm caches first
                    results[name]["steps"].append(done)
        for name, pipe in pipes.items():
            results[name]["sizes"] = ask(pipe, "sizes")
            pipe.send(None)
    return results


def ask(pipe: Any, request: str | None = None) -> Any:
    if request is not None:
        pipe.send(request)
    answer = pipe.recv()
    if isinstance(answer, dict) and "error" in answer:
        raise RuntimeError(answer["error"])
    return answer


def table(results: dict[str, Any]) -> str:
    from tabulate import tabulate

    first = next(iter(results.values()))
    medians = {n: {k: statistics.median(s[k] for s in r["steps"]) for k in r["steps"][0]} for n, r in results.items()}
    base = medians[next(iter(results))]
    rows = []
    for name, result in results.items():
        times = [f"{medians[name][k] / base[k]:.2f}" for k in ("step", "forward", "backward", "optimizer")]
        sizes = [
            f"{result['sizes'][k] / 2**20:.0f} ({result['sizes'][k] / max(1, first['sizes'][k]):.2f})"
            for k in ("saved", "block_gradients_and_optimizer", "peak")
        ]
        compiling = result["compile_and_first_step"] / first["compile_and_first_step"]
        rows.append(
            [
                name,
                f"{medians[name]['step']:.3f}",
                *times,
                *sizes,
                f"{compiling:.2f}",
                result["sizes"]["rewritten"],
            ]
        )
    headers = [
        "",
        "s/step",
        "step",
        "forward",
        "backward",
        "optimizer",
        "saved MiB",
        "block grad+opt MiB",
        "peak MiB",
        "compile",
        "rewritten",
    ]
    return tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="smollm2, or WIDTHxLAYERS for a Llama of that size")
    parser.add_argument("--layers", type=int, help="blocks of smollm2 (30)")
    parser.add_argument("--vocabulary", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq", type=int, default=256)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--matmul-precision", default="highest")
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--contenders", type=lambda text: text.split(","), default=list(CONTENDERS))
    parser.add_argument("--out", type=Path, help="folder for the raw results")
    args = parser.parse_args()
    results = measure(args)
    import torch

    device = (
        torch.cuda.get_device_name()
        if args.device == "cuda"
        else f"CPU {platform.machine()}, {torch.get_num_threads()} threads"
    )
    text = table(results)
    title = f"{args.model} {args.dtype}, {args.batch} x {args.seq} tokens, rank {args.rank}"
    title += f"; {device}, torch {torch.__version__}"
    print(f"\n{title}; ratios to {args.contenders[0]}, medians of {args.steps}\n\n{text}")
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        kind = "gpu" if args.device == "cuda" else "cpu"
        name = f"step-{args.model}-{args.dtype}-{args.batch}x{args.seq}-r{args.rank}-{kind}"
        settings = {k: v if not isinstance(v, Path) else str(v) for k, v in vars(args).items()}
        record = {"settings": settings, "device": device, "torch": torch.__version__, "results": results}
        (args.out / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
