"""The engine torchtitan: its own trainer trains its own models in subspaces, by a change of the configuration.

    from torchtitan.models.llama3.config_registry import llama3_debugmodel

    def llama3_oasis():                                   # in a module of yours: --module MODULE --config llama3_oasis
        return with_oasis(llama3_debugmodel(), rank=32)

Nothing of torchtitan is replaced or copied. The model's `parallelize_fn` compiles the blocks, `OptimizersContainer`,
`CheckpointManager` and `MetricsProcessor` are extended as their docstrings say they may be, and the trainer stays as it
is. Made for torchtitan 0.3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torchtitan.components.checkpointer import CheckpointManager
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.components.optimizer import OptimizersContainer
from torchtitan.components.optimizer.utils import (
    get_flat_optim_state_dict,
    init_optim_state,
    load_flat_optim_state_dict,
)
from torchtitan.tools.logging import logger
from torchtitan.trainer import Trainer

from oasis_fx.backend import OasisBackend, oasis_backend
from oasis_fx.distributed import prepare
from oasis_fx.integrations.flat_states import nested_states, template_of
from oasis_fx.runtime.optim.adamw import OasisAdamW
from oasis_fx.runtime.optim.base import SubspaceOptimizer
from oasis_fx.runtime.optim.lion import OasisLion
from oasis_fx.runtime.optim.sgd import OasisSGD
from oasis_fx.settings import Rank

OPTIMIZERS: Mapping[str, type[SubspaceOptimizer]] = {
    "OasisAdamW": OasisAdamW,
    "OasisLion": OasisLion,
    "OasisSGD": OasisSGD,
}

# The others annotate weights for FSDP2 as DTensors of a whole mesh, which takes a newer torch than 2.13.
SPMD_BACKEND = "partial_dtensor"

_MEANS = ("oasis/mean/captured_energy", "oasis/mean/drift")

# What compiles the blocks of a model: the trainer hands its metrics the model, and knows nothing of a backend.
_backends: WeakKeyDictionary[torch.nn.Module, OasisBackend] = WeakKeyDictionary()


def with_oasis(
    config: Trainer.Config,
    rank: Rank = 32,
    *,
    optimizer: str = "OasisAdamW",
    **settings: Any,
) -> Trainer.Config:
    """Return a configuration of torchtitan's trainer under which each block of the model is trained in subspaces.

    What the given configuration says of learning rates, weight decay, parallelism, batches, checkpoints and metrics
    holds. It is changed in five places: ``compile`` is enabled for the model, whose ``parallelize_fn`` then compiles
    each block with a backend of ours; ``parallelism.spmd_backend`` becomes "partial_dtensor"; ``optimizer`` becomes an
    `OasisOptimizers.Config`, whose groups of Adam and AdamW are stepped by one of our optimizers; ``checkpoint``
    becomes an `OasisCheckpoints.Config`, and ``metrics`` an `OasisMetrics.Config`.

    Args:
        config: as a function of a model's ``config_registry`` returns it, with a decoder whose blocks are its
            ``layers``. It is not changed.
        rank: as in `oasis_backend`.
        optimizer: the optimizer of ours that takes the place of Adam and AdamW: a key of `OPTIMIZERS`.
        settings: further arguments of `oasis_backend`.

    Raises:
        ValueError: ``optimizer`` is no such name; ``config`` has no model, a degree of tensor, context or expert
            parallelism over 1, or a section of checkpoints, optimizers or metrics that is not torchtitan's own; or a
            setting has a value that `oasis_backend` refuses.
    """
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"optimizer is {optimizer!r}: it must be one of {', '.join(OPTIMIZERS)}")
    if config.model_spec is None:
        raise ValueError("config.model_spec is None: a configuration of a model's config_registry is needed")
    for name, kind in (
        ("checkpoint", CheckpointManager),
        ("optimizer", OptimizersContainer),
        ("metrics", MetricsProcessor),
    ):
        if type(getattr(config, name)) is not kind.Config:
            raise ValueError(
                f"config.{name} is a {type(getattr(config, name)).__qualname__}: it must be {kind.__name__}.Config"
            )
    parallelism = replace(config.parallelism, spmd_backend=SPMD_BACKEND)
    _check_parallelism(parallelism)
    backend = oasis_backend(rank, **settings)
    spec = config.model_spec
    groups = [
        replace(group, optimizer_name=optimizer) if group.optimizer_name in ("Adam", "AdamW") else group
        for group in config.optimizer.param_groups
    ]
    components = dict.fromkeys([*config.compile.components, "model"])
    return replace(
        config,
        model_spec=replace(spec, parallelize_fn=partial(_parallelize, spec.parallelize_fn, backend)),
        parallelism=parallelism,
        compile=replace(config.compile, enable=True, components=list(components)),
        optimizer=OasisOptimizers.Config(**{**_fields(config.optimizer), "param_groups": groups}),
        checkpoint=OasisCheckpoints.Config(**_fields(config.checkpoint)),
        metrics=OasisMetrics.Config(**_fields(config.metrics)),
    )


def _fields(config: Any) -> dict[str, Any]:
    return {name: getattr(config, name) for name in config.__dataclass_fields__ if not name.startswith("_")}


def _check_parallelism(parallelism: Any) -> None:
    for name in ("tensor_parallel_degree", "context_parallel_degree", "expert_parallel_degree"):
        degree = getattr(parallelism, name)
        if degree > 1:
            raise ValueError(
                f"parallelism.{name} is {degree}: oasis_fx trains under FSDP2 and HSDP (data_parallel_shard_degree, "
                "data_parallel_replicate_degree) here; leave it 1"
            )
    if parallelism.spmd_backend != SPMD_BACKEND:
        raise ValueError(
            f"parallelism.spmd_backend is {parallelism.spmd_backend!r}: it must be {SPMD_BACKEND!r}, under which FSDP2 "
            "is given plain weights"
        )


def _parallelize(
    stock: Callable[..., torch.nn.Module],
    backend: OasisBackend,
    model: torch.nn.Module,
    *,
    compile_config: Any,
    parallelism: Any,
    **others: Any,
) -> torch.nn.Module:
    """Do what the model's own ``parallelize_fn`` does, and have its blocks compiled by ``backend``.

    torchtitan's compile section takes any registered backend for a model without FlexAttention and refuses all but two
    with it. Nothing has been traced when this returns: the later call of `Module.compile` is the one that counts.

    Raises:
        ValueError: the model is not to be compiled, after the command line had its say, or is parallel in a way that
            does not go together with subspaces.
    """
    _check_parallelism(parallelism)
    if not (compile_config.enable and "model" in compile_config.components):
        raise ValueError(
            f"compile.enable is {compile_config.enable} and compile.components is {compile_config.components}: "
            "oasis_fx is a backend of torch.compile, and needs compile.enable and 'model' among the components"
        )
    model = stock(model, compile_config=compile_config, parallelism=parallelism, **others)
    for block in model.layers.children():  # type: ignore[union-attr]
        block.compile(backend=backend, fullgraph=True)
    _backends[model] = backend
    return model


class OasisOptimizers(OptimizersContainer):
    """A container of optimizers of torchtitan's, with ours among them: `OPTIMIZERS` says by which names.

    It calls `oasis_fx.distributed.prepare` for each part of the model, so that low-rank gradients travel as such.
    Groups of torch's own optimizers may stand beside ours, for embeddings say, if their weights are in no subspace.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(OptimizersContainer.Config):
        """The configuration of torchtitan; ``implementation`` holds for torch's own optimizers alone."""

    # The container is an optimizer of torch's too: its step would have all gradients made dense before ours ran.
    takes_low_rank_gradients = True

    def __init__(self, config: Config, *, model_parts: list[torch.nn.Module]) -> None:
        self._expected: Mapping[str, Any] | None = None
        self.syncs = [prepare(part) for part in model_parts]
        super().__init__(config, model_parts=model_parts)

    @staticmethod
    def _resolve_optimizer_factory(name: str) -> Callable[..., torch.optim.Optimizer]:
        return OPTIMIZERS[name] if name in OPTIMIZERS else OptimizersContainer._resolve_optimizer_factory(name)

    @staticmethod
    def _build_param_groups(
        model: torch.nn.Module, param_group_configs: Sequence[Any], impl_kwargs: dict[str, Any]
    ) -> Any:
        """Leave ``fused`` and ``foreach`` out of our groups: our steps have one implementation for each device."""
        groups, patterns = OptimizersContainer._build_param_groups(model, list(param_group_configs), impl_kwargs)
        chosen = {config.pattern: config.optimizer_kwargs for config in param_group_configs}
        for name in OPTIMIZERS.keys() & groups.keys():
            for group, pattern in zip(groups[name], patterns[name], strict=True):
                for key in impl_kwargs.keys() - chosen[pattern].keys():
                    del group[key]
        return groups, patterns

    def expect(self, entries: Mapping[str, Any] | None) -> None:
        """Name what the checkpoint that is about to be loaded has of optimizers: nothing else knows their shapes.

        Args:
            entries: metadata of `torch.distributed.checkpoint` by the keys of `state_dict`; None once it is loaded.
        """
        self._expected = entries

    def state_dict(self) -> dict[str, Any]:
        """Return states and settings by names of weights, as torchtitan's container does; before loading, empty ones.

        The states of a weight in a subspace have the shapes of its basis, which exists once its graph is compiled. So
        what a checkpoint is loaded into has the shapes of the checkpoint.
        """
        found: dict[str, Any] = {}
        for optimizer in self.optimizers:
            if isinstance(optimizer, SubspaceOptimizer) and self._expected is not None:
                found.update(template_of(optimizer, self._expected))
            else:
                init_optim_state(optimizer)
                found.update(get_flat_optim_state_dict(optimizer))
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned, on any number of ranks.

        Raises:
            ValueError: a state does not fit its weight, or a setting of a group is missing; the message names it.
        """
        for optimizer in self.optimizers:
            if isinstance(optimizer, SubspaceOptimizer):
                optimizer.load_state_dict(nested_states(optimizer, state_dict))
            else:
                init_optim_state(optimizer)
                load_flat_optim_state_dict(optimizer, state_dict)


class OasisCheckpoints(CheckpointManager):
    """A manager of checkpoints of torchtitan's, which first tells the optimizers what a checkpoint holds."""

    @dataclass(kw_only=True, slots=True)
    class Config(CheckpointManager.Config):
        """The configuration of torchtitan, as it is."""

    def dcp_load(self, state_dict: dict[str, Any], checkpoint_id: str, from_hf: bool, from_quantized: bool) -> None:
        """Load a checkpoint into ``state_dict``, as torchtitan's own method does."""
        optimizers = state_dict.get("optimizer")
        if from_hf or not isinstance(optimizers, OasisOptimizers):
            super().dcp_load(state_dict, checkpoint_id, from_hf, from_quantized)
            return
        prefix = "optimizer."
        metadata = FileSystemReader(checkpoint_id).read_metadata().state_dict_metadata
        optimizers.expect({k.removeprefix(prefix): value for k, value in metadata.items() if k.startswith(prefix)})
        try:
            super().dcp_load(state_dict, checkpoint_id, from_hf, from_quantized)
        finally:
            optimizers.expect(None)


class OasisMetrics(MetricsProcessor):
    """The metrics of torchtitan, with the means of our subspaces beside them: what they capture, how far they move.

    They go wherever torchtitan's own go (TensorBoard, Weights & Biases) as ``oasis/mean/captured_energy``,
    ``oasis/mean/drift`` and ``oasis/mean/condition``, and have a line of their own on the console.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(MetricsProcessor.Config):
        """The configuration of torchtitan, as it is."""

    def log(
        self,
        step: int,
        global_avg_loss: float,
        global_max_loss: float,
        grad_norm: float,
        extra_metrics: dict[str, Any] | None = None,
    ) -> None:
        """Log a step, as torchtitan's own method does, with the means of the subspaces among the extra metrics."""
        means = self.means()
        super().log(step, global_avg_loss, global_max_loss, grad_norm, {**(extra_metrics or {}), **means})
        energy, drift = (means.get(name, math.nan) for name in _MEANS)
        logger.info(f"step: {step:2}  captured energy: {energy:.4f}  drift: {drift:.4f}")

    def means(self) -> dict[str, float]:
        """Return the means over all subspaces of the model, by the names that they are logged under."""
        backends = {_backends[part] for part in self.model_parts or () if part in _backends}
        flat = [backend.stats().flat() for backend in backends]
        return {key: value for found in flat for key, value in found.items() if key.startswith("oasis/mean/")}
