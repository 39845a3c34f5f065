"""The compilers that a graph is handed to, their settings and their caches."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import fx
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.backends.debugging import aot_eager, boxed_nop
from torch._dynamo.exc import RestartAnalysis, SkipFrame, Unsupported
from torch._functorch import config as functorch_config
from torch._functorch.compile_utils import fx_graph_cse
from torch._inductor.compile_fx import compile_fx
from torch._inductor.custom_graph_pass import CustomPartitionerFn

__all__ = [
    "RESTARTS",
    "CustomPartitionerFn",
    "aot_eager_lowering",
    "caches_may_be_left_out",
    "compile_caches_disabled",
    "functorch_config",
    "fx_graph_cse",
    "inductor_lowering",
    "is_aot_compile",
    "leave_out_of_caches",
]

# How a backend tells Dynamo to trace anew, or to leave a frame alone: no failures.
RESTARTS = (RestartAnalysis, SkipFrame, Unsupported)


def aot_eager_lowering(
    gm: fx.GraphModule, example_inputs: Sequence[Any], partition_fn: Callable[..., Any] | None = None
) -> Callable[..., Any]:
    """Torch's ``aot_eager`` backend, which runs the two graphs node by node, with another partitioner."""
    if partition_fn is None:
        return aot_eager(gm, list(example_inputs))  # type: ignore[no-any-return]
    lowering = aot_autograd(
        fw_compiler=boxed_nop,
        bw_compiler=boxed_nop,
        partition_fn=partition_fn,
        keep_inference_input_mutations=True,
    )
    return lowering(gm, list(example_inputs))  # type: ignore[no-any-return]


def inductor_lowering(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    config_patches: dict[str, Any],
    inner_compile: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Inductor, all of it: AOTAutograd, its caches, joint passes, code generation (or ``inner_compile``)."""
    extra: dict[str, Any] = {} if inner_compile is None else {"inner_compile": inner_compile}
    return compile_fx(gm, list(example_inputs), config_patches=config_patches or None, **extra)  # type: ignore[return-value]


def is_aot_compile() -> bool:
    """Whether the compile in progress is of `torch.compile(...).aot_compile`, which saves code without its backend."""
    return bool(getattr(functorch_config, "bypass_autograd_cache_key", False))


@contextlib.contextmanager
def caches_may_be_left_out() -> Iterator[None]:
    """Within: `leave_out_of_caches` may be called."""
    with torch._inductor.config.patch(force_disable_caches=torch._inductor.config.force_disable_caches):
        yield


def leave_out_of_caches() -> None:
    """Save no result of the compile in progress: another process would take it without the warning that was given."""
    torch._inductor.config.force_disable_caches = True


@contextlib.contextmanager
def compile_caches_disabled() -> Iterator[None]:
    """Within: AOTAutograd traces again although its cache may hold the result."""
    with (
        functorch_config.patch(enable_autograd_cache=False),
        torch._inductor.config.patch(force_disable_caches=True),
    ):
        yield
