"""What a step remembers of the last one is looked at anew where something has changed in between."""

from __future__ import annotations

import gc

import pytest
import torch

from oasis_fx import OasisAdamW, OasisSGD, oasis_backend
from oasis_fx.graph.matricization import LINEAR
from oasis_fx.runtime.subspaces.initial import initial_basis, new_subspace
from oasis_fx.runtime.subspaces.spec import SubspaceSpec
from oasis_fx.runtime.subspaces.store import STORE
from oasis_fx.runtime.subspaces.subspace import Subspace


def parameter() -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.randn(5, 8))


def put(weight: torch.Tensor, rank: int) -> Subspace:
    return STORE.resolve([weight], SubspaceSpec(rank), [LINEAR])


def test_the_store_is_asked_again_where_it_has_changed() -> None:
    weight, other = parameter(), parameter()
    optimizer = OasisSGD([weight, other])
    assert optimizer.stored_subspaces() == ()
    first = put(weight, 3)
    assert optimizer.stored_subspaces() == (first,) == optimizer.stored_subspaces()
    second = put(weight, 2)
    assert optimizer.stored_subspaces() == (first, second)
    spec = SubspaceSpec(4)
    third = new_subspace(initial_basis(8, 4, torch.float32, torch.device("cpu")), spec)
    STORE.exchange(second, third)
    assert optimizer.stored_subspaces() == (first, third)
    STORE.resolve([weight, other], SubspaceSpec(3), [LINEAR, LINEAR])
    STORE.forget(weight)
    assert optimizer.stored_subspaces() == (first,)  # of the other
    STORE.forget(other)
    assert optimizer.stored_subspaces() == ()


def test_the_store_is_asked_again_where_parameters_have_changed() -> None:
    weight, other = parameter(), parameter()
    first, second = put(weight, 3), put(other, 3)
    optimizer = OasisSGD([weight])
    assert optimizer.stored_subspaces() == (first,)
    optimizer.add_param_group({"params": [other]})
    assert optimizer.stored_subspaces() == (first, second)
    optimizer.param_groups[0]["params"][0] = parameter()
    assert optimizer.stored_subspaces() == (second,)
    optimizer.param_groups[0]["params"][0] = weight
    assert optimizer.stored_subspaces() == (first, second)


def test_a_parameter_that_is_gone_leaves_no_subspace_to_one_in_its_place() -> None:
    optimizer = OasisSGD([parameter()])
    group = optimizer.param_groups[0]["params"]
    put(group[0], 3)
    assert len(optimizer.stored_subspaces()) == 1
    number = id(group[0])
    group.clear()
    gc.collect()
    made = [parameter() for _ in range(100)]  # Python gives objects the places of others that are gone
    group += [weight for weight in made if id(weight) == number] or made[:1]
    assert optimizer.stored_subspaces() == ()


def test_a_gathered_parameter_is_looked_up_in_the_place_of_its_shard() -> None:
    shard, whole = parameter(), parameter()
    optimizer, subspace = OasisSGD([shard]), put(whole, 3)
    assert optimizer.stored_subspaces() == ()
    STORE.note_shard(shard, whole)
    assert optimizer.stored_subspaces() == (subspace,)
    STORE.forget_shard(shard)
    assert optimizer.stored_subspaces() == ()


def test_a_weight_of_a_second_graph_has_its_basis_moved() -> None:
    """By the optimizer that has stepped the weight before, whose states are full-size and so in no subspace."""
    net = torch.nn.Linear(8, 5, bias=False)
    optimizer = OasisAdamW(net.parameters(), full_size_states=True)
    moved = []
    for rank in (2, 3):
        torch._dynamo.reset()
        compiled = torch.compile(net.forward, backend=oasis_backend(rank=rank, inner="aot_eager"))
        compiled(torch.randn(16, 8)).square().mean().backward()
        optimizer.step(), optimizer.zero_grad()
        moved += [int(subspace.num_updates) for subspace in STORE.all_of(net.weight) if subspace.spec.rank == rank]
    assert moved == [1, 1]


@pytest.mark.parametrize("low_rank", [True, False])
@pytest.mark.parametrize("kind", ["exp_avg", "exp_avg_sq"])
def test_a_state_that_fitted_and_was_replaced_is_refused(low_rank, kind) -> None:
    net = torch.nn.Linear(8, 5, bias=False)
    optimizer = OasisAdamW(net.parameters())
    run = torch.compile(net, backend=oasis_backend(rank=3, inner="aot_eager")) if low_rank else net
    for _ in range(2):
        run(torch.randn(16, 8)).square().mean().backward()
        optimizer.step(), optimizer.zero_grad()
    run(torch.randn(16, 8)).square().mean().backward()
    state = optimizer.state[net.weight]
    state[kind] = state[kind][:4]
    before = net.weight.detach().clone()
    with pytest.raises(ValueError, match="moments of shape"):
        optimizer.step()
    assert torch.equal(net.weight, before)
