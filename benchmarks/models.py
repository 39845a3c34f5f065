"""The models that are measured, with random weights: times and sizes do not depend on them."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import torch

NAMES = "smollm2, gpt2, vit-b, llama-1b, llama-8b (its blocks, --layers of them), or WIDTHxLAYERS for a Llama"


def build(args: Namespace) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """A model in training on ``args.device`` in ``args.dtype``, and a batch as keyword arguments, labels among them."""
    from transformers import (
        GPT2Config,
        GPT2LMHeadModel,
        LlamaConfig,
        LlamaForCausalLM,
        ViTConfig,
        ViTForImageClassification,
    )

    torch.manual_seed(0)
    with torch.device(args.device):
        if args.model == "gpt2":
            model: Any = GPT2LMHeadModel(GPT2Config(use_cache=False, n_layer=args.layers or 12))
        elif args.model == "vit-b":
            model = ViTForImageClassification(ViTConfig(num_labels=1000, num_hidden_layers=args.layers or 12))
        else:
            model = LlamaForCausalLM(LlamaConfig(**llama(args), use_cache=False))
    model = model.to(getattr(torch, args.dtype)).train()
    if args.model == "vit-b":
        pixels = torch.randn(args.batch, 3, 224, 224, device=args.device, dtype=getattr(torch, args.dtype))
        return model, {"pixel_values": pixels, "labels": torch.randint(0, 1000, (args.batch,), device=args.device)}
    tokens = torch.randint(0, model.config.vocab_size, (args.batch, args.seq), device=args.device)
    return model, {"input_ids": tokens, "labels": tokens}


def llama(args: Namespace) -> dict[str, Any]:
    """Settings of a LlamaConfig."""
    known = {
        "smollm2": (576, 1536, 30, 9, 3, 49152),  # the demo's model
        "llama-1b": (2048, 8192, 16, 32, 8, 128256),
        "llama-8b": (4096, 14336, 32, 32, 8, 128256),
    }
    if args.model in known:
        width, inner, layers, heads, kv_heads, vocabulary = known[args.model]
        layers, vocabulary = args.layers or layers, args.vocabulary or vocabulary
    else:
        width, layers = map(int, args.model.split("x"))
        inner, heads, kv_heads, vocabulary = width * 11 // 4, width // 64, width // 64, args.vocabulary or 1024
    return {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "tie_word_embeddings": args.model in ("smollm2", "llama-1b"),
        "max_position_embeddings": max(2048, args.seq),
    }
