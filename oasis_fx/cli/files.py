"""Check that a command can write its files, before it does its work."""

from __future__ import annotations

import os
from pathlib import Path


def check_writable(option: str, file: str) -> None:
    """Check that a file can be written or made.

    Args:
        option: that names the file, for the message.

    Raises:
        ValueError: the file is a folder, its folder does not exist, or it may not be written.
    """
    path = Path(file)
    if path.is_dir():
        raise ValueError(f"{option} is {file!r}: it is a folder, and must be a file")
    folder = path.parent
    if not folder.is_dir():
        raise ValueError(f"{option} is {file!r}: there is no folder {str(folder)!r}, make it first")
    allowed = os.access(path, os.W_OK) if path.exists() else os.access(folder, os.W_OK | os.X_OK)
    if not allowed:
        raise ValueError(f"{option} is {file!r}: it may not be written")
