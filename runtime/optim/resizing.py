"""Change the rank of a subspace during training, and resize the optimizer states in it.

    V [r, r]   eigenvectors of a Gram matrix of the coordinates, by falling eigenvalue
    Q V        the same space, columns by what they carry; states are transported by R = V, as in any move

A smaller rank keeps the first columns. A larger one adds columns outside of the space: the directions in which the
statistic C = A^T A Q leaves it, and random ones where there is no statistic or it has too few. Means begin at zero in
new columns, so that what a mean stands for, ``m Q^T``, stays what it was; a second moment begins at the least of its
row, since a zero there would let the first update through at full length.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from oasis_fx.ranks import columns_of
from oasis_fx.runtime.optim.states import note_basis, saved_states
from oasis_fx.runtime.optim.updates import State
from oasis_fx.runtime.subspaces.initial import initial_basis
from oasis_fx.runtime.subspaces.rank_allocation import Spectrum, joined, share_out
from oasis_fx.runtime.subspaces.rules import RULES
from oasis_fx.runtime.subspaces.saved import SavedSubspace
from oasis_fx.runtime.subspaces.state import Family, SubspaceState
from oasis_fx.runtime.subspaces.store import STORE
from oasis_fx.runtime.subspaces.subspace import Subspace

if TYPE_CHECKING:
    from oasis_fx.runtime.optim.algorithm import Algorithm

Group = Mapping[str, Any]
# Entries of a weight's state that mean nothing under another rank.
_OF_RANK = ("basis_move", "basis_tail")


def resize_live(optimizer: Algorithm, rank: int | float) -> None:
    """Change the rank of every subspace of an optimizer, and resize the states of its weights.

    Args:
        optimizer: whose states are in the present coordinates of their bases.
        rank: columns, from 1, or a fraction of each subspace's n; checked before.

    Raises:
        ValueError: the rule of a subspace has bases that cannot change their rank; no rank is changed then.
    """
    families = _waiting(optimizer)
    ranks = {subspace: columns_of(rank, subspace.shape[0]) for subspace in optimizer.subspaces()}
    for subspace in ranks:
        if not subspace.spec.rule.resizable:
            raise _refusal(rank, repr(subspace.spec.rule.name))
    for saved in families:
        if not saved.resizable:
            raise _refusal(rank, _rules_behind(saved.state.code, saved.state.shape[1]))
    _resize_all(optimizer, ranks)
    groups = optimizer.groups_by_weight()
    for saved, weights in families.items():
        n, r = saved.state.shape
        before = saved.state.stored_basis
        assert before is not None  # coded bases were refused
        states = [(optimizer.state[weight], groups[weight]) for weight in weights]
        low_rank = [(state, group) for state, group in states if not state.get("full_rank")]
        gram = _gram(optimizer, low_rank, r)
        basis = _resize(optimizer, low_rank, before, gram, None, columns_of(rank, n))
        for weight, (state, _) in zip(weights, states, strict=True):
            state["basis"] = basis
            for key in _OF_RANK:
                state.pop(key, None)
            resized = _resized(optimizer, saved.state, basis, state)
            STORE.load(weight, replace(saved, state=resized, overrides=True))


def spend_budget(optimizer: Algorithm) -> None:
    """Redistribute the columns of ``rank=AutoRank(...)`` over the subspaces, by the statistics of this step.

    A family of subspaces, one of which has no usable statistic, keeps its rank.
    """
    families: dict[Family, dict[Subspace, Spectrum | None]] = {}
    for subspace, weights in optimizer.subspaces().items():
        if subspace.spec.budget is not None:
            families.setdefault(subspace.family.root(), {})[subspace] = _spectrum(subspace, weights)
    spectra = {
        tuple(members): joined([spectrum for spectrum in members.values() if spectrum is not None])
        for members in families.values()
        if all(spectrum is not None for spectrum in members.values())
    }
    ranks = zip(spectra, share_out(list(spectra.values())), strict=True)
    _resize_all(optimizer, {subspace: rank for members, rank in ranks for subspace in members})


def resize_checkpoint(optimizer: Algorithm, state_dict: Mapping[str, Any], rank: int | float) -> dict[str, Any]:
    """Return a copy of a state dict with all subspaces at another rank.

    Args:
        optimizer: of the kind that the state dict is of; not changed.
        state_dict: with all rows of sharded weights; not changed.
        rank: columns, from 1, or a fraction of each subspace's n; checked before.

    Raises:
        ValueError: the rule of a saved basis does not let it change its rank.
    """
    states = state_dict["state"].items()  # those of no parameter may be of any type
    packed = {**state_dict, "state": {key: dict(state) if isinstance(state, dict) else state for key, state in states}}
    families: dict[int, list[tuple[State, Group]]] = {}
    for _, _, state, group in saved_states(optimizer, packed):
        if "features" in state:
            families.setdefault(state["subspace"], []).append((state, group))
    for members in families.values():
        first = members[0][0]
        if "basis" not in first or first.get("basis_resizable") is False:
            r = first.get("basis_rank", first[optimizer.states[0]].shape[1])
            raise _refusal(rank, _rules_behind(first.get("basis_code"), int(r)))
        n, r = first["basis"].shape
        if columns_of(rank, n) == r:
            continue
        low_rank = [(state, group) for state, group in members if not state.get("full_rank")]
        for state, _ in low_rank:
            for name in optimizer.states:
                state[name] = state[name].clone()
        gram = _gram(optimizer, low_rank, r)
        basis = _resize(optimizer, low_rank, first["basis"], gram, None, columns_of(rank, n))
        for state, _ in members:
            state["basis"] = basis
            for key in _OF_RANK:
                state.pop(key, None)
    return packed


def _refusal(rank: int | float, rules: str) -> ValueError:
    return ValueError(f"rank is {rank!r}: bases of subspace={rules} cannot change their rank")


def _rules_behind(code: torch.Tensor | None, r: int) -> str:
    """Return, as text, the rules that may have made a basis of rank r in a checkpoint, which does not name its own."""
    fixed = [rule for rule in RULES.values() if not rule.resizable and rule.coded == (code is not None)]
    if code is not None:
        fixed = [rule for rule in fixed if rule.first_code(r, 0).shape == code.shape]
    return " or ".join(repr(rule.name) for rule in fixed) or "a rule of your own"


def _waiting(optimizer: Algorithm) -> dict[SavedSubspace, list[torch.Tensor]]:
    """Return bases from a checkpoint that no graph has asked for yet, with their weights; bind the other weights."""
    families: dict[object, tuple[SavedSubspace, list[torch.Tensor]]] = {}
    bound = {weight for weights in optimizer.subspaces().values() for weight in weights}
    for weight in optimizer.groups_by_weight():
        state = optimizer.state.get(weight, {})
        if "features" not in state or weight in bound:
            continue
        saved = STORE.waiting(weight)
        if saved is not None:
            families.setdefault(saved.group, (saved, []))[1].append(weight)
            continue
        for subspace in STORE.all_of(weight):
            if "basis" not in state or subspace.spec.rank == state["basis"].shape[1]:
                optimizer.bind(weight, subspace)
    return dict(families.values())


def _resize_all(optimizer: Algorithm, ranks: Mapping[Subspace, int]) -> None:
    members, groups = optimizer.subspaces(), optimizer.groups_by_weight()
    changed = {subspace: rank for subspace, rank in ranks.items() if rank != subspace.shape[1]}
    for subspace, rank in changed.items():
        weights = members[subspace]
        states = [(optimizer.state[weight], groups[weight]) for weight in weights]
        low_rank = [(state, group) for state, group in states if not state.get("full_rank")]
        statistic, old = subspace.statistic, subspace.basis.detach()
        if statistic is not None and not bool(statistic.isfinite().all()):
            statistic = None
        gram = _gram(optimizer, low_rank, old.shape[1]) if statistic is None else old.mT @ statistic
        basis = _resize(optimizer, low_rank, old, gram, statistic, rank)
        new = Subspace(subspace.spec.with_rank(rank, old.shape[0]), _resized(optimizer, subspace, basis, states[0][0]))
        new.num_updates += 1
        if statistic is not None:
            new.steps_since_due.zero_()
        STORE.exchange(subspace, new)
        for weight in weights:
            optimizer.bind(weight, new)
            note_basis(optimizer.state[weight], new)
    if changed:
        # Their graphs have ranks written into them.
        torch.compiler.reset()


def _resized(optimizer: Algorithm, before: SubspaceState, basis: torch.Tensor, state: State) -> SubspaceState:
    """Return the state of a subspace under its new basis, with the resized momentum of its weight."""
    after = before.resized(basis)
    if before.momentum is not None:
        assert optimizer.mean_state is not None
        after.momentum = replace(before.momentum, mean=state[optimizer.mean_state])
    return after


def _resize(
    optimizer: Algorithm,
    states: Sequence[tuple[State, Group]],
    basis: torch.Tensor,
    gram: torch.Tensor,
    statistic: torch.Tensor | None,
    rank: int,
) -> torch.Tensor:
    """Change the states in place and return the new basis [n, rank]."""
    symmetric = ((gram + gram.mT) / 2).to(basis.device, torch.float64)
    rotation = torch.linalg.eigh(symmetric).eigenvectors.flip(-1).to(basis)
    for state, group in states:
        with optimizer.states_in_place([state]) as plain:
            optimizer.transport(plain, rotation[None], group)
        optimizer.resize_state(state, rank, group)
    kept = (basis @ rotation)[:, :rank]
    if rank <= kept.shape[1]:
        return kept.contiguous()
    n, missing = basis.shape[0], rank - kept.shape[1]
    added = initial_basis(n, missing, basis.dtype, basis.device, seed=1)
    if statistic is not None:
        outside = statistic - basis @ (basis.mT @ statistic)
        vectors = torch.linalg.svd(outside / outside.abs().amax().clamp_min(1e-30), full_matrices=False).U[:, :missing]
        added = torch.cat([vectors, added[:, vectors.shape[1] :]], dim=1)
    # Householder's: orthonormal even where the statistic leaves the subspace in fewer directions than are wanted.
    completed = torch.linalg.qr(torch.cat([kept, added], dim=1)).Q
    return torch.cat([kept, completed[:, kept.shape[1] :]], dim=1).contiguous()


def _gram(optimizer: Algorithm, states: Sequence[tuple[State, Group]], r: int) -> torch.Tensor:
    """Return what the coordinates carry: ``sum of m^T m`` [r, r], m the first state of each weight; I of none."""
    means = [optimizer.decoded(state)[optimizer.states[0]] for state, _ in states]
    return torch.stack([mean.mT @ mean for mean in means]).sum(dim=0) if means else torch.eye(r)


def _spectrum(subspace: Subspace, weights: Sequence[torch.Tensor]) -> Spectrum | None:
    """Return what each direction of the basis captures of ||A||^2; None where the step's statistic is of no use."""
    statistic, energy, basis = subspace.statistic, subspace.energy_sum, subspace.basis.detach()
    if statistic is None or energy is None:
        return None
    peak = statistic.abs().amax().double()
    if not bool(peak.isfinite()) or not bool(peak > 0):
        return None
    gram = basis.mT.double() @ (statistic.double() / peak)
    captured = torch.linalg.eigvalsh((gram + gram.mT) / 2).flip(0) * peak / energy.double()
    n, rows = subspace.shape[0], sum(weight.numel() // subspace.shape[0] for weight in weights)
    assert subspace.spec.budget is not None
    return Spectrum(captured.tolist(), n, rows, subspace.shape[1], subspace.spec.budget)
