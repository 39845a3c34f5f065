"""What all our optimizers share: they gather gradients, bind states to bases, and take them along when bases move."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from oasis_fx.errors import warn_user
from oasis_fx.graph.matricization import Features, as_rows
from oasis_fx.ranks import check_rank
from oasis_fx.runtime.gradients.low_rank_grad import LowRankGrad
from oasis_fx.runtime.optim.gathering import Item, adopt_resting, gather, prepare_state
from oasis_fx.runtime.optim.loading import prepared
from oasis_fx.runtime.optim.resizing import fit_columns, resize_checkpoint, resize_live, spend_budget
from oasis_fx.runtime.optim.state_numbers import pack_numbers, unpack_numbers
from oasis_fx.runtime.optim.states import (
    check_state,
    gather_states,
    note_basis,
    pack_state,
    restore_copy,
    restore_state,
    scatter_states,
    whole_states,
)
from oasis_fx.runtime.optim.updates import DenseUpdate, LowRankUpdate, State, all_finite, is_low_rank
from oasis_fx.runtime.subspaces.basis_updates import count_steps, move_bases, note_idle
from oasis_fx.runtime.subspaces.momentum import Momentum
from oasis_fx.runtime.subspaces.shards import agreed, is_sharded, local_gradient
from oasis_fx.runtime.subspaces.store import STORE
from oasis_fx.runtime.subspaces.subspace import Subspace


@dataclass(frozen=True)
class _Binding:
    """In which coordinates the states of a weight are: a subspace, and its version after the last step."""

    subspace: Subspace
    version: int


# Optimizer steps at which a budget of ranks is shared out, each time with graphs compiled anew. After 20 steps the
# activations of a new network say little about what they will be (docs/results.md).
RANK_STEPS = (100, 1000)


class SubspaceOptimizer(torch.optim.Optimizer):
    """Base of the optimizers for models compiled with `oasis_backend`.

    A weight whose gradient is a `LowRankGrad` has states of m x r, float32 (float64 for float64 weights), which go over
    to the new basis whenever the basis moves, if its rule wants that; every other parameter has states of its own
    shape. A step in which any gradient is not finite is left out whole, as `GradScaler` would.

    A subclass names its states and gives `hyper_of`, `step_low_rank`, `step_dense` and, where it has states that are
    not means of gradients, `transport`.
    """

    states: ClassVar[tuple[str, ...]] = ()
    dense_states: ClassVar[tuple[str, ...] | None] = None  # of weights not in a basis, where they differ
    mean_state: ClassVar[str | None] = None  # the state that is the mean of gradients, for rules that go by it
    steps_shards: ClassVar[bool] = True  # whether each row of a weight is stepped by itself
    takes_low_rank_gradients: ClassVar[bool] = True  # `oasis_fx.runtime.gradients.foreign` looks for it

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        self.bindings: dict[torch.Tensor, _Binding] = {}
        self._skipped: torch.Tensor | None = None
        self._has_looked = False  # for weights that are in a subspace
        super().__init__(params, {**defaults, "rounding_seed": 0, "rank_plans": 0})

    # For subclasses

    def check_group(self, group: Mapping[str, Any]) -> None:
        """Raise ValueError, naming the value, where a group's settings are not allowed."""

    def hyper_of(self, group: Mapping[str, Any], weight: torch.Tensor) -> Hashable:
        """The settings of one parameter at this step; parameters of equal ones are stepped together."""
        raise NotImplementedError

    def step_low_rank(
        self, updates: Sequence[LowRankUpdate], hyper: Any, gate: torch.Tensor | None, generator: torch.Generator
    ) -> None:
        """Update states and weights of one device; where ``gate`` is false, leave everything as it is."""
        raise NotImplementedError

    def step_dense(
        self, updates: Sequence[DenseUpdate], hyper: Any, gate: torch.Tensor | None, generator: torch.Generator
    ) -> None:
        """The same for weights with states of their own shape."""
        raise NotImplementedError

    def transport(self, states: Sequence[State], overlap: torch.Tensor, group: Mapping[str, Any]) -> None:
        """Carry the states of weights of equal m and r over to a new basis, in place; R = Q^T Q+ [L, r, r].

        As it stands: every state is a mean of gradients, ``m+ = m R``.
        """
        for name in self.states:
            moved = torch.stack([state[name] for state in states]) @ overlap
            torch._foreach_copy_([state[name] for state in states], list(moved))

    @classmethod
    def states_of(cls, low_rank: bool) -> tuple[str, ...]:
        """Names of the states that have the shape of the gradient, or of its factor."""
        return cls.states if low_rank or cls.dense_states is None else cls.dense_states

    def decoded(self, state: State) -> State:
        """The states of a weight as floating point numbers: themselves, or copies."""
        return state

    def projected_states(
        self, state: State, basis: torch.Tensor, features: Features, group: Mapping[str, Any]
    ) -> dict[str, torch.Tensor]:
        """What the states of a weight's own shape are in the coordinates of a basis Q [n, r]: each [m, r].

        As it stands: every state is a mean of gradients, ``m Q``.
        """
        return {name: as_rows(state[name], features).to(basis.dtype) @ basis for name in self.states}

    @contextmanager
    def states_in_place(self, state: State) -> Iterator[State]:
        """The states of a weight as floating point numbers; what is written into them is kept."""
        yield state

    def resize_state(self, state: State, columns: int, group: Mapping[str, Any]) -> None:
        """Cut the states [m, r] of a weight to their first columns, or add some, which the new basis has.

        As it stands: every state is a mean of gradients, and new columns are zero.
        """
        for name in self.states:
            state[name] = fit_columns(state[name], columns)

    def new_state(self, name: str, like: torch.Tensor, group: Mapping[str, Any]) -> State:
        """A state that begins at zero, under its name; ``like`` has its shape, dtype and device."""
        return {name: torch.zeros_like(like, memory_format=torch.preserve_format)}

    # As torch's

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self.check_group({**self.defaults, **param_group})
        super().add_param_group(param_group)
        for weight in self.param_groups[-1]["params"]:
            if is_sharded(weight):
                self._check_sharded(weight, self.param_groups[-1])

    def _check_sharded(self, weight: torch.Tensor, group: Mapping[str, Any]) -> None:
        what = f"a parameter of shape {tuple(weight.shape)} is a DTensor"
        if not self.steps_shards:
            raise ValueError(f"{what}: {type(self).__name__} needs all rows of a weight, and does not go with shards")
        if group.get("state_bits", 32) != 32:
            raise ValueError(f"{what}: state_bits must be 32, it is {group['state_bits']}")

    @torch.no_grad()
    def __getstate__(self) -> dict[str, Any]:
        """For `copy` and `pickle`: as torch's, with states in the present coordinates of their bases."""
        self._catch_up()
        resized = [weight for weight in self._weights() if STORE.is_resized(weight)]
        return {**super().__getstate__(), "_skipped": self._skipped, "_resized": resized}

    @torch.no_grad()
    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("bindings", {})
        self.__dict__.setdefault("_skipped", None)
        self.__dict__.setdefault("_has_looked", False)
        for group in self.param_groups:
            for key, value in self.defaults.items():
                if key != "differentiable":  # torch adds it to the defaults, of whatever optimizer
                    group.setdefault(key, value)
        if "defaults" in state:  # of a copy or a pickle; a loaded state dict has none
            restore_copy(self, self.__dict__.pop("_resized", ()))

    @property
    def num_skipped_steps(self) -> int:
        """Steps left out since a gradient was not finite. Reading it waits for the device."""
        return 0 if self._skipped is None else int(self._skipped)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's. The statistics behind the gradients go too: a batch thrown away moves no basis by one."""
        for weight in self._weights():
            gradient = local_gradient(weight)
            for subspace in STORE.all_of(weight) if weight.dim() >= 2 else ():
                subspace.drop_statistic()
            if isinstance(gradient, LowRankGrad) and weight in self.bindings:
                if gradient.subspace is not self.bindings[weight].subspace:
                    weight.grad = None  # of a rank that has changed: nothing of the next one can be added to it
        super().zero_grad(set_to_none)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # a compiled training step calls it as it is
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Take one step.

        Raises:
            ValueError: a gradient has another rank than the states of its weight.
            RuntimeError: a basis moved since the gradient was computed, or another optimizer moved it; or a gradient
                that is to be averaged over ranks was not.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        items = list(gather(self))
        if not items:
            return loss
        self._look_for_subspaces(items)
        finite = agreed(all_finite([item.gradient for item in items]), [item.weight for item in items])
        gate: torch.Tensor | None = finite
        if finite.device.type == "cpu":  # reading it costs nothing there
            gate = None
            if not bool(finite):
                self._count_skipped(finite)
                self._leave_out(items)
                warnings.warn("a gradient is not finite: this step is left out", RuntimeWarning, stacklevel=3)
                return loss
        else:
            self._count_skipped(finite)
        self._catch_up()
        adopt_resting(self, items)
        groups = self.groups_by_weight()
        for item in items:
            prepare_state(self, item, groups[item.weight])
        note_idle({item.subspace: None for item in items if item.subspace is not None})
        generators = self._generators()
        self._step_low_rank([item for item in items if item.low_rank], gate, generators)
        self._step_dense([item for item in items if not item.low_rank], gate, generators)
        self._share_ranks_out(gate)
        self._move_bases(gate)
        return loss

    @torch.no_grad()
    def resize_rank(self, rank: int | float) -> None:
        """Change the rank of every subspace, between two steps: a rank schedule.

        States are resized with it (`oasis_fx.runtime.optim.resizing`). A smaller rank keeps the directions in which the
        first state of the weights is largest. Graphs are compiled anew (`torch.compiler.reset`), whatever rank their
        backend names.

        Args:
            rank: columns from 1, at most all; or a fraction of in_features between 0 and 1.

        Raises:
            ValueError: it is neither; or the rule of a subspace has bases that cannot change their rank: coded ones,
                and those of ``"principal_random"``; or weights are sharded.
        """
        check_rank(rank, "rank")
        if any(is_sharded(weight) for weight in self._weights()):
            raise ValueError(f"rank is {rank!r}: the rank of sharded weights cannot change; use resize_checkpoint()")
        self._catch_up()
        resize_live(self, rank)

    @torch.no_grad()
    def resize_checkpoint(self, state_dict: dict[str, Any], rank: int | float) -> dict[str, Any]:
        """What `load_state_dict` takes under a backend of another rank than the checkpoint's; changes nothing.

        Args and raises as for `resize_rank`.
        """
        check_rank(rank, "rank")
        state_dict = unpack_numbers(self, state_dict)
        check_state(self, state_dict, live=False)
        return pack_numbers(resize_checkpoint(self, whole_states(self, state_dict), rank))

    def state_dict(self) -> dict[str, Any]:
        """As torch's, in plain tensors and numbers; the bases are in it, as ``basis`` of each weight in one."""
        self._catch_up()
        # Packed before hooks see it; torch's own hooks are the only place for that.
        packing = self.register_state_dict_post_hook(
            lambda _, packed: pack_numbers(gather_states(self, pack_state(packed))), prepend=True
        )
        states, members = self.state, set(self._weights())
        # torch has no number for a parameter that was replaced in its group: its state is left out.
        kept = {key: state for key, state in states.items() if not isinstance(key, torch.Tensor) or key in members}
        try:
            self.state = defaultdict(dict, kept) if len(kept) < len(states) else states
            return super().state_dict()
        finally:
            self.state = states
            packing.remove()

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` gave, before or after the first compiled step, or what torch's AdamW or SGD gave.

        Raises:
            ValueError: naming the parameter and both shapes, or the setting, where one does not fit; nothing is loaded
                then.
        """
        loaded: dict[str, Any] = {}

        def check(_: torch.optim.Optimizer, given: dict[str, Any]) -> dict[str, Any]:
            checked = prepared(self, unpack_numbers(self, given))
            check_state(self, checked)
            loaded.update(scatter_states(self, checked))
            return dict(loaded)

        def restore(_: torch.optim.Optimizer) -> None:
            self.bindings.clear()
            restore_state(self, loaded)

        # Between torch's part and the hooks of others: what these have made of it is loaded, and they see all of it.
        before = self.register_load_state_dict_pre_hook(check)
        after = self.register_load_state_dict_post_hook(restore, prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            before.remove()
            after.remove()

    # Weights and what their states are bound to

    def _weights(self) -> Iterable[torch.Tensor]:
        return (weight for group in self.param_groups for weight in group["params"])

    def groups_by_weight(self) -> dict[torch.Tensor, dict[str, Any]]:
        """The group of each weight; the defaults for one that was taken out of its group and has states in a basis."""
        groups = {weight: group for group in self.param_groups for weight in group["params"]}
        return dict.fromkeys(self.bindings, self.defaults) | groups

    def bind(self, weight: torch.Tensor, subspace: Subspace) -> None:
        """Note that the states of a weight are in the present coordinates of ``subspace``."""
        self.bindings[weight] = _Binding(subspace, subspace.version)

    # Updating

    def _step_low_rank(
        self, items: list[Item], gate: torch.Tensor | None, generators: dict[torch.device, torch.Generator]
    ) -> None:
        batches: dict[Any, list[LowRankUpdate]] = {}
        bases: dict[Subspace, torch.Tensor] = {}  # a coded one is made once
        for item in items:
            state = self.state[item.weight]
            weights: torch.Tensor | None = None
            if item.subspace is not None:
                subspace = item.subspace
                if subspace not in bases:
                    bases[subspace] = subspace.basis.detach().to(item.weight.device)
                basis, orthonormal = bases[subspace], subspace.spec.rule.orthonormal
                weights = subspace.projection_weights
            elif "basis" in state:  # loaded from a checkpoint, and not compiled since
                basis, orthonormal = state["basis"], True  # others are coded
            else:
                raise RuntimeError(
                    "a weight with moments in a drawn basis got a dense gradient before any low-rank one"
                )
            if isinstance(item.gradient, LowRankGrad):
                factor, dense = item.gradient.factor, None
            else:  # a dense gradient of a weight with low-rank states: what the pass would have computed
                dense = item.gradient
                factor = as_rows(dense, state["features"]).to(basis.dtype) @ basis
                if weights is not None:
                    factor = factor * weights.to(factor)
            update = LowRankUpdate(item.data, factor, basis, state["features"], state, orthonormal, dense)
            batches.setdefault((item.weight.device, item.hyper), []).append(update)
        for (device, hyper), updates in batches.items():
            self.step_low_rank(updates, hyper, _on(gate, device), generators[device])

    def _step_dense(
        self, items: list[Item], gate: torch.Tensor | None, generators: dict[torch.device, torch.Generator]
    ) -> None:
        batches: dict[Any, list[DenseUpdate]] = {}
        for item in items:
            device, state = item.weight.device, self.state[item.weight]
            if isinstance(item.gradient, LowRankGrad):  # one full-size gradient at a time
                update = DenseUpdate(item.data, item.gradient.to_dense(), state)
                self.step_dense([update], item.hyper, _on(gate, device), generators[device])
            else:
                update = DenseUpdate(item.data, item.gradient, state)
                batches.setdefault((item.hyper, device), []).append(update)
        for (hyper, device), updates in batches.items():
            self.step_dense(updates, hyper, _on(gate, device), generators[device])

    def subspaces(self) -> dict[Subspace, list[torch.Tensor]]:
        """The subspaces that states are in, each with its weights. Weights whose states were cleared are in none."""
        for weight in [w for w in self.bindings if "features" not in self.state.get(w, {})]:
            del self.bindings[weight]
        members: dict[Subspace, list[torch.Tensor]] = {}
        for weight, binding in self.bindings.items():
            members.setdefault(binding.subspace, []).append(weight)
        return members

    def _catch_up(self) -> None:
        """Take states along where a basis has moved within a backward pass since the last step."""
        for subspace, weights in self.subspaces().items():
            if subspace.overlap is not None:
                eye = torch.eye(subspace.shape[1], dtype=subspace.dtype, device=subspace.device)
                if subspace.spec.rule.transports and not torch.equal(subspace.overlap, eye):
                    self.carry_over([(weight, subspace.overlap) for weight in weights])
                subspace.overlap = None
                for weight in weights:
                    self.bind(weight, subspace)

    def _look_for_subspaces(self, items: list[Item]) -> None:
        """Warn, at the first step, where nothing of what is stepped was compiled by our backend."""
        if self._has_looked or all(float(group["lr"]) == 0 for group in self.param_groups):
            return  # torch.distributed.checkpoint makes states by a step of length 0
        self._has_looked = True
        matrices = [item.weight for item in items if item.weight.dim() >= 2]
        if matrices and all(item.subspace is None for item in items):
            if not any(STORE.all_of(weight) or "features" in self.state.get(weight, {}) for weight in matrices):
                warn_user(
                    f"{type(self).__name__}: none of the {len(matrices)} matrices that take part in this step is in a "
                    "subspace, so the step is a dense one: train the model that torch.compile(model, "
                    "backend=oasis_backend(...)) returned, and see backend.report() for weights that were left dense"
                )

    def _share_ranks_out(self, gate: torch.Tensor | None) -> None:
        """Under ``rank=AutoRank(...)``: at the first step from each of `RANK_STEPS` on that counts."""
        if all(subspace.spec.budget is None for subspace in self.subspaces()):
            return
        group = self.param_groups[0]
        plans, steps = group.get("rank_plans", 0), group["rounding_seed"]
        if plans < len(RANK_STEPS) and steps >= RANK_STEPS[plans] and (gate is None or bool(gate)):
            group["rank_plans"] = plans + 1
            spend_budget(self)

    def _move_bases(self, gate: torch.Tensor | None) -> None:
        """Move the bases, and take the states of every weight that is in one along, those without a gradient too."""
        members = self.subspaces()
        # Those of weights that keep dense states, or that another graph has put into a second one, move as well.
        matrices = (weight for weight in self._weights() if weight.dim() >= 2)
        stored = (s for weight in matrices for s in STORE.all_of(weight) if s.statistic is not None)
        by_device: dict[torch.device, list[Subspace]] = {}
        for subspace in dict.fromkeys([*members, *stored]):
            by_device.setdefault(subspace.device, []).append(subspace)
        for device, subspaces in by_device.items():
            overlaps = move_bases(subspaces, _on(gate, device))
            overlaps = {s: overlap for s, overlap in overlaps.items() if s.spec.rule.transports}
            self.carry_over([(weight, overlap) for s, overlap in overlaps.items() for weight in members.get(s, ())])
        self._settle()

    def _settle(self) -> None:
        """Bind all states to the bases as they are now, and show in them what a checkpoint needs of these."""
        groups = self.groups_by_weight()
        for subspace, weights in self.subspaces().items():
            # What moved before the first step of its weights moved from a random start: nothing is to follow.
            subspace.overlap = None
            for weight in weights:
                self.bind(weight, subspace)
                note_basis(self.state[weight], subspace)
                self._lend_momentum(weight, subspace, groups[weight])

    def _lend_momentum(self, weight: torch.Tensor, subspace: Subspace, group: Mapping[str, Any]) -> None:
        state = self.state[weight]
        if self.mean_state is not None and getattr(subspace.spec.rule, "uses_momentum", False) and is_low_rank(state):
            subspace.momentum = Momentum(state[self.mean_state], state["step"], self.mean_decay(group))

    def mean_decay(self, group: Mapping[str, Any]) -> float:
        """The decay a step of ``mean_state``."""
        raise NotImplementedError

    def carry_over(self, moves: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Carry states over, batched over weights of equal m and r in one group."""
        groups = self.groups_by_weight()
        batches: dict[Any, list[tuple[State, torch.Tensor]]] = {}
        for weight, overlap in moves:
            state = self.state[weight]
            if not self.states or not is_low_rank(state):
                continue
            shape = state[self.states[0]].shape
            batches.setdefault((id(groups[weight]), shape, overlap.dtype, overlap.device), []).append((state, overlap))
        by_id = {id(group): group for group in groups.values()}
        for (group, *_), batch in batches.items():
            overlaps = torch.stack([overlap for _, overlap in batch])
            self.transport([state for state, _ in batch], overlaps, by_id[group])

    def _generators(self) -> dict[torch.device, torch.Generator]:
        """One generator a device, seeded by the number of steps: equal on all ranks and after a resume."""
        seed = self.param_groups[0]["rounding_seed"]
        self.param_groups[0]["rounding_seed"] = seed + 1
        return {d: torch.Generator(d).manual_seed(seed) for d in dict.fromkeys(w.device for w in self._weights())}

    def _count_skipped(self, finite: torch.Tensor) -> None:
        missed = (~finite).long()
        self._skipped = missed if self._skipped is None else self._skipped + missed.to(self._skipped.device)

    def _leave_out(self, items: list[Item]) -> None:
        """Leave a step out: weights and counts of updates stay, and so do moments but for the basis that they are in.

        A basis that is chosen from the batch has moved in the forward pass; states and what a checkpoint shows follow
        it here, since a checkpoint may be made, and the next batch projected, before there is another step. The step
        counts under `every`, and states begin: a GPU's host does not know that it was left out.
        """
        self._catch_up()
        groups = self.groups_by_weight()
        subspaces: dict[Subspace, None] = {}
        for item in items:
            prepare_state(self, item, groups[item.weight])
            if item.subspace is not None:
                subspaces[item.subspace] = None
            stored = STORE.all_of(item.weight)
            subspaces |= dict.fromkeys(subspace for subspace in stored if subspace.statistic is not None)
        for subspace in count_steps(subspaces):
            subspace.drop_statistic()
        self._settle()


def _on(gate: torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
    return None if gate is None else gate.to(device)
