"""What one step of an optimizer is to update: an `Item` for each parameter with a gradient, or a refusal."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from oasis_fx.graph.matricization import Features, num_features, num_rows
from oasis_fx.runtime.gradients.low_rank_grad import LowRankGrad
from oasis_fx.runtime.optim.algorithm import Algorithm
from oasis_fx.runtime.optim.group_settings import parameter_name, rename_settings
from oasis_fx.runtime.optim.settled import settled_items
from oasis_fx.runtime.optim.updates import State, is_low_rank
from oasis_fx.runtime.subspaces.shards import local, local_gradient
from oasis_fx.runtime.subspaces.store import STORE
from oasis_fx.runtime.subspaces.subspace import Subspace


@dataclass(slots=True, eq=False)
class Item:
    """A parameter that takes part in a step, with what the step will use.

    A weight is in a subspace because a compiled graph has put it into one, whatever kind its gradient is of at this
    step: a gradient that a hook, a penalty or a clipping by value has made dense is projected.

    Attributes:
        weight: the parameter, which states are found by.
        name: of the parameter, for messages.
        data: what is stepped: the parameter itself, or the local part of one that is sharded.
        gradient: of ``data``: a `LowRankGrad` or a plain tensor; taken out at the end of the step.
        group: the parameter group of the weight.
        settings: of the group at this step, for weights of this dtype.
        subspace: the one that the weight is in; None where it is in none, or in one that only a checkpoint knows.
        features: which dimensions of the weight are n; None where there is no subspace.
        low_rank: whether the states are, or are to be, in the coordinates of the subspace.
    """

    weight: torch.Tensor
    name: str
    data: torch.Tensor
    gradient: torch.Tensor
    group: Mapping[str, Any]
    settings: Hashable
    subspace: Subspace | None
    features: Features | None
    low_rank: bool


def find_items(optimizer: Algorithm) -> Iterator[Item]:
    """Yield an item for every parameter that has a gradient; nothing has changed where one is refused.

    A parameter of which nothing has changed since the last step has the item that it had then.

    Raises:
        ValueError: a setting is not allowed, or a gradient or a state does not fit its parameter.
        RuntimeError: a gradient is sparse, was not averaged over ranks, or is in a basis that has moved since.
    """
    has_ranks = torch.distributed.is_available() and torch.distributed.is_initialized()
    settled, versions = settled_items(optimizer), dict[Subspace, int]()
    for index, group in enumerate(optimizer.param_groups):
        rename_settings(group, optimizer.renamed_settings, f"parameter group {index}")
        optimizer.check_group(group)  # it may have been set since the last step
        settings: dict[torch.dtype, Hashable] = {}
        for number, weight in enumerate(group["params"]):
            gradient = weight.grad
            if gradient is None:
                continue
            if has_ranks:
                for subspace in STORE.all_of(weight):
                    subspace.check_averaged()
            if weight.dtype not in settings:
                settings[weight.dtype] = optimizer.settings_of(group, weight.dtype)
            known = settled.get(id(weight))
            if known is not None and known.takes(weight, gradient, group, optimizer, versions):
                known.item.gradient, known.item.settings = gradient, settings[weight.dtype]
                yield known.item
                continue
            name = parameter_name(group, index, number)
            if gradient.is_sparse:
                raise RuntimeError(f"parameter {name}: {type(optimizer).__name__} does not support sparse gradients")
            yield _item(optimizer, weight, group, settings[weight.dtype], name)


def _item(optimizer: Algorithm, weight: torch.Tensor, group: Mapping[str, Any], settings: Hashable, name: str) -> Item:
    gradient, state = local_gradient(weight), optimizer.state.get(weight, {})
    assert gradient is not None
    data = local(weight)
    subspace, features = _subspace_of(optimizer, weight, gradient, state)
    begun_low_rank = low_rank = is_low_rank(state)
    if not low_rank:  # states of the weight's own shape, or none yet
        full_size = state.get("full_rank") or group.get("full_size_states")
        low_rank = subspace is not None and not subspace.spec.rule.dense and not full_size
    if subspace is not None and low_rank:
        _check_binding(optimizer, weight, subspace, name)
        if state.get("features", features) != features:
            raise ValueError(
                f"parameter {name} has moments in a basis of dimensions {state['features']} and a gradient in one of "
                f"{features}: a graph reads it the other way round. Take them away by optimizer.state.pop(parameter)"
            )
    _check_shapes(optimizer.states_of(begun_low_rank), name, data, gradient, state, subspace if low_rank else None)
    if isinstance(gradient, LowRankGrad):
        if not gradient.is_low_rank:
            gradient = gradient.factor
        elif gradient.is_stale:  # a step without a backward pass before it: the same gradient in the present basis
            factor = gradient.cell.current_factor()
            gradient = LowRankGrad(factor, gradient.subspace, gradient, features=gradient.features)
    return Item(weight, name, data, gradient, group, settings, subspace, features, low_rank)


def _subspace_of(
    optimizer: Algorithm, weight: torch.Tensor, gradient: torch.Tensor, state: State
) -> tuple[Subspace | None, Features | None]:
    """Return the subspace that a weight is in, and which dimensions of the weight are n."""
    if isinstance(gradient, LowRankGrad) and gradient.is_low_rank:
        return gradient.subspace, gradient.features
    binding = optimizer.bindings.get(weight)
    if binding is not None:
        return binding.subspace, state.get("features")
    if weight.dim() < 2:
        return None, None
    stored = STORE.in_use(weight) or STORE.in_use(weight, dense=True)
    return stored or (None, state.get("features"))


def _check_binding(optimizer: Algorithm, weight: torch.Tensor, subspace: Subspace, name: str) -> None:
    binding = optimizer.bindings.get(weight)
    if binding is None or binding.subspace is not subspace or binding.version == subspace.version:
        return
    if not subspace.has_pending_move and subspace.overlap_since(binding.version) is None:
        raise RuntimeError(
            f"the basis of parameter {name} was moved more than once by another optimizer since its last step here: "
            "weights that share a basis belong to one optimizer"
        )


def _check_shapes(
    kinds: tuple[str, ...],
    name: str,
    data: torch.Tensor,
    gradient: torch.Tensor,
    state: State,
    subspace: Subspace | None,
) -> None:
    """Refuse a weight that has another shape than its gradient or its states, which kernels would not notice.

    Args:
        kinds: names of the states that have the shape of the gradient, or of its factor.
        subspace: the one that low-rank states are to be in; None where they are in none, or it is not known yet.

    Raises:
        ValueError: naming the parameter and both shapes.
    """
    shape, low_rank = data.shape, is_low_rank(state)
    # What has fitted once does again: all that the checks look at is in the key.
    key = (
        shape,
        gradient.shape,
        tuple(state["features"]) if low_rank else None,
        state["basis"].shape if low_rank and "basis" in state else None,
        None if subspace is None else subspace.shape,
        tuple([state[kind].shape for kind in kinds if kind in state]),
    )
    if key in _FITTING:
        return
    if gradient.shape != shape:
        raise ValueError(
            f"parameter {name} has shape {tuple(shape)} and a gradient of shape {tuple(gradient.shape)}: it "
            "has changed its shape since the backward pass"
        )
    if low_rank:
        rows, basis = num_rows(shape, state["features"]), state.get("basis")
        has_basis = basis is None or basis.shape[0] == num_features(shape, state["features"])
    for kind in kinds:
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
    if len(_FITTING) == _LIMIT:  # no model has as many shapes; a program that makes them without end has
        _FITTING.clear()
    _FITTING.add(key)


_LIMIT = 4096
_FITTING: set[object] = set()


_SPOKEN = {"exp_avg": "moments", "exp_avg_sq": "moments", "momentum_buffer": "a momentum"}
