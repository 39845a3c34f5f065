"""Choose the steps of weights that our Triton kernels compute; torch's operators compute all others."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING

import torch

from oasis_fx.errors import OasisWarning
from oasis_fx.graph.matricization import rows_view
from oasis_fx.runtime.optim.context import Step
from oasis_fx.runtime.optim.updates import DenseUpdate, LowRankUpdate
from oasis_fx.runtime.subspaces.momentum import bias_correction

if TYPE_CHECKING:
    from oasis_fx.runtime.optim.adam_updates import AdamWSettings

DEVICES = ("cuda",)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def _kernels() -> ModuleType | None:
    try:
        from oasis_fx.runtime.optim.kernels import triton_kernels
    except ImportError:  # a torch built without Triton
        return None
    return triton_kernels


_broken = False


def device_guard(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Return a context in which Triton launches on ``device``; it takes no account of where tensors are."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _launch(run: Callable[[], None], device: torch.device) -> bool:
    """Run a kernel and return whether it ran; warn once on a machine that cannot build kernels."""
    global _broken
    try:
        with device_guard(device):
            run()
    except Exception as error:
        _broken = True
        why = f"{type(error).__name__}: {error}"
        message = f"Triton cannot build the kernels of optimizer steps; slower operators of torch's compute them: {why}"
        warnings.warn(message, OasisWarning, stacklevel=2)
        return False
    return True


def _usable(*tensors: torch.Tensor) -> bool:
    return not _broken and all(tensor.device.type in DEVICES for tensor in tensors) and _kernels() is not None


def add_product(
    update: LowRankUpdate,
    u: torch.Tensor,
    keep: float,
    alpha: float,
    gate: torch.Tensor | None,
    generator: torch.Generator | None,
) -> bool:
    """Compute ``W = keep W + alpha U Q^T`` in place by a kernel, rounded stochastically where there is a generator.

    Args:
        u: U [m, r], float32.
        gate: bool scalar; where it is false, the weight stays as it is. None for true.

    Returns:
        Whether a kernel did. Where none suits, nothing has changed.
    """
    weight, basis = update.weight, update.basis
    if not _usable(weight) or weight.dtype not in _DTYPES or basis.dtype != torch.float32:
        return False
    rows = rows_view(weight, update.features)
    if rows is None or not (u.is_contiguous() and basis.is_contiguous()):
        return False
    seed = None if generator is None else _next_seed(generator)
    done = _launch(
        lambda: _kernels().add_product_(rows, u, basis, keep=keep, alpha=alpha, gate=gate, seed=seed),  # type: ignore[union-attr]
        weight.device,
    )
    if done:
        torch.autograd.graph.increment_version(weight)  # a kernel does not, and autograd looks at it
    return done


def step_dense_bfloat16(updates: Sequence[DenseUpdate], step: Step[AdamWSettings]) -> list[DenseUpdate]:
    """Step bfloat16 weights by AdamW with stochastic rounding, one kernel for each.

    Returns:
        The updates that no kernel suits. Their weights and states have not changed.
    """
    suited = [update for update in updates if _usable(update.weight) and _is_plain_bfloat16(update)]
    if not suited:
        return list(updates)
    steps = [update.state["step"] for update in suited]
    counts = torch.stack(steps) + 1
    betas = step.settings.beta1, step.settings.beta2
    biases = torch.stack([bias_correction(beta, counts) for beta in betas], dim=1).float()
    for number, update in enumerate(suited):
        run = functools.partial(_step_one, update, biases[number], step, _next_seed(step.generator))
        done = _launch(run, update.weight.device)
        if not done:
            suited = suited[:number]
            break
    if suited:
        step.count([update.state for update in suited])
    done_with = {id(update) for update in suited}
    return [update for update in updates if id(update) not in done_with]


def _step_one(update: DenseUpdate, biases: torch.Tensor, step: Step[AdamWSettings], seed: int) -> None:
    weight, state, settings = update.weight, update.state, step.settings
    _kernels().step_adamw_(  # type: ignore[union-attr]
        weight, update.gradient, state["exp_avg"], state["exp_avg_sq"], biases, lr=settings.lr,
        beta1=settings.beta1, beta2=settings.beta2, eps=settings.eps, weight_decay=settings.weight_decay,
        gate=step.gate, seed=seed,
    )  # fmt: skip
    for changed in (weight, state["exp_avg"], state["exp_avg_sq"]):
        torch.autograd.graph.increment_version(changed)


def _is_plain_bfloat16(update: DenseUpdate) -> bool:
    tensors = update.weight, update.gradient, update.state["exp_avg"], update.state["exp_avg_sq"]
    return all(tensor.dtype == torch.bfloat16 and tensor.is_contiguous() for tensor in tensors)


def _next_seed(generator: torch.Generator) -> int:
    """Return a seed that no other kernel of this step has.

    A GPU's generator keeps its seed and offset on the host, so that nothing waits for the device.
    """
    if generator.device.type == "cpu":
        return int(torch.randint(1 << 31, (), generator=generator))
    offset = int(generator.get_offset())
    generator.set_offset(offset + 4)
    return (generator.initial_seed() << 20) + offset
