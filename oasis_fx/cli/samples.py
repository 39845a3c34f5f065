"""Small models to try the commands on: ``oasis-fx explain tiny_llama``, ``oasis-fx print mlp``."""

from __future__ import annotations

from typing import Any

import torch


def mlp() -> tuple[torch.nn.Module, torch.Tensor]:
    """Return a network of two layers, and a batch of 128."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 10))
    return model, torch.randn(128, 64)


def tiny_llama() -> tuple[torch.nn.Module, dict[str, Any]]:
    """Return a Llama of two blocks with random weights, and a batch of 4 x 256 tokens as keyword arguments.

    Raises:
        ValueError: transformers is not installed.
    """
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError as error:
        raise ValueError("tiny_llama needs transformers: pip install transformers") from error

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256, intermediate_size=704, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=1024, use_cache=False,
    )  # fmt: skip
    tokens = torch.randint(0, 1024, (4, 256))
    return LlamaForCausalLM(config), {"input_ids": tokens, "labels": tokens}


SAMPLES = {"mlp": mlp, "tiny_llama": tiny_llama}
