"""Hugging Face Trainer, or TRL's SFTTrainer, in activation subspaces; resumes from its last checkpoint.

python examples/trainer.py --steps 20 --out runs/trainer
python examples/trainer.py --sft --steps 20 --out runs/sft
torchrun --nproc-per-node 2 examples/trainer.py --steps 20
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from _data import load_examples
from _models import EMBEDDED, load_model
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from oasis_fx.integrations.huggingface import oasis_trainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=EMBEDDED, help="Hugging Face name or folder (default: embedded)")
    parser.add_argument("--data", default="gsm_symbolic", help="gsm_symbolic, a jsonl file or a text file")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--sft", action="store_true", help="TRL's SFTTrainer")
    parser.add_argument("--out", type=Path, default=Path("runs/trainer"))
    given = parser.parse_args()

    shared = {
        "output_dir": str(given.out),
        "max_steps": given.steps,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-4,
        "warmup_steps": 3,
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 10,
        "save_steps": 10,
        "use_cpu": not torch.cuda.is_available(),
        "report_to": [],
    }
    model, tokenizer = load_model(given.model, dtype=torch.float32, device="cpu")
    train, heldout = (
        [{"input_ids": i, "labels": j} for i, j in zip(e.input_ids.tolist(), e.labels.tolist(), strict=True)]
        for e in load_examples(given.data, tokenizer, given.seq_len, num_heldout=16, seed=0)
    )
    if given.sft:
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer

        kind, args = SFTTrainer, SFTConfig(**shared, bf16=False, gradient_checkpointing=False)
        train, heldout = Dataset.from_list(train), Dataset.from_list(heldout)
        more = {"processing_class": tokenizer}
    else:
        kind, args, more = Trainer, TrainingArguments(**shared), {}
    ours = oasis_trainer(model, args, rank=given.rank)
    trainer = kind(model=model, args=args, train_dataset=train, eval_dataset=heldout, **more, **ours)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(given.out) if given.out.is_dir() else None)
    print(trainer.evaluate())
    print(ours["callbacks"][0].backend.stats())


if __name__ == "__main__":
    main()
