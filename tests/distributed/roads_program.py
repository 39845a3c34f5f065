"""One rank of several short runs in one job, under torchrun; each writes what it found as JSON.

torchrun --nproc-per-node 2 roads_program.py FOLDER
"""

from __future__ import annotations

import copy
import datetime
import json
import os
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.algorithms.join import Join
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from oasis_fx import OasisAdamW, oasis_backend
from oasis_fx.distributed import prepare
from oasis_fx.runtime.subspaces.basis_updates import update_bases
from oasis_fx.runtime.subspaces.state import SubspaceState
from oasis_fx.runtime.subspaces.store import STORE

WIDTH, ROWS, STEPS = 8, 12, 5
ALONE = 0, 1  # rank and number of ranks of the run on the joint batch


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = torch.nn.LayerNorm(WIDTH)
        self.a, self.b = torch.nn.Linear(WIDTH, ROWS), torch.nn.Linear(ROWS, WIDTH)

    def forward(self, x):
        return self.b(torch.tanh(self.a(self.norm(x)))) - x


def inputs(step: int, rank: int, world: int) -> torch.Tensor:
    x = torch.randn(12, WIDTH, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    return x.view(world, -1, WIDTH)[rank]


def here() -> tuple[int, int]:
    return dist.get_rank(), dist.get_world_size()


_backends: dict = {}


def net(**settings):
    """A compiled model, always the same."""
    model, key = Net().double(), str(settings)
    if key not in _backends:  # one of equal settings, so that what it has compiled serves other models too
        _backends[key] = oasis_backend(**{"rank": 4, "inner": "aot_eager", "exclude": []} | settings)
    model.compile(backend=_backends[key])
    return model


def take_steps(model, run, optimizer, place, steps=range(STEPS), backward=torch.Tensor.backward) -> None:
    for step in steps:
        backward(run(inputs(step, *place)).square().mean())
        optimizer.step()
        optimizer.zero_grad()


def weights_of(model) -> list[torch.Tensor]:
    found = [p.detach() for p in model.parameters()]
    return [p.full_tensor() if hasattr(p, "full_tensor") else p.clone() for p in found]


def bases_of(model) -> list[torch.Tensor]:
    return [subspace.basis.detach().clone() for p in model.parameters() for subspace in STORE.all_of(p)]


def distance(one, other) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True))


def spread(tensors) -> float:
    """How far the ranks are apart."""
    found = 0.0
    for tensor in tensors:
        others = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
        dist.all_gather(others, tensor.contiguous())
        found = max(found, *(float((tensor - other).abs().max()) for other in others))
    return found


def error_of(run) -> str:
    try:
        run()
    except (ValueError, RuntimeError) as error:
        return str(error)
    return ""


# Refused


def zero_redundancy() -> dict:
    model = net()
    prepare(model)
    run = DistributedDataParallel(model)
    optimizer = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=OasisAdamW, lr=1e-2)
    before = weights_of(model)
    error = error_of(lambda: take_steps(model, run, optimizer, here()))
    return {"error": error, "moved": distance(before, weights_of(model))}


def zero_redundancy_of_stock() -> dict:
    """With dense states of torch's AdamW it is right: bases move alike by `update_bases`."""
    found = []
    for place in (ALONE, here()):
        model = net()
        if place != ALONE:
            prepare(model)
        run = model if place == ALONE else DistributedDataParallel(model)
        settings = {"lr": 1e-2, "foreach": False}
        if place == ALONE:
            optimizer = torch.optim.AdamW(model.parameters(), **settings)
        else:
            optimizer = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=torch.optim.AdamW, **settings)
        for step in range(STEPS):
            run(inputs(step, *place)).square().mean().backward()
            optimizer.step()
            update_bases(model.parameters())
            model.zero_grad()
        found.append(weights_of(model) + bases_of(model))
    return {"distance": distance(*found), "spread": spread(found[1])}


def bases_apart() -> dict:
    """One rank loads a basis that the others do not have."""
    model = net()
    prepare(model)
    run = DistributedDataParallel(model)
    optimizer = OasisAdamW(model.parameters(), lr=1e-2)
    take_steps(model, run, optimizer, here())
    if dist.get_rank() == 1:
        for subspace in STORE.all_of(model.a.weight):
            basis = -subspace.basis.detach()
            subspace.load(SubspaceState(subspace.shape, subspace.dtype, subspace.device, stored_basis=basis))
    return {"error": error_of(lambda: take_steps(model, run, optimizer, here()))}


def joined() -> dict:
    model = net()
    prepare(model)
    ddp = DistributedDataParallel(model)
    optimizer = OasisAdamW(model.parameters(), lr=1e-2)

    def uneven() -> None:
        with Join([ddp]):
            take_steps(model, ddp, optimizer, here(), range(1 + dist.get_rank()))

    return {"error": error_of(uneven)}


def not_averaged() -> dict:
    """Gradients that never come by what averages them."""
    return {name: run() for name, run in _NOT_AVERAGED.items()}


def prepared():
    model = net()
    prepare(model)
    ddp = DistributedDataParallel(model)
    return model, ddp, ddp, OasisAdamW(model.parameters(), lr=1e-2)


def by_hand(model):
    """A backward pass by `torch.autograd.grad`."""
    parameters = list(model.parameters())

    def backward(loss) -> None:
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter.grad = gradient

    return backward


def unmoved(model, run) -> str:
    before = weights_of(model)
    error = error_of(run)
    assert distance(before, weights_of(model)) == 0, "a step was taken"
    return error


def by_autograd_grad() -> str:
    model, _, run, optimizer = prepared()
    return unmoved(model, lambda: take_steps(model, run, optimizer, here(), backward=by_hand(model)))


def quiet_to_the_end() -> str:
    model, ddp, run, optimizer = prepared()
    with ddp.no_sync():
        return unmoved(model, lambda: take_steps(model, run, optimizer, here()))


def moved_by_hand() -> str:
    model, _, run, _ = prepared()
    by_hand(model)(run(inputs(0, *here())).square().mean())
    return error_of(lambda: update_bases(model.parameters()))


def within_backward() -> str:
    model, _, run, _ = prepared()
    for weight in (model.a.weight, model.b.weight):
        own = OasisAdamW([weight], lr=1e-2)
        weight.register_post_accumulate_grad_hook(lambda _, own=own: own.step())
    return unmoved(model, lambda: run(inputs(0, *here())).square().mean().backward())


_NOT_AVERAGED = {
    "autograd.grad": by_autograd_grad,
    "no_sync": quiet_to_the_end,
    "foreign": moved_by_hand,
    "within backward": within_backward,
}


# Right


def thawed() -> dict:
    """Frozen at `prepare`, thawed later; with the same DDP, one made anew, and `prepare` called again."""
    found = {}
    for name in ("the same", "wrapped anew", "synchronized anew", "dense", "fsdp"):
        runs, sent = [], []
        for place in (ALONE, here()):
            model = net(**({"exclude": ["*a.weight"]} if name == "dense" else {}))
            model.a.weight.requires_grad_(False)
            run, handle = model, None
            if place != ALONE and name == "fsdp":
                run = fully_shard(model, mesh=init_device_mesh("cpu", (place[1],)))
                handle = prepare(model)
            elif place != ALONE:
                handle = prepare(model)
                run = DistributedDataParallel(model)
            optimizer = OasisAdamW(model.parameters(), lr=1e-2)
            take_steps(model, run, optimizer, place, range(2))
            model.a.weight.requires_grad_(True)
            if place != ALONE and name == "synchronized anew":
                sent.append(handle.sent)
                again = prepare(model)
            if place != ALONE and "anew" in name:
                run = DistributedDataParallel(model)
            take_steps(model, run, optimizer, place, range(2, 2 + STEPS))
            runs.append(weights_of(model) + bases_of(model))
            if place != ALONE and name == "synchronized anew":
                sent.append(handle.sent)
                assert sent[0] == sent[1] and again.sent > 0
        found[name] = {"distance": distance(*runs), "spread": spread(runs[1])}
    return found


def made_dense_by_a_hook() -> dict:
    found = {}
    for name in ("ddp", "fsdp", "fsdp, accumulated"):
        runs = []
        for place in (ALONE, here()):
            model = net()
            run = model
            if place != ALONE and name == "ddp":
                prepare(model)
                run = DistributedDataParallel(model)
            elif place != ALONE:
                run = fully_shard(model, mesh=init_device_mesh("cpu", (place[1],)))
                prepare(model)
            for weight in [model.a.weight, model.b.weight]:
                seen = STORE.whole(weight)
                # What a hook sees of a rank is its own batch's: the clipping must not bite for runs to be equal.
                seen.register_hook(lambda gradient: gradient.clamp(-1e6, 1e6))
            optimizer = OasisAdamW(model.parameters(), lr=1e-2)
            for step in range(STEPS):
                for micro in range(2 if "accumulated" in name else 1):
                    if place != ALONE and "accumulated" in name:
                        model.set_requires_gradient_sync(micro == 1)
                    run(inputs(2 * step + micro, *place)).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
            runs.append(weights_of(model) + bases_of(model))
        moves = min(int(s["basis_updates"]) for s in optimizer.state.values() if "basis_updates" in s)
        shapes = sorted(tuple(s["exp_avg"].shape) for s in optimizer.state.values() if "basis" in s)
        found[name] = {"distance": distance(*runs), "spread": spread(runs[1]), "moves": moves, "shapes": shapes}
    return found


def state_dicts() -> dict:
    """A run that is saved and resumed by `torch.distributed.checkpoint.state_dict`, under DDP and FSDP2."""
    found = {}
    full = {"full_state_dict": True}
    for name, options, begun in (
        ("ddp, full", full, False),
        ("ddp, full and offloaded", {**full, "cpu_offload": True, "broadcast_from_rank0": True}, True),
        ("fsdp, full", full, False),
        ("fsdp, full, begun", full, True),
        ("fsdp, flat", {"flatten_optimizer_state_dict": True}, True),
        ("fsdp", {}, True),
    ):
        model, optimizer, run = wrapped(name)
        take_steps(model, run, optimizer, here(), range(3))
        settings = StateDictOptions(**options)
        saved = copy.deepcopy(get_state_dict(model, optimizer, options=settings))
        take_steps(model, run, optimizer, here(), range(3, 6))
        other, other_optimizer, run = wrapped(name)
        if begun:
            take_steps(other, run, other_optimizer, here(), range(7, 8))
        set_model_state_dict(other, saved[0], options=settings)
        set_optimizer_state_dict(other, other_optimizer, saved[1], options=settings)
        take_steps(other, run, other_optimizer, here(), range(3, 6))
        found[name] = distance(weights_of(model) + bases_of(model), weights_of(other) + bases_of(other))
    return found


def wrapped(name: str):
    model = net()
    run = model
    if name.startswith("fsdp"):
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
        prepare(model)
    else:
        prepare(model)
        run = DistributedDataParallel(model)
    return model, OasisAdamW(model.parameters(), lr=1e-2), run


CASES = [
    zero_redundancy,
    zero_redundancy_of_stock,
    bases_apart,
    joined,
    not_averaged,
    thawed,
    made_dense_by_a_hook,
    state_dicts,
]

if __name__ == "__main__":
    torch._dynamo.config.recompile_limit = 64
    folder, wanted = Path(sys.argv[1]), sys.argv[2:]
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    results = {}
    for case in CASES:
        if wanted and case.__name__ not in wanted:
            continue
        try:
            results[case.__name__] = case()
        except Exception:  # of one case: the others are tried all the same
            results[case.__name__] = {"failed": traceback.format_exc()}
    # Each rank by itself: where a case has failed on one of them, the others may be anywhere.
    (folder / f"rank{dist.get_rank()}.json").write_text(json.dumps(results))
    os._exit(0)
