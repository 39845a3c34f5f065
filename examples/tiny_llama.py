"""A Llama of two blocks with random weights, for `oasis-fx explain tiny_llama`."""

from __future__ import annotations

import torch


def build() -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """Return the model and one batch, as keyword arguments."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256, intermediate_size=704, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=1024, use_cache=False,
    )  # fmt: skip
    tokens = torch.randint(0, 1024, (4, 256))
    return LlamaForCausalLM(config), {"input_ids": tokens, "labels": tokens}
