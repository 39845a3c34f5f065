"""One fine-tuning run: a method, its optimizer and schedule, steps, evaluation, checkpoints, and what it occupies."""

from __future__ import annotations

import math
import os
import resource
import shutil
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from _data import IGNORE, load_examples, without_padding
from _models import add_lora, load_model, transformer_blocks

from oasis_fx import LowRankGrad, OasisAdamW, oasis_backend
from oasis_fx.inspect.measure import gradient_bytes, optimizer_bytes, saved_for_backward_bytes
from oasis_fx.rules import rule_of

# AdamW's best of those tried on the demo's data, and the same for ours (docs/performance.md).
LEARNING_RATES = {"oasis": 2e-4, "adamw": 2e-4, "lora": 5e-4}
WARMUP_STEPS = 3


def backend_settings(args: Namespace) -> dict[str, Any]:
    """What the command line says of the backend."""
    return {
        "rank": args.rank,
        "tail": args.tail or None,
        "subspace": rule_of(args.subspace, every=args.subspace_every),
        "memory_budget": args.memory_budget,
        "inner": args.inner,
    }


class Run:
    """A model in training by one method. Every size that it reports is counted on real tensors."""

    def __init__(self, args: Namespace, method: str) -> None:
        torch.manual_seed(args.seed)
        if args.threads:
            torch.set_num_threads(args.threads)
        torch.set_float32_matmul_precision(args.matmul_precision)
        self.args, self.method, self.device = args, method, args.device
        dtype = getattr(torch, args.dtype)
        self.model, self.tokenizer = load_model(args.model, dtype=dtype, device=args.device, layers=args.layers)
        if method == "lora":
            self.model = add_lora(self.model, args.rank)
        self.train, self.heldout = load_examples(args.data, self.tokenizer, args.seq_len, args.num_heldout, args.seed)
        self.optimizer = self._compile()
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._scale)
        self.step_number, self.losses, self.seconds = 0, [], []
        _reset_peak(self.device)

    def _compile(self) -> torch.optim.Optimizer:
        """The lines in which the methods differ."""
        lr = self.args.lr or LEARNING_RATES[self.method]
        regions = transformer_blocks(self.model) if self.args.compile == "blocks" else [self.model]
        ours = self.method == "oasis"
        backend = oasis_backend(**backend_settings(self.args)) if ours else self.args.inner
        for region in regions:
            region.compile(backend=backend)
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        if ours:
            return OasisAdamW(parameters, lr=lr, weight_decay=0.0, state_bits=self.args.state_bits)
        return torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0, fused=True)

    def _scale(self, step: int) -> float:
        """Linear warm-up, then cosine to a tenth."""
        if step < WARMUP_STEPS:
            return (step + 1) / (WARMUP_STEPS + 1)
        progress = min(1.0, (step - WARMUP_STEPS) / max(1, self.args.steps - WARMUP_STEPS))
        return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))

    def step(self) -> dict[str, float]:
        """Take one optimizer step; return its loss and seconds."""
        batch = self._to_device(self.train.batch(self.step_number, self.args.batch_size, self.args.seed))
        start = self._now()
        loss = self._loss(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        seconds = self._now() - start
        self.step_number += 1
        self.losses.append(loss.item())
        self.seconds.append(seconds)
        return {"loss": self.losses[-1], "seconds": seconds}

    def loaded(self) -> None:
        """Answer that there is a run: making it took what loading takes."""

    def _loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """The mean loss of the tokens that have a label.

        Where the head is not compiled, it computes logits for these alone, and none for prompts and padding.
        """
        if self.args.compile == "model":
            return self.model(**batch).loss
        following = torch.nn.functional.pad(batch["labels"], (0, 1), value=IGNORE)[:, 1:]
        counted = following != IGNORE
        head = self.model.get_output_embeddings()
        hook = head.register_forward_pre_hook(lambda _, hidden: hidden[0][counted])
        try:
            return self.model(**batch, shift_labels=following[counted]).loss
        finally:
            hook.remove()

    @torch.no_grad()
    @torch.compiler.set_stance("force_eager")
    def heldout_loss(self) -> float:
        """Mean loss a token over the held-out examples, by the uncompiled forward pass: no graph for one use."""
        total, count = 0.0, 0
        self.model.eval()
        for batch in self.heldout.batches(self.args.batch_size):
            batch = self._to_device(without_padding(batch))
            tokens = int((batch["labels"][:, 1:] != IGNORE).sum())
            total += float(self._loss(batch)) * tokens
            count += tokens
        self.model.train()
        return total / count

    def sizes(self) -> dict[str, int]:
        """Bytes of weights, gradients, optimizer state and saved activations, from one more forward and backward."""
        batch = self._to_device(self.train.batch(0, self.args.batch_size, self.args.seed))
        loss = self._loss(batch)
        bases = {s["basis"] for s in self.optimizer.state.values() if "basis" in s}
        known = [*self.model.parameters(), *self.model.buffers(), *bases, *batch.values()]
        saved = saved_for_backward_bytes(loss, known)
        loss.backward()
        found = {
            "weights": sum(p.nbytes for p in self.model.parameters()),
            "gradients": gradient_bytes(self.model.parameters()),
            "optimizer": optimizer_bytes(self.optimizer),
            "saved_activations": saved,
            "rewritten": sum(isinstance(p.grad, LowRankGrad) for p in self.model.parameters()),
        }
        self.optimizer.zero_grad()
        return found

    def peak_bytes(self) -> int:
        """Highest memory since the model was loaded: of the process, or of the GPU's allocator."""
        if self.device.startswith("cuda"):
            return torch.cuda.max_memory_allocated()
        status = Path("/proc/self/status")
        if status.exists():
            line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
            return int(line.split()[1]) * 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def save(self, folder: Path, *, with_model: bool) -> None:
        """Write all state; the folder changes from the old checkpoint to the new one at once."""
        new, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "step": self.step_number,
            "losses": self.losses,
            "random": torch.get_rng_state(),
        }
        torch.save(state, new / "state.pt")
        if with_model:
            self.model.save_pretrained(new / "model")
            self.tokenizer.save_pretrained(new / "model")
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.replace(folder, old)
        os.replace(new, folder)
        shutil.rmtree(old, ignore_errors=True)

    def resume(self, folder: Path) -> None:
        """Go on from a checkpoint, as if the run had not stopped."""
        file = folder / "state.pt"
        if not file.is_file():
            raise ValueError(f"--resume is {str(folder)!r}: it holds no state.pt")
        state = torch.load(file, weights_only=True, map_location=self.device)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.step_number, self.losses = state["step"], state["losses"]
        torch.set_rng_state(state["random"].cpu())

    def _to_device(self, batch: dict[str, torch.Tensor]) -> dict[str, Any]:
        return {key: value.to(self.device) for key, value in batch.items()}

    def _now(self) -> float:
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()
        return time.perf_counter()


def _reset_peak(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the peak that loading the model reached
    except OSError:
        pass  # elsewhere the peak includes loading
