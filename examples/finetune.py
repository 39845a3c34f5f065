"""Fine-tune a causal language model in activation subspaces, beside stock torch.compile with AdamW, and LoRA.

    python examples/finetune.py                          # three methods in turns, on the embedded model and data
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
os.environ.setdefault("TQDM_DISABLE", "1")  # the only bar is ours; tqdm reads this when it is imported

from _compare import compare
from _data import GENERATED, check_data
from _models import EMBEDDED
from _noise import silence
from _progress import Progress
from _report import conclude, device_name, draw, summarize, write_json

METHODS = ("oasis", "adamw", "lora")
OF_OASIS = {"tail": 32, "memory_budget": 1.0, "state_bits": 32, "subspace_every": None}  # and their defaults
DATA = (
    f'{GENERATED}, generated (default); a .jsonl file, of which each line is an object with the texts "prompt" and '
    '"answer", or "question" and "answer"; or a text file, which is cut into sequences'
)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=METHODS, help="run this one alone, in this process")
    parser.add_argument(
        "--compare", default="oasis,adamw,lora", help="methods to run side by side (default: %(default)s)"
    )
    parser.add_argument(
        "--model", default=EMBEDDED, help="Hugging Face name or folder (default: %(default)s, embedded)"
    )
    parser.add_argument("--data", default=GENERATED, help=DATA)
    parser.add_argument("--layers", type=int, help="keep the first N blocks")
    parser.add_argument("--rank", type=int, default=32, help="columns of each basis, or of each adapter")
    parser.add_argument(
        "--tail",
        type=_number,
        default=OF_OASIS["tail"],
        help="columns drawn anew at each step beside each basis, 0 for none (oasis; default: %(default)s)",
    )
    parser.add_argument(
        "--memory-budget",
        type=_budget,
        default=1.0,
        help="share of what is kept for the backward pass, or 2GiB (oasis)",
    )
    parser.add_argument("--state-bits", type=int, choices=(32, 8), default=32, help="of the optimizer's states (oasis)")
    parser.add_argument("--subspace", default="oja", help="rule of the bases, see docs/subspaces.md (oasis)")
    parser.add_argument("--subspace-every", type=int, help="a basis moves at each so many steps (oasis)")
    parser.add_argument("--lr", type=float, help="default: the method's own, see _training.py")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--stop-after", type=int, help="stop at this step of the schedule's --steps (with --method)")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--num-heldout", type=int, default=16, help="held-out examples")
    parser.add_argument("--evaluations", type=int, default=4, help="how often held-out loss is taken while training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float64"), default="float32")
    parser.add_argument(
        "--matmul-precision",
        choices=("highest", "high", "medium"),
        default="highest",
        help="of products of float32 matrices: medium computes them in bfloat16 where a CPU has units for it",
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads of a process (0: torch's choice)")
    parser.add_argument("--inner", choices=("inductor", "aot_eager"), default="inductor")
    parser.add_argument(
        "--compile",
        choices=("blocks", "model"),
        default="blocks",
        help="each transformer block by itself, whose code is compiled once for all of them, or the model as a whole",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/finetune"), help="folder for results.json and plot.png")
    parser.add_argument("--save", type=Path, help="checkpoint folder (with --method)")
    parser.add_argument("--save-every", type=int, default=0, help="steps between checkpoints (0: at the end only)")
    parser.add_argument("--resume", type=Path, help="go on from a checkpoint folder (with --method)")
    args = parser.parse_args(argv)
    for name in ("steps", "batch_size", "seq_len", "rank", "num_heldout", "subspace_every", "evaluations"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}: it must be at least 1")
    args.methods = args.compare.split(",")
    unknown = [method for method in args.methods if method not in METHODS]
    if unknown:
        parser.error(f"--compare names {unknown[0]!r}: it must be of {', '.join(METHODS)}")
    if args.method is None and (args.save or args.resume):
        parser.error("--save and --resume go with --method")
    used = [args.method] if args.method else args.methods
    for name, default in OF_OASIS.items():
        if "oasis" not in used and getattr(args, name) != default:
            parser.error(f"--{name.replace('_', '-')} goes with the method oasis: {', '.join(used)} knows none")
    try:  # what can be refused is refused before a model is loaded
        check_data(args.data)
        check_settings(args)
    except ValueError as error:
        parser.error(str(error))
    args.evaluated = sorted({round(args.steps * part / args.evaluations) for part in range(1, args.evaluations + 1)})
    return args


def check_settings(args: argparse.Namespace) -> None:
    """Make the settings of the backend, which checks them.

    Raises:
        ValueError: one has a value that is not allowed.
    """
    from _training import backend_settings

    from oasis_fx import oasis_backend

    oasis_backend(**backend_settings(args))


def _number(text: str) -> int | float:
    return int(text) if text.isdigit() else float(text)


def _budget(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text  # a size; the backend says what is none


def train_one(args: argparse.Namespace) -> dict:
    """Run one method in this process."""
    progress = Progress(args.steps)
    try:
        progress.doing("loading")
        from _training import Run

        run = Run(args, args.method)
        if args.resume:
            run.resume(args.resume)
            progress.skip(run.step_number)
        progress.doing("evaluating")
        heldout = [[run.step_number, run.heldout_loss()]]
        last = min(args.stop_after or args.steps, args.steps)
        progress.doing("compiling")
        while run.step_number < last:
            done = run.step()
            progress.stepped(loss=done["loss"])
            if args.save and args.save_every and run.step_number % args.save_every == 0:
                progress.doing("saving")
                run.save(args.save, with_model=False)
            if run.step_number in args.evaluated and run.step_number < last:
                progress.doing("evaluating")
                heldout.append([run.step_number, run.heldout_loss()])
            progress.doing("training")
        progress.doing("measuring")
        result = {"losses": run.losses, "seconds": run.seconds, "peak_bytes": run.peak_bytes()}
        if args.save:
            progress.doing("saving")
            run.save(args.save, with_model=True)
            progress.doing("measuring")
        sizes = run.sizes()
        progress.doing("evaluating")
        heldout.append([run.step_number, run.heldout_loss()])
    finally:
        progress.close()
    return {
        **result,
        "sizes": sizes,
        "heldout": heldout,
        "heldout_before": heldout[0][1],
        "heldout_after": heldout[-1][1],
    }


def main(argv: list[str] | None = None) -> int:
    silence()
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
    print(f"\n{conclude(results)}")
    print(f"\nresults: {args.out / 'results.json'}   plot: {args.out / 'plot.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
