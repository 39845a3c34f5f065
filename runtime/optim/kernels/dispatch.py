"""Choose the steps of weights that our Triton kernels compute; torch's operators compute all others."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from oasis_fx.errors import OasisWarning
from oasis_fx.graph.matricization import rows_view
from oasis_fx.runtime.optim.context import Step
from oasis_fx.runtime.optim.kernels.layouts import row_stride
from oasis_fx.runtime.optim.updates import DenseUpdate, LowRankUpdate
from oasis_fx.runtime.subspaces.banks import as_bank
from oasis_fx.runtime.subspaces.momentum import bias_correction

if TYPE_CHECKING:
    from oasis_fx.runtime.optim.adam_updates import AdamWSettings

DEVICES = ("cuda",)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Kernels(NamedTuple):
    """The functions that launch kernels; their modules import Triton."""

    add_products: Callable[..., None]
    step_dense_adamw: Callable[..., None]


@functools.cache
def _kernels() -> Kernels | None:
    try:
        from oasis_fx.runtime.optim.kernels.add_products import add_products_
        from oasis_fx.runtime.optim.kernels.dense_adamw import step_dense_adamw_
    except ImportError:  # a torch built without Triton
        return None
    return Kernels(add_products_, step_dense_adamw_)


_broken = False


def device_guard(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Return a context in which Triton launches on ``device``; it takes no account of where tensors are."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _launch(run: Callable[[Kernels], None], device: torch.device) -> bool:
    """Run a kernel and return whether it ran; warn once on a machine that cannot build kernels."""
    global _broken
    kernels = _kernels()
    if _broken or kernels is None:
        return False
    try:
        with device_guard(device):
            run(kernels)
    except Exception as error:
        _broken = True
        why = f"{type(error).__name__}: {error}"
        message = f"Triton cannot build the kernels of optimizer steps; slower operators of torch's compute them: {why}"
        warnings.warn(message, OasisWarning, stacklevel=2)
        return False
    return True


def _usable(tensor: torch.Tensor) -> bool:
    return not _broken and tensor.device.type in DEVICES and _kernels() is not None


def add_products(
    updates: Sequence[LowRankUpdate],
    us: Sequence[torch.Tensor],
    factors: Sequence[float],
    *,
    lr: float | torch.Tensor,
    weight_decay: float,
    gate: torch.Tensor | None,
    generator: torch.Generator | None,
) -> list[int]:
    """Compute ``W = (1 - lr weight_decay) W + lr factor U Q^T`` in place, by one kernel for all weights of a kind.

    Args:
        updates: of weights of one device and dtype.
        us: U [m, r] of each. Those of one kind that lie side by side in memory, in order, are not copied: see
            `oasis_fx.runtime.optim.weight_steps.zero_directions`.
        factors: of each, of the learning rate, but not in weight decay.
        lr: a number, or a tensor with one element on the device.
        weight_decay: decoupled, as AdamW's.
        gate: bool scalar; where it is false, weights stay as they are. None for true.
        generator: for stochastic rounding; None rounds to nearest.

    Returns:
        The places of the updates that no kernel has computed, in order. Their weights have not changed.
    """
    if not updates or not _usable(updates[0].weight) or updates[0].weight.dtype not in _DTYPES:
        return list(range(len(updates)))
    kinds: dict[Any, list[int]] = {}
    rows: dict[int, torch.Tensor] = {}
    for place, (update, u, factor) in enumerate(zip(updates, us, factors, strict=True)):
        view = _matrix_of(update, u)
        layout = None if view is None else row_stride(view)
        if view is not None and layout is not None:
            rows[place] = view
            kinds.setdefault((view.shape, layout, u.shape, factor), []).append(place)
    left = set(range(len(updates)))
    for (*_, factor), places in kinds.items():
        weights, bases = [rows[place] for place in places], [updates[place].basis for place in places]
        given = {"lr": lr, "weight_decay": weight_decay, "factor": factor, "gate": gate}
        bank = as_bank([us[place] for place in places])
        run = functools.partial(_add_products, weights, bank, bases, given, generator)
        if not _launch(run, weights[0].device):
            break
        # A kernel does not, and autograd looks at it.
        torch.autograd.graph.increment_version([updates[place].weight for place in places])
        left.difference_update(places)
    return sorted(left)


def _add_products(
    weights: list[torch.Tensor],
    bank: torch.Tensor,
    bases: list[torch.Tensor],
    given: dict[str, Any],
    generator: torch.Generator | None,
    kernels: Kernels,
) -> None:
    seed = None if generator is None else _next_seed(generator)
    kernels.add_products(weights, bank, bases, **given, seed=seed)


def _matrix_of(update: LowRankUpdate, u: torch.Tensor) -> torch.Tensor | None:
    """Return a weight as the matrix [m, n] that the kernel steps, if `row_stride` allows; None where it would not."""
    weight, basis = update.weight, update.basis
    if u.dtype != torch.float32 or basis.dtype != torch.float32 or weight.numel() == 0:
        return None
    if not u.is_contiguous() or not basis.is_contiguous():
        return None
    return rows_view(weight, update.features)


def step_dense_bfloat16(updates: Sequence[DenseUpdate], step: Step[AdamWSettings]) -> list[DenseUpdate]:
    """Step bfloat16 weights of one device by AdamW with stochastic rounding, all in one kernel.

    Weights whose size or addresses are not multiples of 16 take a second launch, which loads entry by entry.

    Returns:
        The updates that no kernel suits. Their weights and states have not changed.
    """
    kinds: dict[bool, list[DenseUpdate]] = {}
    for update in updates:
        if _usable(update.weight) and _is_plain_bfloat16(update):
            kinds.setdefault(_is_aligned(update), []).append(update)
    done: set[int] = set()
    for batch in kinds.values():
        if not _launch(functools.partial(_step_batch, batch, step), batch[0].weight.device):
            break
        for name in ("exp_avg", "exp_avg_sq"):
            torch.autograd.graph.increment_version([update.state[name] for update in batch])
        torch.autograd.graph.increment_version([update.weight for update in batch])
        step.count([update.state for update in batch])
        done.update(id(update) for update in batch)
    return [update for update in updates if id(update) not in done]


def _step_batch(batch: Sequence[DenseUpdate], step: Step[AdamWSettings], kernels: Kernels) -> None:
    settings, counts = step.settings, torch.stack([update.state["step"] for update in batch]) + 1
    biases = torch.stack([bias_correction(beta, counts) for beta in (settings.beta1, settings.beta2)], dim=1).float()
    kernels.step_dense_adamw(
        *zip(*(_tensors_of(update) for update in batch), strict=True), biases.contiguous(), lr=settings.lr,
        beta1=settings.beta1, beta2=settings.beta2, eps=settings.eps, weight_decay=settings.weight_decay,
        gate=step.gate, seed=_next_seed(step.generator),
    )  # fmt: skip


def _tensors_of(update: DenseUpdate) -> tuple[torch.Tensor, ...]:
    return update.weight, update.gradient, update.state["exp_avg"], update.state["exp_avg_sq"]


def _is_plain_bfloat16(update: DenseUpdate) -> bool:
    tensors = _tensors_of(update)
    return all(tensor.dtype == torch.bfloat16 and tensor.is_contiguous() and tensor.numel() for tensor in tensors)


def _is_aligned(update: DenseUpdate) -> bool:
    return update.weight.numel() % 16 == 0 and all(tensor.data_ptr() % 16 == 0 for tensor in _tensors_of(update))


def _next_seed(generator: torch.Generator) -> int:
    """Return a seed that no other kernel of this step has.

    A GPU's generator keeps its seed and offset on the host, so that nothing waits for the device.
    """
    if generator.device.type == "cpu":
        return int(torch.randint(1 << 31, (), generator=generator))
    offset = int(generator.get_offset())
    generator.set_offset(offset + 4)
    return (generator.initial_seed() << 20) + offset
