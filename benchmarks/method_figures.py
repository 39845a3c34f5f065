"""Draw the figures of docs/method.md and README, as SVG files in docs/figures.

python -m benchmarks.method_figures
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

FIGURES = Path(__file__).parents[1] / "docs" / "figures"
# The figure of README: what this command of ours prints.
GRAPH = ("print", "tiny_llama", "--only", "layers.0.mlp.down_proj", "--format", "svg")

SIZES = {"N": 150, "n": 90, "m": 64, "r": 22, "t": 14, "(r + t)": 36}  # pixels of each dimension
GAP, TITLE, LABEL = 12, 34, 36
STYLE = """
:root { color-scheme: light dark; --page: #fff; --text: #1b1f24; --faint: #59636e; --box: #f6f8fa; --saved: #0969da;
  --added: #d2f4d9; --dropped: #ffd8d3; }
@media (prefers-color-scheme: dark) { :root { --page: #0d1117; --text: #e6edf3; --faint: #9198a1; --box: #161b22;
  --saved: #4493f8; --added: #12361f; --dropped: #4b1d1c; } }
text { font: 14px system-ui, sans-serif; fill: var(--text); text-anchor: middle; }
text.title { font-weight: 600; text-anchor: start; } text.size, text.note { font-size: 12px; fill: var(--faint); }
text.left { text-anchor: start; } rect.page { fill: var(--page); } rect { fill: var(--box); stroke: var(--faint); }
rect.saved { stroke: var(--saved); stroke-width: 3; } rect.low { fill: var(--added); } rect.page { stroke: none; }
rect.freed { fill: none; stroke-dasharray: 4 3; } circle { fill: var(--faint); fill-opacity: .5; }
line { stroke-width: 2.5; stroke: var(--faint); } line.old { stroke-dasharray: 6 4; } line.new { stroke: var(--saved); }
"""


@dataclass(frozen=True)
class Matrix:
    """A matrix of a figure: ``look`` is any of ``saved``, ``low`` and ``freed``, with spaces between."""

    name: str
    rows: str
    columns: str
    look: str = ""

    @property
    def width(self) -> int:
        return SIZES[self.columns]

    @property
    def height(self) -> int:
        return SIZES[self.rows]


Row = Sequence[Matrix | str]  # matrices, and what stands between them


def equations(rows: Sequence[Sequence[tuple[str, Row]]]) -> str:
    """Draw equations of matrices at scale: rows of them, each with its title."""
    parts: list[str] = []
    top, widest = 0, 0
    for row in rows:
        tallest = max(item.height for _, equation in row for item in equation if isinstance(item, Matrix))
        left = GAP
        for title, equation in row:
            parts.append(f'<text class="title" x="{left}" y="{top + 22}">{title}</text>')
            begin = left
            for item in equation:
                middle = top + TITLE + tallest // 2
                if isinstance(item, str):
                    width = 10 + 8 * len(item)
                    parts.append(f'<text x="{left + width // 2}" y="{middle + 5}">{item}</text>')
                    left += width + GAP
                else:
                    parts.append(_matrix(item, left, middle, tallest))
                    left += max(item.width, 8 * len(f"{item.rows} x {item.columns}")) + GAP
            left = max(left, begin + 9 * len(title)) + 2 * GAP
        widest, top = max(widest, left - GAP), top + TITLE + tallest + LABEL
    return _file(widest, top, parts)


def _matrix(matrix: Matrix, left: int, middle: int, tallest: int) -> str:
    room = max(matrix.width, 8 * len(f"{matrix.rows} x {matrix.columns}"))
    x, y = left + (room - matrix.width) // 2, middle - matrix.height // 2
    center = left + room // 2
    name_y = middle + 5 if matrix.width > 8 * len(matrix.name) else y - 5
    return (
        f'<rect class="{matrix.look}" x="{x}" y="{y}" width="{matrix.width}" height="{matrix.height}" rx="2"/>'
        f'<text x="{center}" y="{name_y}">{matrix.name}</text>'
        f'<text class="size" x="{center}" y="{middle + tallest // 2 + 20}">{matrix.rows} x {matrix.columns}</text>'
    )


def _file(width: int, height: int, parts: Sequence[str]) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    begin = f'{head} role="img">\n<style>{STYLE}</style>\n<rect class="page" width="100%" height="100%"/>'
    return "\n".join([begin, *parts, "</svg>"]) + "\n"


X, DY = Matrix("X", "N", "n"), Matrix("dYᵀ", "m", "N")
KEPT_X, FREED_X = Matrix("X", "N", "n", "saved"), Matrix("X", "N", "n", "freed")
Q, P = Matrix("Q", "n", "r", "low"), Matrix("P", "N", "r", "saved low")
C, MOVED = Matrix("C", "n", "r", "low"), Matrix("Q⁺", "n", "r", "low")


def kept() -> str:
    """What the forward pass leaves for the backward pass."""
    return equations([[("stock keeps X", [KEPT_X]), ("oasis_fx keeps P", [FREED_X, "·", Q, "=", P])]])


def gradient() -> str:
    """The product that makes a weight's gradient, and the product in its place."""
    dense, low = Matrix("dW", "m", "n"), Matrix("G", "m", "r", "low")
    return equations([[("stock", [DY, "·", KEPT_X, "=", dense]), ("oasis_fx", [DY, "·", P, "=", low])]])


def moved_basis() -> str:
    """The statistic, and the basis that it moves."""
    turned = Matrix("Xᵀ", "n", "N")
    step: Row = ["orth(", Q, "+ η / s", C, ") =", MOVED]
    return equations([[("in the forward pass", [turned, "·", P, "=", C]), ("after the optimizer step", step)]])


def transport() -> str:
    """Moments in the coordinates of the old basis become those in the coordinates of the new one."""
    turned, small = Matrix("Qᵀ", "r", "n", "low"), Matrix("R", "r", "r", "low")
    old, new = Matrix("M", "m", "r", "low"), Matrix("M⁺", "m", "r", "low")
    return equations([[("from old to new coordinates", [turned, "·", MOVED, "=", small]),
                       ("a mean of gradients", [old, "·", small, "=", new])]])  # fmt: skip


def tail() -> str:
    """A basis with a tail: what is kept, and what has moments."""
    both, kept = Matrix("Q, T", "n", "(r + t)", "low"), Matrix("P", "N", "(r + t)", "saved low")
    factor, states = Matrix("G", "m", "(r + t)", "low"), Matrix("M", "m", "r", "low")
    return equations([[("kept", [FREED_X, "·", both, "=", kept]), ("gradient", [factor]), ("moments", [states])]])


def oja() -> str:
    """One activation of two features, and where steps of the default size take a basis of one column."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(160, 2, generator=generator, dtype=torch.float64) * torch.tensor([2.0, 0.5], dtype=torch.float64)
    turn = torch.tensor(0.6, dtype=torch.float64)
    x = x @ torch.stack([torch.stack([turn.cos(), turn.sin()]), torch.stack([-turn.sin(), turn.cos()])])
    q = torch.tensor([[0.3], [-1.0]], dtype=torch.float64)
    bases = [q / q.norm()]
    for _ in range(3):
        statistic = x.T @ (x @ bases[-1])  # C = Xᵀ P; s is its norm, since r is 1
        q = bases[-1] + statistic / statistic.norm()
        bases.append(q / q.norm())
    first = torch.linalg.svd(x).Vh[0]
    middle, scale = 160, 25

    def at(vector: torch.Tensor, length: float) -> tuple[float, float]:
        return middle + length * float(vector[0]), middle - length * float(vector[1])

    parts = ['<text class="title" x="12" y="22">rows of X, and a basis of one column</text>']
    for row in x:
        left, top = at(row, scale)
        parts.append(f'<circle cx="{left:.1f}" cy="{top:.1f}" r="2.5"/>')
    begin, end = at(first, -140), at(first, 140)
    parts.append(f'<line class="old" x1="{begin[0]:.1f}" y1="{begin[1]:.1f}" x2="{end[0]:.1f}" y2="{end[1]:.1f}"/>')
    for number, basis in enumerate(bases):
        end, label = at(basis[:, 0], 110), at(basis[:, 0], 126)
        parts.append(f'<line class="new" x1="{middle}" y1="{middle}" x2="{end[0]:.1f}" y2="{end[1]:.1f}"/>')
        parts.append(f'<text class="note" x="{label[0]:.1f}" y="{label[1] + 4:.1f}">{number}</text>')
    notes = (
        "0: the basis before a step",
        "1, 2, 3: after as many steps",
        "dashed: the direction in which",
        "X has most energy",
    )
    parts += [f'<text class="note left" x="330" y="{120 + 22 * line}">{note}</text>' for line, note in enumerate(notes)]
    return _file(530, 320, parts)


DRAWN = {"kept": kept, "gradient": gradient, "basis": moved_basis, "oja": oja, "transport": transport, "tail": tail}


def graph() -> str:
    """What our own command draws of one layer before and after the passes."""
    command = [sys.executable, "-P", "-m", "oasis_fx", *GRAPH]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    FIGURES.mkdir(exist_ok=True)
    for name, draw in {**DRAWN, "graph": graph}.items():
        (FIGURES / f"{name}.svg").write_text(draw(), encoding="utf-8")


if __name__ == "__main__":
    main()
