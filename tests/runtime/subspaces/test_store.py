"""Subspaces belong to parameter objects: kept while those live, shared within groups, freed with them."""

from __future__ import annotations

import copy
import gc
import weakref

import torch

from oasis_fx.graph.matricization import LINEAR
from oasis_fx.runtime.subspaces.initial import initial_basis
from oasis_fx.runtime.subspaces.rules import Oja
from oasis_fx.runtime.subspaces.saved import SavedSubspace
from oasis_fx.runtime.subspaces.spec import SubspaceSpec
from oasis_fx.runtime.subspaces.state import SubspaceState
from oasis_fx.runtime.subspaces.store import SubspaceStore

SPEC = SubspaceSpec(3)


def saved(basis: torch.Tensor, group: str, updates: int) -> SavedSubspace:
    shape = basis.shape[0], basis.shape[1]
    state = SubspaceState(shape, basis.dtype, basis.device, torch.tensor(updates), stored_basis=basis)
    return SavedSubspace(state, LINEAR, group)


def weights(count: int, m: int = 5, n: int = 8) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.randn(m, n)) for _ in range(count)]


def test_a_group_shares_one_basis_and_keeps_it() -> None:
    store, (q, k, other) = SubspaceStore(), weights(3)
    subspace = store.resolve([q, k], SPEC, [LINEAR, LINEAR])
    assert subspace.basis.shape == (8, 3) and not subspace.basis.requires_grad
    assert store.resolve([q, k], SPEC, [LINEAR, LINEAR]) is subspace
    assert store.existing(k, SPEC) is subspace and store.existing(other, SPEC) is None
    assert store.resolve([other], SPEC, [LINEAR]) is not subspace
    assert store.resolve([k, other], SPEC, [LINEAR, LINEAR]) is subspace  # re-bound: other joins k
    assert store.existing(other, SPEC) is subspace


def test_another_specification_is_another_subspace() -> None:
    store, (w,) = SubspaceStore(), weights(1)
    assert store.resolve([w], SPEC, [LINEAR]) is not store.resolve([w], SubspaceSpec(2), [LINEAR])
    assert store.resolve([w], SPEC, [LINEAR]) is not store.resolve([w], SubspaceSpec(3, Oja(lr=2.0)), [LINEAR])
    assert [subspace.spec.rank for subspace in store.all_of(w)] == [3, 2, 3]


def test_in_features_of_a_transposed_weight() -> None:
    store, (w,) = SubspaceStore(), weights(1)
    assert store.resolve([w], SPEC, [(0, 1)]).basis.shape == (5, 3)


def test_equal_values_do_not_make_equal_keys() -> None:
    store, (w,) = SubspaceStore(), weights(1)
    twin = copy.deepcopy(w)
    assert store.resolve([w], SPEC, [LINEAR]) is not store.resolve([twin], SPEC, [LINEAR])


def test_a_deleted_parameter_frees_its_basis() -> None:
    store, (w,) = SubspaceStore(), weights(1)
    basis = weakref.ref(store.resolve([w], SPEC, [LINEAR]).basis)
    store.load(w, saved(torch.zeros(8, 2), "group", 1))
    assert basis() is not None
    del w
    gc.collect()
    assert basis() is None and not store._subspaces and not store._waiting


def test_a_saved_basis_is_taken_over_and_shared_by_its_group() -> None:
    store, (q, k, v) = SubspaceStore(), weights(3)
    basis = initial_basis(8, 3, torch.float32, torch.device("cpu"), seed=7)
    for weight in (q, k):
        store.load(weight, saved(basis, "a", 4))
    store.load(v, saved(torch.zeros(8, 3), "b", 1))
    subspace = store.resolve([q], SPEC, [LINEAR])
    assert torch.equal(subspace.basis, basis) and int(subspace.num_updates) == 4
    assert store.resolve([k], SPEC, [LINEAR]) is subspace
    assert store.resolve([v], SPEC, [LINEAR]) is not subspace
    basis.zero_()
    assert subspace.basis.abs().max() > 0  # a copy


def test_a_basis_that_waits_is_a_copy() -> None:
    store, (w,) = SubspaceStore(), weights(1)
    basis = initial_basis(8, 3, torch.float32, torch.device("cpu"), seed=7)
    expected = basis.clone()
    store.load(w, saved(basis, "a", 4))
    basis.zero_()
    assert torch.equal(store.resolve([w], SPEC, [LINEAR]).basis, expected)


def test_a_saved_basis_goes_into_a_live_one_in_place() -> None:
    store, (w,) = SubspaceStore(), weights(1)
    subspace = store.resolve([w], SPEC, [LINEAR])
    address, version = subspace.basis.data_ptr(), subspace.version
    basis = initial_basis(8, 3, torch.float32, torch.device("cpu"), seed=7)
    store.load(w, saved(basis, "a", 4))
    assert store.resolve([w], SPEC, [LINEAR]) is subspace
    assert subspace.basis.data_ptr() == address and subspace.version != version and int(subspace.num_updates) == 4


def test_a_cast_model_keeps_the_values_of_its_basis() -> None:
    store, (w,) = SubspaceStore(), weights(1)
    before = store.resolve([w], SPEC, [LINEAR])
    w.data = w.data.double()
    after = store.resolve([w], SPEC, [LINEAR])
    assert after.basis.dtype == torch.float64 and torch.equal(after.basis, before.basis.double())
    w.data = w.data.bfloat16()
    assert store.resolve([w], SPEC, [LINEAR]).basis.dtype == torch.float32


def test_of_two_subspaces_the_one_with_a_statistic_is_in_use() -> None:
    """Two backends on one weight: that of the graph that ran in this step, else the newest."""
    store, (w,) = SubspaceStore(), weights(1)
    older, newer = (store.resolve([w], SubspaceSpec(rank), [LINEAR]) for rank in (3, 2))
    assert store.in_use(w) == (newer, LINEAR)
    older.add_statistic(torch.ones(8, 3), None)
    assert store.in_use(w) == (older, LINEAR)
    older.drop_statistic()
    newer.add_statistic(torch.ones(8, 2), None)
    assert store.in_use(w) == (newer, LINEAR)


def test_threads_agree(in_threads) -> None:
    store, (q, k) = SubspaceStore(), weights(2)
    found = []
    in_threads(lambda _: found.append(store.resolve([q, k], SPEC, [LINEAR, LINEAR])), 8)
    assert len(found) == 8 and len({id(s) for s in found}) == 1
