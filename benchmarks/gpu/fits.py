"""Whether an 8B Llama trains on a card of 24 GiB: all parameters, bfloat16, one batch of 2048 tokens.

    python -m benchmarks.gpu.fits --out FOLDER [--device cpu --tiny]

The process may take 24 GiB of the card at hand, CUDA's own context not counted
(`torch.cuda.set_per_process_memory_fraction`). Where that is too little, it is tried again without a limit, so that the
peak says how much is missing.
"""

from __future__ import annotations

import gc
import time
from argparse import Namespace
from typing import Any

import torch

from benchmarks import models
from benchmarks.gpu.arguments import parser
from benchmarks.gpu.record import Record
from oasis_fx import OasisAdamW, oasis_backend

LIMIT = 24 * 2**30
SIZES = {"model": "llama-8b", "layers": 32, "vocabulary": None, "batch": 1, "seq": 2048}
TINY = {"model": "64x2", "layers": None, "vocabulary": 64, "batch": 1, "seq": 16}
SETTINGS: dict[str, Any] = {"rank": 128, "memory_budget": 0.1}


def main() -> None:
    args = parser(__doc__).parse_args()
    record = Record(args.out, "fits", args.device)
    for limited in (True, False):
        found = _train(limited, args)
        record.add({"limit_gib": LIMIT / 2**30 if limited else None, **found})
        print(found, flush=True)
        if "error" not in found:
            break
        gc.collect()


def _train(limited: bool, args: Namespace) -> dict[str, Any]:
    on_gpu = args.device == "cuda"
    if on_gpu:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, LIMIT / total) if limited else 1.0)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    torch._dynamo.reset()
    found: dict[str, Any] = {"seconds": []}
    try:
        sizes = TINY if args.tiny else SIZES
        model, batch = models.build(Namespace(**sizes, dtype="bfloat16", device=args.device))
        settings = {**SETTINGS, "rank": 8} if args.tiny else SETTINGS
        model.compile(backend=oasis_backend(**settings))
        optimizer = OasisAdamW(model.parameters(), lr=1e-5, state_bits=32)
        for _ in range(3):
            start = time.perf_counter()
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found["loss"] = loss.item()
            found["seconds"].append(time.perf_counter() - start)
    except torch.OutOfMemoryError as error:
        found["error"] = str(error)[:500]
    if on_gpu:
        found["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        found["reserved_gib"] = torch.cuda.max_memory_reserved() / 2**30
    return found


if __name__ == "__main__":
    main()
