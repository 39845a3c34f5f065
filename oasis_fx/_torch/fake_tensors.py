"""Fake tensors: those of the compile in progress, and the modes that make them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch._guards import TracingContext
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

__all__ = [
    "FakeTensor",
    "FakeTensorMode",
    "is_traceable_wrapper_subclass",
    "known_fake",
    "tracing_fake_mode",
    "unguarded_fake_mode",
]


def tracing_fake_mode() -> FakeTensorMode | None:
    """The fake mode in which Dynamo traced the graph that is being compiled."""
    context = TracingContext.try_get()
    return None if context is None else context.fake_mode


def known_fake(given: Any) -> Any:
    """The fake value that the compile in progress has made of an input; other inputs (sizes) as they are."""
    mode = tracing_fake_mode()
    if mode is None or not isinstance(given, torch.Tensor) or isinstance(given, FakeTensor):
        return given
    return mode.from_tensor(given)  # remembered by the mode, with the symbolic sizes that Dynamo gave it


@contextlib.contextmanager
def unguarded_fake_mode(values: Iterable[Any]) -> Iterator[None]:
    """Enter the fake mode of the first fake tensor in ``values``; shape guards met within are not kept."""
    mode = next((v.fake_mode for v in values if isinstance(v, FakeTensor)), None)
    if mode is None:
        yield
        return
    quiet = mode.shape_env.suppress_guards() if mode.shape_env is not None else contextlib.nullcontext()
    with quiet, mode:
        yield
