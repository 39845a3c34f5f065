"""One rank of a data parallel run, under torchrun; rank 0 prints what it found as JSON.

torchrun --nproc-per-node 2 program.py CASE FOLDER
"""

from __future__ import annotations

import datetime
import json
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from oasis_fx import AutoRank, OasisAdamW, oasis_backend
from oasis_fx.distributed import prepare
from oasis_fx.runtime.optim import step as optimizer_step
from oasis_fx.runtime.subspaces.rules import Oja, rule_of

WIDTH, VOCABULARY, BATCH, STEPS = 64, 96, 96, 8


class Net(torch.nn.Module):
    """``a`` and ``b`` share a basis; the embedding and the norm have dense gradients; ``extra`` is used on request.

    The two long vectors, of a MiB each, make DDP split its graphs at a bucket of one.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed, self.norm = torch.nn.Embedding(VOCABULARY, WIDTH), torch.nn.LayerNorm(WIDTH)
        self.a, self.b = torch.nn.Linear(WIDTH, 2 * WIDTH), torch.nn.Linear(WIDTH, 2 * WIDTH)
        self.first, self.second = (torch.nn.Parameter(torch.zeros(2**17)) for _ in range(2))
        self.c, self.lm_head = torch.nn.Linear(2 * WIDTH, WIDTH), torch.nn.Linear(WIDTH, VOCABULARY)
        self.extra = torch.nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, tokens, targets, extra=False):
        x = self.norm(self.embed(tokens)) + self.first[:WIDTH]
        if extra:
            x = x + self.extra(x)
        x = x + self.second[:WIDTH] + self.c(torch.nn.functional.silu(self.a(x)) * self.b(x))
        return torch.nn.functional.cross_entropy(self.lm_head(x), targets)


def batch(step: int, rank: int, world: int) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(VOCABULARY, (BATCH,), generator=torch.Generator().manual_seed(step))
    part = tokens.view(world, -1)[rank]
    return part, (part * 5 + 1) % VOCABULARY


def train(rank: int, world: int, *, backend=None, parallel: bool = True, sync: bool = True, accumulate: int = 1,
          steps: int = STEPS, after=None, seed: int = 0, dtype=torch.float64, extra_first: bool = False,
          bucket_bytes: int = 25 * 2**20):  # fmt: skip
    """``extra_first``: the first micro-batch of a step uses a weight that no later one does."""
    torch._dynamo.reset()
    model = Net(seed).to(dtype)
    backend = backend or oasis_backend(8, inner="aot_eager")
    handle = prepare(model, bucket_bytes=bucket_bytes) if parallel and sync else None
    run = DistributedDataParallel(model, bucket_cap_mb=1) if parallel else model
    compiled = torch.compile(run, backend=backend)
    optimizer = OasisAdamW(model.parameters(), lr=1e-2)
    losses = []
    for step in range(steps):
        total = 0.0
        for micro in range(accumulate):
            quiet = parallel and micro < accumulate - 1
            with run.no_sync() if quiet else torch.enable_grad():
                loss = compiled(*batch(step * accumulate + micro, rank, world), extra_first and micro == 0)
                (loss / accumulate).backward()
            total += loss.detach() / accumulate
        if parallel:
            dist.all_reduce(total.div_(world))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total.item())
        if after is not None:
            after(step)
    return losses, model, optimizer, handle


def equal_on_all_ranks(model, optimizer) -> bool:
    tensors = [p.detach() for p in model.parameters()]
    tensors += [s[key] for s in optimizer.state.values() for key in ("basis", "exp_avg", "exp_avg_sq") if key in s]
    for tensor in tensors:
        others = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
        dist.all_gather(others, tensor.contiguous())
        if not all(torch.equal(tensor, other) for other in others):
            return False
    return True


def reported(backend, handle) -> bool:
    """Whether the report has what was sent, as a number and as a line."""
    (found,) = {traffic for graph in backend.report() for traffic in graph.traffic}
    line = f"{handle.sent / handle.dense:.2f} of what DDP would have sent"
    numbers = found.sent_bytes, found.early_bytes, found.dense_bytes
    return line in str(backend.report()[-1]) and numbers == (handle.sent, handle.early, handle.dense)


def ranks_change(rank: int, world: int) -> dict:
    """A budget shared out at the third step: in whole graphs, and in those that DDP splits."""
    optimizer_step.RANK_STEPS = (3,)
    made = lambda: oasis_backend(AutoRank(0.25), inner="aot_eager")  # noqa: E731
    alone, model, optimizer, _ = train(0, 1, parallel=False, backend=made())
    ranks = [s["exp_avg"].shape[1] for s in optimizer.state.values() if "basis" in s]
    split = error_of(lambda: train(rank, world, backend=made()))
    torch._dynamo.config.optimize_ddp = False
    losses, model, optimizer, _ = train(rank, world, backend=made())
    found = [s["exp_avg"].shape[1] for s in optimizer.state.values() if "basis" in s]
    equal = equal_on_all_ranks(model, optimizer)
    return {"alone": alone, "losses": losses, "equal": equal, "ranks": [ranks, found], "split": split}


def removed() -> None:
    model = Net()
    prepare(model).remove()
    torch.compile(DistributedDataParallel(model), backend=oasis_backend(8, inner="aot_eager"))(*batch(0, 0, 1))


def error_of(run) -> str:
    torch._dynamo.reset()
    try:
        run()
    except (ValueError, RuntimeError) as error:
        return str(error)
    return ""


def tensor_parallel() -> dict:
    """Dense gradients, and our optimizer on their shards."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    mesh, found = init_device_mesh("cpu", (dist.get_world_size(),)), {}
    torch.manual_seed(0)
    layer = torch.nn.Sequential(torch.nn.Linear(WIDTH, WIDTH))
    plain = torch.nn.Linear(WIDTH, WIDTH)
    plain.load_state_dict(layer[0].state_dict())
    x = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(1))
    layer = parallelize_module(layer, mesh, {"0": ColwiseParallel()})
    backend = oasis_backend(8, inner="aot_eager")
    layer.compile(backend=backend)
    layer(x).square().sum().backward()
    plain(x).square().sum().backward()
    ours = layer[0].weight.grad.to_local()
    rows = plain.weight.grad.chunk(dist.get_world_size(), 0)[dist.get_rank()]
    found["tensor parallel"] = float((ours - rows).abs().max() / rows.abs().max())
    OasisAdamW(layer.parameters(), lr=1e-2).step(), torch.optim.AdamW(plain.parameters(), lr=1e-2).step()
    found["stepped"] = float((layer[0].weight.full_tensor() - plain.weight).abs().max())
    found["reasons"] = [reason for graph in backend.compiled_graphs() for reason in graph.reasons.values()]
    return found


def trainer(folder: Path, world: int) -> dict:
    """Losses of `transformers.Trainer`; a step has four rows, whatever the number of ranks."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "integrations"))
    import tiny
    from transformers import Trainer, TrainingArguments

    from oasis_fx.integrations.huggingface import oasis_trainer

    args = TrainingArguments(
        str(folder / f"trainer{world}"), max_steps=6, per_device_train_batch_size=4 // world, learning_rate=3e-3,
        logging_steps=1, report_to=[], use_cpu=True, ddp_backend="gloo", disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    model = tiny.model()
    data = tiny.examples(64)
    run = Trainer(model=model, args=args, train_dataset=data, **oasis_trainer(model, args, 8, inner="aot_eager"))
    run.train()
    return {"losses": [e["loss"] for e in run.state.log_history if "loss" in e], "norms": [
        e["grad_norm"] for e in run.state.log_history if "grad_norm" in e]}  # fmt: skip


def main(case: str, folder: Path) -> dict:
    rank, world = dist.get_rank(), dist.get_world_size()
    if case == "equal":
        found = {}
        for name, settings in {
            "plain": {"backend": oasis_backend(8, inner="aot_eager"), "bucket_bytes": 4096},
            "accumulated": {"accumulate": 2},
            "used in the first micro-batch alone": {"accumulate": 2, "extra_first": True},
            "auto": {"backend": oasis_backend(AutoRank(0.25), subspace=Oja(lr="auto"), inner="aot_eager")},
            "random": {"backend": oasis_backend(8, subspace=rule_of("random", every=3), inner="aot_eager")},
            "tail": {"backend": oasis_backend(4, tail=4, inner="aot_eager"), "accumulate": 2},
            "inductor": {"backend": oasis_backend(8)},
        }.items():
            if world > 2 and name not in ("plain", "accumulated"):
                continue
            alone, _, _, _ = train(0, 1, parallel=False, **settings)
            # Ranks begin with weights of their own: rank 0's count. (What is drawn comes from the seed.)
            seed = 0 if name == "random" else rank
            losses, model, optimizer, handle = train(rank, world, seed=seed, **settings)
            found[name] = alone, losses, equal_on_all_ranks(model, optimizer), [handle.sent, handle.early, handle.dense]
            if name == "plain":
                found["report"] = reported(settings["backend"], handle)
        return found
    if case == "ranks change":
        return ranks_change(rank, world)
    if case == "unsynchronized":
        return {"never": error_of(lambda: train(rank, world, sync=False)), "no more": error_of(removed)}
    if case == "batch rule":
        train(rank, world, backend=oasis_backend(8, subspace="pca", inner="aot_eager"))
    if case == "disagree":
        # Of equal sizes in all, so that nothing but the checksum tells.
        train(rank, world, backend=oasis_backend(8, exclude=[["*a.weight"], ["*b.weight"]][rank], inner="aot_eager"))
    if case == "trainer":
        return trainer(folder, world)
    if case == "tensor parallel":
        return tensor_parallel()
    if case in ("dies", "hangs"):

        def after(step: int) -> None:
            if step == 2 and rank == 1:
                if case == "dies":
                    os._exit(3)
                time.sleep(60)

        train(rank, world, after=after)
    return {}


if __name__ == "__main__":
    timeout = datetime.timedelta(seconds=5 if sys.argv[1] in ("dies", "hangs") else 120)
    dist.init_process_group("gloo", timeout=timeout)
    result = main(sys.argv[1], Path(sys.argv[2]))
    if dist.get_rank() == 0:
        (Path(sys.argv[2]) / "result.json").write_text(json.dumps(result))
    dist.destroy_process_group()
    # Threads of gloo may hold tensors still, which they cannot let go once Python has begun to end: "terminate called
    # without an active exception" (pytorch PR 179291).
    os._exit(0)
