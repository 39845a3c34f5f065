"""Names of 0.2, for one release: each still works, with a DeprecationWarning that has the new one."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# Modules that users import from, or that pickles of optimizers, gradients and rules name.
_MODULES = {
    "oasis_fx.checkpoint": "oasis_fx.integrations.checkpoint",
    "oasis_fx.gradient_sync": "oasis_fx.distributed.gradient_sync",
    "oasis_fx.huggingface": "oasis_fx.integrations.huggingface",
    "oasis_fx.runtime.lion": "oasis_fx.runtime.optim.lion",
    "oasis_fx.runtime.low_rank_grad": "oasis_fx.runtime.gradients.low_rank_grad",
    "oasis_fx.runtime.moving": "oasis_fx.runtime.subspaces.basis_updates",
    "oasis_fx.runtime.muon": "oasis_fx.runtime.optim.muon",
    "oasis_fx.runtime.optimizer": "oasis_fx.runtime.optim.adamw",
    "oasis_fx.runtime.rules": "oasis_fx.runtime.subspaces.rules",
    "oasis_fx.runtime.sgd": "oasis_fx.runtime.optim.sgd",
    "oasis_fx.runtime.subspace": "oasis_fx.runtime.subspaces.subspace",
    "oasis_fx.runtime.subspace_optimizer": "oasis_fx.runtime.optim.base",
    "oasis_fx.stats": "oasis_fx.inspect.stats",
}


def renamed(module: str, names: Mapping[str, str]) -> Callable[[str], Any]:
    """Make the ``__getattr__`` of a module whose functions were renamed; ``names`` has the new name of each old one."""

    def find(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        _warn(f"{module}.{name}", f"{module}.{names[name]}", stacklevel=4)
        return getattr(sys.modules[module], names[name])

    return find


def find_old_modules() -> None:
    """Make modules importable by their old names."""
    sys.meta_path.insert(0, _OldModules())  # first: a package's own folder would be found under its old name as well


class _OldModules(MetaPathFinder, Loader):
    """Finds a module under its old name: the module itself, not a second copy of it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return None if _new_name(fullname) is None else ModuleSpec(fullname, self)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        new = _new_name(spec.name)
        assert new is not None
        _warn(spec.name, new, stacklevel=2)
        module = import_module(new)
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__ = module.__spec__.loader_state  # the import system has put the old name there


def _new_name(name: str) -> str | None:
    for old, new in _MODULES.items():
        if name == old or name.startswith(f"{old}."):
            return new + name[len(old) :]
    return None


def _warn(old: str, new: str, stacklevel: int) -> None:
    warnings.warn(
        f"{old} is called {new} since 0.3: the old name goes with the next release", DeprecationWarning, stacklevel
    )
