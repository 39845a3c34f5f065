"""Low-rank adapters of peft on a frozen base, plain and quantised."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from zoo import Model, causal_lm, entry


def _with_lora(model: torch.nn.Module) -> Any:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights="gaussian")
    adapted = peft.get_peft_model(model, config)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)  # zero at first: A would get no gradient
    return adapted


@entry("LoRA of peft on Llama")
def lora() -> Model:
    model, inputs = causal_lm("Llama", num_key_value_heads=2)
    return _with_lora(model), inputs


@entry("LoRA of peft on Llama quantised by torchao (int8)", dtype=torch.float32, tolerance=1e-5)
def lora_int8() -> Model:
    quantization = pytest.importorskip("torchao.quantization")
    model, inputs = causal_lm("Llama", num_key_value_heads=2)
    is_linear = lambda module, name: isinstance(module, torch.nn.Linear) and "lm_head" not in name  # noqa: E731
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig(), is_linear)
    return _with_lora(model), inputs
