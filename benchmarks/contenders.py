"""What a user would choose between. Each prepares a model and its optimizer; the names combine a method and options.

eager                torch as it is, AdamW
stock                torch.compile, fused AdamW; all others are compiled too
  -recompute         ban_recompute_materialized_backward=False: exact, and free in many models
  -aggressive        aggressive_recomputation
  -budget0.3         activation_memory_budget=0.3
checkpoint           activation checkpointing of each block
lora32               peft, rank 32, on all linear layers of the blocks, the rest frozen
galore32, apollo32   of the packages galore-torch and apollo-torch, rank 32, on the same layers
adam8bit             torchao's AdamW8bit
oasis                ours, rank of --rank
  -budget0.3 -r64 -no-stats -recompute
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch._functorch import config as functorch_config

METHODS = ("eager", "stock", "checkpoint", "lora", "galore", "apollo", "adam8bit", "oasis")
_ALLOWED = f"{', '.join(METHODS)}, with options as in {__file__}"
_OPTIONS = {
    "stock": ("recompute", "aggressive", "budget"),
    "oasis": ("recompute", "budget", "r", "no-stats"),
}
# galore-torch computes an SVD of each gradient in its first step and every 200; its price is spread over them.
SVD_EVERY = {"galore": 200}


def parse(name: str) -> tuple[str, int | None, dict[str, float]]:
    """Method, rank in its name, and options.

    Raises:
        ValueError: no contender is called so.
    """
    head, *parts = re.split(r"-(?=recompute|aggressive|budget|r\d|no-stats)", name)
    match = re.fullmatch(r"(lora|galore|apollo)(\d+)|(eager|stock|checkpoint|adam8bit|oasis)", head)
    options: dict[str, float] = {}
    for part in parts:
        option = re.fullmatch(r"(recompute|aggressive|no-stats|budget|r)([\d.]*)", part)
        if option is None or option[1] not in _OPTIONS.get(head, ()):
            match = None
            break
        options[option[1]] = float(option[2] or 1)
    if match is None:
        raise ValueError(f"contender is {name!r}: it must be one of {_ALLOWED}")
    method = match[1] or match[3]
    return method, int(match[2]) if match[2] else None, options


def prepare(name: str, model: torch.nn.Module, rank: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """The model, compiled, and an optimizer over what it trains."""
    method, own_rank, options = parse(name)
    functorch_config.ban_recompute_materialized_backward = "recompute" not in options
    functorch_config.aggressive_recomputation = "aggressive" in options
    if method == "oasis":
        return _oasis(model, int(options.get("r", rank)), options)
    functorch_config.activation_memory_budget = options.get("budget", 1.0)
    if method == "checkpoint":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
    if method == "lora":
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=own_rank, target_modules=_names_of_linears(model), lora_dropout=0.0))
    if method != "eager":
        model.compile()
    trained = [p for p in model.parameters() if p.requires_grad]
    if method in ("galore", "apollo"):
        return model, _projected(method, own_rank or rank, model)
    if method == "adam8bit":
        from torchao.optim import AdamW8bit

        return model, AdamW8bit(trained, lr=1e-5)
    return model, torch.optim.AdamW(trained, lr=1e-5, fused=True)


def _oasis(
    model: torch.nn.Module, rank: int, options: dict[str, float]
) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    from oasis_fx import OasisAdamW, oasis_backend

    budget = options.get("budget", 1.0)
    model.compile(backend=oasis_backend(rank=rank, memory_budget=budget, stats="no-stats" not in options))
    return model, OasisAdamW(model.parameters(), lr=1e-5)


def _projected(method: str, rank: int, model: torch.nn.Module) -> torch.optim.Optimizer:
    low = block_weights(model)
    others = [p for p in model.parameters() if all(p is not w for w in low)]
    if method == "galore":
        from galore_torch import GaLoreAdamW

        setting = {"rank": rank, "update_proj_gap": SVD_EVERY["galore"], "scale": 0.25, "proj_type": "std"}
        return GaLoreAdamW([{"params": others}, {"params": low, **setting}], lr=1e-5, no_deprecation_warning=True)
    from apollo_torch import APOLLOAdamW

    setting = {"rank": rank, "proj": "random", "scale_type": "channel", "scale": 1, "update_proj_gap": 200}
    return APOLLOAdamW([{"params": others}, {"params": low, **setting, "proj_type": "std"}], lr=1e-5)


def block_weights(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """The weights of the linear layers in the blocks: what oasis_fx rewrites."""
    return [p for name, p in model.named_parameters() if p.dim() == 2 and _is_in_block(name)]


def _is_in_block(name: str) -> bool:
    return re.search(r"\.(layers|h|layer)\.\d+\.", name) is not None


def _names_of_linears(model: torch.nn.Module) -> list[str]:
    from transformers.pytorch_utils import Conv1D

    kinds = (torch.nn.Linear, Conv1D)
    return sorted(
        {n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, kinds) and _is_in_block(n + ".")}
    )


def state_bytes(optimizer: torch.optim.Optimizer, parameters: list[torch.nn.Parameter]) -> int:
    """Bytes of an optimizer's state for some parameters, each storage once; quantised ones as they are stored."""
    storages: dict[Any, int] = {}
    for parameter in parameters:
        for tensor in _tensors(optimizer.state.get(parameter, {})):
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _tensors(found: Any, depth: int = 0) -> list[torch.Tensor]:
    if isinstance(found, torch.Tensor):
        inner = getattr(found, "__tensor_flatten__", None)
        return [getattr(found, name) for name in inner()[0]] if inner is not None else [found]
    if isinstance(found, dict):
        return [tensor for item in found.values() for tensor in _tensors(item, depth)]
    # The projectors of GaLore and APOLLO are objects with a matrix in them.
    return _tensors(vars(found), depth + 1) if hasattr(found, "__dict__") and depth < 2 else []
