"""torch's interface of our optimizers: steps, state dicts, copies and changes of rank."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch

from oasis_fx.ranks import check_rank
from oasis_fx.runtime.gradients.low_rank_grad import LowRankGrad
from oasis_fx.runtime.optim.algorithm import Algorithm
from oasis_fx.runtime.optim.coordinates import transport_pending
from oasis_fx.runtime.optim.group_settings import is_on_device, rename_settings
from oasis_fx.runtime.optim.items import Item, find_items
from oasis_fx.runtime.optim.loading import prepared
from oasis_fx.runtime.optim.resizing import resize_checkpoint, resize_live
from oasis_fx.runtime.optim.restoring import restore_copy, restore_state
from oasis_fx.runtime.optim.state_checks import check_state
from oasis_fx.runtime.optim.state_numbers import pack_numbers, unpack_numbers
from oasis_fx.runtime.optim.states import gather_states, pack_state, scatter_states, whole_states
from oasis_fx.runtime.optim.step import are_finite, take_step, warn_of_dense_steps
from oasis_fx.runtime.subspaces import host_reads
from oasis_fx.runtime.subspaces.shards import is_sharded, local_gradient
from oasis_fx.runtime.subspaces.store import STORE


class SubspaceOptimizer(Algorithm):
    """Base of the optimizers for models compiled with `oasis_backend`.

    A weight whose gradient is a `LowRankGrad` has states of m x r, float32 (float64 for float64 weights), which are
    transported to the new basis whenever the basis moves, if its rule asks for that; every other parameter has states
    of its own shape. A step in which any gradient is not finite is skipped, as `GradScaler` would skip it.

    What an optimization algorithm defines is in `oasis_fx.runtime.optim.algorithm`; what a step does, in
    `oasis_fx.runtime.optim.step`.
    """

    takes_low_rank_gradients: ClassVar[bool] = True  # `oasis_fx.runtime.gradients.foreign` looks for it

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        self.bindings = {}
        self._skipped: torch.Tensor | None = None
        self._has_looked = False  # for weights that are in a subspace
        super().__init__(params, {**defaults, "step_count": 0, "rank_plans": 0})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as torch's optimizers do.

        Raises:
            ValueError: a setting is not allowed, or the optimizer cannot step a sharded parameter of the group.
        """
        rename_settings(param_group, self.renamed_settings, "a parameter group")
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

    def __repr__(self) -> str:
        """Show the settings of each group, without what the optimizer itself counts there."""
        lines = super().__repr__().splitlines()
        return "\n".join(line for line in lines if line.split(":")[0].strip() not in ("step_count", "rank_plans"))

    @property
    def num_skipped_steps(self) -> int:
        """Number of steps left out because a gradient was not finite. Reading it waits for the device."""
        return 0 if self._skipped is None else int(self._skipped)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients, and the statistics behind them: a batch that is discarded moves no basis."""
        for subspace in self.stored_subspaces():
            subspace.drop_statistic()
        for weight in self.weights():
            gradient = local_gradient(weight)
            if isinstance(gradient, LowRankGrad) and weight in self.bindings:
                if gradient.subspace is not self.bindings[weight].subspace:
                    weight.grad = None  # of a rank that has changed: nothing of the next one can be added to it
        super().zero_grad(set_to_none)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # a compiled training step calls it as it is
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Take one step.

        Args:
            closure: computes the loss and the gradients again, and returns the loss.

        Returns:
            What the closure returned; None without one.

        Raises:
            ValueError: a setting is not allowed, or a gradient or a state does not fit its parameter.
            RuntimeError: a basis moved since the gradient was computed, or another optimizer moved it; or a gradient
                that is to be averaged over ranks was not.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        items = list(find_items(self))
        if items:
            self._look_for_subspaces(items)
            finite = are_finite(items)
            self._count_skipped(finite)
            take_step(self, items, finite)
        return loss

    def _look_for_subspaces(self, items: list[Item]) -> None:
        """Warn about dense steps, at the first step that moves anything."""
        if self._has_looked or all(_is_zero(group["lr"]) for group in self.param_groups):
            return  # torch.distributed.checkpoint makes states by a step of length 0
        self._has_looked = True
        warn_of_dense_steps(self, items)

    def _count_skipped(self, finite: torch.Tensor) -> None:
        if host_reads.reads_are_free(finite.device) and bool(finite):
            return  # reading it costs nothing there
        missed = (~finite).long()
        self._skipped = missed if self._skipped is None else self._skipped + missed.to(self._skipped.device)

    @torch.no_grad()
    def resize_rank(self, rank: int | float) -> None:
        """Change the rank of every subspace, between two steps: a rank schedule.

        States are resized with it (`oasis_fx.runtime.optim.resizing`). A smaller rank keeps the directions in which the
        first state of the weights is largest. Graphs are recompiled (`torch.compiler.reset`), whatever rank their
        backend names.

        Args:
            rank: columns, from 1, at most all; or a fraction of in_features between 0 and 1.

        Raises:
            ValueError: it is neither; or the rule of a subspace has bases that cannot change their rank: coded ones,
                and those of ``"principal_random"``; or weights are sharded.
        """
        check_rank(rank, "rank")
        if any(is_sharded(weight) for weight in self.weights()):
            raise ValueError(f"rank is {rank!r}: the rank of sharded weights cannot change; use resize_checkpoint()")
        transport_pending(self)
        resize_live(self, rank)

    @torch.no_grad()
    def resize_checkpoint(self, state_dict: dict[str, Any], rank: int | float) -> dict[str, Any]:
        """Return a state dict that `load_state_dict` accepts under a backend of another rank than the given one's.

        Neither the optimizer nor the given state dict changes.

        Args:
            state_dict: what `state_dict` returned.
            rank: as for `resize_rank`.

        Raises:
            ValueError: as for `resize_rank`, and where the state dict does not fit the parameters.
        """
        check_rank(rank, "rank")
        state_dict = unpack_numbers(self, state_dict)
        check_state(self, state_dict, live=False)
        return pack_numbers(resize_checkpoint(self, whole_states(self, state_dict), rank))

    def state_dict(self) -> dict[str, Any]:
        """Return states and settings in plain tensors and numbers, as torch's optimizers do.

        The bases are in it: ``basis`` in the state of each weight that is in a subspace.
        """
        transport_pending(self)
        # Packed before hooks see it; torch's own hooks are the only place for that.
        packing = self.register_state_dict_post_hook(
            lambda _, packed: pack_numbers(gather_states(self, pack_state(packed))), prepend=True
        )
        states, members = self.state, set(self.weights())
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
        """Load what `state_dict` returned, of this optimizer or of torch's AdamW or SGD.

        It may be called before or after the first compiled step.

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

    @torch.no_grad()
    def __getstate__(self) -> dict[str, Any]:
        """Return what `copy` and `pickle` keep, with states in the present coordinates of their bases."""
        transport_pending(self)
        resized = [weight for weight in self.weights() if STORE.is_resized(weight)]
        return {**super().__getstate__(), "_skipped": self._skipped, "_resized": resized}

    @torch.no_grad()
    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for name, value in (("bindings", {}), ("_skipped", None), ("_has_looked", False)):
            self.__dict__.setdefault(name, value)
        for group in self.param_groups:
            rename_settings(group, self.renamed_settings, "a pickled optimizer")
            for key, value in self.defaults.items():
                if key != "differentiable":  # torch adds it to the defaults, of whatever optimizer
                    group.setdefault(key, value)
        if "defaults" in state:  # of a copy or a pickle; a loaded state dict has none
            restore_copy(self, self.__dict__.pop("_resized", ()))


def _is_zero(lr: float | torch.Tensor) -> bool:
    """Return whether a learning rate is known to be 0; one on a GPU is not read."""
    return not is_on_device(lr) and float(lr) == 0
