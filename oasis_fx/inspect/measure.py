"""Bytes of training state, measured from the real tensors."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from oasis_fx._torch.tensors import saved_unversioned
from oasis_fx.runtime.gradients.low_rank_grad import LowRankGrad


def saved_for_backward_bytes(output: torch.Tensor, known: Iterable[torch.Tensor] = ()) -> int:
    """Measure the bytes that the autograd graph behind ``output`` keeps for the backward pass.

    Each storage counts once. Saved-tensor hooks would measure the same, but make `torch.compile` compile anew.

    Args:
        output: the loss, before `backward()`.
        known: tensors that exist anyway and do not count, such as parameters, buffers, bases and inputs.
    """
    skip = {_storage(tensor).data_ptr() for tensor in known}
    sizes: dict[int, int] = {}
    pending, seen = [output.grad_fn], set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        pending += [following for following, _ in node.next_functions]
        for tensor in _saved(node):
            storage = _storage(tensor)
            if storage.data_ptr() not in skip:
                sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())


def gradient_bytes(parameters: Iterable[torch.Tensor]) -> int:
    """Count the bytes of the gradients that are stored now; a low-rank gradient counts its factor."""
    gradients = (parameter.grad for parameter in parameters if parameter.grad is not None)
    return sum((g.factor if isinstance(g, LowRankGrad) else g).nbytes for g in gradients)


def optimizer_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Count the bytes of an optimizer's state, bases included; each storage counts once."""
    tensors = (v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor))
    return sum({_storage(t).data_ptr(): _storage(t).nbytes() for t in tensors}.values())


def _saved(node: torch.autograd.graph.Node) -> list[torch.Tensor]:
    found = list(getattr(node, "saved_tensors", ()))  # autograd functions in Python, compiled graphs too
    found += saved_unversioned(node)
    for name in dir(node):
        if name.startswith("_saved_"):
            value = getattr(node, name)
            found += value if isinstance(value, tuple | list) else [value]
    return [value for value in found if isinstance(value, torch.Tensor)]


def _storage(tensor: torch.Tensor) -> torch.UntypedStorage:
    return tensor.untyped_storage()
