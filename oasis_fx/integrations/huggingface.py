"""Hugging Face: what `transformers.Trainer`, and TRL's trainers after it, have to be given.

    arguments = TrainingArguments("out", learning_rate=1e-4, bf16=True)
    trainer = Trainer(model=model, args=arguments, train_dataset=data, **oasis_trainer(model, arguments, rank=32))

The model is compiled in place: names of weights, saving, `load_best_model_at_end` and resuming are as without us. Under
torchrun its gradients are averaged by `oasis_fx.distributed`, beside the DistributedDataParallel that `Trainer` makes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import TrainerCallback, TrainingArguments

from oasis_fx.backend import OasisBackend, oasis_backend
from oasis_fx.distributed import prepare
from oasis_fx.runtime.optim.adamw import OasisAdamW
from oasis_fx.settings import Rank


def oasis_trainer(
    model: torch.nn.Module,
    args: TrainingArguments,
    rank: Rank = 32,
    *,
    optimizer: type[torch.optim.Optimizer] = OasisAdamW,
    optimizer_options: dict[str, Any] | None = None,
    callbacks: Sequence[TrainerCallback | type[TrainerCallback]] = (),
    **settings: Any,
) -> dict[str, Any]:
    """Compile ``model`` in place for training in subspaces, and return keyword arguments for its `Trainer`.

    Args:
        model: of any kind that `Trainer` takes; its `forward` is compiled, also for evaluation.
        args: where learning rate, betas, epsilon and weight decay are taken from; ``optim`` is ignored.
        rank: as in `oasis_backend`.
        optimizer: the class of one of our optimizers.
        optimizer_options: further arguments of it, such as ``{"state_bits": 8}``, which override those of ``args``.
        callbacks: of your own, for the trainer; `Trainer` takes one list of them, which ours has to be in.
        settings: further arguments of `oasis_backend`.

    Returns:
        ``optimizer_cls_and_kwargs``, and ``callbacks`` with an `OasisCallback` and those given, in order.

    Raises:
        ValueError: ``args`` asks for what does not go together with this: ``torch_compile``, DeepSpeed, FSDP, several
            GPUs in one process; or a setting has a value that `oasis_backend` refuses.
    """
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
    options: dict[str, Any] = {"lr": args.learning_rate}
    if optimizer is OasisAdamW:
        options |= {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    backend = oasis_backend(rank, **settings)
    _ = args.device  # makes the process group, where there is one
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        prepare(model)
    model.compile(backend=backend)
    return {
        "optimizer_cls_and_kwargs": (optimizer, options | (optimizer_options or {})),
        "callbacks": [OasisCallback(backend), *callbacks],
    }


class OasisCallback(TrainerCallback):
    """A callback that adds the means of `OasisBackend.stats` to `trainer.state.log_history`, as ``oasis/mean/...``.

    Attributes:
        backend: the backend of the model, for its `report()` and the whole of its `stats()`.
    """

    def __init__(self, backend: OasisBackend) -> None:
        self.backend = backend

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add the means to the latest entry of the log, where that has a loss."""
        if state.log_history and "loss" in state.log_history[-1]:
            found = self.backend.stats().flat()
            state.log_history[-1].update({k: v for k, v in found.items() if k.startswith("oasis/mean/")})
