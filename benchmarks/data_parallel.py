"""Steps of two processes on gloo: what travels, how much of it while the backward pass goes on, and the time it takes.

python -m benchmarks.data_parallel                                # 512x4, 4 x 256 tokens a rank: some 5 minutes
python -m benchmarks.data_parallel --model 1024x4 --steps 15

Contenders step in turns, in one process a rank with one thread; seconds are medians, as ratios to stock DDP.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tabulate import tabulate
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from benchmarks import models
from oasis_fx import OasisAdamW, oasis_backend
from oasis_fx.distributed import prepare

RESULTS = Path(__file__).with_name("results")
ENOUGH = 2**40  # a bucket that nothing fills: all is sent at the end of the backward pass
CONTENDERS = ("DDP", "DDP, oasis", "DDP, oasis, all at the end", "FSDP2", "FSDP2, oasis")


class Contender:
    def __init__(self, name: str, args: argparse.Namespace) -> None:
        self.model, self.batch = models.build(args)
        ours = "oasis" in name
        backend: Any = oasis_backend(rank=args.rank) if ours else "inductor"
        self.sync = None
        if name.startswith("DDP"):
            if ours:
                self.sync = prepare(self.model, bucket_bytes=ENOUGH if "end" in name else args.bucket)
            self.model.compile(backend=backend)
            self.run: torch.nn.Module = DistributedDataParallel(self.model, bucket_cap_mb=args.bucket / 2**20)
        else:
            mesh = init_device_mesh("cpu", (dist.get_world_size(),))
            for block in self.model.model.layers:
                block.compile(backend=backend)
                fully_shard(block, mesh=mesh)
            fully_shard(self.model, mesh=mesh)
            self.sync = prepare(self.model, bucket_bytes=args.bucket) if ours else None
            self.run = self.model
        parameters = list(self.model.parameters())
        self.optimizer: torch.optim.Optimizer = (
            OasisAdamW(parameters, lr=1e-4) if ours else torch.optim.AdamW(parameters, lr=1e-4, fused=True)
        )

    def step(self) -> float:
        dist.barrier()
        start = time.perf_counter()
        self.run(**self.batch).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        dist.barrier()
        return time.perf_counter() - start


def rank_main(args: argparse.Namespace) -> None:
    dist.init_process_group("gloo")
    torch._dynamo.config.recompile_limit = 64
    contenders = {name: Contender(name, args) for name in CONTENDERS}
    seconds: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    for number in range(3 + args.steps):
        for name, contender in contenders.items():
            took = contender.step()
            if number >= 3:
                seconds[name].append(took)
    if dist.get_rank() == 0:
        rows = [_row(name, contenders[name], seconds, 3 + args.steps) for name in CONTENDERS]
        settings = {key: getattr(args, key) for key in ("model", "batch", "seq", "rank", "steps", "bucket")}
        found = {"settings": settings, "torch": torch.__version__, "ranks": dist.get_world_size(), "rows": rows}
        RESULTS.joinpath("data_parallel.json").write_text(json.dumps(found, indent=1) + "\n")
        print(tabulate(rows, headers="keys", tablefmt="github", floatfmt=".2f"))
    dist.barrier()
    os._exit(0)  # threads of gloo hold tensors that cannot be let go once Python has begun to end


def _row(name: str, contender: Contender, seconds: dict[str, list[float]], steps: int) -> dict[str, Any]:
    row: dict[str, Any] = {"": name, "step": _ratio(seconds, name, "DDP"), "to its peer": None}
    if "oasis" in name:
        row["to its peer"] = _ratio(seconds, name, name.split(",")[0])
    dense = sum(p.nbytes for p in contender.model.parameters() if p.requires_grad)
    low = 0
    if contender.sync is not None:
        low, dense = contender.sync.sent, dense * steps - contender.sync.dense
        row["MiB a step"] = (low + dense) / steps / 2**20
        row["early"] = contender.sync.early / low
    else:
        row["MiB a step"], row["early"] = dense / 2**20, None
    return row


def _ratio(seconds: dict[str, list[float]], name: str, peer: str) -> float:
    """Of neighbours in time: the machine's slow minutes meet both."""
    return statistics.median(a / b for a, b in zip(seconds[name], seconds[peer], strict=True))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="512x4", help="WIDTHxLAYERS of a Llama")
    parser.add_argument("--batch", type=int, default=4, help="rows a rank")
    parser.add_argument("--seq", type=int, default=256)
    parser.add_argument("--rank", type=int, default=32, help="of the bases")
    parser.add_argument("--steps", type=int, default=11)
    parser.add_argument("--bucket", type=int, default=2**20, help="bytes; DDP's default of 25 MiB holds all of ours")
    given = parser.parse_args()
    return argparse.Namespace(**vars(given), layers=None, vocabulary=1024, dtype="float32", device="cpu")


if __name__ == "__main__":
    if "LOCAL_RANK" in os.environ:
        rank_main(_parse())
    else:
        _parse()
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        done = subprocess.run([*launch, __file__, *sys.argv[1:]], env={**os.environ, "OMP_NUM_THREADS": "1"})
        sys.exit(done.returncode)
