"""Find the model that a command is about: ``module:callable``, ``file.py:callable``, or the name of a sample."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from oasis_fx.cli.samples import SAMPLES


def is_callable(target: str) -> bool:
    """Return whether a target names something to call, and not a model of transformers or a folder with one."""
    return ":" in target or target in SAMPLES


class TargetError(Exception):
    """A target that cannot be loaded; the message is one line that names what is wrong."""


def load_target(target: str) -> tuple[torch.nn.Module, Any]:
    """Call what ``target`` names and return the model and its example inputs.

    Args:
        target: ``package.module:callable`` (the current folder is importable), ``path/to/file.py:callable``, or a
            name of `oasis_fx.cli.samples`. The callable takes no argument and returns ``(model, example_inputs)``; the
            inputs are a tensor, a tuple of positional arguments, or a dict of keyword arguments.

    Raises:
        TargetError: the target is not such a thing; the message is one line that says what is wrong.
    """
    return _checked(target, _call(target))


def _call(target: str) -> Any:
    if target in SAMPLES:
        return SAMPLES[target]()
    place, _, name = target.rpartition(":")
    module = _load_file(Path(place)) if place.endswith(".py") else _load_module(place)
    function: Any = module
    for part in name.split("."):
        function = getattr(function, part, None)
        if function is None:
            raise TargetError(f"{place} has no {name!r}")
    if not callable(function):
        raise TargetError(f"{target} is {type(function).__name__}, it must be callable")
    try:
        return function()
    except Exception as error:
        raise TargetError(f"{target} raised {_one_line(error)}") from error


def _load_module(name: str) -> ModuleType:
    _make_importable(Path.cwd())
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise TargetError(f"importing {name!r} raised {_one_line(error)}") from error


def _load_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise TargetError(f"there is no file {path}")
    _make_importable(Path.cwd())
    _make_importable(path.resolve().parent)  # as for a script: its neighbours can be imported
    name = f"oasis_fx_target_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # the suffix is .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look their module up there
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise TargetError(f"importing {path} raised {_one_line(error)}") from error
    return module


def _make_importable(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def _checked(target: str, result: Any) -> tuple[torch.nn.Module, Any]:
    if not isinstance(result, tuple) or len(result) != 2:
        raise TargetError(f"{target} returned {_kind(result)}, it must return (model, example_inputs)")
    model, inputs = result
    if not isinstance(model, torch.nn.Module):
        raise TargetError(f"{target} returned {_kind(model)} for the model, it must be a torch.nn.Module")
    if not isinstance(inputs, torch.Tensor | tuple | list | Mapping):
        raise TargetError(
            f"{target} returned {_kind(inputs)} for the inputs, they must be a tensor, a tuple (positional) "
            "or a dict (keywords)"
        )
    return model, inputs


def _kind(given: Any) -> str:
    size = f" of {len(given)}" if isinstance(given, tuple | list) else ""
    return f"{type(given).__name__}{size}"


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
