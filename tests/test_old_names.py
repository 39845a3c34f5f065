"""Names of 0.2 work for one release, and say what they are called now."""

from __future__ import annotations

import sys
from importlib import import_module

import pytest

import oasis_fx
from oasis_fx._old_names import _MODULES


@pytest.mark.parametrize("old", sorted(_MODULES))
def test_an_old_module_is_the_new_one(old: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, old, raising=False)
    new = import_module(_MODULES[old])
    spec = new.__spec__
    with pytest.warns(DeprecationWarning, match=f"{old} is called {_MODULES[old]} since 0.3"):
        assert import_module(old) is new
    assert new.__spec__ is spec


def test_a_module_within_an_old_package_is_not_loaded_twice() -> None:
    with pytest.warns(DeprecationWarning, match="is called oasis_fx.runtime.subspaces.rules.base"):
        sys.modules.pop("oasis_fx.runtime.rules.base", None)
        old = import_module("oasis_fx.runtime.rules.base")
    assert old is import_module("oasis_fx.runtime.subspaces.rules.base")


@pytest.mark.parametrize(
    ("module", "old", "new"),
    [
        ("oasis_fx.distributed", "synchronize", "prepare"),
        ("oasis_fx.runtime.subspaces.basis_updates", "advance_subspaces", "update_bases"),
        ("oasis_fx.integrations.checkpoint", "flatten", "to_tensors"),
        ("oasis_fx.integrations.checkpoint", "unflatten", "from_tensors"),
    ],
)
def test_an_old_function_is_the_new_one(module: str, old: str, new: str) -> None:
    place = import_module(module)
    with pytest.warns(DeprecationWarning, match=rf"{module}\.{old} is called {module}\.{new} since 0.3"):
        assert getattr(place, old) is getattr(place, new)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        place.nothing  # noqa: B018


def test_what_is_public_at_the_top_is_what_its_module_has() -> None:
    for name in oasis_fx.__all__:
        assert getattr(oasis_fx, name) is not None
    assert oasis_fx.update_bases is import_module("oasis_fx.runtime.subspaces.basis_updates").update_bases
    assert (
        import_module("oasis_fx.rules").GradientPower is import_module("oasis_fx.runtime.subspaces.rules").GradientPower
    )
