"""A loop of Accelerate in activation subspaces: accumulation, clipping, mixed precision, resuming.

python examples/accelerate_loop.py --steps 20 --out runs/accelerate
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from _data import load_examples
from _models import EMBEDDED, load_model
from accelerate import Accelerator

from oasis_fx import OasisAdamW, oasis_backend
from oasis_fx.distributed import prepare


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=EMBEDDED, help="Hugging Face name or folder (default: embedded)")
    parser.add_argument("--data", default="gsm_symbolic", help="gsm_symbolic, a jsonl file or a text file")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps")
    parser.add_argument("--accumulate", type=int, default=2)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--precision", choices=("no", "bf16"), default="no")
    parser.add_argument("--out", type=Path, default=Path("runs/accelerate"))
    given = parser.parse_args()

    accelerator = Accelerator(mixed_precision=given.precision, gradient_accumulation_steps=given.accumulate)
    model, tokenizer = load_model(given.model, dtype=torch.float32, device="cpu")
    train, _ = load_examples(given.data, tokenizer, given.seq_len, num_heldout=16, seed=0)
    model.compile(backend=oasis_backend(rank=given.rank))
    optimizer = OasisAdamW(model.parameters(), lr=1e-4)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, given.steps)
    if accelerator.num_processes > 1:
        prepare(model)  # before it is wrapped
    model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)

    state, done = given.out / "state", 0
    if state.is_dir():
        accelerator.load_state(str(state))
        done = int((given.out / "done.txt").read_text())
    for step in range(done, given.steps):
        for micro in range(given.accumulate):
            number = (step * given.accumulate + micro) * accelerator.num_processes + accelerator.process_index
            batch = {key: value.to(accelerator.device) for key, value in train.batch(number, 2, seed=0).items()}
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
        accelerator.print(f"step {step + 1}: loss {loss.item():.3f}, grad norm {float(norm):.3f}")
    accelerator.save_state(str(state))
    (given.out / "done.txt").write_text(str(given.steps))


if __name__ == "__main__":
    main()
