"""Refuse a checkpoint that does not fit the parameters or the present subspaces, before anything is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from oasis_fx.graph.matricization import num_features, num_rows
from oasis_fx.runtime.optim.eight_bit import BLOCK
from oasis_fx.runtime.optim.states import basis_shape, saved_states
from oasis_fx.runtime.subspaces.store import STORE

if TYPE_CHECKING:
    from oasis_fx.runtime.optim.algorithm import Algorithm


def check_state(optimizer: Algorithm, state_dict: dict[str, Any], *, live: bool = True) -> None:
    """Check that each saved state fits its parameter and, with ``live``, the subspaces that the parameter is in.

    Args:
        optimizer: whose parameters count.
        state_dict: as `oasis_fx.runtime.optim.loading.prepared` returns it.
        live: whether it is to be loaded here, and not only resized.

    Raises:
        ValueError: a state is missing, is no tensor, or has a shape, a dtype or a rule that does not fit. The message
            names the parameter and both shapes.
    """
    for name, weight, saved, _ in saved_states(optimizer, state_dict):
        shape = tuple(weight.shape)
        low_rank = "features" in saved and not saved.get("full_rank")
        kinds = optimizer.states_of(low_rank)
        missing = [kind for kind in kinds if kind not in saved]
        if missing:
            raise ValueError(f"parameter {name} has no saved {missing[0]!r}: {type(optimizer).__name__} needs one")
        for kind in kinds:
            _check_kind(name, kind, saved)
        if live and "features" in saved:
            _check_rule(optimizer, name, weight, saved)
        moments = {tuple(saved[kind].shape) for kind in kinds}
        if not low_rank:
            if moments - {shape}:
                raise ValueError(
                    f"parameter {name} has shape {shape}, its saved moments {(moments - {shape}).pop()}, without a "
                    "basis. Of what torch flattens (flatten_optimizer_state_dict=True) it hands an optimizer on what "
                    "that has states for: take one step with the compiled model before you load it"
                )
            continue
        n, rank = basis_shape(weight, saved, optimizer.states)
        features = tuple(saved["features"])
        m, n_of_weight = num_rows(shape, features), num_features(shape, features)
        misfits = moments - {(m, rank)}
        if n_of_weight != n or misfits:
            raise ValueError(
                f"parameter {name} has shape {shape}, its saved basis {(n, rank)} and moments "
                f"{(misfits or moments).pop()}: "
                f"{(n_of_weight, rank)} and {(m, rank)} would fit"
            )
        present = STORE.all_of(weight) if live else ()
        if present and all(s.spec.rank != rank and s.spec.budget is None for s in present):
            raise ValueError(
                f"parameter {name} trains with a basis of shape {present[0].shape}, the saved one has shape "
                f"{(n, rank)}: make the backend with rank={rank}, or load what resize_checkpoint(state_dict, "
                f"{present[0].spec.rank}) makes of it"
            )


def _check_kind(name: str, kind: str, saved: dict[str, Any]) -> None:
    value, scale = saved[kind], saved.get(f"{kind}_scale")
    if not isinstance(value, torch.Tensor):
        raise ValueError(f"parameter {name} has a saved {kind!r} of type {type(value).__name__}: it must be a tensor")
    if value.is_floating_point() or value.is_complex():
        return
    if value.dtype != torch.uint8 or scale is None or scale.numel() * BLOCK != value.numel():
        raise ValueError(
            f"parameter {name} has a saved {kind!r} of {value.dtype}: it must be of floating point, or eight-bit codes "
            f"with a scale for each {BLOCK}"
        )


def _check_rule(optimizer: Algorithm, name: str, weight: torch.Tensor, saved: dict[str, Any]) -> None:
    code, rank = saved.get("basis_code"), basis_shape(weight, saved, optimizer.states)[1]
    for subspace in STORE.all_of(weight):
        rule = subspace.spec.rule
        if subspace.spec.rank != rank:
            continue
        if rule.coded != (code is not None) or (code is not None and code.shape != rule.first_code(rank, 0).shape):
            raise ValueError(
                f"parameter {name} has a saved basis of another rule than the backend's, {rule.name!r}: make the "
                "backend with the rule of the run that saved it"
            )
