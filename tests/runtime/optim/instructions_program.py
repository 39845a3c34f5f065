"""Run by test_triton_kernels.py beside Triton: what the kernels of optimizer steps are on three kinds of GPU.

Instructions an entry bound a kernel that should wait for memory only: an H100 executes about 40 while it reads and
writes a bfloat16 number.
"""

from __future__ import annotations

import itertools
from typing import Any

import sass
import torch
import triton.language as tl

from oasis_fx.runtime.optim.kernels.add_products import add_products_kernel
from oasis_fx.runtime.optim.kernels.dense_adamw import BLOCK, adamw_kernel
from oasis_fx.runtime.optim.kernels.tiles import tile_for

POINTERS = {"weights": "*i64", "bases": "*i64", "bank": "*fp32", "gate": "*i1", "lr": "*fp32"}
NUMBERS = {"decay": "fp32", "seed": "i64"} | dict.fromkeys(("m", "n", "stride", "rank"), "i32")
DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
SHARED = {80: 163, 90: 227, 120: 99}  # KiB that a block of threads can have
# Of bfloat16 weights with stochastic rounding, by rank.
LIMITS = {80: {32: 19, 128: 27}, 90: {32: 18, 128: 20}, 120: {32: 19, 128: 27}}


def product(capability: int, rank: int, dtype: torch.dtype, **changed: Any) -> tuple[sass.Code, float]:
    """The kernel of products and its instructions an entry."""
    tile = tile_for(rank, dtype, divmod(capability, 10))
    constants = {
        "DTYPE": DTYPES[dtype], "TURNED": False, "GATED": True, "LR_ON_DEVICE": True, "ROUND": dtype == torch.bfloat16,
        "ALIGNED": True, "EVEN": rank % tile.part == 0, "PRECISION": tile.precision, "HALF": tile.half,
        "ROWS": tile.rows, "COLUMNS": tile.columns, "CHUNKS": tile.chunks, "PART": tile.part, "LOOP": tile.loop,
        "STAGES": tile.stages,
    }  # fmt: skip
    constants |= changed
    options = {"num_warps": tile.warps, "maxnreg": tile.registers if constants["ALIGNED"] else None}
    types = POINTERS | NUMBERS | ({"bank": "*bf16"} if tile.half else {})
    code = sass.build(add_products_kernel, types, constants, capability, **options)
    entries = tile.rows * tile.columns * tile.chunks / (32 * tile.warps)
    return code, code.executed(tile.chunks, -(-rank // tile.part)) / entries


def check(name: str, capability: int, code: sass.Code, count: float, limit: float) -> None:
    print(f"sm_{capability} {name}: {count:.1f} an entry, {code.registers} registers, {code.shared} bytes", flush=True)
    assert not code.spills(), "spills"
    assert code.shared <= SHARED[capability] * 1024, "too much shared memory"
    assert count <= limit, f"over {limit}"


def products() -> None:
    for capability, limits in LIMITS.items():
        for rank, limit in limits.items():
            check(f"bfloat16, r = {rank}", capability, *product(capability, rank, torch.bfloat16), limit)
        check("transposed", capability, *product(capability, 32, torch.bfloat16, TURNED=True), limits[32])
        check("float16", capability, *product(capability, 32, torch.float16), limits[32])
        check("float32", capability, *product(capability, 32, torch.float32), 30)
        check("r = 100", capability, *product(capability, 100, torch.bfloat16), limits[128])
        check("unaligned", capability, *product(capability, 32, torch.bfloat16, ALIGNED=False), 40)


def code_does_not_grow() -> None:
    """Of a rank of several parts, which a loop of the GPU's goes through."""
    for capability, dtype in itertools.product(LIMITS, (torch.bfloat16, torch.float32)):
        sizes = {rank: len(product(capability, rank, dtype)[0].instructions) for rank in (192, 256, 512)}
        assert len(set(sizes.values())) == 1 and max(sizes.values()) < 1500, (capability, dtype, sizes)
        code, _ = product(capability, 512, dtype)
        check(f"{dtype}, r = 512", capability, code, 0, 0)


def dense() -> None:
    types = dict.fromkeys(("addresses", "layout"), "*i64") | {"tensors": "i32", "biases": "*fp32", "seed": "i64"}
    types |= {"gate": "*i1", "lr": "*fp32"} | dict.fromkeys(("beta1", "beta2", "eps", "decay"), "fp32")
    for capability, aligned in itertools.product(LIMITS, (True, False)):
        constants = {"GATED": True, "LR_ON_DEVICE": True, "ALIGNED": aligned, "BLOCK": BLOCK}
        code = sass.build(adamw_kernel, types, constants, capability, num_warps=8)
        check(
            f"AdamW, aligned {aligned}",
            capability,
            code,
            len(code.instructions) / (BLOCK / 256),
            80 if aligned else 120,
        )


if __name__ == "__main__":
    products()
    code_does_not_grow()
    dense()
