"""One rank of a run under FSDP2, under torchrun; rank 0 prints what it found as JSON.

torchrun --nproc-per-node 2 fsdp_program.py CASE FOLDER
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import checkpoint as dcp
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard

from oasis_fx import AutoRank, LowRankGrad, LowRankGradWarning, OasisAdamW, OasisLion, OasisMuon, oasis_backend
from oasis_fx.distributed import prepare
from oasis_fx.errors import OasisWarning
from oasis_fx.runtime.optim import step as optimizer_step
from oasis_fx.runtime.subspaces.rules import Oja, Random
from oasis_fx.runtime.subspaces.shards import local_gradient

WIDTH, VOCABULARY, BATCH, STEPS = 64, 96, 96, 8


class Block(torch.nn.Module):
    """``up`` has 203 rows, which no number of ranks here divides."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(width)
        self.up, self.down = torch.nn.Linear(width, 203), torch.nn.Linear(203, width)
        self.extra = torch.nn.Linear(width, width, bias=False)

    def forward(self, x, extra=False):
        h = self.norm(x)
        x = x + self.down(torch.nn.functional.silu(self.up(h)))
        return x + self.extra(h) if extra else x


class Net(torch.nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed, self.head = torch.nn.Embedding(VOCABULARY, WIDTH), torch.nn.Linear(WIDTH, VOCABULARY)
        self.blocks = torch.nn.ModuleList([Block(), Block()])

    def forward(self, tokens, targets, extra=False):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, extra)
        return torch.nn.functional.cross_entropy(self.head(x).double(), targets)


def batch(step: int, rank: int, world: int) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(VOCABULARY, (BATCH,), generator=torch.Generator().manual_seed(step))
    part = tokens.view(world, -1)[rank]
    return part, (part * 5 + 1) % VOCABULARY


def made(backend, sharded: bool, *, optimizer=OasisAdamW, dtype=torch.float64, policy=None, replicas=1):
    torch._dynamo.reset()
    model = Net().to(dtype)
    for block in model.blocks:
        block.compile(backend=backend)
    handle = None
    if sharded:
        settings = {"mesh": mesh_of(replicas)}
        settings |= {"mp_policy": policy} if policy is not None else {}
        for block in model.blocks:
            fully_shard(block, **settings)
        fully_shard(model, **settings)
        handle = prepare(model)
    return model, optimizer(model.parameters(), lr=1e-2, weight_decay=0.1), handle


def mesh_of(replicas: int):
    world = dist.get_world_size()
    if replicas == 1:
        return init_device_mesh("cpu", (world,))
    return init_device_mesh("cpu", (replicas, world // replicas), mesh_dim_names=("replicate", "shard"))


def train(model, optimizer, sharded, steps=range(STEPS), *, accumulate=1, send_each=False, scatter_each=False,
          extra_first=False, clip=1.0):  # fmt: skip
    losses, norms = [], []
    rank, world = (dist.get_rank(), dist.get_world_size()) if sharded else (0, 1)
    for step in steps:
        total = 0.0
        for micro in range(accumulate):
            if sharded:
                last = micro == accumulate - 1
                model.set_requires_gradient_sync(send_each or scatter_each or last)
                model.set_requires_all_reduce(send_each or last)
            loss = model(*batch(step * accumulate + micro, rank, world), extra_first and micro == 0)
            (loss / accumulate).backward()
            total += loss.detach() / accumulate
        if sharded:
            dist.all_reduce(total.div_(world))
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        norms.append(float(norm.full_tensor() if sharded else norm))
        low = sum(isinstance(local_gradient(p), LowRankGrad) for p in model.parameters())
        assert low == (6 if extra_first else 4), low
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(total))
    return losses, norms


def bases_agree(optimizer) -> bool:
    for state in optimizer.state.values():
        if "basis" in state:
            others = [torch.empty_like(state["basis"]) for _ in range(dist.get_world_size())]
            dist.all_gather(others, state["basis"].contiguous())
            if not all(torch.equal(state["basis"], other) for other in others):
                return False
    return True


def equal() -> dict:
    found = {}
    for name, (settings, options) in {
        "plain": ({}, {}),
        "accumulated": ({}, {"accumulate": 2}),
        "accumulated, each sent": ({}, {"accumulate": 2, "send_each": True}),
        "used in the first micro-batch alone": ({}, {"accumulate": 2, "extra_first": True}),
        "hybrid": ({"replicas": 2}, {"accumulate": 2}),
        "hybrid, each scattered": ({"replicas": 2}, {"accumulate": 2, "scatter_each": True}),
        "lion, random": ({"optimizer": OasisLion, "backend": {"subspace": Random(every=3)}}, {}),
        "auto": ({"backend": {"rank": AutoRank(0.25), "subspace": Oja(lr="auto")}}, {}),
        "tail": ({"backend": {"rank": 4, "tail": 4}}, {"accumulate": 2}),
        "inductor": ({"backend": {"inner": "inductor"}}, {}),
    }.items():
        of_four = name in ("plain", "accumulated") or "hybrid" in name
        if not of_four if dist.get_world_size() > 2 else "hybrid" in name:
            continue
        optimizer_step.RANK_STEPS = (3,) if name == "auto" else (100, 1000)
        backend = {"rank": 8, "inner": "aot_eager"} | settings.pop("backend", {})
        model, optimizer, _ = made(oasis_backend(**backend), False, optimizer=settings.get("optimizer", OasisAdamW))
        alone = train(model, optimizer, False, **options)
        model, optimizer, handle = made(oasis_backend(**backend), True, **settings)
        losses = train(model, optimizer, True, **options)
        ranks = sorted({s["exp_avg"].shape[1] for s in optimizer.state.values() if "basis" in s})
        moments = [tuple(s["exp_avg"].shape) for s in optimizer.state.values() if "features" in s]
        found[name] = {"alone": alone, "losses": losses, "equal": bases_agree(optimizer), "sent": handle.sent,
                       "dense": handle.dense, "ranks": ranks, "moments": moments}  # fmt: skip
    return found


def divided() -> dict:
    """Gradients by `set_gradient_divide_factor` over those without: FSDP2's own of biases, and ours of weights."""
    found = {}
    for name, factor in {"none": None, "three": 3.0}.items():
        model, _, _ = made(oasis_backend(8, inner="aot_eager"), True)
        for module in (model, *model.blocks) if factor is not None else ():
            module.set_gradient_divide_factor(factor)
        model(*batch(0, dist.get_rank(), dist.get_world_size())).backward()
        block = model.blocks[0]
        bias, weight = block.up.bias.grad.to_local(), local_gradient(block.up.weight)
        assert isinstance(weight, LowRankGrad)
        found[name] = float(bias.norm()), float(weight.factor.norm())
    return {kind: found["three"][number] / found["none"][number] for number, kind in enumerate(("dense", "low-rank"))}


def save(folder: Path) -> dict:
    """A checkpoint after four steps, and what four more give."""
    model, optimizer, _ = made(oasis_backend(8, inner="aot_eager"), True)
    train(model, optimizer, True, range(4))
    dcp.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, checkpoint_id=folder / "saved")
    plain = {key: value.full_tensor() for key, value in model.state_dict().items()}
    whole = optimizer.resize_checkpoint(optimizer.state_dict(), 8)  # of all rows
    if dist.get_rank() == 0:
        torch.save({"model": plain, "optimizer": whole}, folder / "whole.pt")
    smaller = optimizer.resize_checkpoint(optimizer.state_dict(), 4)
    low = [state for state in smaller["state"].values() if "features" in state]
    shapes = {tuple(state["exp_avg"].shape) for state in low}
    return {"rest": train(model, optimizer, True, range(4, 8)), "shapes": sorted(shapes)}


def load(folder: Path, sharded: bool = True) -> dict:
    """The same checkpoint, on as many ranks as there are now; and the one of all rows."""
    found = {}
    backend = oasis_backend(8, inner="aot_eager")
    model, optimizer, _ = made(backend, sharded)
    train(model, optimizer, sharded, range(1))  # its states have their shapes
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    dcp.load(state, checkpoint_id=folder / "saved")
    model.load_state_dict(state["model"]), optimizer.load_state_dict(state["optimizer"])
    found["resharded"] = train(model, optimizer, sharded, range(4, 8))
    model, optimizer, _ = made(oasis_backend(8, inner="aot_eager"), sharded)
    saved = torch.load(folder / "whole.pt", weights_only=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = saved["model"][name]
            if sharded:
                from torch.distributed.tensor import distribute_tensor

                values = distribute_tensor(values, parameter.device_mesh, parameter.placements)
            parameter.copy_(values)
    optimizer.load_state_dict(saved["optimizer"])
    found["whole"] = train(model, optimizer, sharded, range(4, 8))
    return found


def bfloat16() -> dict:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model, optimizer, _ = made(oasis_backend(8, inner="aot_eager"), True, dtype=torch.float32, policy=policy)
    with warnings.catch_warnings():
        for kind in (LowRankGradWarning, OasisWarning):
            warnings.simplefilter("error", kind)
        losses, _ = train(model, optimizer, True, accumulate=2)
    return {"losses": losses, "dtypes": sorted({str(s["exp_avg"].dtype) for s in optimizer.state.values()})}


def refused() -> dict:
    found = {}
    model, _, _ = made(oasis_backend(8, inner="aot_eager"), True)
    for name, run in {
        "muon": lambda: OasisMuon(model.parameters()),
        "eight bits": lambda: OasisAdamW(model.parameters(), state_bits=8),
        "resize": lambda: OasisAdamW(model.parameters()).resize_rank(4),
        "columns": columns,
        "several meshes": several_meshes,
        "not synchronized": unsynchronized,
        "not finite": not_finite,
    }.items():
        try:
            found[name] = run()
        except (ValueError, RuntimeError) as error:
            found[name] = str(error)
    return found


def columns() -> None:
    layer = torch.nn.Linear(WIDTH, 2 * WIDTH, bias=False)
    prepare(fully_shard(layer, mesh=mesh_of(1), shard_placement_fn=lambda p: Shard(p.dim() - 1)))


def several_meshes() -> None:
    own = DeviceMesh("cpu", [dist.get_rank()])
    layers = torch.nn.Sequential(torch.nn.Linear(WIDTH, WIDTH), torch.nn.Linear(WIDTH, WIDTH))
    fully_shard(layers[0], mesh=mesh_of(1)), fully_shard(layers[1], mesh=own)
    prepare(layers)


def unsynchronized() -> None:
    block = Block()
    block.compile(backend=oasis_backend(8, inner="aot_eager"))
    fully_shard(block, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    block(torch.randn(8, WIDTH)).sum().backward()


def not_finite() -> list[bool]:
    """One rank's gradient is not finite: the step is left out on all."""
    model, optimizer, _ = made(oasis_backend(8, inner="aot_eager"), True)
    train(model, optimizer, True, range(2))
    loss = model(*batch(2, dist.get_rank(), dist.get_world_size()))
    loss.backward()
    weight = model.blocks[0].up.weight
    if dist.get_rank() == 1:
        local_gradient(weight).factor.fill_(torch.inf)
    before = [p.to_local().clone() for p in model.parameters()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        optimizer.step()
    return [torch.equal(p.to_local(), old) for p, old in zip(model.parameters(), before, strict=True)]


CASES = {"equal": lambda folder: equal(), "save": save, "load": load, "bfloat16": lambda folder: bfloat16(),
         "refused": lambda folder: refused(), "divided": lambda folder: divided()}  # fmt: skip

if __name__ == "__main__":
    case, folder = sys.argv[1], Path(sys.argv[2])
    dist.init_process_group("gloo")
    result = CASES[case](folder)
    if dist.get_rank() == 0:
        (folder / "result.json").write_text(json.dumps(result))
    dist.destroy_process_group()
    os._exit(0)
