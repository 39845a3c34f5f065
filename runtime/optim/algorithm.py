"""What an optimizer of ours is made of, and what each of them defines: AdamW, SGD, Lion and Muon.

The functions of this room (`items`, `preparation`, `step`, `states`, `resizing`) take an `Algorithm`. They read its
parameter groups, states and bindings and call the methods that a subclass overrides; none of them takes a step or loads
a checkpoint through it. `oasis_fx.runtime.optim.base` puts torch's interface on top.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from oasis_fx.graph.matricization import Features, as_rows
from oasis_fx.runtime.optim.context import Step
from oasis_fx.runtime.optim.transport import fit_columns
from oasis_fx.runtime.optim.updates import DenseUpdate, LowRankUpdate, State
from oasis_fx.runtime.subspaces.banks import as_bank, write_bank
from oasis_fx.runtime.subspaces.store import STORE
from oasis_fx.runtime.subspaces.subspace import Subspace

if TYPE_CHECKING:
    from oasis_fx.runtime.optim.plan import Plan
    from oasis_fx.runtime.optim.settled import Rest


@dataclass(slots=True, eq=False)
class Binding:
    """The coordinates that the states of weights are in: a subspace, and the version of its basis.

    After a step, weights that share a subspace share their binding.
    """

    subspace: Subspace
    version: int


class Algorithm(torch.optim.Optimizer):
    """Parameters, their states and their bindings, with the methods that define one optimization algorithm.

    A subclass names its states and overrides `check_group`, `settings_of`, `step_low_rank` and `step_dense`. It
    overrides the methods about states too where a state is not a mean of gradients.
    """

    # Names of the states that have the shape of the gradient, or of its low-rank factor.
    states: ClassVar[tuple[str, ...]] = ()
    # The same for weights that are not in a subspace, where they differ.
    dense_states: ClassVar[tuple[str, ...] | None] = None
    # The state that is a mean of gradients, which some rules move their basis by.
    mean_state: ClassVar[str | None] = None
    # Whether a row of a weight can be stepped without the other rows, as a shard has to be.
    steps_shards: ClassVar[bool] = True
    # Settings of groups under their old names, which are accepted with a warning: {old: new}.
    renamed_settings: ClassVar[Mapping[str, str]] = {}

    bindings: dict[torch.Tensor, Binding]

    # What the last step found out, for the next one: `oasis_fx.runtime.optim.settled`, `oasis_fx.runtime.optim.plan`.
    rest: Rest | None = None
    plan: Plan | None = None

    # The subspaces of the weights of all groups, and what they are a function of: see `stored_subspaces`.
    _stored: tuple[object, tuple[Subspace, ...]] | None = None

    # What a subclass overrides

    def check_group(self, group: Mapping[str, Any]) -> None:
        """Check the settings of a parameter group.

        Raises:
            ValueError: a setting has a value that is not allowed; the message names both.
        """

    def settings_of(self, group: Mapping[str, Any], dtype: torch.dtype) -> Hashable:
        """Return the settings that a group has at this step for its weights of one dtype.

        Weights of one device and dtype and of equal settings are stepped together.

        Raises:
            NotImplementedError: the class does not define this.
        """
        raise NotImplementedError

    def step_low_rank(self, updates: Sequence[LowRankUpdate], step: Step[Any]) -> None:
        """Step weights in place that have a gradient G [m, r] and states [m, r], and update these states in place.

        The weights are on one device and of one dtype.

        Where ``step.gate`` is false, weights and states must stay as they are.

        Raises:
            NotImplementedError: the class does not define this.
        """
        raise NotImplementedError

    def step_dense(self, updates: Sequence[DenseUpdate], step: Step[Any]) -> None:
        """Step weights in place whose gradient and states have the shape of the weight, as `step_low_rank` does.

        Raises:
            NotImplementedError: the class does not define this.
        """
        raise NotImplementedError

    def mean_decay(self, group: Mapping[str, Any]) -> float:
        """Return the factor by which `mean_state` decays in a step.

        Raises:
            NotImplementedError: the class does not define this.
        """
        raise NotImplementedError

    def transport(self, states: Sequence[State], overlap: torch.Tensor, group: Mapping[str, Any]) -> None:
        """Transport the states of L weights of equal m and r to another basis, in place.

        This implementation takes every state for a mean of gradients: ``m+ = m R``.

        Args:
            overlap: R = Q^T Q+ [L, r, r], of the old basis Q and the new one Q+.
        """
        for name in self.states:
            tensors = [state[name] for state in states]
            write_bank(tensors, as_bank(tensors) @ overlap)

    def projected_states(
        self, state: State, basis: torch.Tensor, features: Features, group: Mapping[str, Any]
    ) -> dict[str, torch.Tensor]:
        """Return what states of a weight's own shape are in the coordinates of a basis Q [n, r], each [m, r].

        This implementation takes every state for a mean of gradients: ``m Q``.
        """
        return {name: as_rows(state[name], features).to(basis.dtype) @ basis for name in self.states}

    def resize_state(self, state: State, columns: int, group: Mapping[str, Any]) -> None:
        """Cut the states [m, r] of a weight to their first columns, or add columns, to fit a basis of another rank.

        This implementation takes every state for a mean of gradients: new columns are zero.
        """
        for name in self.states:
            state[name] = fit_columns(state[name], columns)

    def new_state(self, name: str, like: torch.Tensor, group: Mapping[str, Any]) -> State:
        """Return a new state of zeros under its name, with the shape, dtype and device of ``like``."""
        return {name: torch.zeros_like(like, memory_format=torch.preserve_format)}

    def decoded(self, state: State) -> State:
        """Return the states of a weight as floating point numbers: the tensors themselves, or decoded copies."""
        return state

    @contextmanager
    def states_in_place(self, states: Sequence[State]) -> Iterator[list[State]]:
        """Yield the states of weights of one device as floating point numbers, and keep what is written into them."""
        yield list(states)

    # What the functions of this room look up

    @classmethod
    def states_of(cls, low_rank: bool) -> tuple[str, ...]:
        """Return the names of a weight's states, for weights whose states are in a subspace or for all others."""
        return cls.states if low_rank or cls.dense_states is None else cls.dense_states

    def weights(self) -> Iterable[torch.Tensor]:
        """Return the parameters of all groups, in order."""
        return (weight for group in self.param_groups for weight in group["params"])

    def groups_by_weight(self) -> dict[torch.Tensor, dict[str, Any]]:
        """Return the group of each weight; the defaults for a bound weight that was removed from its group."""
        groups = {weight: group for group in self.param_groups for weight in group["params"]}
        return dict.fromkeys(self.bindings, self.defaults) | groups

    def stored_subspaces(self) -> tuple[Subspace, ...]:
        """Return the subspaces that the store has of the weights, those that no states are in too, each once."""
        # Numbers of weights, which hold none of them. One that is used again is that of a weight whose entry has gone.
        key = STORE.state_of_entries, tuple(map(id, self.weights()))
        if self._stored is None or self._stored[0] != key:
            matrices = [weight for weight in self.weights() if weight.dim() >= 2]
            self._stored = key, tuple(dict.fromkeys(s for weight in matrices for s in STORE.all_of(weight)))
        return self._stored[1]

    def bind(self, weight: torch.Tensor, subspace: Subspace) -> None:
        """Note that the states of a weight are in the present coordinates of ``subspace``."""
        self.bindings[weight] = Binding(subspace, subspace.version)

    def subspaces(self) -> dict[Subspace, list[torch.Tensor]]:
        """Return the subspaces that states are in, each with its weights; forget weights whose states were cleared."""
        members: dict[Subspace, list[torch.Tensor]] = {}
        cleared = []
        for weight, binding in self.bindings.items():
            state = self.state.get(weight)
            if state is not None and "features" in state:
                members.setdefault(binding.subspace, []).append(weight)
            else:
                cleared.append(weight)
        for weight in cleared:
            del self.bindings[weight]
        return members
