"""A LightningModule in activation subspaces; resumes from its last checkpoint.

python examples/lightning_module.py --steps 20 --out runs/lightning
python examples/lightning_module.py --precision bf16-mixed
"""

from __future__ import annotations

import argparse
from pathlib import Path

import lightning
import torch
from _data import load_examples
from _models import EMBEDDED, load_model

from oasis_fx import OasisAdamW, oasis_backend


class FineTuning(lightning.LightningModule):
    def __init__(self, model: torch.nn.Module, rank: int, lr: float) -> None:
        super().__init__()
        self.model, self.lr = model, lr
        self.backend = oasis_backend(rank=rank)
        self.model.compile(backend=self.backend)  # in place: checkpoints have the model's own names

    def training_step(self, batch, index):
        loss = self.model(**batch).loss
        self.log("loss", loss, prog_bar=True)
        return loss

    def on_before_zero_grad(self, optimizer) -> None:
        if self.global_step % 10 == 0:
            self.log_dict({k: v for k, v in self.backend.stats().flat().items() if "/mean/" in k})

    def configure_optimizers(self):
        return OasisAdamW(self.parameters(), lr=self.lr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=EMBEDDED, help="Hugging Face name or folder (default: embedded)")
    parser.add_argument("--data", default="gsm_symbolic", help="gsm_symbolic, a jsonl file or a text file")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--out", type=Path, default=Path("runs/lightning"))
    given = parser.parse_args()

    model, tokenizer = load_model(given.model, dtype=torch.float32, device="cpu")
    train, _ = load_examples(given.data, tokenizer, given.seq_len, num_heldout=16, seed=0)
    rows = [{"input_ids": i, "labels": j} for i, j in zip(train.input_ids, train.labels, strict=True)]
    trainer = lightning.Trainer(
        max_steps=given.steps,
        precision=given.precision,
        gradient_clip_val=1.0,
        default_root_dir=given.out,
        callbacks=[lightning.pytorch.callbacks.ModelCheckpoint(given.out, save_last=True, every_n_train_steps=10)],
        logger=False,
        log_every_n_steps=1,
    )
    last = given.out / "last.ckpt"
    module = FineTuning(model, given.rank, lr=1e-4)
    loader = torch.utils.data.DataLoader(rows, batch_size=2, shuffle=True)
    trainer.fit(module, loader, ckpt_path=last if last.is_file() else None, weights_only=True)
    print(module.backend.stats())


if __name__ == "__main__":
    main()
