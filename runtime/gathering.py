"""What one step of an optimizer is to update, and states brought to where their gradients are."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from oasis_fx.runtime.low_rank_grad import LowRankGrad
from oasis_fx.runtime.optimizer_state import basis_before, note_basis
from oasis_fx.runtime.shards import local, local_gradient
from oasis_fx.runtime.strides import state_layout
from oasis_fx.runtime.subspace import Subspace
from oasis_fx.runtime.updates import State, is_low_rank

if TYPE_CHECKING:
    from oasis_fx.runtime.subspace_optimizer import SubspaceOptimizer


@dataclass(frozen=True)
class Item:
    """A parameter that takes part in a step, with what the step will use.

    Attributes:
        weight: the parameter, which states are found by.
        data: what is stepped: the parameter itself, or the local part of one that is sharded.
        gradient: of ``data``.
    """

    weight: torch.Tensor
    data: torch.Tensor
    gradient: torch.Tensor
    hyper: Hashable
    low_rank: bool


def gather(optimizer: SubspaceOptimizer) -> Iterator[Item]:
    """Everything that this step updates. Raises before anything has changed."""
    for index, group in enumerate(optimizer.param_groups):
        optimizer.check_group(group)  # it may have been set since the last step
        for number, weight in enumerate(group["params"]):
            if weight.grad is None:
                continue
            if weight.grad.is_sparse:
                raise RuntimeError(f"{type(optimizer).__name__} does not support sparse gradients")
            name = group["param_names"][number] if "param_names" in group else f"{number} of group {index}"
            yield _item(optimizer, weight, optimizer.hyper_of(group, weight), bool(group.get("full_rank")), name)


def _item(optimizer: SubspaceOptimizer, weight: torch.Tensor, hyper: Hashable, full_rank: bool, name: str) -> Item:
    gradient, data, state = local_gradient(weight), local(weight), optimizer.state.get(weight, {})
    assert gradient is not None
    if isinstance(gradient, LowRankGrad) and gradient.is_low_rank:
        if gradient.basis_version != gradient.subspace.version:
            raise RuntimeError(
                f"the basis of parameter {name} moved since its gradient was computed: call zero_grad() before "
                "the next backward(), and give weights that share a basis to one optimizer"
            )
        if (state and not is_low_rank(state)) or (full_rank and not state):
            return Item(weight, data, gradient, hyper, False)  # it began with states of its own shape
        shapes = {name: tuple(state[name].shape) for name in optimizer.states if name in state}
        for kind, shape in shapes.items():
            if shape != tuple(gradient.factor.shape):
                raise ValueError(
                    f"parameter {name} has {_SPOKEN.get(kind, kind)} of shape {shape} and a gradient of shape "
                    f"{tuple(gradient.factor.shape)}: its rank has changed since they began"
                )
        return Item(weight, data, gradient, hyper, True)
    dense = gradient.factor if isinstance(gradient, LowRankGrad) else gradient
    return Item(weight, data, dense, hyper, is_low_rank(state))


def prepare_state(optimizer: SubspaceOptimizer, item: Item, group: Mapping[str, Any]) -> None:
    state = optimizer.state[item.weight]
    _follow(optimizer, item.weight, state)
    gradient = item.gradient
    if not state:
        like = item.data
        if item.low_rank and isinstance(gradient, LowRankGrad):
            like = torch.empty(gradient.factor.shape, dtype=gradient.subspace.dtype, device=item.weight.device)
        state["step"] = torch.zeros((), dtype=torch.float32, device=item.weight.device)
        for name in optimizer.states_of(item.low_rank):
            state.update(optimizer.new_state(name, like, group))
    if isinstance(gradient, LowRankGrad):
        if item.low_rank:
            _bring_along(optimizer, item.weight, state, gradient.subspace)
        else:
            state["full_rank"] = True
        note_basis(state, gradient.subspace)
        state["features"] = gradient.features
        optimizer.bind(item.weight, gradient.subspace)


def _bring_along(optimizer: SubspaceOptimizer, weight: torch.Tensor, state: State, subspace: Subspace) -> None:
    """Bring the states of a weight into the coordinates of its gradient."""
    if "features" in state:
        binding = optimizer.bindings.get(weight)
        if binding is not None and binding.subspace is subspace and binding.version != subspace.version:
            raise RuntimeError("a basis was moved by another optimizer: weights that share one belong to one optimizer")
        if (binding is None or binding.subspace is not subspace) and subspace.spec.rule.transports:
            # Loaded from a checkpoint, or taken over from another graph or backend. Equal bases are not
            # multiplied: a resumed run is bitwise the uninterrupted one.
            held = None if binding is None else binding.subspace
            old, basis = basis_before(state, held, subspace), subspace.basis.detach()
            if old is not None and old.shape == basis.shape and not torch.equal(old, basis):
                optimizer.carry_over([(weight, old.mT @ basis)])


def _follow(optimizer: SubspaceOptimizer, weight: torch.Tensor, state: State) -> None:
    """Take a state along where `model.to()` has moved or cast its weight since the last step."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    for key in (*optimizer.states_of(is_low_rank(state)), "basis"):
        if key in state:
            if f"{key}_scale" in state:  # codes of numbers
                state[key] = state[key].to(weight.device)
                state[f"{key}_scale"] = state[f"{key}_scale"].to(weight.device)
                continue
            dtype = wide if key == "basis" or is_low_rank(state) else weight.dtype
            state[key] = state[key].to(weight.device, dtype)
            if key != "basis" and not is_low_rank(state) and state[key].shape == local(weight).shape:
                state[key] = state_layout(state[key], local(weight))
    if "step" in state:
        state["step"] = state["step"].to(weight.device)


_SPOKEN = {"exp_avg": "moments", "exp_avg_sq": "moments", "momentum_buffer": "a momentum"}
