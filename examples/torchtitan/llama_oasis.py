"""Configurations for torchtitan: its Llama debug model, trained in subspaces.

On GPUs, on text of a hub as torchtitan's own debug model:

    PYTHONPATH=examples/torchtitan torchrun --nproc-per-node 8 -m torchtitan.train --module llama_oasis --config debug

On CPUs, on the bytes of README.md:

    torchrun --nproc-per-node 2 examples/torchtitan/train_on_cpu.py --module llama_oasis --config debug_on_cpu
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from text_bytes import ByteLoader, ByteTokenizer
from torch.distributed.fsdp import FSDPModule
from torchtitan.models.common.attention import ScaledDotProductAttention
from torchtitan.models.llama3.config_registry import llama3_debugmodel
from torchtitan.trainer import Trainer

from oasis_fx.integrations.torchtitan import with_oasis

TEXT = Path(__file__).parents[2] / "README.md"


def debug() -> Trainer.Config:
    """torchtitan's debug model as it is, with bases of 32 of its 256 dimensions."""
    return with_oasis(llama3_debugmodel(), rank=32)


def debug_on_cpu() -> Trainer.Config:
    """The same with what a CPU can do: no FlexAttention, which has no backward pass there, and no CUDA graphs."""
    return with_oasis(stock_on_cpu(), rank=32)


def stock_on_cpu() -> Trainer.Config:
    """The debug model on a CPU, without us: what `debug_on_cpu` is compared with."""
    config = llama3_debugmodel()
    spec = config.model_spec
    assert spec is not None
    config.model_spec = replace(spec, parallelize_fn=partial(_parallelize_on_gloo, spec.parallelize_fn))
    for layer in config.model_spec.model.layers:
        layer.attention.inner_attention = ScaledDotProductAttention.Config()
    config.parallelism.spmd_backend = "partial_dtensor"  # the default needs torch 2.14
    config.tokenizer = ByteTokenizer.Config()
    config.dataloader = ByteLoader.Config(dataset_path=str(TEXT))
    config.training.local_batch_size, config.training.seq_len = 4, 128
    config.training.mixed_precision_param = "float32"
    config.training.disable_cuda_graphs = True
    config.activation_checkpoint = None
    config.compile.enable = True
    config.compile.components = ["model"]
    config.metrics.disable_color_printing = True
    return config


def _parallelize_on_gloo(stock: Any, model: torch.nn.Module, **arguments: Any) -> torch.nn.Module:
    """Have FSDP2 sum gradients: where it is told to divide them by 1, it asks for a sum that gloo does not have."""
    model = stock(model, **arguments)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)
    return model
