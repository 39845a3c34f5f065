"""Fine-tune a causal language model in activation subspaces, beside stock torch.compile with AdamW.

    python examples/finetune.py                          # both, side by side, on the embedded model and data
    python examples/finetune.py --method oasis --model gpt2 --data my.jsonl --save out

All linear layers of the blocks are trained, no weight is frozen (but for --method lora). Nothing is downloaded,
unless --model names a model on a hub.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from _compare import compare
from _models import EMBEDDED
from _report import device_name, draw, summarize, write_json

METHODS = ("oasis", "adamw", "lora")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=METHODS, help="run this one alone, in this process")
    parser.add_argument("--compare", default="oasis,adamw", help="methods to run side by side (default: %(default)s)")
    parser.add_argument(
        "--model", default=EMBEDDED, help="Hugging Face name or folder (default: %(default)s, embedded)"
    )
    parser.add_argument("--data", default="gsm_symbolic", help="gsm_symbolic, a jsonl file or a text file")
    parser.add_argument("--layers", type=int, help="keep the first N blocks")
    parser.add_argument("--rank", type=int, default=32, help="columns of each basis, or of each adapter")
    parser.add_argument("--subspace", default="oja", help="rule of the bases, see docs/subspaces.md (oasis)")
    parser.add_argument("--subspace-every", type=int, help="a basis moves at each so many steps (oasis)")
    parser.add_argument("--lr", type=float, help="default: the method's own, see _training.py")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--stop-after", type=int, help="stop at this step of the schedule's --steps (with --method)")
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--num-heldout", type=int, default=32, help="held-out examples")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float64"), default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads of a process (0: torch's choice)")
    parser.add_argument("--inner", choices=("inductor", "aot_eager"), default="inductor")
    parser.add_argument("--out", type=Path, default=Path("runs/finetune"), help="folder for results.json and plot.png")
    parser.add_argument("--save", type=Path, help="checkpoint folder (with --method)")
    parser.add_argument("--save-every", type=int, default=0, help="steps between checkpoints (0: at the end only)")
    parser.add_argument("--resume", type=Path, help="go on from a checkpoint folder (with --method)")
    args = parser.parse_args(argv)
    for name in ("steps", "batch_size", "seq_len", "rank", "num_heldout", "subspace_every"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}: it must be at least 1")
    args.methods = args.compare.split(",")
    unknown = [method for method in args.methods if method not in METHODS]
    if unknown:
        parser.error(f"--compare names {unknown[0]!r}: it must be of {', '.join(METHODS)}")
    if args.method is None and (args.save or args.resume):
        parser.error("--save and --resume go with --method")
    if args.data != "gsm_symbolic" and not Path(args.data).is_file():
        parser.error(f"--data is {args.data!r}: it must be 'gsm_symbolic' or an existing jsonl or text file")
    return args


def train_one(args: argparse.Namespace) -> dict:
    """Run one method in this process."""
    from _training import Run
    from tqdm import tqdm

    run = Run(args, args.method)
    if args.resume:
        run.resume(args.resume)
    before = run.heldout_loss()
    bar = tqdm(range(run.step_number, min(args.stop_after or args.steps, args.steps)), desc="compiling", unit="step")
    for _ in bar:
        done = run.step()
        bar.set_description("training")
        bar.set_postfix(loss=f"{done['loss']:.3f}")
        if args.save and args.save_every and run.step_number % args.save_every == 0:
            run.save(args.save, with_model=False)
    result = {
        "losses": run.losses,
        "seconds": run.seconds,
        "heldout_before": before,
        "peak_bytes": run.peak_bytes(),
    }
    if args.save:
        run.save(args.save, with_model=True)
    return {**result, "sizes": run.sizes(), "heldout_after": run.heldout_loss()}


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        results = {args.method: train_one(args)} if args.method else compare(args, args.methods)
    except ValueError as error:
        print(f"finetune.py: {error}", file=sys.stderr)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(args.out / "results.json", args, results)
    draw(args.out / "plot.png", args, results)
    tokens = f"{args.batch_size} x {args.seq_len} tokens"
    print(f"\n{args.model} on {device_name(args.device)}, {args.steps} steps of {tokens}\n")
    print(summarize(results))
    print(f"\nresults: {args.out / 'results.json'}   plot: {args.out / 'plot.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
