"""The models of docs/coverage.md: small random configurations of real architectures, built offline."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

Model = tuple[torch.nn.Module, Mapping[str, Any]]

DEFAULT_RANK = 8


@dataclass(frozen=True)
class Entry:
    """A model of the matrix.

    Attributes:
        name: row of the table.
        make: returns the model and the keyword arguments of its forward pass.
        left: globs over the names of weights that must stay dense, beside output heads and embeddings; every
            other weight of two or more dimensions must be rewritten.
        dtype: of the model; float64 makes differences of one rounding visible.
        tolerance: of low-rank gradients, relative to the largest entry.
        config: settings of `torch._dynamo.config`.
        alike: the graph that Inductor makes of it has nothing that another model's has not: aot_eager's is enough.
    """

    name: str
    make: Callable[[], Model]
    left: tuple[str, ...] = ()
    dtype: torch.dtype = torch.float64
    tolerance: float = 1e-12
    config: Mapping[str, Any] = field(default_factory=dict)
    alike: bool = False


ENTRIES: list[Entry] = []


def entry(name: str, **facts: Any) -> Callable[[Callable[[], Model]], Callable[[], Model]]:
    """Put a factory into the matrix."""

    def register(make: Callable[[], Model]) -> Callable[[], Model]:
        ENTRIES.append(Entry(name, make, **facts))
        return make

    return register


def load_all() -> list[Entry]:
    """Every entry, in the order of the table."""
    if not ENTRIES:
        for module in ("transformers_text", "transformers_other", "vision", "plain_torch", "adapters"):
            importlib.import_module(f"zoo_{module}")
    return ENTRIES


def tokens(batch: int = 2, length: int = 8, vocabulary: int = 64) -> torch.Tensor:
    return torch.randint(0, vocabulary, (batch, length), generator=torch.Generator().manual_seed(0))


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def causal_lm(family: str, **config: Any) -> Model:
    """A decoder of ``transformers`` by the name of its family, with a batch of tokens."""
    transformers = pytest.importorskip("transformers")
    config = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "pad_token_id": 0, "use_cache": False, **config,
    }  # fmt: skip
    made = getattr(transformers, f"{family}Config")(**config)
    return getattr(transformers, f"{family}ForCausalLM")(made), {"input_ids": tokens()}
