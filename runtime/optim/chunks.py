"""Take the weights of a step a few at a time, where a step needs working memory for each number that it steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")

# Numbers that are worked on together: 64 MiB in float32. More of them would be asked of the host in fewer calls, and
# would take more memory; a step has a few such buffers at a time.
CHUNK = 1 << 24


def in_chunks(items: Sequence[T], sizes: Sequence[int]) -> Iterator[list[T]]:
    """Yield all items, in order, in lists that have at most `CHUNK` numbers together, or one item.

    Args:
        sizes: of each item: how many numbers it has.
    """
    chunk: list[T] = []
    total = 0
    for item, size in zip(items, sizes, strict=True):
        if chunk and total + size > CHUNK:
            yield chunk
            chunk, total = [], 0
        chunk.append(item)
        total += size
    if chunk:
        yield chunk
