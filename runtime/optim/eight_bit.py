"""Keep optimizer states in eight bits: codes in blocks of 256, and a scale for each block, by torchao's functions.

A state ``exp_avg`` [m, r] is kept as ``exp_avg``, uint8 codes of the same shape, and ``exp_avg_scale``, float32
[m r / 256]: 8.1 bits a number. While a weight is stepped, its states are float32. States of fewer than 4096 numbers, or
of a count that 256 does not divide, stay in floating point.

Source: 8-bit optimizers, arXiv 2110.02861; the code tables and the rounding are torchao's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

BLOCK = 256
SMALLEST = 4096
SIGNED = {"exp_avg": True, "exp_avg_sq": False}


def require_torchao() -> None:
    """Check that torchao can be imported.

    Raises:
        ValueError: it cannot; the message says how to install it.
    """
    try:
        import torchao.optim.quant_utils  # noqa: F401
    except ImportError as error:
        raise ValueError("state_bits is 8: it needs torchao (pip install torchao)") from error


def quantizes(like: torch.Tensor) -> bool:
    """Return whether a state with the shape and the dtype of ``like`` is kept in eight bits."""
    return (
        like.numel() >= SMALLEST
        and like.numel() % BLOCK == 0
        and like.is_floating_point()
        and like.dtype != torch.float64
    )


def new_codes(like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes, uint8 in the shape of ``like``, and scales, float32 [numel / 256], that stand for zeros."""
    codes = torch.zeros(like.shape, dtype=torch.uint8, device=like.device)
    return codes, torch.zeros(like.numel() // BLOCK, dtype=torch.float32, device=like.device)


@contextmanager
def in_float32(state: Mapping[str, Any], names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield the state of a weight with its codes decoded to float32, and encode these tensors again at the end.

    A tensor that has not changed keeps its codes, since decoding and encoding again is not the identity.

    Args:
        state: of one weight; its codes and scales are overwritten in place.
        names: of the states to decode. Those that are not codes are yielded as they are.
    """
    from torchao.optim.quant_utils import dequant_with_qmap, quantize_8bit_with_qmap, scale_tensor

    plain, before = dict(state), {}
    for name in names:
        if name in state and state[name].dtype == torch.uint8:
            table = _table(SIGNED[name]).to(state[name].device)
            plain[name] = dequant_with_qmap(state[name], table, state[f"{name}_scale"])
            before[name] = plain[name].clone()
    yield plain
    for name, old in before.items():
        scaled, scale = scale_tensor(plain[name], BLOCK)
        codes = quantize_8bit_with_qmap(scaled, _table(SIGNED[name]).to(old.device))
        changed = (plain[name] != old).any()  # read by nobody here: a GPU's host does not wait for it
        state[name].copy_(torch.where(changed, codes, state[name]))
        state[f"{name}_scale"].copy_(torch.where(changed, scale, state[f"{name}_scale"]))


@cache
def _table(signed: bool) -> torch.Tensor:
    from torchao.optim.quant_utils import create_dynamic_map

    return torch.tensor(create_dynamic_map(signed))
