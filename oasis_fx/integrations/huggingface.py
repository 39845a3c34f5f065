"""Hugging Face: what `transformers.Trainer`, and TRL's trainers after it, have to be given.

    arguments = TrainingArguments("out", learning_rate=1e-4, bf16=True)
    trainer = Trainer(model=model, args=arguments, train_dataset=data, **oasis_trainer(model, arguments, rank=32))

TRL's trainers of preferences and rewards are given to it by their class: ``oasis_trainer(..., trainer=DPOTrainer)``.

The model is compiled in place: names of weights, saving, `load_best_model_at_end` and resuming are as without us. Under
torchrun its gradients are averaged by `oasis_fx.distributed`, beside the DistributedDataParallel that `Trainer` makes.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from oasis_fx.backend import OasisBackend, oasis_backend
from oasis_fx.distributed import prepare
from oasis_fx.errors import warn_user
from oasis_fx.integrations.chunked_loss import chunk_loss
from oasis_fx.runtime.optim.adamw import OasisAdamW
from oasis_fx.runtime.optim.base import SubspaceOptimizer
from oasis_fx.settings import Rank

_ORDINARY = ("adamw_torch", "adamw_torch_fused")  # what `TrainingArguments` has where nobody chose


def oasis_trainer(
    model: torch.nn.Module,
    args: TrainingArguments,
    rank: Rank = 32,
    *,
    optimizer: type[torch.optim.Optimizer] = OasisAdamW,
    optimizer_options: dict[str, Any] | None = None,
    callbacks: Sequence[TrainerCallback | type[TrainerCallback]] = (),
    trainer: type[Trainer] = Trainer,
    loss: str | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Compile ``model`` in place for training in subspaces, and return keyword arguments for its `Trainer`.

    Args:
        model: of any kind that `Trainer` takes; its `forward` is compiled, also for evaluation.
        args: where learning rate, betas, epsilon and weight decay are taken from; another ``optim`` than AdamW is
            warned of and not used.
        rank: as in `oasis_backend`.
        optimizer: the class of one of our optimizers.
        optimizer_options: further arguments of it, such as ``{"state_bits": 8}``, which override those of ``args``.
        callbacks: of your own, for the trainer; `Trainer` takes one list of them, which ours has to be in.
        trainer: the class that gets what this returns, such as TRL's ``DPOTrainer``, ``GRPOTrainer`` or ``KTOTrainer``.
        loss: ``"chunked"`` for a cross-entropy whose logits are never whole (`chunk_loss`), of a causal language model;
            it takes ``label_smoothing_factor`` over from ``args``, where 0 is left. None for the model's own.
        settings: further arguments of `oasis_backend`.

    Returns:
        ``callbacks`` with an `OasisCallback` and those given, in order; ``optimizer_cls_and_kwargs``, from which the
        trainer makes its optimizer. Where ``trainer`` takes no such argument: ``optimizers`` with an optimizer of the
        parameters that require gradients now, in the two groups that `Trainer` makes (no weight decay for biases and
        norms), and None, for which the trainer makes its scheduler.

    Raises:
        ValueError: ``optimizer`` is not the class of one of our optimizers; ``args`` asks for what does not go together
            with this: ``torch_compile``, DeepSpeed, FSDP, several GPUs in one process; a setting has a value that
            `oasis_backend` refuses; or the loss is to be chunked, and the model's cannot be (`chunk_loss`) or
            ``trainer`` computes a loss of its own.
    """
    _check_optimizer(optimizer)
    _check_loss(loss, trainer)
    if args.torch_compile:
        raise ValueError("torch_compile is True: leave it False, the model is compiled by oasis_trainer")
    for name in ("deepspeed", "fsdp"):
        if getattr(args, name, None):
            raise ValueError(f"{name} is {getattr(args, name)!r}: it cannot be combined with oasis_fx")
    if args.n_gpu > 1:  # `Trainer` would wrap the model in nn.DataParallel, whose copies have no parameters
        raise ValueError(
            f"n_gpu is {args.n_gpu}: several GPUs need a process each, torchrun --nproc-per-node {args.n_gpu}; "
            "or show one GPU only, with CUDA_VISIBLE_DEVICES"
        )
    asked = str(getattr(args.optim, "value", args.optim))
    if asked not in _ORDINARY:
        warn_user(
            f"optim is {asked!r} and is not used: {optimizer.__name__} steps this model. Leave optim out; for moments "
            "in eight bits give oasis_trainer optimizer_options={'state_bits': 8}"
        )
    options: dict[str, Any] = {"lr": args.learning_rate}
    if optimizer is OasisAdamW:
        options |= {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    backend = oasis_backend(rank, **settings)
    if loss == "chunked":
        chunk_loss(model, label_smoothing=args.label_smoothing_factor)
        args.label_smoothing_factor = 0.0  # `Trainer` would compute it from logits
    _ = args.device  # makes the process group, where there is one
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        prepare(model)
    model.compile(backend=backend)
    options |= optimizer_options or {}
    ours: dict[str, Any] = {"callbacks": _BeforeReporters([OasisCallback(backend), *callbacks])}
    if _takes(trainer, "optimizer_cls_and_kwargs"):
        return {"optimizer_cls_and_kwargs": (optimizer, options), **ours}
    return {"optimizers": (optimizer(_groups(model, args.weight_decay), **options), None), **ours}


def _check_optimizer(given: object) -> None:
    """Refuse what is no class of an optimizer of ours.

    Raises:
        ValueError: the message names ``given``, and what is allowed.
    """
    if not (isinstance(given, type) and issubclass(given, SubspaceOptimizer)):
        raise ValueError(
            f"optimizer is {given!r}: it must be the class of one of our optimizers, such as oasis_fx.OasisAdamW; "
            "for moments in eight bits add optimizer_options={'state_bits': 8}"
        )


def _check_loss(loss: str | None, trainer: type[Trainer]) -> None:
    """Refuse a loss that there is not, or that a trainer would not use.

    Raises:
        ValueError: the message names what was given, and what is allowed.
    """
    if loss not in (None, "chunked"):
        raise ValueError(f"loss is {loss!r}: it must be 'chunked', or None for the model's own")
    if loss is not None and trainer.compute_loss is not Trainer.compute_loss:
        raise ValueError(
            f"loss is {loss!r}: {trainer.__name__} computes a loss of its own and not the model's, so leave loss out"
        )


def _takes(trainer: type[Trainer], argument: str) -> bool:
    """Whether the constructor of a trainer has an argument, or hands all that it is given on."""
    parameters = inspect.signature(trainer.__init__).parameters
    return argument in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    decays = set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]  # it does not read itself
    named = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
    return [
        {"params": [weight for name, weight in named if name in decays], "weight_decay": weight_decay},
        {"params": [weight for name, weight in named if name not in decays], "weight_decay": 0.0},
    ]


class _BeforeReporters(list[Any]):
    """Callbacks that come before those that a trainer has by default, in ``defaults + callbacks``.

    `Trainer` calls callbacks in their order and its reporters (wandb, TensorBoard, trackio) are among its defaults:
    what one of ours adds to a log has to be there before they read it, and no other hook comes between.
    """

    def __radd__(self, defaults: list[Any]) -> list[Any]:
        return [*self[:1], *defaults, *self[1:]]


class OasisCallback(TrainerCallback):
    """A callback that adds the means of `OasisBackend.stats` to logs with a loss, as ``oasis/mean/...``.

    They are in `trainer.state.log_history`, and reach the callbacks that come after this one. What `oasis_trainer`
    returns puts it first, before the trainer's reporters (``report_to``: wandb, TensorBoard, trackio). Where its list
    was joined with another, as in ``[*ours["callbacks"], mine]``, it comes after them: give `oasis_trainer` yours.

    Attributes:
        backend: the backend of the model, for its `report()` and the whole of its `stats()`.
    """

    def __init__(self, backend: OasisBackend) -> None:
        self.backend = backend

    def on_train_begin(
        self,
        args: Any,
        state: Any,
        control: Any,
        model: torch.nn.Module | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        **kwargs: Any,
    ) -> None:
        """Refuse an optimizer that does not have every parameter that requires a gradient.

        Raises:
            ValueError: the message names one that it lacks, such as an adapter that was added after the optimizer.
        """
        if model is None or optimizer is None:
            return
        known = {id(weight) for group in optimizer.param_groups for weight in group["params"]}
        lacking = [name for name, w in model.named_parameters() if w.requires_grad and id(w) not in known]
        if lacking:
            raise ValueError(
                f"{len(lacking)} parameters require gradients and are not in the optimizer, the first is {lacking[0]}: "
                "add adapters and unfreeze weights before oasis_trainer, and give it that model"
            )

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Add the means to a log, and to the latest entry of the history, where that has a loss."""
        if state.log_history and "loss" in state.log_history[-1]:
            found = {k: v for k, v in self.backend.stats().flat().items() if k.startswith("oasis/mean/")}
            state.log_history[-1].update(found)
            if logs is not None:  # what reporters read; the history has a copy
                logs.update(found)
