"""Keep optimizer states in eight bits: codes in blocks of 256, and a scale for each block, by torchao's functions.

A state ``exp_avg`` [m, r] is kept as ``exp_avg``, uint8 codes of the same shape, and ``exp_avg_scale``, float32
[m r / 256]: 8.1 bits a number. While weights are stepped, their states are float32, in one buffer for all that are
stepped together. States of fewer than 4096 numbers, or of a count that 256 does not divide, stay in floating point.

Source: 8-bit optimizers, arXiv 2110.02861; the code tables and the scales are torchao's. A number gets the code whose
value is nearest, which a binary search among the midpoints of the table finds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from oasis_fx.runtime.optim import chunks
from oasis_fx.runtime.optim.updates import DenseUpdate, State
from oasis_fx.runtime.subspaces.banks import Layout

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


def pieces(update: DenseUpdate) -> list[DenseUpdate]:
    """Cut the update of a weight whose states are codes into updates of at most `chunks.CHUNK` numbers each.

    The moments of a large embedding would otherwise be the largest tensors of a step while they are float32. A weight
    or a gradient that is not contiguous is left whole.
    """
    weight, gradient, state = update.weight, update.gradient, update.state
    if weight.numel() <= chunks.CHUNK or not (weight.is_contiguous() and gradient.is_contiguous()):
        return [update]
    found = []
    for start in range(0, weight.numel(), chunks.CHUNK):
        end = start + chunks.CHUNK
        numbers, blocks = slice(start, end), slice(start // BLOCK, end // BLOCK)
        # Each piece counts the step, and the first one for the weight.
        part: State = {"step": state["step"] if start == 0 else state["step"].clone()}
        for name in SIGNED:
            part |= {name: state[name].view(-1)[numbers], f"{name}_scale": state[f"{name}_scale"][blocks]}
        found.append(DenseUpdate(weight.view(-1)[numbers], gradient.view(-1)[numbers], part))
    return found


@contextmanager
def in_float32(states: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Iterator[list[dict[str, Any]]]:
    """Yield the states of weights with their codes decoded to float32, and encode these tensors again at the end.

    The states of one name are decoded, and encoded, by the same few operators however many weights they are of. A block
    that has not changed keeps its codes, since decoding and encoding again is not the identity.

    Args:
        states: of weights of one device; codes and scales are overwritten in place.
        names: of the states to decode. Those that are not codes are yielded as they are.
    """
    plain = [dict(state) for state in states]
    decoded: dict[str, tuple[_Codes, torch.Tensor, torch.Tensor]] = {}
    for name in names:
        places = [place for place, state in enumerate(states) if name in state and state[name].dtype == torch.uint8]
        if not places:
            continue
        codes = _Codes.of([states[place] for place in places], name)
        values = codes.values()
        decoded[name] = codes, values, values.clone()
        for place, value in zip(places, Layout(codes.tensors).parts(values), strict=True):
            plain[place][name] = value
    yield plain
    for codes, values, before in decoded.values():
        codes.store(values, before)


@dataclass(frozen=True)
class _Codes:
    """The codes of one state of several weights.

    Attributes:
        tensors: the codes of each weight, uint8.
        scales: float32, of each block of each weight.
        joined, joined_scales: all of them in one buffer each, as their `Layout` has it.
        signed: whether the state has negative numbers.
    """

    tensors: list[torch.Tensor]
    scales: list[torch.Tensor]
    joined: torch.Tensor
    joined_scales: torch.Tensor
    signed: bool

    @classmethod
    def of(cls, states: Sequence[Mapping[str, Any]], name: str) -> _Codes:
        tensors, scales = ([state[key] for state in states] for key in (name, f"{name}_scale"))
        return cls(tensors, scales, Layout(tensors).join(tensors), Layout(scales).join(scales), SIGNED[name])

    def values(self) -> torch.Tensor:
        """Return what the codes stand for, float32 [total]."""
        from torchao.optim.quant_utils import dequant_with_qmap

        table = _table(self.signed, self.joined.device)
        return dequant_with_qmap(self.joined, table, self.joined_scales)  # type: ignore[no-any-return]

    def store(self, values: torch.Tensor, before: torch.Tensor) -> None:
        """Encode numbers into these codes, in place, but for the blocks that are as they were before."""
        codes, scales = encode(values, self.signed)
        # Read by nobody here: a GPU's host does not wait for it.
        changed = (values != before).view(-1, BLOCK).any(dim=1)
        codes = torch.where(changed[:, None], codes.view(-1, BLOCK), self.joined.view(-1, BLOCK)).flatten()
        scales = torch.where(changed, scales, self.joined_scales)
        torch._foreach_copy_(self.tensors, Layout(self.tensors).parts(codes))
        torch._foreach_copy_(self.scales, Layout(self.scales).parts(scales))


def encode(values: torch.Tensor, signed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes, uint8 [k], and scales, float32 [k / 256], of float32 numbers [k]."""
    from torchao.optim.quant_utils import scale_tensor

    scaled, scales = scale_tensor(values, BLOCK)
    codes = torch.bucketize(scaled, _midpoints(signed, values.device), right=True, out_int32=True)
    return codes.to(torch.uint8), scales


@cache
def _table(signed: bool, device: torch.device) -> torch.Tensor:
    """Return the number that each code stands for, float32 [256], ascending."""
    from torchao.optim.quant_utils import create_dynamic_map

    return torch.tensor(create_dynamic_map(signed), device=device)


@cache
def _midpoints(signed: bool, device: torch.device) -> torch.Tensor:
    """Return the numbers half way between those of neighbouring codes, float32 [255]: as many lie below as its code."""
    table = _table(signed, device).double()
    return ((table[1:] + table[:-1]) / 2).float()
