"""Optimizer states as named tensors and one text: for safetensors, and for whatever else takes nothing but tensors.

    tensors, text = to_tensors(optimizer.state_dict())
    safetensors.torch.save_file(tensors, "optimizer.safetensors", {"oasis_fx": text})
    ...
    with safe_open("optimizer.safetensors", "pt") as file:
        saved = from_tensors({name: file.get_tensor(name) for name in file.keys()}, file.metadata()["oasis_fx"])
    optimizer.load_state_dict(saved)

Any state dict of torch's optimizers goes this way; `torch.save` needs none of it.
"""

from __future__ import annotations

import json
from typing import Any

import torch

from oasis_fx._old_names import renamed


def to_tensors(state_dict: dict[str, Any]) -> tuple[dict[str, torch.Tensor], str]:
    """Take a state dict apart into tensors by names such as ``state/3/exp_avg``, and JSON with everything else.

    A tensor that several entries share, as weights share a basis, is there once. All are contiguous.

    Raises:
        ValueError: the state dict holds something else than tensors, numbers, texts, None, and collections of them.
    """
    tensors: dict[str, torch.Tensor] = {}
    names: dict[tuple[Any, ...], str] = {}

    def replaced(value: Any, place: str) -> Any:
        if isinstance(value, torch.Tensor):
            key: tuple[Any, ...] = (place,)
            if value.numel():  # addresses are those of one device
                key = value.device, value.data_ptr(), value.shape, value.stride(), value.dtype
            if key not in names:
                names[key] = place
                tensors[place] = value.detach().contiguous()
            return {"tensor": names[key]}
        if isinstance(value, dict):
            return {"dict": [[key, replaced(item, f"{place}/{key}")] for key, item in value.items()]}
        if isinstance(value, list | tuple):
            items = [replaced(item, f"{place}/{index}") for index, item in enumerate(value)]
            return {"tuple" if isinstance(value, tuple) else "list": items}
        if value is None or isinstance(value, str | int | float | bool):
            return {"value": value}
        raise ValueError(f"{place} is {value!r}: a state dict has tensors, numbers, texts and collections of them")

    tree = {key: replaced(value, str(key)) for key, value in state_dict.items()}
    # What views one storage, as what a fused optimizer allocated at once, is no longer one.
    storages: dict[tuple[torch.device, int], int] = {}
    for name, tensor in tensors.items():
        storage = tensor.device, tensor.untyped_storage().data_ptr()
        storages[storage] = storages.get(storage, 0) + 1
        if storages[storage] > 1 or tensor.untyped_storage().nbytes() != tensor.nbytes:
            tensors[name] = tensor.clone()
    return tensors, json.dumps(tree)


def from_tensors(tensors: dict[str, torch.Tensor], text: str) -> dict[str, Any]:
    """Put a state dict together again from what `to_tensors` returned.

    Args:
        tensors: by the names that `to_tensors` gave them.
        text: the JSON of the same call.

    Raises:
        KeyError: ``tensors`` lacks one that the text names.
    """

    def restored(node: Any) -> Any:
        ((kind, content),) = node.items()
        if kind == "tensor":
            return tensors[content]
        if kind == "dict":
            return {key: restored(item) for key, item in content}
        if kind in ("list", "tuple"):
            items = [restored(item) for item in content]
            return tuple(items) if kind == "tuple" else items
        return content

    return {key: restored(node) for key, node in json.loads(text).items()}


__getattr__ = renamed(__name__, {"flatten": "to_tensors", "unflatten": "from_tensors"})
