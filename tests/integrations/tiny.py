"""A small causal language model and tokens to learn, for every integration."""

from __future__ import annotations

import torch

VOCABULARY, LENGTH = 32, 16


def model(seed: int = 0) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=VOCABULARY,
        use_cache=False,
        max_position_embeddings=LENGTH,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return LlamaForCausalLM(config)


def examples(count: int, seed: int = 0) -> list[dict[str, list[int]]]:
    """Rows that count upwards from a random start."""
    starts = torch.randint(VOCABULARY, (count, 1), generator=torch.Generator().manual_seed(seed))
    rows = ((starts + torch.arange(LENGTH)) % VOCABULARY).tolist()
    return [{"input_ids": row, "labels": row, "attention_mask": [1] * LENGTH} for row in rows]
