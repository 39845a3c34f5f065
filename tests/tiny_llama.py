"""The Llama that tests stand on where any transformer would do."""

from __future__ import annotations

from typing import Any

import torch

VOCABULARY = 64


def llama(**changes: Any) -> torch.nn.Module:
    """Make a Llama of two blocks, width 32 and grouped heads; ``changes`` are settings of its LlamaConfig."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": VOCABULARY, "use_cache": False,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**(settings | changes)))
