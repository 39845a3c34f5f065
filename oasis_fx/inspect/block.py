"""Which part of a model to draw, where nobody says."""

from __future__ import annotations

from collections.abc import Sequence


def typical_block(weights: Sequence[str]) -> str | None:
    """Find the module of a numbered list that holds the first weight and at least one more, like ``model.layers.0``.

    None where there is no such module: the model is a block itself.
    """
    for name in weights[:1]:
        steps = name.split(".")
        for end in range(1, len(steps)):
            path = ".".join(steps[:end])
            if steps[end - 1].isdigit() and sum(other.startswith(f"{path}.") for other in weights) > 1:
                return path
    return None
