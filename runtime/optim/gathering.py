"""What one step of an optimizer is to update, and states brought to where their gradients are."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from oasis_fx.graph.matricization import Features, num_features, num_rows
from oasis_fx.runtime.gradients.low_rank_grad import LowRankGrad
from oasis_fx.runtime.optim.states import basis_before, note_basis
from oasis_fx.runtime.optim.strides import state_layout
from oasis_fx.runtime.optim.updates import State, is_low_rank
from oasis_fx.runtime.subspaces.shards import local, local_gradient
from oasis_fx.runtime.subspaces.state import basis_dtype
from oasis_fx.runtime.subspaces.store import STORE
from oasis_fx.runtime.subspaces.subspace import Subspace

if TYPE_CHECKING:
    from oasis_fx.runtime.optim.base import SubspaceOptimizer


@dataclass(frozen=True)
class Item:
    """A parameter that takes part in a step, with what the step will use.

    A weight is in a subspace because a compiled graph has put it into one, whatever kind its gradient is of at this
    step: a gradient that a hook, a penalty or a clipping by value has made dense is projected.

    Attributes:
        weight: the parameter, which states are found by.
        data: what is stepped: the parameter itself, or the local part of one that is sharded.
        gradient: of ``data``: a `LowRankGrad` or a plain tensor.
        subspace: which the weight is in; None for no subspace, or one that is known from a checkpoint only.
        features: which dimensions of the weight are n; None where there is no subspace.
        low_rank: whether the states are, or are to be, in the coordinates of the subspace.
    """

    weight: torch.Tensor
    data: torch.Tensor
    gradient: torch.Tensor
    hyper: Hashable
    subspace: Subspace | None
    features: Features | None
    low_rank: bool


def gather(optimizer: SubspaceOptimizer) -> Iterator[Item]:
    """Everything that this step updates. Raises before anything has changed."""
    has_ranks = torch.distributed.is_available() and torch.distributed.is_initialized()
    for index, group in enumerate(optimizer.param_groups):
        optimizer.check_group(group)  # it may have been set since the last step
        for number, weight in enumerate(group["params"]):
            if weight.grad is None:
                continue
            if weight.grad.is_sparse:
                raise RuntimeError(f"{type(optimizer).__name__} does not support sparse gradients")
            name = group["param_names"][number] if "param_names" in group else f"{number} of group {index}"
            if has_ranks:
                for subspace in STORE.all_of(weight):
                    subspace.check_averaged()
            yield _item(optimizer, weight, group, name)


def _item(optimizer: SubspaceOptimizer, weight: torch.Tensor, group: Mapping[str, Any], name: str) -> Item:
    gradient, state = local_gradient(weight), optimizer.state.get(weight, {})
    assert gradient is not None
    data = local(weight)
    subspace, features = _place(optimizer, weight, gradient, state)
    if is_low_rank(state):
        low_rank = True
    else:  # states of the weight's own shape, or none yet
        full_rank = state.get("full_rank") or group.get("full_rank")
        low_rank = subspace is not None and not subspace.spec.rule.dense and not full_rank
    if subspace is not None and low_rank:
        _check_binding(optimizer, weight, subspace, name)
        if state.get("features", features) != features:
            raise ValueError(
                f"parameter {name} has moments in a basis of dimensions {state['features']} and a gradient in one of "
                f"{features}: a graph reads it the other way round. Take them away by optimizer.state.pop(parameter)"
            )
    _check_shapes(optimizer, name, data, gradient, state, subspace if low_rank else None)
    if isinstance(gradient, LowRankGrad):
        if not gradient.is_low_rank:
            gradient = gradient.factor
        elif gradient.is_stale:  # a step without a backward pass before it: the same gradient in the present basis
            factor = gradient.cell.current_factor()
            gradient = LowRankGrad(factor, gradient.subspace, gradient, features=gradient.features)
    hyper = optimizer.hyper_of(group, weight)
    return Item(weight, data, gradient, hyper, subspace, features, low_rank)


def _place(
    optimizer: SubspaceOptimizer, weight: torch.Tensor, gradient: torch.Tensor, state: State
) -> tuple[Subspace | None, Features | None]:
    """The subspace that a weight is in."""
    if isinstance(gradient, LowRankGrad) and gradient.is_low_rank:
        return gradient.subspace, gradient.features
    binding = optimizer.bindings.get(weight)
    if binding is not None:
        return binding.subspace, state.get("features")
    if weight.dim() < 2:
        return None, None
    stored = STORE.in_use(weight) or STORE.in_use(weight, dense=True)
    return stored or (None, state.get("features"))


def _check_binding(optimizer: SubspaceOptimizer, weight: torch.Tensor, subspace: Subspace, name: str) -> None:
    binding = optimizer.bindings.get(weight)
    if binding is None or binding.subspace is not subspace or binding.version == subspace.version:
        return
    if subspace.overlap is None and subspace.overlap_since(binding.version) is None:
        raise RuntimeError(
            f"the basis of parameter {name} was moved more than once by another optimizer since its last step here: "
            "weights that share a basis belong to one optimizer"
        )


def _check_shapes(
    optimizer: SubspaceOptimizer,
    name: str,
    data: torch.Tensor,
    gradient: torch.Tensor,
    state: State,
    subspace: Subspace | None,
) -> None:
    """Raise ValueError where a weight has another shape than its gradient or its states: kernels do not look at it.

    ``subspace`` is the one that low-rank states are to be in; None where they are in none, or it is not known yet.
    """
    shape, low_rank = data.shape, is_low_rank(state)
    if gradient.shape != shape:
        raise ValueError(
            f"parameter {name} has shape {tuple(shape)} and a gradient of shape {tuple(gradient.shape)}: it "
            "has changed its shape since the backward pass"
        )
    if low_rank:
        rows, basis = num_rows(shape, state["features"]), state.get("basis")
        has_basis = basis is None or basis.shape[0] == num_features(shape, state["features"])
    for kind in optimizer.states_of(low_rank):
        if kind not in state:
            continue
        found = state[kind].shape
        if not (has_basis and found[0] == rows if low_rank else found == shape):
            raise ValueError(
                f"parameter {name} has shape {tuple(shape)} and {_SPOKEN.get(kind, kind)} of shape {tuple(found)}: "
                "its shape has changed since they began. Take them away by optimizer.state.pop(parameter)"
            )
        if low_rank and subspace is not None and found[1] != subspace.shape[1]:
            raise ValueError(
                f"parameter {name} has {_SPOKEN.get(kind, kind)} of shape {tuple(found)} and a gradient of shape "
                f"{(rows, subspace.shape[1])}: its rank has changed since they began"
            )


def prepare_state(optimizer: SubspaceOptimizer, item: Item, group: Mapping[str, Any]) -> None:
    """Make the state of a parameter, or bring it to where this step needs it."""
    state, subspace = optimizer.state[item.weight], item.subspace
    _follow(optimizer, item.weight, state)
    if not state:
        like = item.data
        if item.low_rank:
            assert subspace is not None and item.features is not None
            shape = num_rows(item.data.shape, item.features), subspace.shape[1]
            like = torch.empty(shape, dtype=subspace.dtype, device=item.weight.device)
        state["step"] = torch.zeros((), dtype=torch.float32, device=item.weight.device)
        for name in optimizer.states_of(item.low_rank):
            state.update(optimizer.new_state(name, like, group))
    elif item.low_rank and not is_low_rank(state):
        assert subspace is not None and item.features is not None
        _project(optimizer, state, subspace.basis.detach(), item.features, group)
    if subspace is None:
        return
    binding = optimizer.bindings.get(item.weight)
    if binding is not None and binding.subspace is subspace and binding.version == subspace.version:
        return  # as the last step left it
    if item.low_rank:
        _transport_to(optimizer, item.weight, state, subspace)
    else:
        state["full_rank"] = True
    note_basis(state, subspace)
    state["features"], state["subspace"] = item.features, subspace.handle
    optimizer.bind(item.weight, subspace)


def adopt_resting(optimizer: SubspaceOptimizer, items: Sequence[Item]) -> None:
    """Bind weights that were loaded in a subspace and take no part in this step, as frozen ones: it is to move now."""
    active = {item.weight for item in items}
    for weight, state in optimizer.state.items():
        if not isinstance(weight, torch.Tensor):  # foreign; torch.distributed.checkpoint leaves some with our entries
            continue
        if "features" not in state or weight in active or weight in optimizer.bindings:
            continue
        for subspace in STORE.all_of(weight):
            if "basis" not in state or subspace.shape == state["basis"].shape:
                if is_low_rank(state):
                    _transport_to(optimizer, weight, state, subspace)
                note_basis(state, subspace)
                optimizer.bind(weight, subspace)
                break


def _project(
    optimizer: SubspaceOptimizer, state: State, basis: torch.Tensor, features: Features, group: Mapping[str, Any]
) -> None:
    """Bring states of the weight's own shape into the coordinates of a basis Q [n, r].

    It happens where a weight comes into a subspace after its first steps: they were eager, or the checkpoint is that of
    a stock optimizer.
    """
    projected = optimizer.projected_states(optimizer.decoded(state), basis, features, group)
    for name in optimizer.states_of(False):
        state.pop(name, None)
        state.pop(f"{name}_scale", None)
    for name, value in projected.items():
        state.update(optimizer.new_state(name, value, group))
    with optimizer.states_in_place(state) as plain:
        for name, value in projected.items():
            plain[name].copy_(value)


def _transport_to(optimizer: SubspaceOptimizer, weight: torch.Tensor, state: State, subspace: Subspace) -> None:
    """Transport the states of a weight to the present coordinates of its subspace."""
    if "features" not in state or not subspace.spec.rule.transports:
        return
    binding = optimizer.bindings.get(weight)
    if binding is not None and binding.subspace is subspace:
        if binding.version != subspace.version:  # another optimizer, whose weights share the basis, has moved it
            overlap = subspace.overlap_since(binding.version)
            assert overlap is not None  # `gather` has seen to it
            optimizer.carry_over([(weight, overlap)])
        return
    # Loaded from a checkpoint, or taken over from another graph or backend. Equal bases are not multiplied: a resumed
    # run is bitwise the uninterrupted one.
    held = None if binding is None else binding.subspace
    old, basis = basis_before(state, held, subspace), subspace.basis.detach()
    if old is not None and old.shape == basis.shape and not torch.equal(old, basis):
        optimizer.carry_over([(weight, old.mT @ basis)])


def _follow(optimizer: SubspaceOptimizer, weight: torch.Tensor, state: State) -> None:
    """Take a state along where `model.to()` has moved or cast its weight since the last step."""
    wide, low_rank, device = basis_dtype(weight.dtype), is_low_rank(state), weight.device
    for key in (*optimizer.states_of(low_rank), "basis"):
        if key not in state:
            continue
        found: torch.Tensor = state[key]
        if f"{key}_scale" in state:  # codes of numbers
            state[key], state[f"{key}_scale"] = found.to(device), state[f"{key}_scale"].to(device)
            continue
        dtype = wide if key == "basis" or low_rank else weight.dtype
        if found.dtype != dtype or found.device != device:
            state[key] = found = found.to(device, dtype)
        if key != "basis" and not low_rank:
            data = local(weight)
            if found.shape == data.shape:
                state[key] = state_layout(found, data)
    if "step" in state and state["step"].device != device:
        state["step"] = state["step"].to(device)


_SPOKEN = {"exp_avg": "moments", "exp_avg_sq": "moments", "momentum_buffer": "a momentum"}
