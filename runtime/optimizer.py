"""OasisAdamW: AdamW whose moments live in the subspaces of the weights, and move with them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from oasis_fx.runtime.adamw import (
    Hyper,
    LowRankUpdate,
    State,
    bias_correction,
    step_dense_bfloat16,
    step_fused,
    step_low_rank,
)
from oasis_fx.runtime.layout import as_rows
from oasis_fx.runtime.low_rank_grad import LowRankGrad
from oasis_fx.runtime.oja import count_steps, move_bases
from oasis_fx.runtime.optimizer_state import check_state, pack_state, restore_state
from oasis_fx.runtime.subspace import Subspace
from oasis_fx.runtime.transport import transport_mean, transport_second_moment


@dataclass(frozen=True)
class _Binding:
    """In which coordinates the moments of a weight are: a subspace, and its version after the last step."""

    subspace: Subspace
    version: int


@dataclass(frozen=True)
class _Item:
    """A parameter that takes part in a step, with what the step will use."""

    weight: torch.Tensor
    gradient: torch.Tensor
    hyper: Hyper
    low_rank: bool


class OasisAdamW(torch.optim.Optimizer):
    """AdamW for models compiled with `oasis_backend`.

    A weight whose gradient is a `LowRankGrad` has moments of m x r, float32 (float64 for float64 weights),
    which go over to the new basis whenever the basis moves; every other parameter is torch's fused AdamW. At
    the end of a step each basis whose statistic has grown moves, under `subspace_every=k` at each k-th step.
    A step in which any gradient is not finite is left out whole, as `GradScaler` would: weights, moments, step
    counts and bases stay as they were.

    Args:
        params: parameters, named parameters, or groups of either, as torch's optimizers take them. Weights
            that share a basis must all be in one optimizer.
        lr: learning rate, from 0; a float or a one-element tensor.
        betas: decay of the moments a step, each in [0, 1).
        eps: added to the root of the second moment, from 0.
        weight_decay: decoupled: each step multiplies weights by ``1 - lr * weight_decay``; from 0.
        stochastic_rounding: round bfloat16 weights at random, so that updates below half a step are not lost.
            None: on for bfloat16. Rounding repeats itself: it is seeded by the number of steps.

    Raises:
        ValueError: naming the value and what is allowed.

    Source: OASIS, arXiv 2604.09406; transport of moments: LDAdam, arXiv 2410.16103.
    """

    def __init__(
        self,
        params: Any,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        stochastic_rounding: bool | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "stochastic_rounding": stochastic_rounding,
            "rounding_seed": 0,
        }
        self._bindings: dict[torch.Tensor, _Binding] = {}
        self._skipped: torch.Tensor | None = None
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        _check_group({**self.defaults, **param_group})
        super().add_param_group(param_group)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_bindings", {})
        self.__dict__.setdefault("_skipped", None)

    @property
    def num_skipped_steps(self) -> int:
        """Steps left out since a gradient was not finite. Reading it waits for the device."""
        return 0 if self._skipped is None else int(self._skipped)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's. The statistics behind the gradients go too: a batch thrown away moves no basis."""
        for weight in self._weights():
            if isinstance(weight.grad, LowRankGrad):
                weight.grad.subspace.drop_statistic()
            if weight in self._bindings:
                self._bindings[weight].subspace.drop_statistic()
        super().zero_grad(set_to_none)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # a compiled training step calls it as it is
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Take one step.

        Raises:
            ValueError: a gradient has another rank than the moments of its weight.
            RuntimeError: a basis moved since the gradient was computed, or another optimizer moved it.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        items = list(self._items())
        if not items:
            return loss
        finite = _all_finite([item.gradient for item in items])
        gate: torch.Tensor | None = finite
        if finite.device.type == "cpu":  # reading it costs nothing there
            gate = None
            if not bool(finite):
                self._count_skipped(finite)
                self._drop_statistics(items)
                warnings.warn("a gradient is not finite: this step is left out", RuntimeWarning, stacklevel=3)
                return loss
        else:
            self._count_skipped(finite)
        for item in items:
            self._prepare_state(item)
        generators = self._generators()
        self._step_low_rank([item for item in items if item.low_rank], gate, generators)
        self._step_dense([item for item in items if not item.low_rank], gate, generators)
        self._move_bases(gate)
        return loss

    def state_dict(self) -> dict[str, Any]:
        """As torch's, in plain tensors and numbers; the bases are in it, as ``basis`` of each weight in one."""
        return pack_state(super().state_dict())

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` gave, before or after the first compiled step.

        Raises:
            ValueError: naming the parameter and both shapes, where one does not fit; nothing is loaded then.
        """
        check_state(self, state_dict)
        super().load_state_dict(state_dict)
        self._bindings.clear()
        restore_state(self, state_dict)

    # Gathering

    def _weights(self) -> Iterable[torch.Tensor]:
        return (weight for group in self.param_groups for weight in group["params"])

    def _items(self) -> Iterable[_Item]:
        """Everything that this step updates. Raises before anything has changed."""
        for index, group in enumerate(self.param_groups):
            beta1, beta2 = (float(beta) for beta in group["betas"])
            for number, weight in enumerate(group["params"]):
                if weight.grad is None:
                    continue
                if weight.grad.is_sparse:
                    raise RuntimeError("OasisAdamW does not support sparse gradients")
                name = group["param_names"][number] if "param_names" in group else f"{number} of group {index}"
                rounding = group["stochastic_rounding"]
                hyper = Hyper(
                    float(group["lr"]),
                    beta1,
                    beta2,
                    float(group["eps"]),
                    float(group["weight_decay"]),
                    weight.dtype == torch.bfloat16 and rounding is not False,
                )
                yield self._item(weight, hyper, name)

    def _item(self, weight: torch.Tensor, hyper: Hyper, name: str) -> _Item:
        gradient, state = weight.grad, self.state.get(weight, {})
        assert gradient is not None
        if isinstance(gradient, LowRankGrad) and gradient.basis is not None:
            if gradient.basis_version != gradient.subspace.version:
                raise RuntimeError(
                    f"the basis of parameter {name} moved since its gradient was computed: call zero_grad() before "
                    "the next backward(), and give weights that share a basis to one optimizer"
                )
            if "basis" not in state and state:
                return _Item(weight, gradient.to_dense(), hyper, False)  # it began with dense moments
            if state and state["exp_avg"].shape != gradient.factor.shape:
                raise ValueError(
                    f"parameter {name} has moments of shape {tuple(state['exp_avg'].shape)} and a gradient of shape "
                    f"{tuple(gradient.factor.shape)}: its rank has changed since the moments began"
                )
            return _Item(weight, gradient, hyper, True)
        dense = gradient.factor if isinstance(gradient, LowRankGrad) else gradient
        return _Item(weight, dense, hyper, "basis" in state)

    def _prepare_state(self, item: _Item) -> None:
        state = self.state[item.weight]
        _follow(item.weight, state)
        if item.low_rank and isinstance(item.gradient, LowRankGrad):
            self._bind(item.weight, state, item.gradient)
        elif not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=item.weight.device)
            state["exp_avg"] = torch.zeros_like(item.weight, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(item.weight, memory_format=torch.preserve_format)

    def _bind(self, weight: torch.Tensor, state: State, gradient: LowRankGrad) -> None:
        """Bring the moments of a weight into the coordinates of its gradient."""
        subspace = gradient.subspace
        if not state:
            like = torch.zeros(gradient.factor.shape, dtype=subspace.basis.dtype, device=weight.device)
            state["step"] = torch.zeros((), dtype=torch.float32, device=weight.device)
            state["exp_avg"], state["exp_avg_sq"] = like, like.clone()
        else:
            binding = self._bindings.get(weight)
            if binding is not None and binding.subspace is subspace and binding.version != subspace.version:
                raise RuntimeError(
                    "a basis was moved by another optimizer: weights that share one belong to one optimizer"
                )
            if binding is None or binding.subspace is not subspace:
                # Loaded from a checkpoint, or taken over from another graph or backend. Equal bases are not
                # multiplied: a resumed run is bitwise the uninterrupted one.
                if not torch.equal(state["basis"], subspace.basis):
                    overlap = state["basis"].to(subspace.basis).mT @ subspace.basis
                    self._transport([(weight, overlap)])
        state["basis"], state["basis_updates"] = subspace.basis.detach(), subspace.num_updates
        state["basis_steps"] = subspace.num_steps
        state["features"] = gradient.features
        self._bindings[weight] = _Binding(subspace, subspace.version)

    # Updating

    def _step_low_rank(
        self, items: list[_Item], gate: torch.Tensor | None, generators: dict[torch.device, torch.Generator]
    ) -> None:
        batches: dict[Any, list[LowRankUpdate]] = {}
        for item in items:
            state = self.state[item.weight]
            if isinstance(item.gradient, LowRankGrad):
                factor = item.gradient.factor
            else:  # a dense gradient of a weight with low-rank moments: what the pass would have computed
                dense = as_rows(item.gradient, state["features"])
                factor = dense.to(state["basis"].dtype) @ state["basis"]
            update = LowRankUpdate(item.weight, factor, state["basis"], state["features"], state)
            batches.setdefault((item.weight.device, item.hyper), []).append(update)
        for (device, hyper), updates in batches.items():
            step_low_rank(updates, hyper, _on(gate, device), generators[device])

    def _step_dense(
        self, items: list[_Item], gate: torch.Tensor | None, generators: dict[torch.device, torch.Generator]
    ) -> None:
        batches: dict[Any, list[_Item]] = {}
        for item in items:
            if item.hyper.stochastic_rounding:
                device = item.weight.device
                state = self.state[item.weight]
                step_dense_bfloat16(
                    item.weight, item.gradient, state, item.hyper, _on(gate, device), generators[device]
                )
            else:
                batches.setdefault((item.hyper, item.weight.device), []).append(item)
        for (hyper, device), batch in batches.items():
            states = [self.state[item.weight] for item in batch]
            weights, gradients = [item.weight for item in batch], [item.gradient for item in batch]
            step_fused(weights, gradients, states, hyper, _on(gate, device))

    def _move_bases(self, gate: torch.Tensor | None) -> None:
        """Move the bases, and take the moments of every weight that is in one along, those without a gradient too."""
        members: dict[Subspace, list[torch.Tensor]] = {}
        for weight, binding in self._bindings.items():
            members.setdefault(binding.subspace, []).append(weight)
        by_device: dict[torch.device, list[Subspace]] = {}
        for subspace in members:
            by_device.setdefault(subspace.basis.device, []).append(subspace)
        for device, subspaces in by_device.items():
            overlaps = move_bases(subspaces, _on(gate, device))
            self._transport([(weight, overlap) for s, overlap in overlaps.items() for weight in members[s]])
            for subspace in overlaps:
                for weight in members[subspace]:
                    self._bindings[weight] = _Binding(subspace, subspace.version)

    def _transport(self, moves: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Carry moments over, batched over weights of equal m and r."""
        betas = {weight: group["betas"] for group in self.param_groups for weight in group["params"]}
        batches: dict[Any, list[tuple[State, torch.Tensor]]] = {}
        for weight, overlap in moves:
            state = self.state[weight]
            key = (
                state["exp_avg"].shape,
                state["exp_avg"].dtype,
                overlap.device,
                tuple(map(float, betas[weight])),
            )
            batches.setdefault(key, []).append((state, overlap))
        for (*_, (beta1, beta2)), batch in batches.items():
            states = [state for state, _ in batch]
            overlap = torch.stack([overlap for _, overlap in batch])
            mean, second = (torch.stack([s[key] for s in states]) for key in ("exp_avg", "exp_avg_sq"))
            step = torch.stack([s["step"] for s in states]).view(-1, 1, 1)
            bias1, bias2 = (bias_correction(beta, step).to(mean.dtype) for beta in (beta1, beta2))
            moved = transport_second_moment(second, mean, overlap, bias1, bias2)
            torch._foreach_copy_([s["exp_avg_sq"] for s in states], list(moved))
            torch._foreach_copy_([s["exp_avg"] for s in states], list(transport_mean(mean, overlap)))

    def _generators(self) -> dict[torch.device, torch.Generator]:
        """One generator a device, seeded by the number of steps: equal on all ranks and after a resume."""
        seed = self.param_groups[0]["rounding_seed"]
        self.param_groups[0]["rounding_seed"] = seed + 1
        return {d: torch.Generator(d).manual_seed(seed) for d in dict.fromkeys(w.device for w in self._weights())}

    def _count_skipped(self, finite: torch.Tensor) -> None:
        missed = (~finite).long()
        self._skipped = missed if self._skipped is None else self._skipped + missed.to(self._skipped.device)

    def _drop_statistics(self, items: list[_Item]) -> None:
        """Of a step that is left out. It counts under `subspace_every`: a GPU's host does not know that it was one."""
        subspaces: dict[Subspace, None] = {}
        for item in items:
            if isinstance(item.gradient, LowRankGrad):
                subspaces[item.gradient.subspace] = None
                state = self.state.get(item.weight, {})
                if "basis" in state:
                    state["basis_steps"] = item.gradient.subspace.num_steps  # a checkpoint may follow, before any step
        for subspace in count_steps(subspaces):
            subspace.drop_statistic()


def _follow(weight: torch.Tensor, state: State) -> None:
    """Take a state along where `model.to()` has moved or cast its weight since the last step."""
    dtype = weight.dtype if "basis" not in state else torch.promote_types(weight.dtype, torch.float32)
    for key in ("exp_avg", "exp_avg_sq", "basis"):
        if key in state:
            state[key] = state[key].to(weight.device, dtype)
    if "step" in state:
        state["step"] = state["step"].to(weight.device)


def _all_finite(gradients: list[torch.Tensor]) -> torch.Tensor:
    """Whether every gradient is finite, as a bool scalar on the first one's device; nothing waits for it."""
    by_kind: dict[Any, list[torch.Tensor]] = {}
    for gradient in gradients:
        values = gradient.factor if isinstance(gradient, LowRankGrad) else gradient
        by_kind.setdefault((values.device, values.dtype), []).append(values)
    verdicts: list[torch.Tensor] = []
    for (_, dtype), batch in by_kind.items():
        wide = torch.float64 if dtype == torch.float64 else torch.float32  # a float16 norm could overflow
        verdicts.append(torch.stack(list(torch._foreach_norm(batch, 2, dtype=wide))).isfinite().all())
    return torch.stack([verdict.to(verdicts[0].device) for verdict in verdicts]).all()


def _on(gate: torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
    return None if gate is None else gate.to(device)


def _check_group(group: dict[str, Any]) -> None:
    for name in ("lr", "eps", "weight_decay"):
        value = group[name]
        if isinstance(value, torch.Tensor) and (name != "lr" or value.numel() != 1):
            raise ValueError(f"{name} is {value!r}: it must be a number from 0 (lr may be a one-element tensor)")
        if not float(value) >= 0:  # false for NaN too
            raise ValueError(f"{name} is {value!r}: it must be a number from 0")
    betas = group["betas"]
    if not isinstance(betas, tuple | list) or len(betas) != 2 or not all(0 <= float(b) < 1 for b in betas):
        raise ValueError(f"betas is {betas!r}: it must be two numbers in [0, 1)")
    if group["stochastic_rounding"] not in (None, True, False):
        raise ValueError(f"stochastic_rounding is {group['stochastic_rounding']!r}: it must be None, True or False")
