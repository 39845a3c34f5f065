"""OasisAdamW: AdamW whose moments are in the subspaces of the weights, and are transported when these move."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar

import torch

from oasis_fx.graph.matricization import Features, as_rows
from oasis_fx.runtime.optim.adam_updates import (
    AdamWSettings,
    step_dense_bfloat16,
    step_fused,
    step_in_float32,
    step_low_rank,
)
from oasis_fx.runtime.optim.base import SubspaceOptimizer
from oasis_fx.runtime.optim.chunks import in_chunks
from oasis_fx.runtime.optim.context import Step
from oasis_fx.runtime.optim.eight_bit import in_float32, new_codes, pieces, quantizes, require_torchao
from oasis_fx.runtime.optim.group_settings import (
    check_bits,
    check_decays,
    check_flags,
    check_numbers,
    check_rounding,
    learning_rate,
    refuse_torch_options,
    rename_settings,
    rounds_stochastically,
)
from oasis_fx.runtime.optim.kernels import dispatch
from oasis_fx.runtime.optim.transport import fit_columns, transport_mean, transport_second_moment
from oasis_fx.runtime.optim.updates import DenseUpdate, LowRankUpdate, State, states_of
from oasis_fx.runtime.roster import Roster, once
from oasis_fx.runtime.subspaces import host_reads
from oasis_fx.runtime.subspaces.banks import as_bank, write_bank
from oasis_fx.runtime.subspaces.momentum import bias_correction


class OasisAdamW(SubspaceOptimizer):
    """AdamW for models compiled with `oasis_backend`.

    A weight whose gradient is a `LowRankGrad` has moments of m x r, float32 (float64 for float64 weights),
    which are transported to the new basis whenever the basis moves; every other parameter is stepped by torch's fused
    AdamW. At the end of a step each basis that has a statistic moves; with `every=k`, every k steps. A step
    in which any gradient is not finite is skipped, as `GradScaler` would skip it: weights, moments, step counts and
    bases stay as they were.

    Args:
        params: parameters, named parameters, or groups of either, as torch's optimizers accept them. Weights that
            share a basis must all be in one optimizer.
        lr: learning rate, from 0; a float or a one-element tensor.
        betas: factors by which the two moments decay in a step, each in [0, 1); floats or one-element tensors.
        eps: added to the root of the second moment, from 0.
        weight_decay: decoupled: each step multiplies weights by ``1 - lr * weight_decay``; from 0.
        stochastic_rounding: round bfloat16 weights at random, so that updates smaller than half their last digit are
            not lost. None: on for bfloat16. Rounding is seeded by the number of steps, so that a run can be repeated.
        rank_scaling: multiply the learning rate of a weight in a subspace by ``sqrt(n / r)``, so that its step is as
            long as AdamW's and a learning rate for AdamW holds at every rank. A setting of a group.
        step_outside_subspace: where a weight in a subspace has a dense gradient, step along the part of it outside of
            the subspace as well, at the length that AdamW gives the part inside (Fira's scaling). False drops that
            part. For a full-rank step now and then, run some steps by a model that another backend has compiled:
            ``exact = torch.compile(model.forward)``. A setting of a group.
        full_size_states: keep moments of the weights' own shape, as PRAC does, and turn each low-rank gradient into a
            full-size matrix, one at a time, to update them. A setting of a group; for weights whose moments have not
            begun.
        state_bits: 32, or 8 to keep all moments of 4096 numbers and more as eight-bit codes in blocks of 256, by
            torchao. A setting of a group; for weights whose moments have not begun.
        residual, full_rank: what `step_outside_subspace` and `full_size_states` were called until 0.2; they go with
            the next release.
        of_torch: further options of `torch.optim.AdamW`. Each is accepted at a value that changes nothing here, such as
            ``fused=True``.

    Settings of groups are read at every step: schedulers may set them, or change tensors in place.

    Raises:
        TypeError: an option is neither ours nor torch's.
        ValueError: a setting has a value that is not allowed, or torchao is asked for and missing. Raised here, in
            `add_param_group`, and at the next step where it was set in ``param_groups``.

    Source: OASIS, arXiv 2604.09406; transport of moments: LDAdam, arXiv 2410.16103; eight bits: arXiv 2110.02861.
    """

    states: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")
    mean_state: ClassVar[str | None] = "exp_avg"
    renamed_settings: ClassVar[Mapping[str, str]] = {
        "residual": "step_outside_subspace",
        "full_rank": "full_size_states",
    }

    def __init__(
        self,
        params: Any,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float | torch.Tensor, float | torch.Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        stochastic_rounding: bool | None = None,
        rank_scaling: bool = True,
        step_outside_subspace: bool = False,
        full_size_states: bool = False,
        state_bits: int = 32,
        residual: bool | None = None,
        full_rank: bool | None = None,
        **of_torch: Any,
    ) -> None:
        refuse_torch_options("OasisAdamW", of_torch)
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "stochastic_rounding": stochastic_rounding,
            "rank_scaling": rank_scaling,
            "step_outside_subspace": step_outside_subspace,
            "full_size_states": full_size_states,
            "state_bits": state_bits,
        }
        old = {"residual": residual, "full_rank": full_rank}
        defaults |= {name: value for name, value in old.items() if value is not None}
        rename_settings(defaults, self.renamed_settings, "OasisAdamW")
        super().__init__(params, defaults)

    def check_group(self, group: Mapping[str, Any]) -> None:
        check_numbers(group, "lr", "eps", "weight_decay")
        check_decays(group)
        check_rounding(group)
        check_flags(group, "rank_scaling", "step_outside_subspace", "full_size_states")
        check_bits(group)
        if group.get("state_bits", 32) == 8:
            require_torchao()

    def new_state(self, name: str, like: torch.Tensor, group: Mapping[str, Any]) -> State:
        if group.get("state_bits", 32) == 32 or not quantizes(like):
            return super().new_state(name, like, group)
        codes, scale = new_codes(like)
        return {name: codes, f"{name}_scale": scale}

    def decoded(self, state: State) -> State:
        if not _in_codes(state):
            return state
        with in_float32([state], self.states) as (plain,):
            return plain

    @contextmanager
    def states_in_place(self, states: Sequence[State]) -> Iterator[list[State]]:
        if not any(map(_in_codes, states)):
            yield list(states)
            return
        with in_float32(states, self.states) as plain:
            yield plain

    def projected_states(
        self, state: State, basis: torch.Tensor, features: Features, group: Mapping[str, Any]
    ) -> dict[str, torch.Tensor]:
        mean, second = (as_rows(state[name], features).to(basis.dtype)[None] for name in self.states)
        bias1, bias2 = (bias_correction(float(beta), state["step"]).to(mean) for beta in group["betas"])
        moved = transport_second_moment(second, mean, basis[None], bias1, bias2)
        return {"exp_avg": transport_mean(mean, basis[None])[0], "exp_avg_sq": moved[0]}

    def resize_state(self, state: State, columns: int, group: Mapping[str, Any]) -> None:
        plain, fitted = self.decoded(state), dict[str, torch.Tensor]()
        for name in self.states:
            fill = plain[name].amin(dim=1, keepdim=True) if name == "exp_avg_sq" else None
            fitted[name] = fit_columns(plain[name], columns, fill)
            state.pop(f"{name}_scale", None)
            state.update(self.new_state(name, fitted[name], group))
        if not _in_codes(state):
            state.update(fitted)
            return
        with in_float32([state], self.states) as (plain,):
            for name, value in fitted.items():
                plain[name].copy_(value)

    def settings_of(self, group: Mapping[str, Any], dtype: torch.dtype) -> AdamWSettings:
        beta1, beta2 = (float(beta) for beta in group["betas"])
        return AdamWSettings(
            learning_rate(group),
            beta1,
            beta2,
            float(group["eps"]),
            float(group["weight_decay"]),
            rounds_stochastically(group, dtype),
            bool(group.get("rank_scaling", False)),
            bool(group.get("step_outside_subspace", False)),
        )

    def mean_decay(self, group: Mapping[str, Any]) -> float:
        return float(group["betas"][0])

    def step_low_rank(self, updates: Sequence[LowRankUpdate], step: Step[AdamWSettings]) -> None:
        plain, coded = once(updates, _plain_and_coded)
        if plain:
            step_low_rank(plain, step)
        for chunk in in_chunks(coded, [update.state["exp_avg"].numel() for update in coded]):
            with in_float32([update.state for update in chunk], self.states) as states:
                step_low_rank([replace(u, state=state) for u, state in zip(chunk, states, strict=True)], step)

    def step_dense(self, updates: Sequence[DenseUpdate], step: Step[AdamWSettings]) -> None:
        plain, in_codes = once(updates, _plain_and_coded)
        coded = [piece for update in in_codes for piece in pieces(update)]
        for chunk in in_chunks(coded, [update.weight.numel() for update in coded]):
            with in_float32([update.state for update in chunk], self.states) as states:
                step_in_float32([replace(u, state=state) for u, state in zip(chunk, states, strict=True)], step)
        if step.settings.stochastic_rounding:
            for update in dispatch.step_dense_bfloat16(plain, step):
                step_dense_bfloat16(update.weight, update.gradient, update.state, step)
            return
        if not plain:
            return
        weights, gradients = [update.weight for update in plain], [update.gradient for update in plain]
        step_fused(weights, gradients, once(plain, states_of), step.settings, step.gate)

    def transport(self, states: Sequence[State], overlap: torch.Tensor, group: Mapping[str, Any]) -> None:
        means, seconds, steps = ([state[name] for state in states] for name in (*self.states, "step"))
        mean, second = as_bank(means), as_bank(seconds)
        step = as_bank(steps).view(-1, 1, 1).double()
        bias1, bias2 = (bias_correction(float(beta), step).to(mean.dtype) for beta in group["betas"])
        moved = transport_second_moment(second, mean, overlap, bias1, bias2)
        if not host_reads.reads_are_free(overlap.device):
            # Bases may not have moved, as in a step that is left out: what divides and multiplies would not be exact.
            eye = torch.eye(overlap.shape[-1], dtype=overlap.dtype, device=overlap.device)
            moved = torch.where((overlap == eye).all(dim=(-2, -1)).view(-1, 1, 1), second, moved)
        write_bank(seconds, moved)
        write_bank(means, transport_mean(mean, overlap))


def _in_codes(state: State) -> bool:
    return bool(state["exp_avg"].dtype == torch.uint8)


def _plain_and_coded(updates: Sequence[Any]) -> tuple[Roster[Any], list[Any]]:
    """Return the updates whose moments are numbers, and those whose moments are eight-bit codes."""
    plain = Roster(update for update in updates if not _in_codes(update.state))
    return plain, [update for update in updates if _in_codes(update.state)]
