"""What CUDA graphs need of the runtime's inputs: memory that stays where it is from step to step.

CUDA graphs themselves want a GPU: tests/test_gpu.py.
"""

from __future__ import annotations

import torch

from oasis_fx.backend import OasisBackend
from oasis_fx.compile.lowering import run_node_by_node
from oasis_fx.runtime.gradients.slots import Group, lend
from oasis_fx.runtime.optim.adamw import OasisAdamW
from oasis_fx.runtime.subspaces.spec import SubspaceSpec
from oasis_fx.runtime.subspaces.store import STORE
from oasis_fx.settings import Settings

SPEC = SubspaceSpec(3)


def test_bases_energies_and_slots_stay_where_they_are(products, make_weight) -> None:
    weights = [make_weight(5, 8, seed=1), make_weight(6, 8, seed=2)]
    optimizer = OasisAdamW(weights, lr=0.05)
    addresses, versions = set(), set()
    for step in range(4):
        x = torch.randn(20, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        q, k = products(x, weights, SPEC)
        (q.square().mean() + k.sin().mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
        subspace = STORE.resolve(weights, SPEC, [(1, 2)] * 2)
        lent = lend([Group(subspace, tuple(weights), ((1, 2),) * 2)])
        addresses.add(tuple(t.data_ptr() for t in (*lent.bases, *lent.energies, *lent.slots)))
        versions.add(subspace.version)
        assert all(slot.untyped_storage().nbytes() == slot.element_size() for slot in lent.slots)  # no memory to copy
    assert len(versions) == 4  # the bases did move
    assert len(addresses) == 1


def test_a_compiled_graph_knows_that_they_are_static() -> None:
    """Otherwise CUDA graphs would copy each of them before each replay."""
    model = torch.nn.Sequential(torch.nn.Linear(12, 20), torch.nn.Tanh(), torch.nn.Linear(20, 7))
    backend = OasisBackend(Settings(rank=4), run_node_by_node)
    torch.compile(model, backend=backend)(torch.randn(9, 12)).sum().backward()
    (record,) = backend.compiled_graphs()
    trace = record.trace or record.retrace()
    ours = {position for w in record.lifted for position in (w.slot, w.basis, w.energy)}
    assert len(ours) == 6 and ours <= set(trace.static_inputs)
