"""Operators by which a compiled graph asks for a basis that is chosen from the batch itself.

    batch_basis(X [N,n], stand_in [n,r], control)             -> Q diag(weights) [n,r]   next to the activation
    project_gradient(dW [m,n], stand_in [n,r], control)       -> G [m,r]                 in the backward pass
    compress_gradient(dW [m,n], stand_in [n,r], control)      -> G Q^T [m,n]             the same at full size

Torch sees opaque functions of their inputs. The subspace is found by the handle in ``control``; where its turn has
come, the first call of a step moves the basis and projects on the new one, later calls find it moved. So a call that is
repeated, as when the backward pass recomputes P, gives the same basis. ``stand_in`` has the
basis' shape and no memory: the graph could not know which basis it is to be.
"""

from __future__ import annotations

import torch

from oasis_fx.runtime.subspaces.rules import BatchRule
from oasis_fx.runtime.subspaces.seeds import generator_of
from oasis_fx.runtime.subspaces.subspace import BY_HANDLE, Subspace
from oasis_fx.runtime.subspaces.versions import BY_CALL, Versions


def control_of(subspace: Subspace, versions: Versions) -> torch.Tensor:
    """Return what an operator of a graph is told, int64 [3] on the CPU: its subspace, its call, and a seed.

    The seed comes from torch's generator, as dropout's, for rules that choose a basis for each batch; else it is 0.
    """
    each_batch = isinstance(rule := subspace.spec.rule, BatchRule) and rule.each_batch
    seed = int(torch.randint(1 << 62, (), device="cpu")) if each_batch else 0
    return torch.tensor([subspace.handle, versions.call, seed], device="cpu")


def stand_in(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return what a graph takes in place of a basis: zeros of its shape [n, r], all of them one element of memory."""
    return torch.zeros(1, dtype=dtype, device=device).expand(shape)


@torch.library.custom_op("oasis_fx::batch_basis", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def batch_basis(x: torch.Tensor, stand_in: torch.Tensor, control: torch.Tensor) -> torch.Tensor:
    handle, call, seed = control.tolist()
    subspace, versions = BY_HANDLE[handle], BY_CALL.get(call)
    rule = _rule(subspace)
    with torch.autocast(x.device.type, enabled=False):
        if rule.each_batch:
            basis = _chosen_basis(subspace, x.to(subspace.dtype), generator_of(seed))
        else:
            _move_if_due(subspace, x)
            if versions is not None:  # else nobody will ask
                versions.note(subspace)
            basis = subspace.basis.detach()
        weights = rule.weights(*subspace.shape)
        if weights is not None:
            if rule.dense:  # the graph multiplies by this basis on both sides: (dY^T X Q sqrt(w)) (Q sqrt(w))^T
                weights = _roots(subspace, weights)
            basis = basis * weights.to(basis)
        return basis.to(x.dtype).clone(memory_format=torch.contiguous_format)  # as the fake says


@batch_basis.register_fake
def _(x: torch.Tensor, stand_in: torch.Tensor, control: torch.Tensor) -> torch.Tensor:
    return torch.empty(stand_in.shape, dtype=x.dtype, device=x.device)


@torch.library.custom_op("oasis_fx::project_gradient", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def project_gradient(gradient: torch.Tensor, stand_in: torch.Tensor, control: torch.Tensor) -> torch.Tensor:
    with torch.autocast(gradient.device.type, enabled=False):
        g, _ = _projected(gradient, control)
        return g.to(gradient.dtype).clone(memory_format=torch.contiguous_format)


@project_gradient.register_fake
def _(gradient: torch.Tensor, stand_in: torch.Tensor, control: torch.Tensor) -> torch.Tensor:
    return gradient.new_empty(gradient.shape[0], stand_in.shape[1])


@torch.library.custom_op("oasis_fx::compress_gradient", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def compress_gradient(gradient: torch.Tensor, stand_in: torch.Tensor, control: torch.Tensor) -> torch.Tensor:
    with torch.autocast(gradient.device.type, enabled=False):
        g, basis = _projected(gradient, control)
        return (g @ basis.mT).to(gradient.dtype).clone(memory_format=torch.contiguous_format)


@compress_gradient.register_fake
def _(gradient: torch.Tensor, stand_in: torch.Tensor, control: torch.Tensor) -> torch.Tensor:
    return gradient.new_empty(gradient.shape)


def _projected(gradient: torch.Tensor, control: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """G [m, r] and the basis that it is in, both in the dtype of the subspace."""
    handle, _, seed = control.tolist()
    subspace = BY_HANDLE[handle]
    wide = gradient.to(subspace.dtype)
    if _rule(subspace).each_batch:
        basis = _chosen_basis(subspace, wide, generator_of(seed))
        return wide @ basis, basis
    old = _move_if_due(subspace, gradient)
    return _rule(subspace).project_gradient(wide, subspace, old), subspace.basis.detach()


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
    peak = wide.abs().amax() if wide.numel() else wide.new_zeros(())  # a batch without rows says as little as zeros
    if not (bool(peak.isfinite()) and bool(peak > 0)):
        subspace.steps_since_due.fill_(subspace.spec.rule.every - 1)
        return None
    old = subspace.basis.detach().clone()
    subspace.replace(_choose(subspace, wide, generator_of(subspace.seed, int(subspace.num_updates))))
    subspace.steps_since_due.zero_()
    unit = wide / peak  # squares could leave the exponent range
    subspace.note_measure("captured_energy", ((unit @ subspace.basis.detach()).norm() / unit.norm()).square())
    return old


def _chosen_basis(subspace: Subspace, batch: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return the basis [n, r] of a rule that chooses one for each batch."""
    found = _choose(subspace, batch, generator)
    rule = _rule(subspace)
    return rule.expand(found, *subspace.shape, subspace.dtype, subspace.device) if rule.coded else found


def _choose(subspace: Subspace, batch: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return what the rule chooses from the batch.

    Raises:
        RuntimeError: it has another shape than a basis (or a code) of the subspace: to copy it would fail, or repeat
            a single column r times.
    """
    rule = _rule(subspace)
    found = rule.choose(batch, subspace, generator)
    wanted = subspace.shape if subspace.code is None else tuple(subspace.code.shape)
    if tuple(found.shape) != wanted:
        chosen = "basis" if subspace.code is None else "code"
        raise RuntimeError(
            f"subspace={rule.name!r} chose a {chosen} of shape {tuple(found.shape)} from a batch of shape "
            f"{tuple(batch.shape)} for {subspace.spoken_name}: choose() must return one of shape {wanted}"
        )
    return found


def _roots(subspace: Subspace, weights: torch.Tensor) -> torch.Tensor:
    """Return the square roots of the weights [r] that a rule with dense gradients gives the columns of its basis.

    Raises:
        RuntimeError: a weight is negative.
    """
    if bool((weights < 0).any()):
        raise RuntimeError(
            f"subspace={subspace.spec.rule.name!r} has a negative weight for a column of the basis of "
            f"{subspace.spoken_name}: weights() of a rule with dense gradients must return none"
        )
    return weights.sqrt()
