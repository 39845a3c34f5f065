"""Bytes of gradients and optimizer states of the weights that a graph rewrites, before and after, from fake values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from oasis_fx._torch.joint_graphs import input_placeholders
from oasis_fx.compile.joint import Trace
from oasis_fx.compile.lowering import CompiledGraph
from oasis_fx.graph.edits import shape, value
from oasis_fx.graph.facts import WeightGradient
from oasis_fx.memory.node_costs import hint, num_bytes
from oasis_fx.runtime.optim.eight_bit import BLOCK, SMALLEST


@dataclass(frozen=True)
class StateBytes:
    """What the rewritten weights of one graph have beside themselves, in bytes.

    Attributes:
        dense_gradients: dW of each weight.
        gradients: G of each weight, and C of each basis where the rule forms one.
        dense_moments: Adam's two moments in the weight's shape and dtype, or in eight bits.
        moments: two moments of m x r in the dtype of the basis: float32, float64 for float64 weights. Under a rule
            whose gradients are dense, two of the weight's shape and dtype.
        bases: Q of each group, where the basis is stored, and its tail T.
    """

    dense_gradients: int
    gradients: int
    dense_moments: int
    moments: int
    bases: int


def state_bytes(record: CompiledGraph, trace: Trace, bits: int = 32) -> StateBytes:
    """Count the bytes of gradients, of Adam's moments and of bases for the weights that ``trace`` rewrites.

    Args:
        bits: 8 where moments are kept in eight bits, as `OasisAdamW(state_bits=8)` and torchao's 8-bit AdamW do.
    """
    placeholders = input_placeholders(trace.before.graph)
    weights = [value(placeholders[site.inputs.weight]) for site in trace.sites]
    dense = sum(map(num_bytes, weights))
    dense_moments = sum(
        2 * moment_bytes(num_bytes(weight) // weight.itemsize, weight.dtype, bits) for weight in weights
    )
    rule = record.groups[0].spec.rule if record.groups else None
    stored = not (rule is not None and (rule.coded or getattr(rule, "each_batch", False)))
    gradients = moments = bases = 0
    for basis, sites in sites_by_basis(trace).items():
        bases += stored * _size(placeholders, basis)
        gradients += sites[0].inputs.rule.statistic * _size(placeholders, basis)
        tail = sites[0].inputs.tail
        bases += 0 if tail is None else _size(placeholders, tail)
        for site in sites:
            if site.inputs.rule.dense:
                gradients += _size(placeholders, site.inputs.weight)
                weight: Any = value(placeholders[site.inputs.weight])
                moments += 2 * moment_bytes(num_bytes(weight) // weight.itemsize, weight.dtype, bits)
            else:
                gradients += _size(placeholders, site.inputs.slot)
                m, rank = hint(shape(placeholders[site.inputs.slot])[0]), hint(shape(placeholders[basis])[1])
                moments += 2 * moment_bytes(m * rank, value(placeholders[basis]).dtype, bits)
    return StateBytes(dense, gradients, dense_moments, moments, bases)


def moment_bytes(numbers: int, dtype: torch.dtype, bits: int) -> int:
    """Count the bytes of one moment, in its own dtype or as eight-bit codes with a float32 scale for each block.

    Args:
        numbers: how many the moment has.
        dtype: of the moment where it is not kept in codes.
        bits: 32 or 8, as ``state_bits`` of `OasisAdamW`.
    """
    if bits == 32 or numbers < SMALLEST or numbers % BLOCK or dtype == torch.float64:
        return numbers * dtype.itemsize
    return numbers + 4 * (numbers // BLOCK)


def sites_by_basis(trace: Trace) -> dict[int, list[WeightGradient]]:
    """Return the rewritten weight gradients by the position of their basis."""
    groups: dict[int, list[WeightGradient]] = {}
    for site in trace.sites:
        groups.setdefault(site.inputs.basis, []).append(site)
    return groups


def _size(placeholders: Mapping[int, fx.Node], position: int) -> int:
    return num_bytes(value(placeholders[position]))
