"""Fine-tuning on grade-school maths: held-out loss, and the share of problems whose last number is right.

GSM8K (MIT) where it lies in ../shared/data, else generated problems of the same kind (`gsm_symbolic`). The model, its
data and its steps are those of examples/finetune.py; problems of the official test set are solved greedily.
"""

from __future__ import annotations

import json
import math
import re
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.experiments.runs import Checkpoint, Settings

ROOT = Path(__file__).parents[2]
GSM8K = ROOT.parent / "shared" / "data" / "gsm8k"
# The best of a first search over 40 steps on generated problems (docs/performance.md); GaLore's is its authors' 0.01
# for pretraining times the ratio of AdamW's two.
RATES = {"adamw": 1e-4, "lora": 5e-4, "galore": 1e-3, "oasis": 1e-4}
POINTS = (("adamw", 0), *((method, rank) for rank in (32, 128, 64, 16) for method in ("oasis", "lora", "galore")))
PROBLEMS, NEW_TOKENS = 100, 160
Result = Callable[[Settings], dict[str, Any] | None]


def settings(method: str, rank: int, seed: int, **others: Any) -> Settings:
    fixed = {"part": "finetune", "model": "smollm2-135m", "steps": 100, "batch": 4, "length": 256, "device": "cpu"}
    data = "gsm8k" if GSM8K.is_dir() else "gsm_symbolic"
    chosen = {"method": method, "rank": rank, "seed": seed, "lr": RATES[method], "data": data}
    return chosen | fixed | {"inner": "inductor"} | others


def plan(seeds: int, points: tuple[tuple[str, int], ...] = POINTS, **others: Any) -> Iterator[Settings]:
    for seed in range(seeds):
        for method, rank in points:
            yield settings(method, rank, seed, **others)


def train(s: Settings, checkpoint: Checkpoint) -> dict[str, Any]:
    """Do a run."""
    run = _run(s)
    state = checkpoint.load()
    if state is not None:
        run.model.load_state_dict(state["model"])
        run.optimizer.load_state_dict(state["optimizer"])
        run.schedule.load_state_dict(state["schedule"])
        run.step_number, run.losses, run.seconds = state["step"], state["losses"], state["seconds"]
    before = run.heldout_loss() if state is None else state["before"]
    while run.step_number < s["steps"] and all(map(math.isfinite, run.losses[-1:])):
        run.step()
        checkpoint.offer(
            lambda: {
                "model": run.model.state_dict(),
                "optimizer": run.optimizer.state_dict(),
                "schedule": run.schedule.state_dict(),
                "step": run.step_number,
                "losses": run.losses,
                "seconds": run.seconds,
                "before": before,
            }
        )
    seconds = sorted(run.seconds)
    start = time.perf_counter()
    return {
        "heldout_before": before,
        "heldout_after": run.heldout_loss(),
        "sizes": run.sizes(),
        "accuracy": accuracy(run.model, run.tokenizer, problems(s), s["device"]),
        "seconds_of_accuracy": time.perf_counter() - start,
        "losses": run.losses,
        "median_seconds": seconds[len(seconds) // 2],
        "torch": torch.__version__,
    }


def _run(s: Settings) -> Any:
    sys.path.insert(0, str(ROOT / "examples"))
    try:
        from _training import Run
    finally:
        sys.path.remove(str(ROOT / "examples"))

    class WithGaLore(Run):
        def _compile(self) -> torch.optim.Optimizer:
            if self.method != "galore":
                return super()._compile()
            from galore_torch import GaLoreAdamW
            from galore_torch.galore_projector import GaLoreProjector

            torch.serialization.add_safe_globals([GaLoreProjector])  # in its state, which a run that goes on loads

            low = [p for name, p in self.model.named_parameters() if p.dim() == 2 and ".layers." in name]
            others = [p for p in self.model.parameters() if all(p is not w for w in low)]
            self.model.compile(backend=self.args.inner)
            projected = {"params": low, "rank": self.args.rank, "update_proj_gap": 50, "scale": 0.25}
            groups = [{"params": others}, {**projected, "proj_type": "std"}]
            return GaLoreAdamW(groups, lr=self.args.lr, weight_decay=0.0, no_deprecation_warning=True)

    args = Namespace(
        **{key: s[key] for key in ("model", "seed", "lr", "rank", "steps", "device", "inner")},
        batch_size=s["batch"],
        seq_len=s["length"],
        data=str(GSM8K / "train.jsonl") if s["data"] == "gsm8k" else s["data"],
        threads=0,
        dtype="float32",
        layers=s.get("layers"),
        num_heldout=s.get("heldout", 128),
        subspace=s.get("subspace", "oja"),
        subspace_every=None,
        tail=s.get("tail"),
        memory_budget=1.0,
        state_bits=32,
    )
    torch._dynamo.reset()
    return WithGaLore(args, s["method"])


def problems(s: Settings) -> list[tuple[str, str]]:
    """Questions and answers that no run has trained on."""
    count = s.get("problems", PROBLEMS)
    if s["data"] == "gsm8k":
        lines = (GSM8K / "test.jsonl").read_text().splitlines()[:count]
        return [(item["question"], item["answer"]) for item in map(json.loads, lines)]
    import reasoning_gym

    found = reasoning_gym.create_dataset("gsm_symbolic", size=count, seed=2_000_000)
    return [(item["question"], item["metadata"]["answer_cot"]) for item in found]


@torch.no_grad()
def accuracy(model: torch.nn.Module, tokenizer: Any, pairs: list[tuple[str, str]], device: str) -> float:
    """The share of problems whose last number is that of the reference, solved greedily, without a compiled graph."""
    compiled, model._compiled_call_impl = model._compiled_call_impl, None  # type: ignore[assignment]
    model.eval()
    tokenizer.padding_side = "left"
    right = 0
    for start in range(0, len(pairs), 50):
        part = pairs[start : start + 50]
        prompts = [_prompt(tokenizer, question) for question, _ in part]
        given = tokenizer(prompts, add_special_tokens=False, padding=True, return_tensors="pt").to(device)
        made = model.generate(**given, max_new_tokens=NEW_TOKENS, do_sample=False, use_cache=True)
        texts = tokenizer.batch_decode(made[:, given["input_ids"].shape[1] :], skip_special_tokens=True)
        right += sum(last_number(text) == last_number(answer) for text, (_, answer) in zip(texts, part, strict=True))
    model._compiled_call_impl = compiled
    model.train()
    return right / len(pairs)


def _prompt(tokenizer: Any, question: str) -> str:
    if not getattr(tokenizer, "chat_template", None):
        return question + "\n"
    message = [{"role": "user", "content": question}]
    return str(tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))


def last_number(text: str) -> float | None:
    """``"... #### 1,080."`` is 1080."""
    found = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
    return float(found[-1].replace(",", "")) if found else None


def table(known: Result, seeds: int, points: tuple[tuple[str, int], ...] = POINTS, **others: Any) -> list[list[Any]]:
    rows = []
    for method, rank in points:
        runs = [known(settings(method, rank, seed, **others)) for seed in range(seeds)]
        for done in [run for run in runs if run is not None]:
            sizes = {k: v / 2**20 for k, v in done["sizes"].items()}
            kept = sizes["gradients"] + sizes["optimizer"]
            loss = f"{done['heldout_before']:.4f}", f"{done['heldout_after']:.4f}"
            numbers = f"{done['accuracy']:.2f}", f"{kept:.0f}", f"{sizes['saved_activations']:.0f}"
            rows.append([method, rank or "", f"{settings(method, rank, 0, **others)['lr']:g}", *loss, *numbers])
    return rows


HEADERS = ["method", "rank", "lr", "loss before", "loss after", "exact match", "grad+opt MiB", "saved MiB"]
