"""A cross-entropy that never holds the logits of more than a chunk of tokens.

The logits of N tokens over a vocabulary of V are N x V numbers, in float32 often more than everything else that a step
keeps. Here a chunk of them is made, turned into the chunk's loss and the chunk's part of both gradients, and freed,
all in the forward pass; the backward pass scales what is there. The work is that of an ordinary head, three products;
what is kept for the backward pass is the gradients of the hidden states and of the head, instead of the logits.

It is one operator, which compiled graphs call as it is: the time to compile does not grow with the number of chunks,
and no scheduler can move two chunks' logits beside each other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

NUM_CHUNKS = 8


def chunked_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    num_chunks: int = NUM_CHUNKS,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> torch.Tensor:
    """Compute ``F.cross_entropy(F.linear(hidden, weight, bias).float(), target)`` in chunks of tokens.

    The product is in the dtype of ``weight`` (under autocast, in autocast's), softmax and loss are in float32, or in
    float64 where ``hidden`` is. Gradients of the head are added up over the chunks in the dtype of the product.

    Args:
        hidden: [..., d], the input of the head.
        weight: [V, d], the head.
        target: [...], int64, a class or ``ignore_index`` for each row of ``hidden``.
        bias: [V], or None.
        num_chunks: of about equal numbers of tokens.
        ignore_index: the class of rows that the loss leaves out.
        label_smoothing: the share of the uniform distribution in each target, as in `F.cross_entropy`.
        reduction: ``"mean"`` over the rows that count, or ``"sum"``.

    Returns:
        The loss, a scalar. It has no second derivative.

    Raises:
        ValueError: a shape or a setting is not as above; or ``weight`` is a DTensor, whose rows are not all here.
    """
    if hidden.shape[:-1] != target.shape:
        raise ValueError(
            f"target has the shape {tuple(target.shape)}: it must be {tuple(hidden.shape[:-1])}, one class for each row"
        )
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(f"weight has the shape {tuple(weight.shape)}: it must be [V, {hidden.shape[-1]}]")
    if num_chunks < 1:
        raise ValueError(f"num_chunks is {num_chunks}: it must be at least 1")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing is {label_smoothing}: it must be from 0 to 1")
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction is {reduction!r}: it must be 'mean' or 'sum'")
    if hasattr(weight, "device_mesh"):
        raise ValueError(
            "weight is a DTensor: shard the head in one group with the model that calls it, or leave it whole"
        )
    dtype = weight.dtype
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
    rows = hidden.reshape(-1, hidden.shape[-1]).to(dtype)
    classes = target.reshape(-1)
    total, *_ = _operator(
        rows,
        weight.to(dtype),
        None if bias is None else bias.to(dtype),
        classes,
        num_chunks,
        ignore_index,
        label_smoothing,
    )
    return total / (classes != ignore_index).sum() if reduction == "mean" else total


def _in_chunks(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    num_chunks: int,
    ignore_index: int,
    label_smoothing: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute the sum of the losses, and its gradients by hidden [N, d], weight [V, d] and bias [V]."""
    total = hidden.new_zeros((), dtype=_dtype_of_loss(hidden))
    d_hidden, d_weight = torch.zeros_like(hidden), torch.zeros_like(weight)
    d_bias = weight.new_zeros(len(weight) if bias is not None else 0)
    for rows, classes, slot in zip(
        hidden.chunk(num_chunks), target.chunk(num_chunks), d_hidden.chunk(num_chunks), strict=True
    ):
        counts = classes != ignore_index
        classes = torch.where(counts, classes, 0)[:, None]
        logits = F.linear(rows, weight, bias).to(total.dtype)
        log_sum = logits.logsumexp(-1, keepdim=True)
        losses = (log_sum - logits.gather(1, classes)) * (1 - label_smoothing)
        if label_smoothing:
            losses += (log_sum - logits.mean(-1, keepdim=True)) * label_smoothing
        total += torch.where(counts[:, None], losses, 0).sum()
        d_logits = logits.sub_(log_sum).exp_()  # the softmax, in the memory of the logits
        d_logits.scatter_add_(1, classes, d_logits.new_full(classes.shape, label_smoothing - 1))
        if label_smoothing:
            d_logits -= label_smoothing / len(weight)
        d_logits = d_logits.masked_fill_(~counts[:, None], 0).to(weight.dtype)
        torch.mm(d_logits, weight, out=slot)
        d_weight.addmm_(d_logits.mT, rows)
        if bias is not None:
            d_bias += d_logits.sum(0)
    return total, d_hidden, d_weight, d_bias


_operator = torch.library.custom_op("oasis_fx::chunked_cross_entropy", _in_chunks, mutates_args=())


@_operator.register_fake
def _(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *_: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    total = hidden.new_empty((), dtype=_dtype_of_loss(hidden))
    d_bias = weight.new_empty(len(weight) if bias is not None else 0)
    return total, torch.empty_like(hidden), torch.empty_like(weight), d_bias


def _dtype_of_loss(hidden: torch.Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype is torch.float64 else torch.float32


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    _, d_hidden, d_weight, d_bias = output
    ctx.has_bias = inputs[2] is not None
    ctx.save_for_backward(d_hidden, d_weight, d_bias)
    ctx.mark_non_differentiable(d_hidden, d_weight, d_bias)


def _scale(ctx: Any, gradient: torch.Tensor, *_: Any) -> tuple[Any, ...]:
    d_hidden, d_weight, d_bias = ctx.saved_tensors
    needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]

    def scaled(found: torch.Tensor, needed: bool) -> torch.Tensor | None:
        return found * gradient.to(found.dtype) if needed else None

    return (
        scaled(d_hidden, needs_hidden),
        scaled(d_weight, needs_weight),
        scaled(d_bias, needs_bias) if ctx.has_bias else None,
        *[None] * 4,
    )


_operator.register_autograd(_scale, setup_context=_keep)
