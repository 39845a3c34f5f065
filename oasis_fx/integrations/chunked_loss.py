"""The chunked cross-entropy in causal language models of Hugging Face's transformers.

Where the model trains and is given labels, its head hands on what it was given, and the loss is made of that and of the
head's weight (`oasis_fx.chunked_loss`). Everything else that the model's `forward` does, and everything that it does
where it evaluates or generates, stays as it is.
"""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch.nn import functional as F

from oasis_fx.chunked_loss import NUM_CHUNKS, chunked_cross_entropy
from oasis_fx.errors import warn_user

_PROBE_SCALE = 1e3  # a soft cap of logits hardly changes small ones, and changes large ones much


def chunk_loss(
    model: torch.nn.Module, *, num_chunks: int = NUM_CHUNKS, label_smoothing: float = 0.0
) -> torch.nn.Module:
    """Let a causal language model of transformers compute its loss in chunks of tokens while it trains, in place.

    The loss is the model's own: labels are shifted, -100 is left out, ``num_items_in_batch`` divides the sum where it
    is given. The logits of a training step are never whole, and its output has None in their place.

    Args:
        model: such as `LlamaForCausalLM`, or a `PeftModel` of one; not compiled yet. One forward pass over eight tokens
            is run, to see that the loss is computed from the product of the head alone.
        num_chunks: of about equal numbers of tokens.
        label_smoothing: as in `torch.nn.functional.cross_entropy`; for evaluation too, as `Trainer` has it.

    Returns:
        ``model``. Names of weights, saving and loading are as before.

    Raises:
        ValueError: the model has no linear head, is chunked already, has another loss than ForCausalLMLoss, or changes
            its logits between head and loss, as soft caps and scales do. The model is then as it was.
    """
    causal: Any = model
    if hasattr(model, "get_base_model"):  # of a PeftModel
        causal = model.get_base_model()  # type: ignore[operator]  # it is a method
    head: Any = causal.get_output_embeddings() if hasattr(causal, "get_output_embeddings") else None
    if "_chunking" in vars(causal):
        raise ValueError(f"the loss of {type(causal).__name__} is chunked already")
    if type(head) is not torch.nn.Linear:
        _refuse(causal, f"its head is {type(head).__name__}, and has to be nn.Linear")
    from transformers.loss.loss_utils import ForCausalLMLoss

    if getattr(causal, "loss_function", None) is not ForCausalLMLoss:
        _refuse(causal, "its loss is not the cross-entropy of the next token, ForCausalLMLoss")
    _probe(causal, head)
    chunking = _Chunking(num_chunks, label_smoothing)
    causal._chunking = chunking
    head._chunking = chunking  # type: ignore[assignment]  # an attribute that is no tensor
    # Classes are changed, not methods of the instances, so that a deep copy of the model calls the copy.
    causal.__class__ = _chunked(type(causal))  # type: ignore[arg-type]  # a class is hashable
    head.__class__ = _Head
    return model


@dataclass
class _Chunking:
    """What a model and its head share: settings, and whether a forward pass that trains on labels is under way."""

    num_chunks: int
    label_smoothing: float
    active: bool = False


class _Head(torch.nn.Linear):
    _chunking: _Chunking

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return input if self._chunking.active else super().forward(input)


@functools.cache
def _chunked(kind: type[Any]) -> type[Any]:
    """Derive from a class of models one of the same name whose loss is chunked."""
    position = list(inspect.signature(kind.forward).parameters).index("labels") - 1  # without self

    @functools.wraps(kind.forward)  # `Trainer` reads its signature
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        labels = args[position] if len(args) > position else kwargs.get("labels")
        if not self.training or labels is None:
            if self.training and torch.is_grad_enabled():
                _warn_without_labels(kind.__name__)
            return kind.forward(self, *args, **kwargs)
        self._chunking.active = True
        try:
            outputs = kind.forward(self, *args, **kwargs)
        finally:
            self._chunking.active = False
        if isinstance(outputs, tuple):
            return outputs[0], None, *outputs[2:]
        outputs["logits"] = None
        return outputs

    return type(kind.__name__, (kind,), {"forward": forward, "loss_function": _loss, "__module__": kind.__module__})


def _loss(
    self: Any,
    logits: torch.Tensor,
    labels: torch.Tensor,
    vocab_size: int,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: torch.Tensor | None = None,
    **_: Any,
) -> torch.Tensor:
    """Compute ForCausalLMLoss: of hidden states where the head handed them on as ``logits``, else of logits."""
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    shift_labels = shift_labels.to(logits.device)
    settings: dict[str, Any] = {
        "ignore_index": ignore_index,
        "label_smoothing": self._chunking.label_smoothing,
        "reduction": "mean" if num_items_in_batch is None else "sum",
    }
    if self._chunking.active:
        head = self.get_output_embeddings()
        chunks = self._chunking.num_chunks
        loss = chunked_cross_entropy(logits, head.weight, shift_labels, head.bias, num_chunks=chunks, **settings)
    else:
        loss = F.cross_entropy(logits.float().view(-1, vocab_size), shift_labels.reshape(-1), **settings)
    if num_items_in_batch is None:
        return loss
    if isinstance(num_items_in_batch, torch.Tensor):
        num_items_in_batch = num_items_in_batch.to(loss.device)
    return loss / num_items_in_batch


def _refuse(model: torch.nn.Module, reason: str) -> NoReturn:
    raise ValueError(f"the loss of {type(model).__name__} cannot be chunked: {reason}")


_warned_without_labels: set[str] = set()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # Dynamo calls it as it compiles
def _warn_without_labels(name: str) -> bool:
    if name not in _warned_without_labels:
        _warned_without_labels.add(name)
        warn_user(
            f"{name} trains without labels, so that its chunked loss has no effect: give the model its labels, and "
            "leave the loss to it (no compute_loss_func)"
        )
    return True  # Dynamo takes no None for a constant


def _probe(model: Any, head: torch.nn.Linear) -> None:
    """See that what the head returns is what the loss is given, bit for bit, on large numbers.

    Raises:
        ValueError: it is not.
    """
    returned: list[torch.Tensor] = []
    given: list[torch.Tensor] = []

    def enlarge(_: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        returned.append(output * _PROBE_SCALE)
        return returned[-1]

    def see(logits: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        given.append(logits)
        return logits.new_zeros(())

    ids = torch.arange(8, device=head.weight.device)[None] % head.out_features
    training = {module: module.training for module in model.modules()}
    hook = head.register_forward_hook(enlarge)
    model.loss_function = see
    try:
        with torch.no_grad():
            model.eval()(input_ids=ids, labels=ids, use_cache=False)
    finally:
        hook.remove()
        del model._loss_function
        for module, mode in training.items():
            module.training = mode
    if len(returned) != 1 or len(given) != 1 or not torch.equal(returned[0].float(), given[0].float()):
        _refuse(model, "its loss is not computed from the product of its head alone, but from capped or scaled logits")
