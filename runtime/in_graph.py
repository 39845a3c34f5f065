"""Operators by which a compiled graph asks for a basis that goes by the batch itself.

    batch_basis(X [N,n], stand_in [n,r], control)       -> Q diag(weights) [n,r]   next to the activation
    project_gradient(dW [m,n], stand_in [n,r], control) -> G [m,r]                 in the backward pass

Torch sees opaque functions of their inputs. The subspace is found by the handle in ``control``; where its turn has
come, the first call of a step moves the basis and projects on the new one, later calls find it moved. So a call that is
repeated, as when the partitioner computes P again in the backward pass, gives the same basis. ``stand_in`` has the
basis' shape and no memory: the graph could not know which basis it is to be.
"""

from __future__ import annotations

import torch

from oasis_fx.runtime.rules import BatchRule
from oasis_fx.runtime.subspace import BY_CALL, BY_HANDLE, Subspace, Versions


def control_of(subspace: Subspace, versions: Versions) -> torch.Tensor:
    """What an operator of a graph is told: its subspace, its call and, for rules that draw anew for each batch, a
    seed from torch's generator, as dropout takes one."""
    seed = int(torch.randint(1 << 62, (), device="cpu")) if subspace.spec.rule.dense else 0
    return torch.tensor([subspace.handle, versions.call, seed], device="cpu")


def stand_in(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """What a graph takes in a basis' place: zeros of its shape, without memory of their own."""
    return torch.zeros(1, dtype=dtype, device=device).expand(shape)


@torch.library.custom_op("oasis_fx::batch_basis", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def batch_basis(x: torch.Tensor, stand_in: torch.Tensor, control: torch.Tensor) -> torch.Tensor:
    handle, call, seed = control.tolist()
    subspace, versions = BY_HANDLE[handle], BY_CALL.get(call)
    with torch.autocast(x.device.type, enabled=False):
        if _rule(subspace).dense:
            generator = torch.Generator("cpu").manual_seed(seed)
            basis = _rule(subspace).choose(x.to(subspace.dtype), subspace, generator)
        else:
            _move_if_due(subspace, x)
            if versions is not None:  # else nobody will ask
                versions.note(subspace)
            basis = subspace.basis.detach()
        weights = _rule(subspace).weights(*subspace.shape)
        if weights is not None:
            basis = basis * weights.to(basis)
        return basis.to(x.dtype).clone(memory_format=torch.contiguous_format)  # as the fake says


@batch_basis.register_fake
def _(x: torch.Tensor, stand_in: torch.Tensor, control: torch.Tensor) -> torch.Tensor:
    return torch.empty(stand_in.shape, dtype=x.dtype, device=x.device)


@torch.library.custom_op("oasis_fx::project_gradient", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def project_gradient(gradient: torch.Tensor, stand_in: torch.Tensor, control: torch.Tensor) -> torch.Tensor:
    subspace = BY_HANDLE[int(control[0])]
    with torch.autocast(gradient.device.type, enabled=False):
        old = _move_if_due(subspace, gradient)
        wide = gradient.to(subspace.dtype)
        g = _rule(subspace).project_gradient(wide, subspace, old)
        return g.to(gradient.dtype).clone(memory_format=torch.contiguous_format)


@project_gradient.register_fake
def _(gradient: torch.Tensor, stand_in: torch.Tensor, control: torch.Tensor) -> torch.Tensor:
    return gradient.new_empty(gradient.shape[0], stand_in.shape[1])


def _rule(subspace: Subspace) -> BatchRule:
    rule = subspace.spec.rule
    assert isinstance(rule, BatchRule)
    return rule


def _move_if_due(subspace: Subspace, batch: torch.Tensor) -> torch.Tensor | None:
    """Move the basis where its turn has come; return the old one then.

    A batch that is zero or not finite moves nothing, and neither do the later ones of its step: gradients of one step
    are in one basis. The turn comes again at the next.
    """
    if not subspace.is_due:
        return None
    wide = batch.to(subspace.dtype)
    peak = wide.abs().amax()
    if not (bool(peak.isfinite()) and bool(peak > 0)):
        subspace.num_steps.fill_(subspace.spec.every - 1)
        return None
    old = subspace.basis.detach().clone()
    seed = subspace.seed * 1_000_003 + int(subspace.num_updates)
    subspace.replace(_rule(subspace).choose(wide, subspace, torch.Generator("cpu").manual_seed(seed)))
    subspace.num_steps.zero_()
    subspace.captured_energy = ((wide @ subspace.basis.detach()).norm() / wide.norm()).square()
    return old
