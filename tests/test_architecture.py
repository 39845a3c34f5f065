"""docs/architecture.md is right about every file and name."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "architecture.md").read_text()
STOPS = re.findall(r"^\| .* \| `([\w/]+\.py)` \| `(\w+)` \|$", PAGE, flags=re.MULTILINE)
ROOMS = re.findall(r"^\| (`[^|]*`) \| [^|]* \|$", PAGE[: PAGE.index("## One weight")], flags=re.MULTILINE)


def test_every_file_that_is_named_exists() -> None:
    named = set(re.findall(r"`((?:oasis_fx|passes|runtime|tests)/[\w/.]+)`", PAGE))
    assert len(named) > 30
    assert not [name for name in named if not (ROOT / name).exists()]


def test_every_stop_defines_its_name() -> None:
    for file, name in STOPS:
        defined = [node for node in ast.parse((ROOT / file).read_text()).body if hasattr(node, "name")]
        assert name in [node.name for node in defined], (file, name)


def test_no_stop_is_visited_twice() -> None:
    assert len(STOPS) == 21 and len({file for file, _ in STOPS}) == len(STOPS)


def test_every_room_is_on_the_page() -> None:
    named = set(re.findall(r"`([^`]+)`", " ".join(ROOMS)))
    folders = [folder for top in ("oasis_fx", "runtime") for folder in (ROOT / top).iterdir() if folder.is_dir()]
    rooms = {str(folder.relative_to(ROOT)) for folder in folders if (folder / "__init__.py").exists()}
    assert named >= rooms | {"passes"}
