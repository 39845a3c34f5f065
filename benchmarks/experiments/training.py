"""One run: a model, a method, a schedule; the loss on fixed validation windows as it goes, and what it occupies."""

from __future__ import annotations

import math
import time
from typing import Any

import torch

from benchmarks.experiments import byte_lm, corpus, methods
from benchmarks.experiments.runs import Checkpoint, Settings

VALIDATION = 32  # windows


def settings(method: str, lr: float, seed: int, **others: Any) -> Settings:
    """The settings of a run, all of them: what is not given has its default written out."""
    fixed = {"model": "small", "data": "shakespeare", "rank": 64, "steps": 300, "batch": 8, "length": 128}
    chosen = methods.METHODS[method]
    rest = {"weight_decay": chosen.weight_decay, "inner": "inductor", "device": "cpu", "backend": {}}
    if chosen.backend is None:
        others.pop("rank_scaling", None)  # a stock optimizer has none: one run serves both tables
    return {"method": method, "lr": lr, "seed": seed} | fixed | rest | others


def train(s: Settings, checkpoint: Checkpoint) -> dict[str, Any]:
    """Do a run. Losses are in nats a byte, bytes those of gradients, optimizer and saved activations."""
    torch._dynamo.reset()
    data, heldout = corpus.load(s["data"])
    model = byte_lm.byte_lm(s["model"], s["seed"]).to(s["device"])
    method = methods.METHODS[s["method"]]
    state = checkpoint.load()
    first = 0 if state is None else len(state["done"]["losses"])
    ranks = {int(at * s["steps"]): round(factor * s["rank"]) for at, factor in method.schedule.items()}
    optimizer = methods.build(
        method,
        model,
        rank=ranks[max(at for at in ranks if at < max(1, first))] if ranks else s["rank"],
        lr=s["lr"],
        weight_decay=s["weight_decay"],
        inner=s["inner"],
        rank_scaling=s.get("rank_scaling", False),  # runs from before it have none
        **(s["backend"] if method.backend is not None else {}),
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _scale(step, s["steps"]))
    done: dict[str, Any] = {"losses": [], "validation": [], "seconds": [], "subspaces": []}
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        torch.set_rng_state(state["random"])
        done = state["done"]
    every = max(1, s["steps"] // 10)
    exact = torch.compile(model.forward, backend=s["inner"]) if method.exact_every else None
    for step in range(first, s["steps"]):
        start = time.perf_counter()
        tokens, targets = corpus.batch(data, s["batch"], s["length"], s["seed"] * 1_000_003 + step)
        if step > 0 and step in ranks:
            optimizer.resize_rank(ranks[step])
        dense = method.exact_every and (step + 1) % method.exact_every == 0
        loss = (exact if dense else model)(tokens.to(s["device"]), targets.to(s["device"]))
        loss.backward()
        if step == s["steps"] - 1:
            sizes = _sizes(model, optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        done["losses"].append(loss.item())
        done["seconds"].append(time.perf_counter() - start)
        if (step + 1) % every == 0 or step == s["steps"] - 1:
            done["validation"].append((step + 1, validation_loss(model, heldout, s["length"], s["device"])))
            done["subspaces"].append((step + 1, _subspaces(optimizer)))
            if not math.isfinite(done["losses"][-1]):
                break
        checkpoint.offer(
            lambda: {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "schedule": schedule.state_dict(),
                "random": torch.get_rng_state(),
                "done": done,
            }
        )
    seconds = sorted(done["seconds"])
    return {
        "validation": done["validation"],
        "subspaces": done["subspaces"],
        "loss": done["validation"][-1][1] if math.isfinite(done["losses"][-1]) else math.inf,
        "median_seconds": seconds[len(seconds) // 2],
        "sizes": sizes if math.isfinite(done["losses"][-1]) else {},
        "torch": torch.__version__,
    }


@torch.no_grad()
def validation_loss(model: torch.nn.Module, heldout: torch.Tensor, length: int, device: str) -> float:
    """By the uncompiled forward pass, on the same windows whatever the run."""
    tokens, targets = corpus.batch(heldout, VALIDATION, length, 0)
    parts = zip(tokens.split(8), targets.split(8), strict=True)
    losses = [float(model.forward(x.to(device), y.to(device))) for x, y in parts]
    return sum(losses) / len(losses)


def _subspaces(optimizer: torch.optim.Optimizer) -> list[tuple[float, float, int]]:
    """Drift, captured energy and rank of each subspace; NaN where they are unknown."""
    found = getattr(optimizer, "subspaces", dict)()
    return [(float(s.measure("drift")), float(s.measure("captured_energy")), s.shape[1]) for s in found]


def _sizes(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    from oasis_fx.inspect.measure import gradient_bytes, optimizer_bytes

    return {
        "weights": sum(p.nbytes for p in model.parameters()),
        "gradients": gradient_bytes(model.parameters()),
        "optimizer": optimizer_bytes(optimizer),
    }


def _scale(step: int, steps: int) -> float:
    """Linear warm-up over a tenth, then cosine to a tenth."""
    warm = max(1, steps // 10)
    if step < warm:
        return (step + 1) / warm
    progress = min(1.0, (step - warm) / max(1, steps - warm))
    return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))
