"""One rank of collectives on gradients, under torchrun: each against the same on a dense gradient.

torchrun --nproc-per-node 2 collectives_program.py FOLDER
"""

from __future__ import annotations

import datetime
import json
import os
import sys
import traceback
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import _functional_collectives as functional
from torch.distributed import distributed_c10d as c10d

from oasis_fx import LowRankGrad
from oasis_fx.runtime.subspaces.initial import initial_basis, new_subspace
from oasis_fx.runtime.subspaces.spec import SubspaceSpec

ROWS, WIDTH, RANK = 6, 8, 3


def gradient(shared: bool, number: int = 0) -> LowRankGrad:
    rank = dist.get_rank()
    basis = initial_basis(WIDTH, RANK, torch.float64, torch.device("cpu"), seed=7 if shared else rank)
    subspace = new_subspace(basis, SubspaceSpec(RANK))
    subspace.replicas = frozenset(range(dist.get_world_size()) if shared else ())
    subspace.names = ("w",)
    generator = torch.Generator().manual_seed(10 * number + rank)
    factor = torch.randn(RANK, ROWS, dtype=torch.float64, generator=generator).mT  # by columns
    return LowRankGrad(factor, subspace, torch.empty(ROWS, WIDTH, dtype=torch.float64))


def together(pair, **kwargs) -> None:
    with c10d._coalescing_manager(**kwargs) as manager:
        for one in pair:
            dist.all_reduce(one)
    if kwargs:
        manager.wait()


def received(pair) -> None:
    if dist.get_rank() == 0:
        dist.send(pair[0], 1)
    else:
        dist.recv(pair[0], 0)


def gathered(pair) -> list[torch.Tensor]:
    found = [torch.zeros(ROWS, WIDTH, dtype=torch.float64) for _ in range(2)]
    dist.all_gather(found, pair[0])
    return found


def gathered_into_one(pair) -> list[torch.Tensor]:
    found = torch.zeros(2 * ROWS, WIDTH, dtype=torch.float64)
    getattr(dist, "all_gather_single", dist.all_gather_into_tensor)(found, pair[0])
    return [found]


def scattered(pair) -> list[torch.Tensor]:
    found = torch.zeros(ROWS // 2, WIDTH, dtype=torch.float64)
    getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)(found, pair[0])
    return [found]


# Each works on a pair of gradients; what it returns is compared too. On factors where the name says so.
WAYS = {
    "all_reduce, factor": lambda pair: dist.all_reduce(pair[0]),
    "all_reduce async, factor": lambda pair: dist.all_reduce(pair[0], async_op=True).wait() and None,
    "all_reduce max": lambda pair: dist.all_reduce(pair[0], dist.ReduceOp.MAX),
    "all_reduce min": lambda pair: dist.all_reduce(pair[0], dist.ReduceOp.MIN),
    "all_reduce product": lambda pair: dist.all_reduce(pair[0], dist.ReduceOp.PRODUCT),
    "all_reduce of data, factor": lambda pair: dist.all_reduce(pair[0].data),
    "all_reduce of detached, factor": lambda pair: dist.all_reduce(pair[0].detach()),
    "broadcast, factor": lambda pair: dist.broadcast(pair[0], 1),
    "broadcast async, factor": lambda pair: dist.broadcast(pair[0], 1, async_op=True).wait() and None,
    "reduce, factor": lambda pair: dist.reduce(pair[0], 0),
    "coalesced, factor": lambda pair: dist.all_reduce_coalesced(pair),
    "coalescing manager, factor": together,
    "coalescing manager async, factor": lambda pair: together(pair, async_ops=True),
    "send and recv": received,
    "all_gather": gathered,
    "all_gather into one": gathered_into_one,
    "reduce_scatter": scattered,
    "functional": lambda pair: [functional.all_reduce(pair[0], "sum", dist.group.WORLD)],
    "functional broadcast": lambda pair: [functional.broadcast(pair[0], 1, dist.group.WORLD)],
    "functional all_gather": lambda pair: [functional.all_gather_tensor(pair[0], 0, dist.group.WORLD)],
    "in autograd": lambda pair: [dist.nn.all_reduce(pair[0])],
}


def tried(way, shared: bool, name: str):
    """The largest error, and whether the gradient is still low-rank."""
    ours = [gradient(shared, number) for number in range(2)]
    dense = [one.to_dense() for one in ours]
    alias = ours[0].detach()
    returned, wanted = way(ours), way(dense)
    if name.startswith("reduce,") and dist.get_rank() != 0:
        return 0.0, ours[0].is_low_rank  # nobody says what is left where nothing is wanted
    pairs = [*zip(ours, dense, strict=True), (alias, dense[0]), *zip(returned or [], wanted or [], strict=True)]
    error = 0.0
    for one, other in pairs:
        one = one.to_dense() if isinstance(one, LowRankGrad) else one
        error = max(error, float((one - other).abs().max()))
    return error, ours[0].is_low_rank


if __name__ == "__main__":
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    warnings.simplefilter("ignore")
    results = {}
    for shared in (True, False):
        for name, way in WAYS.items():
            try:
                results[f"{name}, {'one basis' if shared else 'two bases'}"] = tried(way, shared, name)
            except Exception:  # of one way: the others are tried all the same
                results[f"{name}, {'one basis' if shared else 'two bases'}"] = traceback.format_exc()
    (Path(sys.argv[1]) / f"rank{dist.get_rank()}.json").write_text(json.dumps(results))
    os._exit(0)
