"""docs/api.md lists every public name, and every name and keyword of ours that README and docs/usage.md use."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import oasis_fx
import oasis_fx.rules

ROOT = Path(__file__).parents[1]
README = "\n".join((ROOT / page).read_text() for page in ("README.md", "docs/usage.md"))
ENTRIES = {
    name: re.findall(r"\w+", members or "")
    for name, members in re.findall(
        r"^::: (\S+)\n(?:    options:\n      (?:inherited_)?members: \[(.*)\]\n)?",
        (ROOT / "docs/api.md").read_text(),
        re.M,
    )
}
FOLDERS = {"oasis_fx.passes", "oasis_fx.runtime"}  # README says how they are imported, not what is in them
TORCHS = {"backend", "mode", "ban_recompute_materialized_backward"}  # keywords of torch.compile, an option of Inductor


def found(name: str) -> Any:
    module, _, attribute = name.rpartition(".")
    return getattr(import_module(module), attribute)


def code() -> Iterator[str]:
    """Code of README: its Python blocks, and spans within lines."""
    yield from re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    yield from re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", README, flags=re.DOTALL))


def parameters() -> set[str]:
    known = set()
    for name, members in ENTRIES.items():
        entry = found(name)
        for callable_ in (entry, *(getattr(entry, member) for member in members)):
            if callable(callable_) and not (isinstance(callable_, type) and issubclass(callable_, Warning)):
                known |= set(inspect.signature(callable_).parameters)
    return known


@pytest.mark.parametrize("name", ENTRIES)
def test_an_entry_exists_and_says_what_it_is(name: str) -> None:
    entry = found(name)
    assert inspect.getdoc(entry)
    for member in ENTRIES[name]:
        assert hasattr(entry, member), member


def test_all_that_the_package_exports_is_listed() -> None:
    assert {f"oasis_fx.{name}" for name in oasis_fx.__all__} - {"oasis_fx.__version__"} <= set(ENTRIES)


def test_names_of_the_readme_are_listed() -> None:
    names = {name.rstrip(".") for name in re.findall(r"\boasis_fx(?:\.\w+)+", README)} - FOLDERS
    assert len(names) > 2
    assert {n for n in names if not any(entry == n or entry.startswith(f"{n}.") for entry in ENTRIES)} == set()
    ours = {**vars(oasis_fx), **vars(oasis_fx.rules)}
    spoken = {word for text in code() for word in re.findall(r"\b[A-Z]\w+", text) if word in ours}
    assert spoken - {entry.rpartition(".")[2] for entry in ENTRIES} == set()


def test_methods_of_the_readme_are_listed() -> None:
    methods = {name for text in code() for name in re.findall(r"\b(?:backend|optimizer)\.(\w+)", text)}
    assert {"report", "step", "resize_rank"} <= methods
    assert methods - {member for members in ENTRIES.values() for member in members} == set()


def test_keywords_of_the_readme_are_parameters_of_what_is_listed() -> None:
    keywords = {name for text in code() for name in re.findall(r"(?<![\w.-])(\w+)=(?!=)", text)}
    assert {"rank", "memory_budget", "state_bits", "every"} <= keywords
    assert keywords - parameters() - TORCHS == set()
