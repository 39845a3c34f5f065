"""Who may know whom: every room of the house imports from those before it, and modules stand in no circle."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {"oasis_fx": "oasis_fx", "passes": "oasis_fx.passes", "runtime": "oasis_fx.runtime"}

# From the ground up. Passes come before the runtime in this list, which does not import them either: see below.
ROOMS = (
    "_old_names",
    "errors",
    "ranks",
    "_torch",
    "chunked_loss",
    "graph",
    "memory",
    "passes",
    "runtime.roster",
    "runtime.subspaces",
    "runtime.gradients",
    "runtime.optim",
    "rules",
    "settings",
    "_old_arguments",
    "distributed",
    "compile",
    "backend",
    "inspect",
    "plan",
    "integrations",
    "cli",
    "__main__",
)


def modules() -> dict[str, Path]:
    found = {}
    for folder, package in FOLDERS.items():
        for file in (ROOT / folder).rglob("*.py"):
            parts = file.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join((package, *(part for part in parts if part != "__init__")))] = file
    return found


MODULES = modules()


def room_of(module: str) -> str:
    inner = module.removeprefix("oasis_fx").lstrip(".")
    return ".".join(inner.split(".")[: 2 if inner.startswith("runtime.") else 1])


def imported(node: ast.AST) -> Iterator[str]:
    """Modules of ours that are imported when a module is: not for annotations alone, and not within functions."""
    if isinstance(node, ast.FunctionDef) or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)):
        return
    if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("oasis_fx"):
        names = (f"{node.module}.{name.name}" for name in node.names)
        yield from (name if name in MODULES else str(node.module) for name in names)
    elif isinstance(node, ast.Import):
        yield from (name.name for name in node.names if name.name.startswith("oasis_fx."))
    for inner in ast.iter_child_nodes(node):
        yield from imported(inner)


GRAPH = {name: set(imported(ast.parse(file.read_text()))) - {name} for name, file in MODULES.items()}


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_knows_those_before_it(room: str) -> None:
    allowed = {*ROOMS[: ROOMS.index(room) + 1], "", "runtime"}
    if room.startswith("runtime."):
        allowed -= {"passes", "memory"}
    for module, others in GRAPH.items():
        if room_of(module) == room:
            assert {room_of(other) for other in others} <= allowed, module


def test_every_module_has_its_place_in_the_list() -> None:
    assert {room_of(module) for module in MODULES} == {*ROOMS, "", "runtime"}


def test_no_module_imports_itself_in_a_circle() -> None:
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path[path.index(module) :], module))
        if module not in done:
            for other in sorted(GRAPH[module]):
                visit(other, (*path, module))
            done.add(module)

    sys.setrecursionlimit(10_000)
    for module in GRAPH:
        visit(module, ())


@pytest.mark.parametrize(("folder", "other"), [("passes", "oasis_fx.runtime"), ("runtime", "oasis_fx.passes")])
def test_passes_and_runtime_do_not_know_each_other(folder: str, other: str) -> None:
    """Not within functions or annotations either: what both know is in `oasis_fx.graph`."""
    for file in (ROOT / folder).rglob("*.py"):
        lines = [line.lstrip() for line in file.read_text().splitlines()]
        assert not any(line.startswith((f"from {other}", f"import {other}")) for line in lines), file


def test_private_names_of_torch_are_in_one_room() -> None:
    private = ("_dynamo", "_functorch", "_inductor", "_guards", "_subclasses", "_higher_order_ops")
    attributes = ("._version)", "_tensors_no_vc_check", "_ddp_params_and_buffers_to_ignore", 'meta["desc"]')
    for module, file in MODULES.items():
        if room_of(module) != "_torch":
            text = file.read_text()
            imports = [line.lstrip() for line in text.splitlines() if line.lstrip().startswith(("import ", "from "))]
            assert not any(f"torch.{name}" in line for line in imports for name in private), module
            assert not any(name in text for name in attributes), module
